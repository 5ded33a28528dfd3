"""Prompts of ``python -m sam3.track`` from JSON files and mask pictures: what is wrong is said, entry by entry."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from video_clips import frame_pixels

from sam3.drawing import index_image
from sam3.video.frame_source import ListFrames
from sam3.video.prompts import (
    ObjectPrompt,
    are_prompted_together,
    check_prompts,
    clip_box,
    read_mask_prompts,
    read_prompts,
)


@pytest.fixture
def write(tmp_path):
    """Write a prompts file and its pictures."""
    masks = np.zeros((2, 48, 64), dtype=bool)
    masks[0, 8:20, 4:20], masks[1, 30:40, 30:50] = True, True
    index_image(list(masks), (48, 64), [3, 9]).save(tmp_path / "two.png")
    Image.fromarray(masks[0]).save(tmp_path / "one.png")
    Image.fromarray(np.stack([masks[1] * np.uint8(200)] * 3, axis=-1)).save(tmp_path / "colour.png")
    Image.new("L", (64, 48)).save(tmp_path / "black.png")
    index_image([], (48, 64)).save(tmp_path / "nothing.png")

    def call(content: object) -> Path:
        path = tmp_path / "prompts.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return call


def test_a_file_of_prompts(write) -> None:
    entries = [
        {"object": 1, "points": [[10, 20], [30.5, 4, 0]], "box": [1, 2, 30, 40]},
        {"object": 2, "frame": 12, "mask": "two.png", "value": 9},
        {"object": 3, "frame": 12, "mask": "colour.png"},
    ]
    for content in (entries, {"prompts": entries}):
        problems: list[str] = []
        first, second, third = read_prompts(write(content), problems)
        assert not problems
        assert (first.obj_id, first.frame_idx, first.labels) == (1, 0, (1, 0))
        assert first.points_xy_px == ((10, 20), (30.5, 4)) and first.box_xyxy_px == (1, 2, 30, 40)
        assert (second.obj_id, second.frame_idx) == (2, 12) and second.mask is not None and third.mask is not None
        assert second.mask.dtype == bool and second.mask.sum() == 200
        np.testing.assert_array_equal(second.mask, third.mask)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"object": 1,]', "is no JSON (Expecting property name enclosed in double quotes, line 1 column 15)"),
        ("[]", 'must be a list of prompts, or {"prompts": [...]}, with at least one'),
        ('{"objects": []}', "must be a list of prompts"),
        (["click"], 'entry 1: must be an object in braces, got "click"'),
        ([{"object": 1, "pionts": []}], "entry 1: unknown key 'pionts'; known are object, frame, points, box, mask"),
        ([{"points": [[1, 2]]}], 'entry 1: "object" must be a whole number from 1 to 255, got null'),
        ([{"object": 256, "points": [[1, 2]]}], '"object" must be a whole number from 1 to 255, got 256'),
        ([{"object": 1, "frame": -1, "points": [[1, 2]]}], '"frame" must be a whole number from 0 on, got -1'),
        ([{"object": 1, "frame": 1.5, "points": [[1, 2]]}], '"frame" must be a whole number from 0 on, got 1.5'),
        ([{"object": 1}], "entry 1: has neither points nor a box nor a mask"),
        ([{"object": 1, "points": []}], "entry 1: has neither points nor a box nor a mask"),
        ([{"object": 1, "points": [1, 2]}], "a point must be [x, y], or [x, y, label] with the label 1 or 0, got 1"),
        ([{"object": 1, "points": [[1, 2, 2]]}], "with the label 1 or 0, got [1, 2, 2]"),
        ([{"object": 1, "points": {"x": 1}}], '"points" must be a list of [x, y] or [x, y, label], got {"x": 1}'),
        ('[{"object": 1, "points": [[NaN, 2]]}]', "got [NaN, 2]"),
        ([{"object": 1, "box": [5, 5, 5, 9]}], '"box" must be [x0, y0, x1, y1] with x0 < x1 and y0 < y1'),
        ([{"object": 1, "box": "5,5,9,9"}], '"box" must be [x0, y0, x1, y1]'),
        ([{"object": 1, "mask": "two.png", "box": [1, 1, 9, 9]}], "a frame takes a mask alone"),
        ([{"object": 1, "mask": "three.png"}], "three.png: no such file"),
        ([{"object": 1, "mask": "prompts.json"}], "prompts.json: not an image"),
        ([{"object": 1, "mask": 5}], '"mask" must be the name of a picture, got 5'),
        ([{"object": 1, "mask": "black.png"}], "entry 1: the mask is empty"),
        ([{"object": 1, "mask": "two.png", "value": 4}], "two.png has no pixel with the value 4"),
        ([{"object": 1, "mask": "colour.png", "value": 4}], "colour.png has no palette (mode RGB)"),
        ([{"object": 1, "points": [[1, 2]], "value": 4}], '"value" belongs to a mask, and there is none'),
        (
            [{"object": 1, "points": [[1, 2]]}, {"object": 1, "box": [1, 2, 3, 4]}],
            "entry 2: object 1 has another entry for frame 0: put them together",
        ),
    ],
)
def test_wrong_files_of_prompts(write, content, message) -> None:
    problems: list[str] = []
    read_prompts(write(content), problems)
    assert len(problems) == 1 and message in problems[0] and "prompts.json" in problems[0]


def test_all_that_is_wrong_is_said_at_once(write, tmp_path) -> None:
    problems: list[str] = []
    good = read_prompts(write([{"object": 0}, {"object": 1, "points": [[3, 4]]}, 7]), problems)
    assert [prompt.obj_id for prompt in good] == [1] and len(problems) == 2
    problems = []
    read_prompts(tmp_path / "missing.json", problems)
    (tmp_path / "picture.json").write_bytes(b"\xff\xfe\x00")
    read_prompts(tmp_path / "picture.json", problems)
    assert "missing.json: cannot be read (No such file or directory)" in problems[0]
    assert "picture.json: is no text file in UTF-8" in problems[1]


def test_a_picture_of_masks(write, tmp_path) -> None:
    write([])
    problems: list[str] = []
    three, nine = read_mask_prompts(tmp_path / "two.png", 4, problems)
    assert (three.obj_id, nine.obj_id, three.frame_idx) == (3, 9, 4), "as in DAVIS"
    (one,) = read_mask_prompts(tmp_path / "one.png", 0, problems)
    np.testing.assert_array_equal(one.mask, three.mask)
    assert not problems
    for name, message in {
        "black.png": "black.png: the mask is empty",
        "nothing.png": "nothing.png: the mask is empty",
        "missing.png": "missing.png: no such file",
    }.items():
        problems = []
        assert read_mask_prompts(tmp_path / name, 0, problems) == [] and message in problems[0]


def test_prompts_are_compared_with_the_video() -> None:
    frames = ListFrames([frame_pixels(i) for i in range(5)])
    good = ObjectPrompt("--box", 1, 4, ((0, 0), (64, 48)), (1, 0), (-5, -5, 90, 30))
    assert check_prompts([good], frames) == []
    assert clip_box(good, (48, 64)).box_xyxy_px == (0, 0, 64, 30)
    bad = [
        ObjectPrompt("a", 1, 5, ((1, 1),), (1,)),
        ObjectPrompt("b", 1, 0, ((64.5, 1),), (1,)),
        ObjectPrompt("c", 1, 0, box_xyxy_px=(70, 1, 90, 9)),
        ObjectPrompt("d", 1, 0, mask=np.ones((64, 48), bool)),
    ]
    assert check_prompts(bad, frames) == [
        "a: there is no frame 5: the video has 5 frames (0 to 4)",
        "b: point 64.5,1 lies outside the video (64 x 48 pixels)",
        "c: box 70,1,90,9 lies outside the video (64 x 48 pixels)",
        "d: the mask has 48 x 64 pixels, the video 64 x 48 pixels",
    ]


def test_objects_are_prompted_together_if_they_share_all_frames() -> None:
    def together(*places: tuple[int, int]) -> bool:
        return are_prompted_together([ObjectPrompt("", obj_id, frame_idx) for obj_id, frame_idx in places])

    assert together((1, 0)) and together((1, 0), (1, 5)) and together((1, 3), (2, 3), (2, 0), (1, 0))
    assert not together((1, 0), (2, 5)) and not together((1, 0), (2, 0), (1, 5))
