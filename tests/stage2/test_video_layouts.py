"""Every layout gives the same videos: which frames are annotated, what they show, and what is known of the objects."""

from __future__ import annotations

from pathlib import Path

import clip_sets
import numpy as np
import pytest

from sam3_train.errors import UserError
from stage2.data.layouts import VideoLayout, open_layout
from stage2.data.video_entry import UNKNOWN, VideoEntry, encode_areas, is_visible

EVERY_FOURTH = list(range(0, clip_sets.NUM_FRAMES, 4))


def sav(root: Path) -> Path:
    return clip_sets.write_sav(root, ("sav_train/sav_000/sav_000001",))


def frames(root: Path) -> Path:
    return clip_sets.write_sav_frames(root, ("sav_000001",))


def some_frames(root: Path) -> Path:
    return clip_sets.write_sav_frames(root, ("sav_000001",), every=4)


def davis(root: Path) -> Path:
    return clip_sets.write_palette_set(root, ("bear",), resolution="480p")


def mose(root: Path) -> Path:
    clip_sets.write_palette_set(root / "train", ("bear",))
    return root


def youtube_vos(root: Path) -> Path:
    clip_sets.write_palette_set(root / "train", ("bear",), every=5, mask_digits=8)
    return root


def sav_png(root: Path) -> Path:
    return clip_sets.write_object_png_set(root, ("sav_000100",))


def only_entry(layout: VideoLayout) -> VideoEntry:
    (name,) = layout.find()
    return layout.scan(name)


@pytest.mark.parametrize(
    ("make", "kind", "numbers"),
    [
        (sav, "sav", EVERY_FOURTH),
        (frames, "sav_frames", EVERY_FOURTH),
        (some_frames, "sav_frames", EVERY_FOURTH),
        (davis, "davis", list(range(clip_sets.NUM_FRAMES))),
        (mose, "mose", list(range(clip_sets.NUM_FRAMES))),
        (youtube_vos, "youtube_vos", list(range(0, clip_sets.NUM_FRAMES, 5))),
        (sav_png, "sav_png", EVERY_FOURTH),
    ],
)
def test_frames_and_masks_of_every_layout_belong_together(make, kind: str, numbers: list[int], tmp_path: Path) -> None:
    """Defect D-114, 7.6 (17) of the published training."""
    root = make(tmp_path)
    entry = only_entry(open_layout(root, kind))
    layout = open_layout(root)
    recognised = only_entry(layout)
    assert recognised.frame_numbers.tolist() == entry.frame_numbers.tolist() == numbers
    assert entry.size_hw == clip_sets.SIZE_HW and entry.num_frames == clip_sets.NUM_FRAMES
    visible = is_visible(entry.area_codes, 0.0)
    assert visible[:, 0].all()
    assert visible[:, 1].tolist() == [number >= 8 for number in numbers]
    masks, reader = layout.open_masks(entry), layout.open_frames(entry.name)
    for row, number in enumerate(numbers):
        pixels = reader.frame(number)
        assert clip_sets.frame_number(float(np.median(pixels))) == number
        for column in (0, 1):
            expected = clip_sets.object_mask(number, column)
            np.testing.assert_array_equal(masks.mask(row, column), expected)
            if expected.any():
                red, green, _ = pixels[expected].mean(axis=0)
                assert (red > green) == (column == 0)
    reader.close()


def test_the_objects_keep_the_names_of_the_annotation(tmp_path: Path) -> None:
    assert only_entry(open_layout(davis(tmp_path / "a"))).objects.tolist() == [1, 3]
    assert only_entry(open_layout(sav_png(tmp_path / "b"))).objects.tolist() == [0, 1]


def test_manual_automatic_or_both_annotations(tmp_path: Path) -> None:
    clip_sets.write_sav(tmp_path, ("sav_000001", "sav_000002"))
    record = clip_sets.sav_record("sav_000001")
    record["masklet"] = [[*row, row[0]] for row in record["masklet"]]
    clip_sets.write_json(tmp_path / "sav_000001_auto.json", record)
    counts = {}
    for which in ("any", "manual", "auto", "both"):
        layout = open_layout(tmp_path, "sav", which)
        counts[which] = [len(layout.scan(name).objects) for name in layout.find()]
    assert counts == {"any": [2, 2], "manual": [2, 2], "auto": [3], "both": [5, 2]}
    both = open_layout(tmp_path, "sav", "both")
    entry = both.scan("sav_000001")
    np.testing.assert_array_equal(both.open_masks(entry).mask(3, 4), clip_sets.object_mask(12, 0))
    (tmp_path / "sav_000002_manual.json").rename(tmp_path / "sav_000002_auto.json")
    layout = open_layout(tmp_path, "sav", "any")
    assert len(layout.scan("sav_000002").objects) == 2


def test_an_entry_without_a_mask_is_unknown_and_not_absent(tmp_path: Path) -> None:
    record = clip_sets.sav_record("sav_000001")
    record["masklet"][2][0] = None
    clip_sets.write_mp4(tmp_path / "sav_000001.mp4")
    clip_sets.write_json(tmp_path / "sav_000001_manual.json", record)
    layout = open_layout(tmp_path)
    entry = layout.scan("sav_000001")
    assert entry.area_codes[2, 0] == UNKNOWN and (entry.area_codes[:, 0] == UNKNOWN).sum() == 1
    assert not is_visible(entry.area_codes, 0.0)[2, 0]
    assert not layout.open_masks(entry).mask(2, 0).any()
    root = sav_png(tmp_path / "png")
    (root / "Annotations_6fps/sav_000100/001/00012.png").unlink()
    assert only_entry(open_layout(root)).area_codes[3].tolist()[1] == UNKNOWN


def test_areas_survive_as_one_byte() -> None:
    areas = np.array([-1, 0, 1, 10, 1000, 480 * 848])
    codes = encode_areas(areas, (480, 848))
    assert codes[0] == UNKNOWN and codes[1] == 0 and codes[-1] == 254
    assert is_visible(codes, 0.0).tolist() == [False, False, True, True, True, True]
    assert is_visible(codes, 1000 / (480 * 848)).tolist() == [False, False, False, False, True, True]
    assert is_visible(codes, 2000 / (480 * 848)).tolist() == [False, False, False, False, False, True]


def test_folders_behind_links_are_found_once(tmp_path: Path) -> None:
    root = clip_sets.write_sav(tmp_path / "sav" / "sav_000", ("sav_000001",)).parent
    source = clip_sets.write_sav(tmp_path / "other" / "sav_001", ("sav_000003",))
    (root / "sav_001").symlink_to(source)
    (source / "back").symlink_to(root)
    assert list(open_layout(root).find()) == ["sav_000/sav_000001", "sav_001/sav_000003"]


def test_the_demo_world_must_be_named(tmp_path: Path) -> None:
    clip_sets.write_sav_frames(tmp_path / "clips" / "train", ("sav_100000",))
    clip_sets.write_sav_frames(tmp_path / "clips" / "val", ("sav_200000",))
    (tmp_path / "world.json").write_text("{}")
    for place in (tmp_path, tmp_path / "clips", tmp_path / "clips" / "train"):
        with pytest.raises(UserError, match=r"say DATA\.DATASET demo"):
            open_layout(place)
    layout = open_layout(tmp_path, "demo")
    assert list(layout.find()) == ["train/sav_100000", "val/sav_200000"]
    assert layout.names_of_split("val") == {"val/sav_200000"}
    assert layout.scan("val/sav_200000").frame_numbers.tolist() == EVERY_FOURTH
    with pytest.raises(UserError, match="is no demo world"):
        open_layout(tmp_path / "clips", "demo")


def test_davis_has_lists_of_its_splits(tmp_path: Path) -> None:
    clip_sets.write_palette_set(tmp_path, ("bear", "bike"), every=16, resolution="480p")
    (tmp_path / "ImageSets/2017").mkdir(parents=True)
    (tmp_path / "ImageSets/2017/val.txt").write_text("bike\n")
    layout = open_layout(tmp_path)
    assert layout.names_of_split("val") == {"bike"}
    assert layout.names_of_split("train") is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (("missing", "auto"), "missing is missing .DATA.DATA_PATH"),
        (("file.txt", "auto"), "not a folder"),
        (("empty", "auto"), "is an empty folder"),
        (("other", "auto"), "has no layout of annotated videos that is known here"),
        (("other", "davis"), "JPEGImages is not a folder"),
        (("other", "sa-v"), "kind 'sa-v' is not one of auto, sav"),
    ],
)
def test_what_is_no_data_set_is_refused(setting: tuple[str, str], message: str, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other" / "photos").mkdir(parents=True)
    (tmp_path / "other" / "photos" / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=message):
        open_layout(tmp_path / setting[0], setting[1])
