"""The step in which the tiny teacher's trunk learns names: its scenes, its losses and its recipe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import train_tiny_names
from demo_scenes import SIZES_HW
from teacher_data import COLOUR_NAMES, KINDS, PoolSpec, ScenePool, build_pool
from teacher_lineups import PARADE_HW, make_lineup, make_parade
from teacher_names import NUM_RAYS, NamesTask, inner_cells, outline_of_cells
from train_tiny_teacher import RECORD, WEIGHTS

import sam3
from sam3.config import Sam3Config

TINY = Sam3Config.preset("tiny")


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("pool")
    pool = ScenePool(build_pool(folder, PoolSpec.for_model(TINY, "train", 2, 0, "lineup"), num_workers=1))
    return torch.utils.data.default_collate([pool[i] for i in range(2)])


@pytest.mark.parametrize("make", [make_lineup, make_parade])
def test_lineups_replay_and_show_many_whole_objects(make):
    scenes = [make(0, "train", index) for index in range(8)]
    again = make(0, "train", 3)
    assert np.array_equal(scenes[3].image, again.image) and np.array_equal(scenes[3].masks, again.masks)
    assert np.mean([len(scene.objects) for scene in scenes]) > 4
    for scene in scenes:
        assert scene.image.shape[:2] in (*SIZES_HW, PARADE_HW)
        assert scene.masks.any(axis=(1, 2)).all() and scene.masks.sum(axis=0).max() == 1
    if make is make_parade:
        assert {scene.image.shape[:2] for scene in scenes} == {PARADE_HW}
        assert min(len(scene.objects) for scene in scenes) >= 7


def test_an_outline_is_measured_from_the_cell_to_the_border():
    coverage = torch.zeros(1, 1, 72, 72, dtype=torch.uint8)
    coverage[0, 0, 20:44, 12:60] = 255  # 24 high, 48 wide
    boxes = torch.tensor([[[12.0, 20.0, 60.0, 44.0]]]) * 252 / 72
    batch = {"coverage": coverage, "boxes": boxes, "image": torch.zeros(1, 3, 252, 252)}
    cells = inner_cells(coverage, 18)
    assert len(cells.row) == 6 * 12
    outline = outline_of_cells(batch, cells, 18)
    centre = int(((cells.row == 7) & (cells.column == 8)).nonzero())
    right, down = outline[centre, 0], outline[centre, NUM_RAYS // 4]
    assert float(right) == pytest.approx((60 - 34) / 72, abs=0.03)
    assert float(down) == pytest.approx((44 - 30) / 72, abs=0.03)
    left, top, right, bottom, area = outline[centre, NUM_RAYS:].tolist()
    assert [left * 72, top * 72, right * 72, bottom * 72] == pytest.approx(
        [34 - 12, 30 - 20, 60 - 34, 44 - 30], abs=1e-3
    )
    assert area == pytest.approx((24 * 48) ** 0.5 / 72, abs=1e-4)


def test_a_step_trains_trunk_and_heads_and_overfits(batch: dict[str, torch.Tensor]):
    task = NamesTask(train_tiny_names.load_promptable(WEIGHTS)).train()
    torch.manual_seed(0)
    terms = task(batch)
    assert {"loss", "kind", "colour", "outline", "iou", "iou_corrected"} == set(terms)
    terms["loss"].backward()
    trained = {name for name, parameter in task.named_parameters() if parameter.grad is not None}
    for part in (".trunk.blocks.0.", ".sam2_convs.0.", ".sam_mask_decoder.", "names.whole", "names.outline"):
        assert any(part in name for name in trained), part
    assert not any(".vision_backbone.convs." in name for name in trained)
    alone = NamesTask(task.model, prompted_scenes=0).train()
    optimizer = torch.optim.AdamW(alone.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        torch.manual_seed(0)
        terms = alone(batch)
        assert "iou" not in terms
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        losses.append(float(terms["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    with torch.no_grad():
        values = alone.eval().validate(batch)
    assert {"iou_box", "right_kind", "right_colour", "right_kind_cells"} < set(values)
    assert len(KINDS) == 13 and len(COLOUR_NAMES) == 12


def test_the_command_line_runs_both_stages_and_notes_what_was_before(tmp_path: Path):
    weights = tmp_path / "named.safetensors"
    arguments = ["--device", "cpu", "--batch-size", "2", "--output", str(tmp_path / "run"), "--weights", str(weights)]
    settings = [
        "DATA.PARADES",
        "1",
        "DATA.LINEUPS",
        "1",
        "DATA.SCENES",
        "1",
        "DATA.VAL_SCENES",
        "1",
        "DATA.NUM_WORKERS",
        "1",
    ]
    settings += ["TRAIN.EPOCHS", "1", "TRAIN.PARADE_EPOCHS", "1", "PROMPTS.PER_SCENE", "1"]
    arguments += ["--pretrained", str(WEIGHTS), "--test-scenes", "1", "--opts", *settings]
    assert train_tiny_names.main(arguments) == 0
    record = json.loads(weights.with_suffix(".json").read_text())
    assert "train_tiny_names.py" in record["command"] and record["steps"] == 1
    assert record["before"] == json.loads(RECORD.read_text())
    assert 0 <= record["miou"]["box"] <= 1
    before, after = (sam3.load_model(path, device="cpu").state_dict() for path in (WEIGHTS, weights))
    name = "backbone.vision_backbone.trunk.blocks.0.mlp.fc1.weight"
    assert not torch.equal(before[name], after[name])
