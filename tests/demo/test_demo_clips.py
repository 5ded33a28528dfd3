"""Clips of the demo world."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from demo_clips import ANNOTATED_EVERY, FPS, render_frame, sample_motion, write_clip
from PIL import Image
from pycocotools import mask as coco_mask


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    return root / write_clip(root, seed=0, split="test", index=0, num_frames=10, jpeg_quality=90)


def test_a_clip_has_sav_layout(clip: Path):
    record = json.loads((clip / f"{clip.name}_manual.json").read_text())
    frames = sorted(path.name for path in clip.glob("*.jpg"))
    assert frames == [f"{i:05d}.jpg" for i in range(10)]
    assert len(record["masklet"]) == -(-10 // ANNOTATED_EVERY) == 3
    assert record["video_duration"] == pytest.approx(10 / FPS)
    with Image.open(clip / "00000.jpg") as frame:
        size = (record["video_width"], record["video_height"])
        assert frame.size == size
    for row in record["masklet"]:
        assert len(row) == record["masklet_num"] == len(record["category"])
        for one in row:
            assert coco_mask.decode(one).shape == size[::-1]


def test_the_same_clip_again_is_left_alone(clip: Path):
    before = (clip / "00000.jpg").stat().st_mtime_ns
    write_clip(clip.parent, seed=0, split="test", index=0, num_frames=10, jpeg_quality=90)
    assert (clip / "00000.jpg").stat().st_mtime_ns == before


def test_objects_move_hide_each_other_and_vanish():
    rng = np.random.default_rng(0)
    background = np.zeros((120, 160, 3), np.float32)
    front = dataclasses.replace(
        sample_motion(rng, (120, 160), 20),
        start_xy_px=(20.0, 60.0),
        velocity_xy_px=(6.0, 0.0),
        sway_px=0.0,
        radius_px=30.0,
        growth=0.0,
        visible_frames=(0, 15),
    )
    behind = dataclasses.replace(front, start_xy_px=(80.0, 60.0), velocity_xy_px=(0.0, 0.0), radius_px=12.0)
    masks = [render_frame(background, [behind, front], frame, 20)[1] for frame in range(20)]
    area = np.array([mask.sum(axis=(1, 2)) for mask in masks])
    assert area[0].min() > 0
    assert area[10, 0] < area[0, 0] / 2
    assert not area[15:].any()
    centre = [np.nonzero(masks[i][1])[1].mean() for i in (0, 10)]
    assert centre[1] - centre[0] == pytest.approx(60, abs=8)
    assert all(mask.sum(axis=0).max() <= 1 for mask in masks)
