"""Loaders: the same clips for any number of workers, batches of one kind, and what a resumed run needs."""

from __future__ import annotations

import clip_sets
import fixtures_data
import pytest
import torch

from sam3.config import Sam3Config
from sam3.model.clip_forward import ClipPlan, forward_clip
from sam3.model.sam3_tracker import TrackerFeatures
from sam3.model_builder import build_sam3_image_model
from sam3.preprocess import Preprocess
from sam3_train.data.image_index import build_image_index
from sam3_train.errors import UserError
from sam3_train.task import to_device
from stage2.data.clip_choice import ClipSpec
from stage2.data.clip_loader import build_train_loader, build_val_loader
from stage2.data.clip_look import LookSpec
from stage2.data.clip_sampler import ClipSampler
from stage2.data.clip_sources import ImageClips, VideoClips
from stage2.data.sav_dataset import ClipDataset
from stage2.data.video_set import VideoSettings, open_video_set

STRETCH, SIDE = Preprocess(size_px=56), 16
NAMES = tuple(f"sav_{number:06d}" for number in range(5))


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> ClipDataset:
    """Five videos and six images."""
    root = clip_sets.write_sav_frames(tmp_path_factory.mktemp("videos"), NAMES, every=4)
    images = fixtures_data.make_sa1b_tree(tmp_path_factory.mktemp("images"), range(6), [100])
    spec = ClipSpec(lengths=((0, 2), (1, 3)))
    videos = open_video_set(VideoSettings(str(root), val_fraction=0.0), "train")
    return ClipDataset(
        VideoClips(videos, spec, STRETCH, SIDE, LookSpec()),
        ImageClips(build_image_index(images, "sa1b", "train"), spec, STRETCH, SIDE, LookSpec()),
        seed=5,
    )


def test_workers_change_nothing_and_see_the_epoch(joint: ClipDataset) -> None:
    runs = []
    for workers in (0, 2):
        sampler = ClipSampler(5, 6, batch_size=2, image_share=0.5, seed=5)
        loader = build_train_loader(joint, sampler, 2, num_workers=workers)
        batches = []
        for epoch in (0, 1):
            sampler.set_epoch(epoch)
            batches += list(loader)
        runs.append(batches)
        del loader
    assert [batch["key"] for batch in runs[0]] == [batch["key"] for batch in runs[1]]
    for one, other in zip(*runs, strict=True):
        assert one["clips"].features is None and other["clips"].features is None, "nothing is cached"
        tensors = [clips._replace(features=torch.zeros(0)) for clips in (one["clips"], other["clips"])]
        assert all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))
    assert {batch["clips"].length for batch in runs[0][:4]} == {1, 2}
    assert {batch["clips"].length for batch in runs[0][4:]} == {1, 3}, "clips have grown in the second epoch"


@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_each_global_batch_is_of_one_kind(batch_size: int, world_size: int) -> None:
    num_images, num_videos = 20, 37
    parts = []
    for rank in range(world_size):
        sampler = ClipSampler(
            num_videos, num_images, batch_size=batch_size, image_share=0.3, rank=rank, world_size=world_size
        )
        sampler.set_epoch(2)
        parts.append(list(sampler))
    batches = sampler.clip_batches + sampler.image_batches
    assert {len(part) for part in parts} == {batches * batch_size}
    assert sampler.image_batches == round(batches * 0.3)
    videos = []
    for step in range(batches):
        batch = [p for part in parts for p in part[step * batch_size : (step + 1) * batch_size]]
        assert len({position < num_images for position in batch}) == 1
        videos += [position for position in batch if position >= num_images]
    assert len(set(videos)) == len(videos) == sampler.clip_batches * batch_size * world_size
    assert len(videos) > num_videos - batch_size * world_size


def test_a_run_continues_in_the_middle_of_an_epoch() -> None:
    sampler = ClipSampler(10, batch_size=2, clips_per_video=3, seed=1)
    sampler.set_epoch(4)
    whole = list(sampler)
    assert len(whole) == 30 and sorted(position % 10 for position in whole) == sorted([*range(10)] * 3)
    sampler.set_epoch(4, 12)
    assert list(sampler) == whole[12:]
    sampler.set_epoch(5)
    assert list(sampler) != whole


def test_a_set_smaller_than_a_batch_still_makes_one() -> None:
    """D-126: SUBSET_FRACTION may leave one video; an epoch without a step would learn nothing."""
    sampler = ClipSampler(1, batch_size=4, world_size=2, rank=1)
    assert len(list(sampler)) == 4 and sampler.clip_batches == 1
    assert len(set(sampler)) == 4, "clips of one video, but other ones"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_videos": 0}, "has no video"),
        ({"image_share": 1.0, "num_images": 3}, r"must lie in \[0, 1\)"),
        ({"image_share": 0.5}, "there is no image data set"),
        ({"batch_size": 0}, "must be 1 or more"),
    ],
)
def test_impossible_orders_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ClipSampler(**{"num_videos": 4, "batch_size": 2, **settings})


def test_validation_shows_every_video_once_over_all_ranks(joint: ClipDataset) -> None:
    source = joint.videos
    assert isinstance(source, VideoClips)
    fixed = VideoClips(source.videos, source.spec.for_validation(2), STRETCH, SIDE)
    names = []
    for rank in (0, 1):
        loader = build_val_loader(ClipDataset(fixed, is_fixed=True), 2, rank, 2, num_workers=0)
        names += [name for batch in loader for name in batch["key"]]
    assert sorted(names) == list(NAMES)


def test_a_batch_is_what_the_tracker_trains_on(joint: ClipDataset) -> None:
    torch.manual_seed(0)
    config = Sam3Config.preset("tiny")
    model = build_sam3_image_model(config=config, load_from_HF=False, enable_detector=False, enable_tracker=True)
    preprocess = model.preprocess
    source = joint.videos
    assert isinstance(source, VideoClips)
    data = ClipDataset(
        VideoClips(source.videos, ClipSpec(lengths=((0, 3),)), preprocess, config.low_res_mask_size), seed=2
    )
    batch = next(iter(build_train_loader(data, ClipSampler(5, batch_size=2), 2, num_workers=0)))
    clips = to_device(batch, torch.device("cpu"))["clips"]
    images = clips.images(preprocess)
    with torch.no_grad():
        maps = [model.tracker_features(images[:, t]) for t in range(clips.length)]
        features = [TrackerFeatures(*(level[clips.clip_of_object] for level in one)) for one in maps]
        result = forward_clip(model.tracker, features, clips.coverage_tbhw(), ClipPlan("box", (0,)))
    side = config.low_res_mask_size
    assert result.outputs[2].pred_masks.shape == (clips.num_objects, 1, side, side)
