"""What a clip shows is what its masks say, wherever it comes from and however it is changed on the way."""

from __future__ import annotations

from pathlib import Path

import clip_sets
import fixtures_data
import numpy as np
import pytest
import torch

from sam3.preprocess import Preprocess
from sam3_train.data.image_index import build_image_index
from stage2.data.clip_batch import Clip, join_clips
from stage2.data.clip_choice import ClipSpec
from stage2.data.clip_look import LookSpec, draw_look
from stage2.data.clip_sources import ImageClips, VideoClips
from stage2.data.sav_dataset import ClipDataset
from stage2.data.video_set import VideoSet, VideoSettings, open_video_set

STRETCH, LETTERBOX = Preprocess(size_px=112), Preprocess.letterbox_imagenet(112)
SIDE = 32
NO_COLOURS = LookSpec(flip_share=0.5, brightness=0, contrast=0, saturation=0, hue=0, grey_share=0)


def open_videos(root: Path) -> VideoSet:
    return open_video_set(VideoSettings(str(root), val_fraction=0.0), "train")


@pytest.fixture(scope="module")
def frames_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_sets.write_sav_frames(tmp_path_factory.mktemp("frames"), ("sav_000001", "sav_000002", "sav_000003"))


@pytest.fixture(scope="module")
def mp4_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_sets.write_sav(tmp_path_factory.mktemp("mp4"))


def dataset(root: Path, spec: ClipSpec, preprocess: Preprocess = STRETCH, look: LookSpec | None = None) -> ClipDataset:
    return ClipDataset(VideoClips(open_videos(root), spec, preprocess, SIDE, look), seed=3)


def shown_numbers(clip: Clip) -> list[int]:
    """Which frames are shown, by the brightness of a row that no object touches."""
    height, width = clip.resized_hw.tolist()
    row = round(23 / clip_sets.SIZE_HW[0] * height)
    return [clip_sets.frame_number(float(frame[:, row, :width].float().median())) for frame in clip.pixels]


def is_red(clip: Clip, t: int, k: int) -> bool:
    """Whether the object's colour under its mask is that of object 0."""
    cells = (clip.coverage[t, k] == 255).nonzero()
    scale = clip.pixels.shape[-1] / SIDE
    y, x = (((cells.float() + 0.5) * scale).long()).unbind(1)
    red, green, _ = clip.pixels[t][:, y, x].float().mean(dim=1)
    return bool(red > green)


@pytest.mark.parametrize("root", ["frames_root", "mp4_root"])
@pytest.mark.parametrize("preprocess", [STRETCH, LETTERBOX], ids=["stretch", "letterbox"])
def test_masks_lie_on_their_objects_on_annotated_frames(root: str, preprocess: Preprocess, request) -> None:
    data = dataset(request.getfixturevalue(root), ClipSpec(lengths=((0, 3),), strides=(1, 2)), preprocess, NO_COLOURS)
    seen = set()
    for epoch in range(6):
        data.set_epoch(epoch)
        clip = data[epoch % 2]["clip"]
        numbers = clip.frame_numbers.tolist()
        assert shown_numbers(clip) == numbers and all(number % 4 == 0 for number in numbers)
        for k, name in enumerate(clip.object_ids.tolist()):
            assert (clip.coverage[0, k] > 127).any()
            for t, number in enumerate(numbers):
                expected = clip_sets.object_mask(number, name)
                height, width = clip.resized_hw.tolist()
                area = clip.coverage[t, k].sum() / 255 / SIDE**2 * 112**2 / (height * width)
                assert float(area) == pytest.approx(expected.mean(), abs=2e-3)
                assert not expected.any() or is_red(clip, t, k) == (name == 0)
        seen.add(int(numbers[1] > numbers[0]))
    assert seen == {0, 1}


def test_a_whole_clip_is_flipped_or_not(frames_root: Path) -> None:
    """Object 0 starts at the left border; in a mirrored clip it walks from the right."""
    spec = ClipSpec(lengths=((0, 3),), reverse_share=0.0, max_objects=2)
    data = dataset(frames_root, spec, STRETCH, NO_COLOURS)
    sides = set()
    for epoch in range(8):
        data.set_epoch(epoch)
        clip = data[0]["clip"]
        k = clip.object_ids.tolist().index(0)
        centres = [float((cover > 127).nonzero()[:, 1].float().mean()) for cover in clip.coverage[:, k]]
        steps = np.diff(centres)
        assert (steps > 0).all() or (steps < 0).all()
        sides.add(bool(steps[0] > 0))
    assert sides == {True, False}


def test_an_object_in_the_corner_stays_in_the_corner(tmp_path: Path) -> None:
    record = clip_sets.sav_record("sav_000001")
    corner = np.zeros(clip_sets.SIZE_HW, bool)
    corner[-8:, -8:] = True
    record["masklet"] = [[clip_sets.encode_mask(corner)] for _ in record["masklet"]]
    clip_sets.write_pictures(tmp_path / "sav_000001", range(0, 33, 4))
    clip_sets.write_json(tmp_path / "sav_000001/sav_000001_manual.json", record)
    for preprocess, end in ((STRETCH, SIDE), (LETTERBOX, SIDE * 3 // 4)):
        cover = dataset(tmp_path, ClipSpec(lengths=((0, 2),)), preprocess)[0]["clip"].coverage[0, 0]
        rows, columns = (cover > 127).nonzero().unbind(1)
        assert int(rows.max()) == end - 1 and int(columns.max()) == SIDE - 1
        assert int(rows.min()) >= end - 6 and int(columns.min()) >= SIDE - 4


def test_colours_change_the_same_way_on_all_frames(frames_root: Path) -> None:
    """Two frames of one clip whose pixels were equal before are equal after."""
    spec = ClipSpec(lengths=((0, 8),), reverse_share=0.0)
    plain = dataset(frames_root, spec)
    look = LookSpec(0.0, 0.4, 0.4, 0.4, 0.2, 0.0)
    changed = dataset(frames_root, spec, STRETCH, look)
    maps = []
    for epoch in range(4):
        plain.set_epoch(epoch), changed.set_epoch(epoch)
        before, after = plain[0]["clip"], changed[0]["clip"]
        assert torch.equal(before.coverage, after.coverage) and torch.equal(before.frame_numbers, after.frame_numbers)
        colours = [clip.pixels[..., ::2, ::2].transpose(0, 1).flatten(1).T.numpy() for clip in (before, after)]
        num_old, num_pairs = (len(np.unique(c, axis=0)) for c in (colours[0], np.concatenate(colours, axis=1)))
        assert num_old == num_pairs > 100, "one old colour never becomes two new ones"
        maps.append(after.pixels[0])
    assert not torch.equal(maps[0], maps[1])


def test_a_look_keeps_what_it_should() -> None:
    rng = np.random.default_rng(0)
    pixels = torch.randint(60, 190, (2, 3, 64, 80), dtype=torch.uint8)
    assert torch.equal(draw_look(None, rng).recolour(pixels.clone()), pixels)
    assert torch.equal(draw_look(LookSpec(1.0, 0, 0, 0, 0, 0), rng).recolour(pixels.clone()), pixels)
    luma = torch.tensor([0.299, 0.587, 0.114])
    turned = draw_look(LookSpec(0, 0, 0, 0.2, 0.1, 0), rng).recolour(pixels.clone())
    grey = torch.einsum("c,tchw->thw", luma, turned.float() - pixels.float())
    assert not torch.equal(turned, pixels) and float(grey.abs().mean()) < 1.0
    drained = draw_look(LookSpec(0, 0, 0, 0.2, 0.1, 1.0), rng).recolour(pixels.clone())
    assert int((drained[:, 0].int() - drained[:, 2].int()).abs().max()) <= 1
    contrast = draw_look(LookSpec(0, 0, 0.5, 0, 0, 0), rng).recolour(pixels.clone()).float()
    mean = torch.einsum("c,tchw->thw", luma, contrast - pixels.float()).mean()
    assert abs(float(mean)) < 1.0 and not torch.equal(contrast, pixels.float())
    with pytest.raises(ValueError, match="hue is a share"):
        LookSpec(hue=0.7)


def same(one: Clip, other: Clip) -> bool:
    return one.name == other.name and all(
        torch.equal(a, b) for a, b in zip(one, other, strict=True) if isinstance(a, torch.Tensor)
    )


def test_an_item_is_a_function_of_seed_epoch_and_position(frames_root: Path) -> None:
    spec = ClipSpec(lengths=((0, 3), (2, 4)), strides=(1, 2), gap_share=0.5)

    def item(seed: int, epoch: int, position: int) -> Clip:
        data = ClipDataset(VideoClips(open_videos(frames_root), spec, STRETCH, SIDE, LookSpec()), seed=seed)
        np.random.seed(seed * 7 + epoch)
        torch.manual_seed(epoch)
        data.set_epoch(epoch)
        return data[position]["clip"]

    first = item(0, 0, 1)
    assert same(first, item(0, 0, 1))
    assert not any(same(first, other) for other in (item(1, 0, 1), item(0, 1, 1), item(0, 0, 4)))
    assert item(0, 0, 4).name == first.name, "positions beyond the videos are more clips of the same ones"
    assert len(item(0, 2, 1).pixels) == 4


def test_validation_clips_do_not_change(frames_root: Path) -> None:
    data = ClipDataset(VideoClips(open_videos(frames_root), ClipSpec().for_validation(4), STRETCH, SIDE), is_fixed=True)
    before = [data[i]["clip"] for i in range(3)]
    data.set_epoch(5)
    assert all(same(clip, data[i]["clip"]) for i, clip in enumerate(before))
    assert [clip.frame_numbers.tolist() for clip in before] == [[0, 4, 8, 12]] * 3


def test_a_batch_joins_clips_of_any_numbers_of_objects(frames_root: Path) -> None:
    videos = open_videos(frames_root)
    clips = []
    for preprocess, count in ((LETTERBOX, 2), (LETTERBOX, 1)):
        source = VideoClips(videos, ClipSpec(lengths=((0, 3),), max_objects=count), preprocess, SIDE)
        data = ClipDataset(source, seed=1)
        while len(data[0]["clip"].object_ids) != count:
            data.set_epoch(data.epoch + 1)
        clips.append(data[0]["clip"])
    batch = join_clips(clips)
    assert (batch.num_clips, batch.length, batch.num_objects) == (2, 3, 3)
    assert batch.clip_of_object.tolist() == [0, 0, 1]
    assert batch.coverage_tbhw().shape == (3, 3, SIDE, SIDE) and float(batch.coverage_tbhw().max()) == 1.0
    images = batch.images(LETTERBOX)
    assert images.shape == (2, 3, 3, 112, 112) and images.dtype == torch.float32
    pixels = torch.from_numpy(clip_sets.frame_pixels(int(batch.frame_numbers[1, 2]))).permute(2, 0, 1)
    assert float((images[1, 2] - LETTERBOX(pixels)).abs().mean()) < 0.02, "JPEG aside, what the deployed model sees"
    assert torch.equal(images[1, 2, :, 84:], torch.zeros(3, 28, 112)), "padding is zero after normalisation"
    assert torch.equal(batch.images(LETTERBOX, slice(1, 2)), images[:, 1:2])
    with pytest.raises(ValueError, match="must have one length"):
        join_clips([clips[0], clips[1]._replace(pixels=clips[1].pixels[:2])])


def test_an_images_annotation_makes_a_clip_of_one_frame(tmp_path: Path) -> None:
    fixtures_data.make_sa1b_tree(tmp_path, range(4), range(100, 102))
    index = build_image_index(tmp_path, "sa1b", "train")
    source = ImageClips(index, ClipSpec(max_objects=2), LETTERBOX, SIDE, NO_COLOURS)
    clips = [source.draw(i, 0, np.random.default_rng(i)) for i in range(4)]
    for clip in clips:
        assert clip is not None and clip.pixels.shape == (1, 3, 112, 112)
        assert sorted(clip.object_ids.tolist()) == [1, 2]
        share = clip.coverage[0].float().sum(dim=(1, 2)) / 255 / (SIDE**2 * 2 / 3)  # 48 x 32 pixels: a third is padding
        for object_id, area in zip(clip.object_ids.tolist(), share.tolist(), strict=True):
            assert area == pytest.approx({1: 96, 2: 240}[object_id] / (48 * 32), rel=0.1)
