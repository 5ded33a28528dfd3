"""The tiny tracker: its clips, its training, its evaluation, and what the shipped weights do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_tiny_tracker
from clip_pool import ClipPool, ClipPoolSpec, build_pool, choose_clips, draw_clip
from demo_clips import write_clip
from torch import Tensor
from tracker_eval import (
    PROMPT_KINDS,
    EvalClip,
    evaluate_tracking,
    generate_test_clips,
    read_clips,
    score_objects,
    stand_still,
    track_clip,
)
from tracker_init import init_for_tracking
from tracker_task import TrackingTask

import sam3
from sam3.checkpoint_io import sha256_file
from sam3.model.clip_forward import ClipPlan, forward_clip
from sam3.model.sam3_image import Sam3Image
from sam3_train.clip_judging import absent_loss, judged_answers, tracked_ious
from sam3_train.tracking_losses import TrackingAnswer

WEIGHTS = train_tiny_tracker.WEIGHTS


@pytest.fixture(scope="module")
def model() -> Sam3Image:
    return train_tiny_tracker.build_model(WEIGHTS, seed=0)


@pytest.fixture(scope="module")
def pool(model: Sam3Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tracker") / "pool_train"
    return build_pool(folder, ClipPoolSpec.for_model(model, "train", 4, 5, seed=0), model, num_workers=0)


@pytest.fixture(scope="module")
def batch(pool: Path) -> dict[str, Tensor]:
    items = ClipPool(pool)
    return torch.utils.data.default_collate([items[i] for i in range(len(items))])


def test_a_pool_holds_the_features_of_its_clips_and_is_reused(model: Sam3Image, pool: Path, batch: dict[str, Tensor]):
    spec = ClipPoolSpec.for_model(model, "train", 4, 5, seed=0)
    images, coverage = draw_clip((spec, 1_000_001))
    pixels = model.preprocess.normalize(torch.from_numpy(images[2]))[None]
    with torch.no_grad():
        features = model.tracker_features(pixels)
    for name, values in features._asdict().items():
        torch.testing.assert_close(batch[name][1, 2].float(), values[0], atol=0.05, rtol=0.01)
    assert torch.equal(batch["coverage"][1, :, : coverage.shape[1]], torch.from_numpy(coverage))
    stamp = (pool / "fine.npy").stat().st_mtime_ns
    build_pool(pool, spec, model, num_workers=0)
    assert (pool / "fine.npy").stat().st_mtime_ns == stamp
    on_disk = sum(path.stat().st_size for path in pool.glob("*.npy"))
    assert spec.num_bytes(model.config) == pytest.approx(on_disk, rel=0.01)


def test_cuts_start_with_objects_and_keep_clips_apart(batch: dict[str, Tensor]):
    torch.manual_seed(0)
    for _ in range(6):
        clips = choose_clips(batch, 3, 2, shuffle=True)
        assert (clips.coverage_tbhw[0] > 0.5).flatten(1).any(dim=1).all()
        assert torch.bincount(clips.clip_of_object).max() <= 2
        for t in range(3):
            stored = batch["coarse"][clips.clip_of_object].float()
            same = (stored == clips.features[t].coarse[:, None]).flatten(2).all(dim=2)
            assert (same.sum(dim=1) == 1).all(), "every object sees a frame of its own clip"
    with pytest.raises(ValueError, match="clips of 9 frames can't be cut from stored ones of 5"):
        choose_clips(batch, 9, 2, shuffle=False)


def test_cuts_prefer_objects_that_vanish():
    shape = {"fine": (8, 4, 4), "middle": (8, 2, 2), "coarse": (8, 1, 1)}
    coverage = torch.full((1, 6, 3, 4, 4), 255, dtype=torch.uint8)
    coverage[0, 4:, 1] = 0
    batch = {name: torch.zeros(1, 6, *size) for name, size in shape.items()}
    batch |= {"coverage": coverage, "count": torch.tensor([3])}
    torch.manual_seed(0)
    draws = [choose_clips(batch, 3, 1, shuffle=True).coverage_tbhw[:, 0].amax(dim=(1, 2)) for _ in range(60)]
    vanishing = sum(bool((shown == 0).any()) for shown in draws)
    assert all(shown[0] == 1 for shown in draws)
    # Of all cuts, three of six show it; of those drawn without preference, half of the rest.
    assert 36 <= vanishing <= 58


def test_the_score_of_absent_objects_is_judged_apart():
    def answer(scores: list[float], present: list[bool]) -> TrackingAnswer:
        count = len(scores)
        zeros = torch.zeros(count, 1, 4, 4)
        return TrackingAnswer(
            zeros, torch.zeros(count, 1), torch.tensor(scores)[:, None], zeros[:, 0], torch.tensor(present)
        )

    found = absent_loss([answer([9.0, 2.0], [True, False]), answer([-2.0], [False])])
    expected = torch.nn.functional.softplus(torch.tensor([2.0, -2.0])).mean()
    torch.testing.assert_close(found, expected)
    assert absent_loss([answer([9.0], [True])]) == 0


def test_the_start_already_remembers_where_objects_were(model: Sam3Image, batch: dict[str, Tensor]):
    tracker = train_tiny_tracker.build_model(WEIGHTS, seed=0).tracker.eval()
    clips = choose_clips(batch, 2, 3, shuffle=False)
    init_for_tracking(tracker, clips.features[0].coarse, clips.coverage_tbhw[0], seed=0)
    with torch.no_grad():
        result = forward_clip(tracker, clips.features, clips.coverage_tbhw, ClipPlan("mask", (0,)))
    remembered = result.bank.cond[0].maskmem_features[:, 0].float()
    cells = torch.nn.functional.adaptive_avg_pool2d(clips.coverage_tbhw[0], remembered.shape[-1])
    assert torch.corrcoef(torch.stack([remembered.flatten(), cells.flatten()]))[0, 1] > 0.9


def test_two_steps_train_memory_and_heads(batch: dict[str, Tensor]):
    tracker = train_tiny_tracker.build_model(WEIGHTS, seed=0).tracker
    task = TrackingTask(tracker, lengths=(3, 4), steps_per_length=1, hint_steps=1).train()
    before = {name: value.clone() for name, value in task.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], 1e-3)
    torch.manual_seed(0)
    for _ in range(2):
        terms = task(batch)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        assert all(torch.isfinite(value) for value in terms.values())
    assert int(task.steps_done) == 2
    still = {name for name, value in task.named_parameters() if torch.equal(value, before[name])}
    fixed = {name for name, value in task.named_parameters() if not value.requires_grad}
    assert fixed <= still and {name.split(".")[2] for name in fixed - {"tracker.no_mem_pos_enc"}} == {
        "conv_s0",
        "conv_s1",
    }
    moved = {name.split(".")[1] for name in set(before) - still}
    assert {"transformer", "maskmem_backbone", "sam_mask_decoder", "obj_ptr_proj"} <= moved
    assert task.lr_scale("tracker.sam_mask_decoder.iou_token.weight") == 0.3
    assert task.lr_scale("tracker.maskmem_tpos_enc") == 1.0
    large = {name for name, _ in task.named_parameters() if task.lr_scale(name) > 1.0}
    assert len(large) == 2 * (2 + 1) + 2, "two attentions and an MLP in each layer, and the last norm"


def test_a_step_reads_as_many_frames_as_were_drawn(batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch):
    tracker = train_tiny_tracker.build_model(WEIGHTS, seed=0).tracker
    read: list[int] = []
    condition = tracker.condition_on_memory

    def noted(features: Any, memories: list[Any], *args: Any, **kwargs: Any) -> Tensor:
        read.append(len(memories))
        return condition(features, memories, *args, **kwargs)

    monkeypatch.setattr(tracker, "condition_on_memory", noted)
    most = {}
    for drawn in ((1,), (3,), ()):
        read.clear()
        torch.manual_seed(0)
        TrackingTask(tracker, lengths=(5,), memory_frames=drawn).train()(batch)
        most[drawn] = max(read)
    assert most[(1,)] < most[(3,)] <= 3 + 2 and most[(3,)] <= most[()]
    assert tracker.settings.memory_frames is None, "tracking reads all of them again"


def test_validation_is_repeatable_and_leaves_the_random_stream_alone(model: Sam3Image, batch: dict[str, Tensor]):
    task = TrackingTask(model.tracker).eval()
    state = torch.get_rng_state()
    with torch.no_grad():
        first, again = task.validate(batch), task.validate(batch)
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("iou_mask", "iou_box", "iou_click", "iou_tracked"):
        assert torch.equal(first[name].nan_to_num(), again[name].nan_to_num())


def test_tracked_frames_alone_are_scored(model: Sam3Image, batch: dict[str, Tensor]):
    clips = choose_clips(batch, 3, 1, shuffle=False)
    with torch.no_grad():
        result = forward_clip(model.tracker.eval(), clips.features, clips.coverage_tbhw, ClipPlan("box", (0,)))
    answers = judged_answers(result, clips.coverage_tbhw)
    assert len(answers) == 3 and answers[0].present.all()
    iou, is_tracked = tracked_ious(result, clips.coverage_tbhw)
    assert is_tracked.all(dim=1).tolist() == [False, True, True]
    assert ((iou >= 0) & (iou <= 1)).all()


def test_evaluation_scores_perfect_and_standing_masks(tmp_path: Path):
    clip = generate_test_clips(1, num_frames=16)[0]
    assert len(clip.frames) == 8
    prompted, found = stand_still(clip)
    assert prompted and all(score.region < 1 for score in score_objects(clip, prompted, found))
    assert all(score.j_and_f == 1 for score in score_objects(clip, prompted, clip.masks))
    write_clip(tmp_path, 0, "test", 0, 16, 92)
    stored = read_clips(tmp_path)[0]
    assert stored.categories == clip.categories
    assert np.flatnonzero(stored.annotated).tolist() == [0, 2, 4, 6]
    assert np.array_equal(stored.masks[stored.annotated], clip.masks[stored.annotated])
    assert not stored.masks[~stored.annotated].any()


def test_a_clip_is_tracked_from_the_frame_that_shows_an_object(model: Sam3Image):
    clip = generate_test_clips(1, num_frames=20)[0]
    masks = clip.masks.copy()
    masks[:2, 0] = False
    late = EvalClip(clip.name, clip.frames, masks, clip.annotated, clip.categories)
    prompted, found = track_clip(model, late, "mask")
    assert prompted[0] == 2 and found.shape == masks.shape
    assert not found[:2, 0].any()
    with pytest.raises(ValueError, match="'scribble' is not one of"):
        track_clip(model, late, "scribble")


@pytest.fixture(scope="module")
def run_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    settings = ["DATA.TRAIN_CLIPS", "4", "DATA.VAL_CLIPS", "1", "DATA.KEPT_FRAMES", "3", "DATA.NUM_WORKERS", "0"]
    settings += ["TRAIN.EPOCHS", "1", "CLIPS.LENGTHS", "[2, 3]"]
    output = tmp_path_factory.mktemp("tracker_run")
    return ["--device", "cpu", "--batch-size", "2", "--output", str(output), "--test-clips", "1", "--opts", *settings]


def test_the_command_line_trains_exports_and_records(
    tmp_path: Path, run_arguments: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tracker_eval.generate_test_clips.__defaults__", (16, 0))
    weights = tmp_path / "tiny.safetensors"
    assert train_tiny_tracker.main(["--weights", str(weights), "--test-scenes", "1", *run_arguments]) == 0
    record = json.loads(weights.with_suffix(".json").read_text())
    assert record["tracker"]["steps"] == 2 and "train_tiny_tracker.py" in record["tracker"]["command"]
    assert set(record["tracker"]["scores"]) == {"mask", "box", "click", "stand_still"}
    assert record["weights_sha256"] == sha256_file(weights)
    made, shipped = sam3.load_model(weights, device="cpu"), sam3.load_model(WEIGHTS, device="cpu")
    assert made.has_tracker and made.has_detector == shipped.has_detector
    for name, value in shipped.state_dict().items():
        if not name.startswith("inst_interactive_predictor."):
            assert torch.equal(value, made.state_dict()[name]), name
    before, after = (model.heads.sam_mask_decoder.iou_token.weight for model in (shipped, made))
    assert not torch.equal(before, after)


def test_heads_that_were_hurt_are_not_written(
    tmp_path: Path,
    run_arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr("demo_eval.evaluate_promptable", lambda *args: {"box": 0.5})
    weights = tmp_path / "tiny.safetensors"
    arguments = ["--weights", str(weights), "--test-scenes", "6", *run_arguments]
    assert train_tiny_tracker.main(arguments) == 2
    assert "boxes score 0.500 on held-out scenes, less than 0.8" in capsys.readouterr().err
    assert not weights.exists()


def test_without_a_run_there_is_nothing_to_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert train_tiny_tracker.main(["--device", "cpu", "--output", str(tmp_path / "none"), "--export-only"]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_shipped_tracker_reaches_its_recorded_quality():
    record = json.loads(train_tiny_tracker.WEIGHTS.with_suffix(".json").read_text())["tracker"]
    assert WEIGHTS.stat().st_size < 8_000_000
    shipped = sam3.load_model(WEIGHTS, device="cpu")
    clips = generate_test_clips(train_tiny_tracker.FIRST_CLIPS)
    found = evaluate_tracking(shipped, clips, ("mask",))["mask"]["j_and_f"]
    assert found == pytest.approx(record["scores_first_clips"]["mask"]["j_and_f"], abs=0.03)
    still = record["scores"]["stand_still"]["j_and_f"]
    assert all(record["scores"][kind]["j_and_f"] > still + 0.2 for kind in PROMPT_KINDS)
