"""The tiny teacher: its training task learns, and the shipped weights do what their record says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import train_tiny_teacher
from demo_eval import EvalScene, evaluate_promptable, generate_test_scenes
from teacher_data import PoolSpec, ScenePool, augment, build_pool, choose_objects
from teacher_task import PromptableTask, init_for_training

import sam3
from sam3.checkpoint_io import read_state_dict, sha256_file
from sam3.config import Sam3Config
from sam3.model_builder import build_sam3_image_model

WEIGHTS = train_tiny_teacher.WEIGHTS
TINY = Sam3Config.preset("tiny")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "pool_train"
    return build_pool(folder, PoolSpec.for_model(TINY, "train", 4, seed=0), num_workers=1)


@pytest.fixture(scope="module")
def batch(pool: Path) -> dict[str, torch.Tensor]:
    items = ScenePool(pool)
    return torch.utils.data.default_collate([items[i] for i in range(3)])


def tiny_task(**settings: int) -> PromptableTask:
    torch.manual_seed(0)
    model = build_sam3_image_model(
        load_from_HF=False,
        device="cpu",
        eval_mode=False,
        enable_inst_interactivity=True,
        enable_detector=False,
        config=TINY,
    )
    init_for_training(model, 0)
    return PromptableTask(model, prompts_per_image=2, **settings).train()


def test_a_pool_is_reused_until_its_description_changes(pool: Path):
    stamp = (pool / "images.npy").stat().st_mtime_ns
    build_pool(pool, PoolSpec.for_model(TINY, "train", 4, seed=0), num_workers=1)
    assert (pool / "images.npy").stat().st_mtime_ns == stamp


def test_augmentation_moves_boxes_and_masks_with_the_image(batch: dict[str, torch.Tensor]):
    chosen = choose_objects(batch, 2, shuffle=False)
    torch.manual_seed(3)
    for _ in range(8):
        view = augment(chosen)
        cell = TINY.image_size_px / TINY.low_res_mask_size
        for coverage, box in zip(view["coverage"].flatten(0, 1), view["boxes"].flatten(0, 1), strict=True):
            rows, columns = (coverage > 127).nonzero(as_tuple=True)
            found = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) * cell
            assert (found - box).abs().max() < 2.5 * cell
        assert view["image"].dtype == torch.uint8
        assert not torch.equal(view["image"], chosen["image"])


def test_two_steps_train_everything_but_necks_that_the_loss_does_not_read(batch: dict[str, torch.Tensor]):
    task = tiny_task(num_corrections=1)
    before = {name: value.clone() for name, value in task.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], 1e-3)
    for _ in range(2):
        terms = task(batch)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        assert all(torch.isfinite(value) for name, value in terms.items() if name not in ("iou", "iou_corrected"))
    still = {name for name, value in task.named_parameters() if torch.equal(value, before[name])}
    assert still == {name for name, value in task.named_parameters() if not value.requires_grad}
    assert {name.split(".")[3] for name in still} == {"convs", "sam2_convs"}
    assert int(task.steps_done) == 2


def test_validation_is_repeatable_and_leaves_the_random_stream_alone(batch: dict[str, torch.Tensor]):
    task = tiny_task().eval()
    state = torch.get_rng_state()
    with torch.no_grad():
        first, again = task.validate(batch), task.validate(batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first["loss"], again["loss"])
    assert first["iou_box"].shape == (3,)


def test_corrections_start_after_the_balanced_steps():
    task = tiny_task(num_corrections=1, balanced_steps=5, more_corrections_from=9)
    assert [task._num_corrections(step) for step in (0, 4, 5, 8, 9)] == [0, 0, 1, 1, 2]
    assert task.eval()._num_corrections(0) == 1


def test_evaluation_gives_a_perfect_model_full_marks():
    class Perfect:
        """Answers with the mask that the prompt was drawn from."""

        def __init__(self, masks: np.ndarray) -> None:
            self.masks = masks.astype(np.float32)
            self.inst_interactive_predictor = self

        def set_image(self, image: np.ndarray) -> None:
            assert image.dtype == np.uint8

        def predict(self, point_coords=None, point_labels=None, box=None, mask_input=None, multimask_output=True):
            count = 3 if multimask_output else 1
            masks = self.masks[:, None].repeat(count, axis=1)
            assert box is None or box.shape == (len(masks), 4)
            return masks, np.ones((len(masks), count)), np.zeros((len(masks), count, 8, 8), np.float32)

    scene = next(scene for scene in generate_test_scenes(8) if len(scene.masks) > 1)
    scores = evaluate_promptable(Perfect(scene.masks), [scene])
    assert scores == {"box": 1.0, "one_click": 1.0, "three_clicks": 1.0, "num_objects": len(scene.masks)}
    half = EvalScene(scene.image, scene.masks[:, :, : scene.masks.shape[2]], scene.categories)
    wrong = evaluate_promptable(Perfect(~scene.masks), [half])
    assert wrong["box"] == 0.0
    with pytest.raises(ValueError, match="no object"):
        evaluate_promptable(Perfect(scene.masks), [])


def test_the_command_line_trains_exports_and_records(tmp_path: Path, pool: Path):
    output, weights = tmp_path / "run", tmp_path / "tiny.safetensors"
    settings = ["DATA.TRAIN_SCENES", "4", "DATA.VAL_SCENES", "2", "PROMPTS.PER_IMAGE", "2", "TRAIN.EPOCHS", "2"]
    arguments = ["--device", "cpu", "--batch-size", "2", "--output", str(output), "--weights", str(weights)]
    assert train_tiny_teacher.main([*arguments, "--max-steps", "2", "--test-scenes", "1", "--opts", *settings]) == 0
    record = json.loads(weights.with_suffix(".json").read_text())
    assert record["steps"] == 2
    assert record["training_seconds"] >= 0
    assert "train_tiny_teacher.py" in record["command"]
    assert record["weights_sha256"] == sha256_file(weights)
    assert set(record["miou"]) == {"box", "one_click", "three_clicks", "num_objects"}
    assert sam3.load_model(weights, device="cpu").config == TINY


def test_without_a_run_there_is_nothing_to_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert train_tiny_teacher.main(["--device", "cpu", "--output", str(tmp_path / "none"), "--export-only"]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_shipped_weights_are_small_and_in_the_released_layout():
    state_dict, metadata = read_state_dict(WEIGHTS)
    assert WEIGHTS.stat().st_size < 8_000_000
    exact = {name for name, value in state_dict.items() if value.dtype != torch.float16}
    assert exact == {"tracker.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"}
    assert all(key.startswith(("detector.", "tracker.")) for key in state_dict)
    assert Sam3Config.from_dict(metadata["model"]) == TINY


def test_shipped_weights_reach_their_recorded_quality():
    record = json.loads(train_tiny_teacher.RECORD.read_text())
    assert record["weights_sha256"] == sha256_file(WEIGHTS)
    model = sam3.load_model(WEIGHTS, device="cpu")
    scores = evaluate_promptable(model, generate_test_scenes(train_tiny_teacher.FIRST_SCENES))
    for kind in ("box", "one_click", "three_clicks"):
        assert scores[kind] == pytest.approx(record["miou_first_scenes"][kind], abs=0.01), kind
    assert record["miou"]["box"] >= 0.80
