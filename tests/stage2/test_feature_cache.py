"""Features of the frozen backbone on disk: the same as computed ones, found again, and never of another model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import clip_sets
import numpy as np
import pytest
import torch
from tracking_clips import make_model

from sam3.model.efficient_sam3_train import EfficientSam3Train
from sam3.preprocess import Preprocess
from sam3_train.errors import UserError
from stage2.data.clip_batch import collate_clips
from stage2.data.clip_choice import ClipSpec
from stage2.data.clip_look import LookSpec
from stage2.data.clip_sources import VideoClips
from stage2.data.sav_dataset import ClipDataset
from stage2.data.video_entry import BadVideoError
from stage2.data.video_set import VideoSet, VideoSettings, open_video_set
from stage2.feature_cache import FeatureCache, fill_feature_cache, release_backbone
from stage2.task import Stage2Task

SPEC = ClipSpec(lengths=((0, 3),), max_objects=2)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> VideoSet:
    root = clip_sets.write_sav_frames(tmp_path_factory.mktemp("set"), every=4)
    return open_video_set(VideoSettings(str(root), val_fraction=0.0), "train")


@pytest.fixture(scope="module")
def model() -> EfficientSam3Train:
    return make_model()


def make_cache(folder: Path, model: EfficientSam3Train, **changes: Any) -> FeatureCache:
    given: dict[str, Any] = {"weights_sha256": "ab", "preprocess": model.preprocess, **changes}
    return FeatureCache(folder, model.config, **given)


def batch(videos: VideoSet, model: EfficientSam3Train, cache: FeatureCache | None) -> dict[str, Any]:
    source = VideoClips(videos, SPEC, model.preprocess, 72, features=cache)
    dataset = ClipDataset(source, seed=4)
    return collate_clips([dataset[0], dataset[1]])


@pytest.fixture(scope="module")
def cache(videos: VideoSet, model: EfficientSam3Train, tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    cache = make_cache(tmp_path_factory.mktemp("cache"), model)
    assert cache.missing(videos) == [0, 1]
    assert cache.bytes_to_write(videos) == 2 * 9 * cache.bytes_per_frame
    assert fill_feature_cache(cache, model, videos, frames_at_once=4) == []
    return cache


def test_cached_clips_are_the_clips(videos: VideoSet, model: EfficientSam3Train, cache: FeatureCache) -> None:
    plain, cached = (batch(videos, model, each)["clips"] for each in (None, cache))
    assert cached.pixels.shape == (2, 3, 3, 0, 0) and cached.num_clips == 2 and cached.length == 3
    for name in ("coverage", "clip_of_object", "frame_numbers", "object_ids", "num_frames", "resized_hw"):
        assert torch.equal(getattr(plain, name), getattr(cached, name))
    task = Stage2Task(model)
    for computed, read in zip(task._features(plain), task._features(cached), strict=True):
        for wanted, found in zip(computed, read, strict=True):
            assert found.dtype == torch.float32
            assert torch.allclose(wanted, found, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_nothing_is_computed_twice(
    videos: VideoSet, model: EfficientSam3Train, cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*inputs: Any) -> None:
        raise AssertionError("the backbone runs")

    monkeypatch.setattr(model, "clip_features", fail)
    assert cache.missing(videos) == [] and cache.bytes_to_write(videos) == 0
    assert fill_feature_cache(cache, model, videos) == []


def test_training_needs_no_backbone(videos: VideoSet, cache: FeatureCache) -> None:
    model = make_model()
    clips = batch(videos, model, cache)
    release_backbone(model)
    task = Stage2Task(model).train()
    assert not any(name.startswith("model.backbone") for name in task.state_dict())
    assert bool(task(clips)["loss"].isfinite())


@pytest.mark.parametrize(
    "changes",
    [{"weights_sha256": "cd"}, {"preprocess": Preprocess(size_px=252, mode="letterbox")}, {"dtype": torch.bfloat16}],
)
def test_other_features_have_another_folder(
    videos: VideoSet, model: EfficientSam3Train, cache: FeatureCache, changes: dict[str, Any]
) -> None:
    other = make_cache(cache.folder.parent, model, **changes)
    assert other.folder != cache.folder and other.missing(videos) == [0, 1]
    assert make_cache(cache.folder.parent, model).folder == cache.folder


def test_other_annotated_frames_have_another_file(videos: VideoSet, cache: FeatureCache) -> None:
    entry = videos.entry(0)
    fewer = dataclasses.replace(entry, frame_numbers=entry.frame_numbers[:-1])
    assert cache.path(entry).is_file() and not cache.path(fewer).is_file()


def test_another_data_set_with_the_same_names_has_other_files(cache: FeatureCache, tmp_path: Path) -> None:
    root = clip_sets.write_sav_frames(tmp_path, every=4)
    assert cache.missing(open_video_set(VideoSettings(str(root), val_fraction=0.0), "train")) == [0, 1]


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY broken", "short", "other"])
def test_damaged_files_are_said_by_name(
    tmp_path: Path, videos: VideoSet, model: EfficientSam3Train, content: bytes | str
) -> None:
    cache = make_cache(tmp_path, model)
    path = cache.path(videos.entry(0))
    path.parent.mkdir(parents=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, np.zeros((9, sum(cache.sizes)), np.float16)[: 4 if content == "other" else 9])
    if content == "short":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadVideoError, match=r"sav_000001.*damaged"):
        cache.read(videos.entry(0), np.arange(2))


def test_a_video_without_features_is_replaced(videos: VideoSet, model: EfficientSam3Train, cache: FeatureCache) -> None:
    path = cache.path(videos.entry(0))
    aside = path.with_suffix(".aside")
    path.rename(aside)
    try:
        item = batch(videos, model, cache)
        assert set(item["key"]) == {"sav_000002"} and "features are not cached" in item["bad"][0][1]
    finally:
        aside.rename(path)


def test_an_unreadable_video_does_not_end_the_filling(tmp_path: Path, model: EfficientSam3Train) -> None:
    root = clip_sets.write_sav_frames(tmp_path / "set", every=4)
    videos = open_video_set(VideoSettings(str(root), val_fraction=0.0), "train")
    (root / "sav_000001" / "00008.jpg").write_bytes(b"no picture")
    cache = make_cache(tmp_path / "cache", model)
    [(name, reason)] = fill_feature_cache(cache, model, videos)
    assert name == "sav_000001" and "00008" in reason and cache.missing(videos) == [0]


def test_ranks_share_the_work(tmp_path: Path, videos: VideoSet, model: EfficientSam3Train) -> None:
    """Each writes its own, and makes sure that it sees those of the others: machines may not share the folder."""
    cache = make_cache(tmp_path, model)
    with pytest.raises(UserError, match=r"does not see .*, which another rank has written: name a folder that all"):
        fill_feature_cache(cache, model, videos, rank=1, world_size=2)
    assert cache.missing(videos) == [0]
    fill_feature_cache(cache, model, videos, rank=0, world_size=2)
    assert cache.missing(videos) == []


def test_too_small_a_disk_is_said_before_computing(
    tmp_path: Path, videos: VideoSet, model: EfficientSam3Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("stage2.feature_cache.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=r"DATA.FEATURE_CACHE: .*GiB free.*SUBSET_FRACTION"):
        fill_feature_cache(make_cache(tmp_path, model), model, videos)


def test_features_beyond_half_precision_are_refused(
    tmp_path: Path, videos: VideoSet, model: EfficientSam3Train
) -> None:
    cache = make_cache(tmp_path, model)
    maps = type(cache.shapes)(*(torch.full((9, *shape), 1e5) for shape in cache.shapes))
    with pytest.raises(UserError, match="sav_000001: a feature is not finite in half precision"):
        cache.write(videos.entry(0), [maps])
    assert cache.missing(videos) == [0, 1]


def test_cached_features_are_not_changed(videos: VideoSet, model: EfficientSam3Train, cache: FeatureCache) -> None:
    with pytest.raises(ValueError, match="cannot be flipped"):
        VideoClips(videos, SPEC, model.preprocess, 72, LookSpec(), cache)


def test_clips_with_and_without_features_make_no_batch(
    videos: VideoSet, model: EfficientSam3Train, cache: FeatureCache
) -> None:
    sources = [VideoClips(videos, SPEC, model.preprocess, 72, features=each) for each in (None, cache)]
    with pytest.raises(ValueError, match="1 of the 2 clips"):
        collate_clips([ClipDataset(source)[0] for source in sources])
