"""Prompts through the loader: the same with any workers and after a resume, and new in every epoch."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from annotated_photos import make_photos, record, shape
from PIL import Image

from sam3.image_input import to_rgb_uint8
from sam3.preprocess import Preprocess
from sam3_train.data.augmentation import AugmentSpec, view_of_seed
from sam3_train.data.bad_images import BadImageLog
from sam3_train.data.distillation_dataset import DistillationDataset
from sam3_train.data.distillation_loader import build_loader
from sam3_train.data.image_index import ImageIndex, build_image_index
from sam3_train.data.samplers import ResumableDistributedSampler
from sam3_train.errors import UserError
from sam3_train.task import to_device
from stage1_geometry_finetune.config import get_defaults
from stage1_geometry_finetune.data import PromptExtras, PromptSpec, annotation_problems, prompt_spec
from stage1_geometry_finetune.prompts import PromptBatch

HW = (60, 90)
PREPROCESS = Preprocess(56)
SPEC = PromptSpec(3, num_points=(1, 3), min_area=0)
NUM_IMAGES = 7


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> ImageIndex:
    root = tmp_path_factory.mktemp("photos")
    return make_photos(
        root, {f"sa_{i}": record([shape(HW, "blob", 10 * i + j) for j in range(6)]) for i in range(NUM_IMAGES)}
    )


def dataset_of(index: ImageIndex, spec: PromptSpec = SPEC, augment: AugmentSpec | None = None) -> DistillationDataset:
    extras = PromptExtras(spec, PREPROCESS, 16, seed=5)
    return DistillationDataset(index, PREPROCESS, "online", 4, augment=augment, seed=5, extras=extras)


def epochs(
    dataset: DistillationDataset, num_workers: int, which: range, position: int = 0
) -> list[list[dict[str, Any]]]:
    """All batches of some epochs, from one loader whose workers go on living; the first epoch may start later."""
    sampler = ResumableDistributedSampler(len(dataset), seed=0)
    loader = build_loader(dataset, sampler, 3, num_workers=num_workers, pin_memory=False)
    found = []
    for epoch in which:
        sampler.set_epoch(epoch, position if epoch == which.start else 0)
        found.append(list(loader))
    return found


def ids(epoch: list[dict[str, Any]]) -> list[int]:
    return [int(i) for batch in epoch for i in batch["prompts"].prompt_ids]


def test_workers_change_nothing_and_see_every_new_epoch(photos):
    """D-92: persistent workers keep their first copy of the data set, but not its epoch."""
    dataset = dataset_of(photos, augment=AugmentSpec())
    here, there = epochs(dataset, 0, range(3)), epochs(dataset, 2, range(3))
    for mine, theirs in zip(here, there, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a["key"] == b["key"] and torch.equal(a["image"], b["image"])
            assert all(torch.equal(x, y) for x, y in zip(a["prompts"], b["prompts"], strict=True))
    every = [i for epoch in here for i in ids(epoch)]
    assert len(set(every)) == len(every), "each epoch asks something new"


def test_a_later_start_draws_what_the_first_would_have_drawn(photos):
    whole, resumed = epochs(dataset_of(photos), 0, range(4)), epochs(dataset_of(photos), 0, range(2, 4), position=3)
    assert ids(whole[2][1:]) == ids(resumed[0]) and ids(whole[3]) == ids(resumed[1])


def test_fixed_prompts_ask_the_same_in_every_epoch(photos):
    """D-96: what repeats can be cached."""
    spec = PromptSpec(3, num_points=(1, 3), min_area=0, is_fixed=True)
    first, second = epochs(dataset_of(photos, spec), 0, range(2))
    assert sorted(ids(first)) == sorted(ids(second)) and ids(first) != ids(second)


def test_global_random_numbers_neither_matter_nor_move(photos):
    """D-92: drawing prompts seeds nothing, so jitter of one image is not tied to another's."""
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = ids(epochs(dataset_of(photos), 0, range(1))[0])
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    torch.manual_seed(2)
    np.random.seed(2)
    assert first == ids(epochs(dataset_of(photos), 0, range(1))[0])


def test_a_batch_is_ragged_and_moves_as_one(photos):
    batch = epochs(dataset_of(photos, PromptSpec(4, num_points=(1, 3), min_area=0.02)), 0, range(1))[0][0]
    prompts = to_device(batch, torch.device("cpu"))["prompts"]
    assert isinstance(prompts, PromptBatch) and "damaged" not in batch
    counts = torch.bincount(prompts.image_of_object, minlength=3)
    assert counts.max() <= 4 and counts.sum() == prompts.num_objects and len(set(counts.tolist())) > 1
    assert (prompts.image_of_object.diff() >= 0).all()
    padded = ~prompts.is_point
    assert (prompts.points_xy[padded] == 0).all() and not (prompts.is_point[:, 1:] & padded[:, :-1]).any()
    for name, dtype in (("boxes_cxcywh", torch.float32), ("masks", torch.bool), ("point_labels", torch.int64)):
        assert getattr(prompts, name).dtype == dtype
    assert prompts.masks.shape[1:] == (16, 16) and prompts.masks.flatten(1).any(1).all()


@pytest.mark.parametrize("preprocess", [Preprocess(56), Preprocess(56, "letterbox")], ids=["stretch", "letterbox"])
def test_prompts_and_masks_are_where_the_view_has_the_pixels(tmp_path, preprocess):
    """D-01, D-85: the same crop, flip and mapping for pixels, points, boxes and masks; nothing lies in the padding."""
    masks = [np.zeros((120, 180), bool) for _ in range(4)]
    for i, mask in enumerate(masks):
        mask[15 + 60 * (i // 2) : 55 + 60 * (i // 2), 15 + 90 * (i % 2) : 75 + 90 * (i % 2)] = True
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], np.uint8)
    index = make_photos(tmp_path, {"sa_1": record(masks)})
    pixels = np.zeros((120, 180, 3), np.uint8)
    for mask, colour in zip(masks, colours, strict=True):
        pixels[mask] = colour
    Image.fromarray(pixels).save(tmp_path / "images/train/sa_1.jpg", quality=100, subsampling=0)
    extras = PromptExtras(PromptSpec(4, 0, 0, 1, point_sampling="centre", box_jitter=0), preprocess, 56)
    dataset = DistillationDataset(index, preprocess, "online", 4, augment=AugmentSpec(), seed=1, extras=extras)
    flips = set()
    for epoch in range(12):
        dataset.set_epoch(epoch)
        item = dataset[0]
        image, prompts = item["image"], item["prompts"]
        flips.add(view_of_seed(AugmentSpec(), item["seed"]).is_flipped)
        for box, (point,), mask in zip(prompts.boxes_cxcywh, prompts.points_xy, prompts.masks, strict=True):
            x, y = (point * 56).long().tolist()
            colour = image[:, y, x]
            assert (colour.abs() > 0.8).all() and colour.max() > 0.8, "the middle of a shape has one of their colours"
            alike = ((image - colour[:, None, None]).abs() < 0.98).all(0)  # half of the way to black; padding is there
            assert (alike & mask).sum() / (alike | mask).sum() > 0.85, "and its mask covers what has that colour"
            rows, columns = alike.any(1).nonzero(), alike.any(0).nonzero()
            seen = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            torch.testing.assert_close(corners(box) * 56, seen.float(), atol=1.0, rtol=0)
            assert item["valid"][0, y * 4 // 56, x * 4 // 56] == 1
    assert flips == {False, True}


def corners(box_cxcywh: torch.Tensor) -> torch.Tensor:
    return torch.cat([box_cxcywh[:2] - box_cxcywh[2:] / 2, box_cxcywh[:2] + box_cxcywh[2:] / 2])


def as_tar(index: ImageIndex, path: Path) -> Path:
    """The photos and annotations of an index side by side in a tar, as SA-1B ships them."""
    with tarfile.open(path, "w") as tar:
        for i in range(len(index)):
            for suffix, content in ((".jpg", index.source.read(i, index.key(i))), (".json", index.read_annotation(i))):
                member = tarfile.TarInfo(f"./{index.key(i)}{suffix}")
                member.size = len(content or b"")
                tar.addfile(member, io.BytesIO(content or b""))
    return path


def test_annotations_in_tars_give_the_same_prompts(photos, tmp_path):
    as_tar(photos, tmp_path / "sa_000000.tar")
    tars = build_image_index(tmp_path, "sa1b_tar", "train", val_fraction=0.0)
    assert len(tars) == NUM_IMAGES
    assert ids(epochs(dataset_of(tars), 0, range(1))[0]) == ids(epochs(dataset_of(photos), 0, range(1))[0])


def test_images_without_valid_masks_are_left_out_up_to_the_limit(tmp_path):
    good, empty = record([shape(HW, "disc")]), record([np.zeros(HW, bool)])
    index = make_photos(tmp_path, {"sa_1": good, "sa_2": empty, "sa_3": good, "sa_4": None, "sa_5": good})
    for limit in (2, 1):
        log = BadImageLog(tmp_path / f"bad_{limit}.txt", limit)
        loader = build_loader(dataset_of(index), None, 5, num_workers=0, pin_memory=False, bad_log=log)
        if limit == 1:
            with pytest.raises(UserError, match="2 unreadable images, more than the 1"):
                list(loader)
            continue
        (batch,) = list(loader)
        assert batch["key"] == ["sa_1", "sa_3", "sa_5"] and batch["prompts"].image_of_object.tolist() == [0, 1, 2]
    listed = (tmp_path / "bad_2.txt").read_text()
    assert "sa_2\t" in listed and "no valid mask" in listed and "sa_4\t" in listed and "no annotation" in listed


def test_a_rotated_photo_is_refused_if_its_annotation_is_not(tmp_path):
    """A camera's orientation turns the pixels; masks that were drawn on the stored ones would lie elsewhere."""
    index = make_photos(tmp_path, {"sa_1": record([shape(HW, "disc")])})
    image = index.open_image(0)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "images/train/sa_1.jpg", exif=exif)
    assert to_rgb_uint8(index.open_image(0)).shape[1:] == (90, 60)
    item = dataset_of(index)[0]
    assert "60 x 90 pixels, but this one has 90 x 60" in item["bad"]


def test_a_data_set_without_annotations_is_found_before_training(photos, tmp_path):
    assert annotation_problems(photos, 0.001) == []
    for i in range(6):
        (tmp_path / "plain").mkdir(exist_ok=True)
        photos.open_image(0).save(tmp_path / "plain" / f"{i}.jpg")
    plain = build_image_index(tmp_path / "plain", "folder", "train", val_fraction=0.0)
    (problem,) = annotation_problems(plain, 0.001)
    assert "kind folder has no annotations" in problem and "DATA.DATASET" in problem
    good = record([shape(HW, "disc")])
    bare = make_photos(tmp_path / "bare", {f"sa_{i}": None if i % 2 else good for i in range(8)})
    (problem,) = annotation_problems(bare, 0.001)
    assert "4 of 8 train images that were looked at" in problem and "sa_1.json" in problem and "0.001" in problem
    assert annotation_problems(bare, 0.5) == []


def test_prompts_follow_the_config(photos):
    cfg = get_defaults()
    cfg.MODEL.PRESET = "tiny"
    cfg.PROMPTS.MAX_OBJECTS = 2
    extras = PromptExtras.from_config(cfg, PREPROCESS, 3, is_train=True)
    assert extras.spec == PromptSpec(2) and extras.seed == 3 and extras.mask_side == 4 * 18
    val = PromptExtras.from_config(cfg, PREPROCESS, 3, is_train=False)
    first, second = epochs(DistillationDataset(photos, PREPROCESS, "online", 4, extras=val), 0, range(2))
    assert sorted(ids(first)) == sorted(ids(second))
    prompts = first[0]["prompts"]
    assert prompts.has_box.all() and prompts.is_point.all() and prompts.points_xy.shape[1] == 1
    cfg.PROMPTS.BOX_JITTER, cfg.PROMPTS.NUM_POINTS = 0.9, [3, 1]
    with pytest.raises(UserError, match=r"PROMPTS: NUM_POINTS .*\(3, 1\); BOX_JITTER must lie in \[0, 0.25\), got 0.9"):
        prompt_spec(cfg)


def test_the_default_settings_are_the_documented_ones():
    assert prompt_spec(get_defaults()) == PromptSpec()
