"""The index holds what a scan finds, is kept, notices what changed, and is never read half-written."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import clip_sets
import numpy as np
import pytest

from sam3_train.errors import UserError
from stage2.data.clip_index import ClipIndex, build_clip_index
from stage2.data.layouts import VideoLayout, open_layout
from stage2.data.video_entry import VideoEntry
from stage2.data.video_set import VideoSettings, open_video_set

NAMES = [f"sav_{number:06d}" for number in range(12)]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve videos of three annotated frames each; nobody writes here."""
    root = tmp_path_factory.mktemp("many")
    first = clip_sets.write_mp4(root / f"{NAMES[0]}.mp4", 9)
    for name in NAMES:
        if name != NAMES[0]:
            shutil.copy(first, root / f"{name}.mp4")
        clip_sets.write_json(root / f"{name}_manual.json", clip_sets.sav_record(name, 9))
    return root


class CountingLayout(VideoLayout):
    """Notes what is scanned."""

    def __init__(self, layout: VideoLayout) -> None:
        super().__init__(layout.root, layout.description)
        self._layout = layout
        self.scanned: list[str] = []

    def find(self) -> dict[str, int]:
        return self._layout.find()

    def scan(self, name: str) -> VideoEntry:
        self.scanned.append(name)
        return self._layout.scan(name)

    open_frames = open_masks = None  # type: ignore[assignment]


def require_same(one: VideoEntry, other: VideoEntry) -> None:
    assert (one.name, one.size_hw, one.num_frames) == (other.name, other.size_hw, other.num_frames)
    for field in ("frame_numbers", "objects", "area_codes"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


def test_the_index_holds_what_a_scan_finds(many: Path, tmp_path: Path) -> None:
    layout = open_layout(many)
    for index in (build_clip_index(layout, tmp_path), build_clip_index(layout, tmp_path)):
        assert list(index.names) == NAMES and index.good().tolist() == list(range(12)) and not index.bad()
        for position, name in enumerate(NAMES):
            require_same(index.entry(position), layout.scan(name))


def test_workers_give_the_same_index_as_one_process(many: Path, tmp_path: Path) -> None:
    layout = open_layout(many)
    folders = [build_clip_index(layout, tmp_path / f"{n}", num_workers=n).folder for n in (1, 2)]
    for path in folders[0].iterdir():
        assert path.read_bytes() == (folders[1] / path.name).read_bytes(), path.name


def test_only_videos_whose_files_changed_are_read_again(tmp_path: Path) -> None:
    root = clip_sets.write_sav(tmp_path / "set", NAMES[:3], 9)
    cache = tmp_path / "cache"
    layout = CountingLayout(open_layout(root))
    build_clip_index(layout, cache)
    build_clip_index(layout, cache)
    assert layout.scanned == NAMES[:3]
    record = clip_sets.sav_record(NAMES[1], 9)
    record["masklet"] = [row[:1] for row in record["masklet"]]
    clip_sets.write_json(root / f"{NAMES[1]}_manual.json", record)
    (root / f"{NAMES[2]}.mp4").unlink()
    (root / f"{NAMES[2]}_manual.json").unlink()
    layout.scanned.clear()
    index = build_clip_index(layout, cache)
    assert layout.scanned == [NAMES[1]]
    assert [len(index.entry(i).objects) for i in range(len(index))] == [2, 1]
    assert [path.name for path in cache.iterdir()] == [index.folder.name]


def test_an_index_that_was_not_finished_is_made_again(many: Path, tmp_path: Path) -> None:
    index = build_clip_index(open_layout(many), tmp_path)
    (index.folder / "index.json").unlink()
    (index.folder / "area_codes.npy").write_bytes(b"")
    again = build_clip_index(open_layout(many), tmp_path)
    assert again.sha256 == index.sha256
    assert again.entry(3).area_codes.shape == (3, 2)


def test_workers_open_the_index_and_do_not_copy_it(many: Path, tmp_path: Path) -> None:
    """Defect D-120, 7.6 (27) of the published training."""
    index = build_clip_index(open_layout(many), tmp_path)
    copy = pickle.loads(pickle.dumps(index))
    assert isinstance(copy, ClipIndex) and len(pickle.dumps(index)) < 400
    require_same(copy.entry(5), index.entry(5))


def test_an_index_that_cannot_be_kept_is_said(many: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*DATA\.INDEX_CACHE"):
        build_clip_index(open_layout(many), tmp_path / "file" / "cache")


def open_set(root: Path, cache: Path, split: str = "train", **settings: object) -> list[str]:
    videos = open_video_set(VideoSettings(str(root), cache_dir=str(cache), **settings), split)  # type: ignore[arg-type]
    return [videos.name(i) for i in range(len(videos))]


def test_train_and_val_share_no_video_and_leave_none_out(many: Path, tmp_path: Path) -> None:
    train, val = (open_set(many, tmp_path, split, val_fraction=0.3) for split in ("train", "val"))
    assert val and sorted([*train, *val]) == NAMES
    assert open_set(many, tmp_path, "train", val_fraction=0.0) == NAMES


@pytest.mark.parametrize("fraction", [1e-6, 0.25, 0.5, 1.0])
def test_a_subset_holds_its_share_and_one_video_at_least(fraction: float, many: Path, tmp_path: Path) -> None:
    whole = open_set(many, tmp_path)
    part = open_set(many, tmp_path, subset_fraction=fraction)
    assert len(part) == max(1, round(fraction * len(whole))) and set(part) <= set(whole)
    assert set(open_set(many, tmp_path, subset_fraction=1e-6)) <= set(part)
    assert open_set(many, tmp_path, "val") == open_set(many, tmp_path, "val", subset_fraction=fraction)


def test_another_seed_chooses_another_subset(many: Path, tmp_path: Path) -> None:
    parts = {tuple(open_set(many, tmp_path, subset_fraction=0.4, subset_seed=seed)) for seed in range(5)}
    assert len(parts) > 1


def test_videos_whose_objects_are_all_too_small_are_left_out(many: Path, tmp_path: Path) -> None:
    settings = VideoSettings(str(many), cache_dir=str(tmp_path))
    assert len(open_video_set(settings, "train", min_area=0.04)) == len(open_set(many, tmp_path))
    with pytest.raises(UserError, match="of 12 videos 0 are bad, and 11 good ones belong to"):
        open_video_set(settings, "train", min_area=0.2)


def test_all_impossible_settings_are_said_at_once(tmp_path: Path) -> None:
    settings = VideoSettings(
        str(tmp_path), "film", "some", subset_fraction=0.0, val_fraction=1.5, on_bad="ignore", max_bad_fraction=-1.0
    )
    with pytest.raises(UserError) as caught:
        open_video_set(settings, "test")
    for part in (
        "film",
        "some",
        "subset_fraction 0.0",
        "val_fraction 1.5",
        "ignore",
        "max_bad_fraction -1.0",
        "'test'",
    ):
        assert part in str(caught.value)
