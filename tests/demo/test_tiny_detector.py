"""The detector side of the tiny teacher: its prompts, its task, its recipe, and how it is scored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import train_tiny_detector
from demo_eval import generate_test_scenes
from detector_eval import (
    absent_phrases,
    average_precision,
    evaluate_detector,
    normalised_box,
    scene_phrases,
    union_iou,
)
from detector_queries import BOX_SLOTS, SHARES, VISUAL, draw_queries, normalised_boxes
from teacher_data import COLOUR_NAMES, KINDS, PoolSpec, ScenePool, build_pool, flip
from teacher_detector import DetectorTask, init_for_training, without_masks
from train_tiny_teacher import FIRST_SCENES, RECORD, WEIGHTS

import sam3
from sam3.checkpoint_io import sha256_file
from sam3.config import Sam3Config
from sam3_train.task import frozen_prefixes

TINY = Sam3Config.preset("tiny")


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("pool")
    pool = ScenePool(build_pool(folder, PoolSpec.for_model(TINY, "train", 6, 0, "alike"), num_workers=1))
    return torch.utils.data.default_collate([pool[i] for i in range(6)])


@pytest.fixture(scope="module")
def model():
    return train_tiny_detector.build_model(WEIGHTS, seed=0)


def test_scenes_of_the_pool_show_several_alike(batch: dict[str, torch.Tensor]):
    repeated = 0
    for count, categories in zip(batch["count"].tolist(), batch["categories"], strict=True):
        repeated += len(categories[:count]) - len(categories[:count].unique(dim=0))
    assert repeated > 0


@pytest.mark.parametrize("kind", SHARES)
def test_a_prompt_means_what_it_says(batch: dict[str, torch.Tensor], kind: str):
    torch.manual_seed(1)
    queries = draw_queries(batch, 5, {kind: 1.0})
    assert len(queries.texts) == 30
    for i, text in enumerate(queries.texts):
        scene = i // 5
        count = int(batch["count"][scene])
        names = [(KINDS[k], COLOUR_NAMES[c]) for k, c in batch["categories"][scene][:count].tolist()]
        members = queries.members[i]
        assert not members[count:].any()
        meant = [names[j] for j in members.nonzero()[:, 0].tolist()]
        labels = queries.box_labels[i].tolist()
        if kind == "absent":
            assert not meant
            assert tuple(reversed(text.split())) not in names
        elif kind == "category":
            assert {f"{colour} {shape}" for shape, colour in meant} == {text}
            assert len(meant) == sum(f"{colour} {shape}" == text for shape, colour in names)
        elif kind == "kind":
            assert {shape for shape, _ in meant} == {text}
        elif kind == "colour":
            assert {f"{colour} shape" for _, colour in meant} == {text}
        elif kind == "exemplar":
            assert text == VISUAL
            assert len(set(meant)) == 1
            assert 1 in labels or int(queries.point_labels[i]) == 1
        else:
            assert labels == [0, *[-1] * (BOX_SLOTS - 1)]
            assert all(shape == text for shape, _ in meant)
        if kind in ("category", "kind", "colour", "exemplar"):
            assert meant


def test_prompts_replay_from_the_seed_and_their_boxes_lie_in_the_image(batch: dict[str, torch.Tensor]):
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(draw_queries(batch, 8))
    assert drawn[0].texts == drawn[1].texts
    assert torch.equal(drawn[0].boxes, drawn[1].boxes)
    assert drawn[0].boxes.min() >= 0
    assert drawn[0].boxes.max() <= 1
    prompt = drawn[0].to_prompt()
    assert prompt.box_embeddings.shape == (BOX_SLOTS, 48, 4)
    assert torch.equal(prompt.box_mask, drawn[0].box_labels < 0)


def test_flips_keep_boxes_on_their_objects(batch: dict[str, torch.Tensor]):
    for seed in range(8):
        torch.manual_seed(seed)
        turned = flip(batch)
        boxes = normalised_boxes(turned["boxes"], TINY.image_size_px)
        for scene, count in enumerate(turned["count"].tolist()):
            for coverage, box in zip(turned["coverage"][scene][:count], boxes[scene], strict=False):
                found = torch.tensor(normalised_box((coverage > 0).numpy()))
                assert torch.allclose(found, box, atol=2 / TINY.low_res_mask_size)


def test_a_step_trains_the_detector_and_nothing_else(model, batch: dict[str, torch.Tensor]):
    init_for_training(model, 0)
    task = DetectorTask(model, prompts_per_image=1, hint_steps=1).train()
    frozen = frozen_prefixes(task)
    torch.manual_seed(0)
    hints = task(batch)
    assert "score" not in hints
    terms = task(batch)
    assert {"kind", "colour", "score", "box", "giou", "presence", "mask_focal", "mask_dice", "marked"} < set(terms)
    terms["loss"].backward()
    trained = {name for name, parameter in task.named_parameters() if parameter.grad is not None}
    assert not [name for name in trained if name.startswith(frozen)]
    assert {
        "model.transformer.decoder.query_embed.weight",
        "model.segmentation_head.instance_seg_head.weight",
        "model.dot_prod_scoring.hs_proj.weight",
        "model.backbone.language_backbone.resizer.weight",
        "model.backbone.vision_backbone.convs.0.conv_1x1.weight",
    } <= trained
    assert any(name.startswith("model.backbone.vision_backbone.trunk.") for name, _ in task.named_parameters())
    assert not any(".trunk." in name or ".sam2_convs." in name for name in task.saved_state())


def test_queries_start_by_looking_into_their_boxes(model):
    init_for_training(model, 0)
    decoder = model.transformer.decoder
    boxes = torch.tensor([0.5, 0.25, 0.3, 0.2]).expand(1, 24, 4)
    bias = decoder.box_bias(boxes, (20, 20))[0, :, 1].unflatten(-1, (20, 20))
    assert bias[:, 5, 10].abs().max() < 0.5, "inside"
    assert bias[:, 5, 19].max() < -1 and bias[:, 15, 10].max() < -1, "beside and below"
    assert (bias[:, 19, 10] < bias[:, 12, 10]).all()
    assert (bias[1:, 15, 10] < bias[:-1, 15, 10]).all(), "each head at its own rate"


def test_boxes_alone_need_no_mask_head(model):
    head = model.segmentation_head
    with pytest.raises(RuntimeError, match="stop"), without_masks(model):
        assert model.segmentation_head is None
        raise RuntimeError("stop")
    assert model.segmentation_head is head


def test_validation_repeats_its_prompts(model, batch: dict[str, torch.Tensor]):
    task = DetectorTask(model, prompts_per_image=2).eval()
    with torch.no_grad():
        first, second = task.validate(batch), task.validate(batch)
    assert set(first) >= {"iou_category", "iou_exemplar", "iou_absent", "right_colour_cells", "loss"}
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_command_line_trains_the_detector_and_keeps_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    weights = tmp_path / "tiny.safetensors"
    pretrained = tmp_path / "named.safetensors"
    shutil.copyfile(WEIGHTS, pretrained)
    pretrained.with_suffix(".json").write_text(json.dumps({"miou": {"box": 0.5}}))
    arguments = ["--device", "cpu", "--batch-size", "2", "--output", str(tmp_path / "run"), "--weights", str(weights)]
    arguments += ["--pretrained", str(pretrained)]
    settings = [
        "DATA.LINEUPS",
        "2",
        "DATA.SCENES",
        "2",
        "DATA.VAL_SCENES",
        "2",
        "DATA.NUM_WORKERS",
        "1",
        "TRAIN.EPOCHS",
        "1",
    ]
    settings += ["PROMPTS.PER_IMAGE", "1", "PROMPTS.HINT_EPOCHS", "0.5"]
    assert train_tiny_detector.main([*arguments, "--test-scenes", "1", "--opts", *settings]) == 0
    record = json.loads(weights.with_suffix(".json").read_text())
    assert record["miou"] == {"box": 0.5}
    assert record["detector"]["steps"] == 2
    assert "train_tiny_detector.py" in record["detector"]["command"]
    assert {"mask_ap", "box_ap50", "phrase_miou", "absent_rejected"} < set(record["detector"]["scores"])
    assert set(record["detector"]["scores_by_form"]) == {"colour", "kind"}
    assert record["weights_sha256"] == sha256_file(weights)
    before, after = (sam3.load_model(path, device="cpu").state_dict() for path in (WEIGHTS, weights))
    kept = [name for name in before if name.startswith(train_tiny_detector.PROMPTABLE_PARTS)]
    assert len(kept) > 100
    assert all(torch.equal(before[name], after[name]) for name in kept)


def test_the_shipped_detector_reaches_its_recorded_quality():
    recorded = json.loads(RECORD.read_text())["detector"]
    found = evaluate_detector(sam3.load_model(WEIGHTS, device="cpu"), generate_test_scenes(FIRST_SCENES), False)
    for name, value in found.items():
        assert value == pytest.approx(recorded["scores_first_scenes"][name], abs=0.05), name
    floors = {"mask_ap50": 0.7, "box_ap50": 0.7, "phrase_miou": 0.65, "exemplar_miou": 0.4, "absent_rejected": 0.65}
    for name, floor in floors.items():
        assert recorded["scores"][name] > floor, name
    assert recorded["scores_by_form"]["colour"]["mask_ap50"] > 0.8


def test_perfect_answers_score_one_and_no_answers_zero():
    meant = np.zeros((2, 20, 30), dtype=bool)
    meant[0, 2:8, 3:9] = meant[1, 10:18, 12:25] = True
    perfect = {"masks": meant, "boxes": np.array([[3, 2, 9, 8], [12, 10, 25, 18]]), "scores": np.array([0.9, 0.8])}
    nothing = {"masks": meant[:0], "boxes": np.zeros((0, 4)), "scores": np.zeros(0)}
    assert average_precision([(perfect, meant), (nothing, meant[:0])]) == pytest.approx(
        dict.fromkeys(("mask_ap", "mask_ap50", "box_ap", "box_ap50"), 1.0)
    )
    assert set(average_precision([(nothing, meant)]).values()) == {0.0}
    # The same objects for a phrase that nothing answers, with higher scores, halve the precision.
    loud = {**perfect, "scores": perfect["scores"] + 1}
    assert average_precision([(perfect, meant), (loud, meant[:0])])["mask_ap"] == pytest.approx(0.5, abs=0.01)
    assert union_iou(perfect, meant) == union_iou(nothing, np.zeros((1, 20, 30), bool)) == 1.0
    assert union_iou(nothing, meant) == 0.0


def test_phrases_of_a_scene():
    categories = ("red circle", "blue star", "red circle")
    assert {name: members.tolist() for name, members in scene_phrases(categories).items()} == {
        "blue star": [False, True, False],
        "red circle": [True, False, True],
    }
    phrases = absent_phrases(categories, 20, seed=0)
    assert not set(phrases) & set(categories)
    assert all(set(phrase.split()) & {"red", "blue", "circle", "star"} for phrase in phrases)
    assert phrases == absent_phrases(categories, 20, seed=0)
