"""What a student and its teacher are shown, and how it reaches the device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_data import make_jpeg, make_sa1b_tree
from fixtures_embeddings import make_embedding, make_seed, make_spec, make_store
from PIL import Image
from torch.utils.data import Dataset

from sam3.config import Sam3Config
from sam3.model_builder import assemble_image_model
from sam3.preprocess import Preprocess
from sam3_train.data.augmentation import AugmentSpec, seed_of_key
from sam3_train.data.bad_images import BadImageLog
from sam3_train.data.distillation_dataset import DistillationDataset
from sam3_train.data.distillation_loader import build_loader, image_index_from_config
from sam3_train.data.image_index import ImageIndex, build_image_index
from sam3_train.data.samplers import ResumableDistributedSampler
from sam3_train.embeddings import EmbeddingStore
from sam3_train.errors import UserError
from stage1.config import get_defaults

PREPROCESS = Preprocess(28)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_sa1b_tree(tmp_path / "photos")


@pytest.fixture
def index(root: Path) -> ImageIndex:
    return build_image_index(root, "sa1b", "train")


def store_of(
    index: ImageIndex, directory: Path, codec: str = "fp16", augment: AugmentSpec | None = None
) -> EmbeddingStore:
    spec = make_spec(codec=codec, augmentation=augment and augment.to_dict())
    return EmbeddingStore(make_store(directory, list(index.keys), spec=spec))


class StoredSeeds:
    """A store that holds what an export would: the seeds of its items."""

    def __init__(self, items: list[dict[str, Any]]) -> None:
        self.seeds = {item["key"]: item["seed"] for item in items}

    def read_raw(self, key: str) -> tuple[int, dict[str, np.ndarray]]:
        return self.seeds[key], {"values": np.zeros((2, 1, 1), np.float16)}


# ---- the pixels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["stretch", "letterbox"])
def test_training_and_deployment_see_the_same_pixels(tmp_path: Path, root: Path, mode: str) -> None:
    """D-01, D-64: export, training and the deployed predictor turn a photo into the same bits."""
    config = Sam3Config.preset("tiny")
    preprocess = Preprocess(config.image_size_px, mode)
    exif = Image.Exif()
    exif[0x0112] = 6  # shot with the camera on its side
    Image.open(root / "images/train/sa_1.jpg").save(root / "images/train/sa_1.jpg", exif=exif)
    Image.open(root / "images/train/sa_2.jpg").convert("L").save(root / "images/train/sa_2.jpg")
    index = build_image_index(root, "sa1b", "train")
    export = DistillationDataset(index, preprocess, "export", config.grid_size)
    train = DistillationDataset(index, preprocess, "train", config.grid_size, store=store_of(index, tmp_path / "store"))
    model = assemble_image_model(config, preprocess, enable_inst_interactivity=True, enable_detector=False).eval()
    seen: list[torch.Tensor] = []
    model.backbone.vision_backbone.trunk.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for position in range(3):
        with torch.no_grad():
            model.inst_interactive_predictor.set_image(Image.open(index.where(position)))
        assert torch.equal(export[position]["image"], seen[-1][0])
        assert torch.equal(train[position]["image"], seen[-1][0])


def test_no_annotation_is_opened(root: Path) -> None:
    """D-19, D-22: missing, empty and malformed annotations do not matter to trunk distillation."""
    (root / "annotations/train/sa_0.json").unlink()
    (root / "annotations/train/sa_1.json").write_bytes(b"")
    (root / "annotations/train/sa_2.json").write_bytes(b"[[[")
    dataset = DistillationDataset(build_image_index(root, "sa1b", "train"), PREPROCESS, "export", 2)
    assert [dataset[i]["key"] for i in range(6)] == [f"sa_{i}" for i in range(6)]
    assert not any(dataset[i]["bad"] for i in range(6))


def test_the_student_sees_the_view_its_teacher_saw(index: ImageIndex) -> None:
    """D-27: flip and crop are replayed from the stored seed, bit for bit."""
    spec = AugmentSpec()
    export = DistillationDataset(index, PREPROCESS, "export", 2, augment=spec, seed=5)
    items = [export[i] for i in range(len(index))]
    train = DistillationDataset(index, PREPROCESS, "train", 2, store=StoredSeeds(items), augment=spec, seed=999)
    plain = DistillationDataset(index, PREPROCESS, "export", 2)
    assert all(torch.equal(train[i]["image"], items[i]["image"]) for i in range(len(index)))
    assert sum(torch.equal(plain[i]["image"], items[i]["image"]) for i in range(len(index))) <= 1


def test_without_augmentation_stored_seeds_change_nothing(index: ImageIndex, tmp_path: Path) -> None:
    """D-27: files of the public tool hold random seeds that nothing used."""
    train = DistillationDataset(index, PREPROCESS, "train", 2, store=store_of(index, tmp_path / "s"))
    assert torch.equal(train[0]["image"], PREPROCESS(Image.open(index.where(0))))
    assert train[0]["seed"] == make_seed("sa_0")


def test_a_resumed_export_draws_the_same_views(index: ImageIndex) -> None:
    """Seeds depend on run seed and key, not on the order or on what was done before."""
    first = DistillationDataset(index, PREPROCESS, "export", 2, augment=AugmentSpec(), seed=5)
    again = DistillationDataset(index.select(np.array([2, 4])), PREPROCESS, "export", 2, augment=AugmentSpec(), seed=5)
    for position, earlier in ((0, 2), (1, 4)):
        assert again[position]["seed"] == first[earlier]["seed"]
        assert torch.equal(again[position]["image"], first[earlier]["image"])


def test_padding_is_marked_in_the_valid_mask(index: ImageIndex, tmp_path: Path) -> None:
    store = store_of(index, tmp_path / "s")
    letterbox = DistillationDataset(index, Preprocess(28, "letterbox"), "train", 4, store=store)
    stretch = DistillationDataset(index, Preprocess(28), "train", 4, store=store)
    assert stretch[0]["valid"].shape == (1, 4, 4) and stretch[0]["valid"].all()
    assert letterbox[0]["valid"][0].sum(1).tolist() == [4.0, 4.0, 4.0, 0.0], "48 x 32 pixels leave the bottom empty"


# ---- embeddings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("codec", "types"), [("fp16", {torch.float16}), ("int8", {torch.int8, torch.float32})])
def test_embeddings_travel_as_they_are_stored(index: ImageIndex, tmp_path: Path, codec: str, types: set) -> None:
    """D-53: the cast to float32 is the device's work."""
    store = store_of(index, tmp_path / "s", codec)
    dataset = DistillationDataset(index, PREPROCESS, "train", 2, store=store)
    batch = next(iter(build_loader(dataset, [4, 1, 2], 3, num_workers=0)))
    assert batch["key"] == ["sa_4", "sa_1", "sa_2"]
    assert {part.dtype for part in batch["embedding"].values()} == types
    decoded = store.codec.to_float(batch["embedding"])
    for row, key in enumerate(batch["key"]):
        assert torch.allclose(decoded[row], torch.from_numpy(make_embedding(key)).float(), atol=0.02)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_embedding_is_one_line_even_from_a_worker(
    index: ImageIndex, tmp_path: Path, num_workers: int
) -> None:
    """D-13: and it names file and key."""
    store = store_of(index, tmp_path / "s")
    values = tmp_path / "s" / "rank0-values.bin"
    content = bytearray(values.read_bytes())
    content[store.spec.record_bytes * 2 + 9] ^= 1
    values.write_bytes(content)
    dataset = DistillationDataset(index, PREPROCESS, "train", 2, store=EmbeddingStore(tmp_path / "s"))
    with pytest.raises(UserError, match=r"rank0-values\.bin: record 2 \(key 'sa_2'") as caught:
        list(build_loader(dataset, None, 2, num_workers=num_workers))
    assert "\n" not in str(caught.value)


# ---- unreadable photos -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["export", "online", "train"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_photo_is_left_out_and_written_down(
    root: Path, index: ImageIndex, tmp_path: Path, mode: str, num_workers: int
) -> None:
    """D-21: no grey or black stand-in reaches teacher or student."""
    store = store_of(index, tmp_path / "s") if mode == "train" else None
    (root / "images/train/sa_3.jpg").write_bytes(make_jpeg(3)[:400])
    log = BadImageLog(tmp_path / "bad_images.txt", limit=1)
    dataset = DistillationDataset(index, PREPROCESS, mode, 2, store=store)
    batches = list(build_loader(dataset, None, 3, num_workers=num_workers, bad_log=log))
    assert [batch["key"] for batch in batches] == [["sa_0", "sa_1", "sa_2"], ["sa_4", "sa_5"]]
    assert [len(batch["image"]) for batch in batches] == [3, 2]
    assert [key for key, _ in batches[1]["bad"]] == ["sa_3"] == list(log.reasons)
    (root / "images/train/sa_4.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="2 unreadable images, more than the 1"):
        list(build_loader(dataset, None, 3, num_workers=num_workers, bad_log=log))


def test_a_batch_of_unreadable_photos_ends_a_training_run(root: Path, index: ImageIndex) -> None:
    """D-21"""
    for name in ("sa_0", "sa_1"):
        (root / f"images/train/{name}.jpg").write_bytes(b"")
    loader = build_loader(DistillationDataset(index, PREPROCESS, "online", 2), None, 2, num_workers=0)
    assert next(iter(loader))["key"] == [], "an export goes on"
    loader.bad_log = BadImageLog(None, limit=5)
    with pytest.raises(UserError, match=r"no image of a batch .*sam3_train\.data\.validate"):
        next(iter(loader))


# ---- order, workers, resume --------------------------------------------------------------------------------------


def images_of(loader: Iterator[dict] | Any) -> list[tuple[list[str], torch.Tensor]]:
    return [(batch["key"], batch["image"]) for batch in loader]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_epoch_continues_with_the_same_batches(index: ImageIndex, num_workers: int) -> None:
    """D-47: order and pixels of the rest of an epoch do not depend on where it was interrupted, nor on workers."""
    dataset = DistillationDataset(index, PREPROCESS, "online", 2, augment=AugmentSpec(), seed=1)
    whole_sampler = ResumableDistributedSampler(len(index), seed=3)
    whole_sampler.set_epoch(2)
    whole = images_of(build_loader(dataset, whole_sampler, 2, num_workers=0, drop_last=True))
    sampler = ResumableDistributedSampler(len(index), seed=3)
    loader = build_loader(dataset, sampler, 2, num_workers=num_workers, drop_last=True)
    sampler.set_epoch(2, position=2)
    rest = images_of(loader)
    assert [keys for keys, _ in rest] == [keys for keys, _ in whole[1:]]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(rest, whole[1:], strict=True))


def test_running_workers_follow_the_epoch(index: ImageIndex) -> None:
    """D-92: persistent workers draw the views of the epoch they are in."""
    dataset = DistillationDataset(index, PREPROCESS, "online", 2, augment=AugmentSpec(), seed=1)
    sampler = ResumableDistributedSampler(len(index), shuffle=False)
    loader = build_loader(dataset, sampler, 6, num_workers=1)
    for epoch in (0, 1, 5):
        sampler.set_epoch(epoch)
        (batch,) = loader
        assert batch["seed"].tolist() == [seed_of_key(1, key, epoch) for key in batch["key"]]


class WhoLoads(Dataset):
    """Items that tell which process made them."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {"key": str(os.getpid()), "bad": "", "seed": torch.get_num_threads()}


def test_workers_live_as_long_as_the_loader_and_use_one_thread() -> None:
    """D-55: they are not started again each epoch."""
    loader = build_loader(WhoLoads(), None, 1, num_workers=2)
    epochs = [[(batch["key"][0], int(batch["seed"])) for batch in loader] for _ in range(3)]
    assert epochs[0] == epochs[1] == epochs[2]
    assert {threads for _, threads in epochs[0]} == {1}
    assert len({pid for pid, _ in epochs[0]} - {str(os.getpid())}) == 2


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_the_random_stream_of_the_run_alone(index: ImageIndex, num_workers: int) -> None:
    """D-47, D-92: a resumed run would otherwise draw other numbers than the uninterrupted one."""
    dataset = DistillationDataset(index, PREPROCESS, "online", 2, augment=AugmentSpec())
    torch.manual_seed(0)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    for _ in range(2):
        list(build_loader(dataset, None, 2, num_workers=num_workers))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], before_numpy)


def test_planned_batches_come_as_planned(index: ImageIndex) -> None:
    dataset = DistillationDataset(index, PREPROCESS, "export", 2)
    loader = build_loader(dataset, batches=[[5], [0, 3], [1]], num_workers=1)
    assert [batch["key"] for batch in loader] == [["sa_5"], ["sa_0", "sa_3"], ["sa_1"]]


# ---- settings ----------------------------------------------------------------------------------------------------


def test_settings_reach_the_index(root: Path, tmp_path: Path) -> None:
    data = get_defaults().DATA
    data.DATA_PATH, data.NUM_SAMPLES, data.VAL_NUM_SAMPLES = str(root), 4, 2
    assert len(image_index_from_config(data, "train")) == 4
    assert list(image_index_from_config(data, "val").keys) == ["sa_100", "sa_101"]
    (tmp_path / "bad.txt").write_text("sa_0\tbroken\n")
    data.BAD_IMAGES = str(tmp_path / "bad.txt")
    assert list(image_index_from_config(data, "train", ["sa_2"]).keys) == ["sa_1", "sa_3", "sa_4", "sa_5"]
    data.NUM_SAMPLES, data.SUBSET = -1, 0.4
    assert len(image_index_from_config(data, "train")) == 2
    data.BAD_IMAGES = str(tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match=r"DATA\.BAD_IMAGES: .*nowhere\.txt does not exist"):
        image_index_from_config(data, "train")


def test_a_mode_and_its_store_must_fit(index: ImageIndex) -> None:
    with pytest.raises(ValueError, match="'train' needs a store"):
        DistillationDataset(index, PREPROCESS, "train", 2)
    with pytest.raises(ValueError, match="'export' takes no store"):
        DistillationDataset(index, PREPROCESS, "export", 2, store=StoredSeeds([]))
    with pytest.raises(ValueError, match="'write' is not one of"):
        DistillationDataset(index, PREPROCESS, "write", 2)
