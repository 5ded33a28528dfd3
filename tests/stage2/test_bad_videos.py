"""A video that cannot be used is found, named and counted; a run goes on without it, or ends, as it was told to."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import clip_sets
import numpy as np
import pytest
from PIL import Image

from sam3.preprocess import Preprocess
from sam3_train.data.bad_images import read_bad_images
from sam3_train.errors import UserError
from stage2.data.clip_choice import ClipSpec
from stage2.data.clip_loader import BAD_VIDEOS_FILE, bad_video_log, build_train_loader
from stage2.data.clip_sampler import ClipSampler
from stage2.data.clip_sources import VideoClips
from stage2.data.layouts import open_layout
from stage2.data.sav_dataset import ClipDataset
from stage2.data.video_entry import BadVideoError
from stage2.data.video_set import VideoSettings, open_video_set

BAD, GOOD = "sav_000001", "sav_000002"


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def truncate_rows(record: dict[str, Any]) -> None:
    record["masklet"] = record["masklet"][:-2]


def shrink_a_mask(record: dict[str, Any]) -> None:
    record["masklet"][3][1] = clip_sets.encode_mask(np.ones((24, 32), bool))


def cut_a_mask(record: dict[str, Any]) -> None:
    record["masklet"][3][0]["counts"] = record["masklet"][3][0]["counts"][:-2]


def empty_all_masks(record: dict[str, Any]) -> None:
    empty = dict(clip_sets.encode_mask(np.zeros(clip_sets.SIZE_HW, bool)))
    record["masklet"] = [[empty, empty] for _ in record["masklet"]]


def drop_objects(record: dict[str, Any]) -> None:
    record["masklet"] = [[] for _ in record["masklet"]]


def lose_an_object(record: dict[str, Any]) -> None:
    record["masklet"][5] = record["masklet"][5][:1]


def forget_the_height(record: dict[str, Any]) -> None:
    del record["video_height"]


JSON_FAULTS = [
    (truncate_rows, "7 rows of masks for 33 frames; every fourth frame makes 9"),
    (shrink_a_mask, "row 3, object 1: the mask is 32 x 24 pixels, the video 64 x 48"),
    (cut_a_mask, "row 3, object 0: the runs of the mask add up to|a mask is damaged"),
    (empty_all_masks, "all masks are empty"),
    (drop_objects, "the annotation has no object"),
    (lose_an_object, "row 5: has 1 objects, row 0 has 2"),
    (forget_the_height, "not an SA-V annotation .KeyError: 'video_height'"),
]


def sav_set(root: Path) -> Path:
    return clip_sets.write_sav(root, (BAD, GOOD))


def frames_set(root: Path) -> Path:
    return clip_sets.write_sav_frames(root, (BAD, GOOD), every=4)


def unlink_video(root: Path) -> None:
    (root / f"{BAD}.mp4").unlink()


def unlink_json(root: Path) -> None:
    (root / f"{BAD}_manual.json").unlink()


def break_json(root: Path) -> None:
    path = root / f"{BAD}_manual.json"
    path.write_bytes(path.read_bytes()[:1000])


def shorten_video(root: Path) -> None:
    clip_sets.write_mp4(root / f"{BAD}.mp4", 20)


def resize_video(root: Path) -> None:
    clip_sets.write_mp4(root / f"{BAD}.mp4", size_hw=(64, 96))


def cut_video_header(root: Path) -> None:
    path = root / f"{BAD}.mp4"
    path.write_bytes(path.read_bytes()[:-2000])  # the header stands at the end


def remove_a_frame(root: Path) -> None:
    (root / BAD / "00016.jpg").unlink()


def add_a_frame(root: Path) -> None:
    clip_sets.write_pictures(root / BAD, [48])


def remove_all_frames(root: Path) -> None:
    for path in (root / BAD).glob("*.jpg"):
        path.unlink()


def empty_the_folder(root: Path) -> None:
    for path in (root / BAD).iterdir():
        path.unlink()


def remove_frames_annotation(root: Path) -> None:
    (root / BAD / f"{BAD}_manual.json").unlink()


def resize_frames(root: Path) -> None:
    Image.new("RGB", (32, 24)).save(root / BAD / "00000.jpg")


def rename_a_frame(root: Path) -> None:
    (root / BAD / "00008.jpg").rename(root / BAD / "frame8.jpg")


FILE_FAULTS = [
    (sav_set, unlink_video, "the video is missing, although its annotation is there"),
    (sav_set, unlink_json, "has no annotation sav_000001_manual.json or sav_000001_auto.json"),
    (sav_set, break_json, "not valid JSON"),
    (sav_set, shorten_video, r"has 20 frames, but .*manual.json is of 33 \(9 annotated\)"),
    (sav_set, resize_video, "is 96 x 64 pixels, its annotation 64 x 48"),
    (sav_set, cut_video_header, "not a video that can be read, or cut off"),
    (frames_set, remove_a_frame, r"8 pictures up to frame 32.* picture 00016 \(annotated\) is missing"),
    (frames_set, add_a_frame, "10 pictures up to frame 48, but .* is of 33 frames"),
    (frames_set, remove_all_frames, "the folder holds no picture"),
    (frames_set, empty_the_folder, "the folder holds no picture"),
    (frames_set, remove_frames_annotation, "has no annotation"),
    (frames_set, resize_frames, "is 32 x 24 pixels, the annotation 64 x 48"),
    (frames_set, rename_a_frame, "frames are named after their numbers"),
]


def require_bad(root: Path, message: str, bad: str = BAD, good: str = GOOD) -> None:
    """One video is bad with this message, and which it is decides nothing about the other."""
    with pytest.raises(BadVideoError, match=message) as caught:
        open_layout(root).scan(bad)
    assert bad in str(caught.value)
    kept = open_video_set(VideoSettings(str(root), max_bad_fraction=0.5, val_fraction=0.0), "train")
    assert [kept.name(i) for i in range(len(kept))] == [good]
    ((name, reason),) = kept.index.bad()
    assert name == bad and re.search(message, reason)
    with pytest.raises(UserError, match=r"1 of 2 videos .* none is allowed \(on_bad fail\)") as failed:
        open_video_set(VideoSettings(str(root), on_bad="fail"), "train")
    assert re.search(message, str(failed.value)) and bad in str(failed.value)


@pytest.mark.parametrize(("change", "message"), JSON_FAULTS, ids=[change.__name__ for change, _ in JSON_FAULTS])
@pytest.mark.parametrize("make", [sav_set, frames_set], ids=["sav", "frames"])
def test_a_faulty_annotation_is_found(make, change, message: str, tmp_path: Path) -> None:
    root = make(tmp_path)
    edit_json(next(root.rglob(f"{BAD}_manual.json")), change)
    require_bad(root, message)


@pytest.mark.parametrize(("make", "harm", "message"), FILE_FAULTS, ids=[harm.__name__ for _, harm, _ in FILE_FAULTS])
def test_files_that_do_not_fit_are_found(make, harm, message: str, tmp_path: Path) -> None:
    root = make(tmp_path)
    harm(root)
    require_bad(root, message)


def write_wrong_png(path: Path, mode: str, size_wh: tuple[int, int]) -> None:
    Image.new(mode, size_wh).save(path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: write_wrong_png(path, "P", (32, 24)), "the masks are 32 x 24 pixels, the video 64 x 48"),
        (lambda path: write_wrong_png(path, "RGB", (64, 48)), r"holds colours \(RGB\), not one number per object"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "cannot be decoded|not an image"),
        (lambda path: path.rename(path.with_name("00050.png")), "frame 50 has a mask but no picture"),
    ],
    ids=["size", "colours", "damaged", "no picture"],
)
@pytest.mark.parametrize("kind", ["palette", "object"])
def test_wrong_masks_in_png_files_are_found(kind: str, harm, message: str, tmp_path: Path) -> None:
    if kind == "palette":
        root = clip_sets.write_palette_set(tmp_path, (BAD, GOOD), every=8)
        harm(root / "Annotations" / BAD / "00008.png")
    else:
        root = clip_sets.write_object_png_set(tmp_path, (BAD, GOOD))
        harm(root / "Annotations_6fps" / BAD / "001" / "00008.png")
    require_bad(root, message)


def test_an_object_folder_without_a_number_is_found(tmp_path: Path) -> None:
    root = clip_sets.write_object_png_set(tmp_path, (BAD, GOOD))
    (root / "Annotations_6fps" / BAD / "000").rename(root / "Annotations_6fps" / BAD / "cat")
    require_bad(root, "one numbered folder per object, found 'cat'")


def test_a_video_of_one_frame_gives_a_clip_that_stands_still(tmp_path: Path) -> None:
    root = clip_sets.write_sav(tmp_path, (BAD,), num_frames=1)
    clip = only_clip(root)
    assert clip.frame_numbers.tolist() == [0, 0, 0] and clip.num_frames == 1
    assert bool((clip.pixels[0] == clip.pixels[2]).all()) and clip.object_ids.tolist() == [0]


def only_clip(root: Path, **spec: Any) -> Any:
    videos = open_video_set(VideoSettings(str(root), val_fraction=0.0), "train")
    source = VideoClips(videos, ClipSpec(lengths=((0, 3),), **spec), Preprocess(size_px=56), 16)
    return ClipDataset(source, on_bad="fail")[0]["clip"]


def test_an_object_that_is_absent_on_frame_0_is_followed_from_where_it_appears(tmp_path: Path) -> None:
    root = clip_sets.write_sav_frames(tmp_path, (BAD,), every=4)
    edit_json(
        root / BAD / f"{BAD}_manual.json",
        lambda record: record.update(masklet=[row[1:] for row in record["masklet"]]),
    )
    clip = only_clip(root, reverse_share=0.0)
    assert clip.frame_numbers[0] >= 8
    assert bool((clip.coverage[0, 0] > 127).any())


def damage_the_middle(path: Path, num_frames: int) -> None:
    """A file whose header and first frames are good, with rubbish where later ones were: decoders die on the way."""
    clip_sets.write_mp4(path, num_frames)
    data = bytearray(path.read_bytes())
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    third = (end - start) // 3
    data[start + third : end] = bytes(end - start - third)
    path.write_bytes(data)


@pytest.fixture
def midway(tmp_path: Path) -> Path:
    """Two good videos, and one whose decoding ends on the way."""
    root = clip_sets.write_sav(tmp_path / "set", (BAD, GOOD, "sav_000003"), num_frames=49)
    damage_the_middle(root / f"{BAD}.mp4", 49)
    return root


def loader_of(root: Path, on_bad: str, log: Any, num_workers: int = 0) -> Any:
    settings = VideoSettings(str(root), val_fraction=0.0, on_bad=on_bad)
    videos = open_video_set(settings, "train")
    assert len(videos) == 3, "its header is good, so only decoding shows it"
    source = VideoClips(videos, ClipSpec(lengths=((0, 3),), reverse_share=1.0), Preprocess(size_px=56), 16)
    dataset = ClipDataset(source, seed=1, on_bad=on_bad)
    sampler = ClipSampler(3, batch_size=1, clips_per_video=4, seed=1)
    return build_train_loader(dataset, sampler, 1, num_workers=num_workers, bad_log=log)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_video_that_cannot_be_decoded_to_its_end_is_replaced_and_counted(
    num_workers: int, midway: Path, tmp_path: Path
) -> None:
    log = bad_video_log(tmp_path / "run", 0.4, 3)
    batches = list(loader_of(midway, "skip", log, num_workers))
    assert len(batches) == 12 and all(batch["clips"].num_clips == 1 for batch in batches)
    listed = read_bad_images(tmp_path / "run" / BAD_VIDEOS_FILE)
    assert list(listed) == [BAD] and f"{BAD}.mp4: " in listed[BAD]
    assert {GOOD, "sav_000003"} <= {name for batch in batches for name in batch["key"]}


def test_too_many_of_them_end_the_run(midway: Path, tmp_path: Path) -> None:
    log = bad_video_log(tmp_path / "run", 0.0, 3)
    with pytest.raises(UserError, match=rf"1 videos that cannot be used, more than the 0 .*{BAD}\.mp4"):
        list(loader_of(midway, "skip", log))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_failing_batch_ends_the_run_with_the_videos_name(num_workers: int, midway: Path) -> None:
    with pytest.raises(UserError, match=rf"{BAD}\.mp4: "):
        list(loader_of(midway, "fail", None, num_workers))


def test_where_every_video_fails_the_run_ends(tmp_path: Path) -> None:
    root = clip_sets.write_sav(tmp_path, (BAD,), num_frames=49)
    settings = VideoSettings(str(root), val_fraction=0.0)
    videos = open_video_set(settings, "train")
    (root / f"{BAD}.mp4").unlink()
    source = VideoClips(videos, ClipSpec(lengths=((0, 3),)), Preprocess(size_px=56), 16)
    log = bad_video_log(None, 0.5, 1)
    loader = build_train_loader(ClipDataset(source), ClipSampler(1, batch_size=1), 1, num_workers=0, bad_log=log)
    with pytest.raises(UserError, match=rf"{BAD} and 7 others gave no clip: .*no such file"):
        list(loader)


def test_frames_that_changed_after_the_index_was_made_are_noticed(tmp_path: Path) -> None:
    root = frames_set(tmp_path)
    settings = VideoSettings(str(root), val_fraction=0.0)
    videos = open_video_set(settings, "train")
    for path in (root / BAD).glob("*.jpg"):
        Image.new("RGB", (32, 24)).save(path)
    source = VideoClips(videos, ClipSpec(lengths=((0, 3),)), Preprocess(size_px=56), 16)
    item = ClipDataset(source, on_bad="fail")[0]
    assert f"{BAD}: frame" in item["error"] and "32 x 24 pixels, its masks are 64 x 48" in item["error"]


def test_many_bad_videos_are_counted_and_some_are_shown(tmp_path: Path) -> None:
    names = [f"sav_{number:06d}" for number in range(9)]
    clip_sets.write_sav(tmp_path, names[:1], num_frames=5)
    for name in names[1:]:
        clip_sets.write_json(tmp_path / f"{name}_manual.json", clip_sets.sav_record(name, 5))
    with pytest.raises(UserError, match=r"8 of 9 videos .* cannot be used, 1 are allowed") as caught:
        open_video_set(VideoSettings(str(tmp_path)), "train")
    assert str(caught.value).count("the video is missing") == 5 and "and 3 more" in str(caught.value)
