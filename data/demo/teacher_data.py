"""Training scenes of the tiny teacher, generated once at the model's input size and read by memory map.

The pool draws from the photos of the demo world's train split, with scene numbers far beyond those of the world itself,
so that no shape of the world's splits is ever trained on.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from demo_scenes import ALIKE_STYLE, TRAINING_STYLE, Scene, make_scene
from demo_shapes import COLOURS, SHAPES
from PIL import Image
from teacher_lineups import make_lineup, make_parade
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from yacs.config import CfgNode

from sam3.config import Sam3Config
from sam3.model.prompt_sampling import boxes_from_masks
from sam3.preprocess import Preprocess

POOL_VERSION = 3
MAX_OBJECTS = 9
STYLES: dict[str, Callable[[int, str, int], Scene]] = {
    "training": functools.partial(make_scene, style=TRAINING_STYLE),
    "alike": functools.partial(make_scene, style=ALIKE_STYLE),
    "lineup": make_lineup,
    "parade": make_parade,
}
FIRST_INDEX = {"training": 1_000_000, "alike": 2_000_000, "lineup": 3_000_000, "parade": 4_000_000}
"""First scene number of the pools of a style; the demo world's own splits count from 0."""
KINDS, COLOUR_NAMES = tuple(SHAPES), tuple(COLOURS)


@dataclass(frozen=True)
class PoolSpec:
    """What decides the bytes of a pool."""

    split: str
    num_scenes: int
    seed: int
    size_px: int
    """Side of the stored images, which are stretched as the model does."""
    grid_size: int
    """Side of the stored mask coverage: that of the mask decoder's logits."""
    style: str = "training"
    """One of `STYLES`."""
    version: int = POOL_VERSION

    @classmethod
    def for_model(cls, config: Sam3Config, split: str, num_scenes: int, seed: int, style: str = "training") -> PoolSpec:
        """A pool at a model's input and mask sizes."""
        return cls(split, num_scenes, seed, config.image_size_px, config.low_res_mask_size, style)


def build_pool(folder: Path, spec: PoolSpec, num_workers: int = 2) -> Path:
    """Generate a pool unless ``folder`` already holds it whole.

    Args:
        folder: Gets ``images.npy``, ``coverage.npy``, ``boxes.npy``, ``categories.npy``, ``counts.npy`` and, last,
            ``pool.json``.
        spec: What to generate.
        num_workers: Processes that draw scenes; the result does not depend on it.

    Returns:
        The folder.
    """
    record = folder / "pool.json"
    wanted = {key: getattr(spec, key) for key in spec.__dataclass_fields__}
    if record.is_file() and json.loads(record.read_text()) == wanted:
        return folder
    record.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        "images": np.lib.format.open_memmap(
            folder / "images.npy", "w+", np.uint8, (spec.num_scenes, 3, spec.size_px, spec.size_px)
        ),
        "coverage": np.lib.format.open_memmap(
            folder / "coverage.npy", "w+", np.uint8, (spec.num_scenes, MAX_OBJECTS, spec.grid_size, spec.grid_size)
        ),
        "boxes": np.lib.format.open_memmap(folder / "boxes.npy", "w+", np.float32, (spec.num_scenes, MAX_OBJECTS, 4)),
        "categories": np.lib.format.open_memmap(
            folder / "categories.npy", "w+", np.int64, (spec.num_scenes, MAX_OBJECTS, 2)
        ),
        "counts": np.lib.format.open_memmap(folder / "counts.npy", "w+", np.int64, (spec.num_scenes,)),
    }
    jobs = [(spec, FIRST_INDEX[spec.style] + i) for i in range(spec.num_scenes)]
    with tqdm(total=len(jobs), desc=f"teacher scenes ({spec.split})", unit="scene") as bar:
        for i, (image, coverage, boxes, categories) in enumerate(_run(jobs, num_workers)):
            count = len(boxes)
            arrays["images"][i], arrays["counts"][i] = image, count
            arrays["coverage"][i, :count], arrays["boxes"][i, :count] = coverage, boxes
            arrays["categories"][i, :count] = categories
            bar.update()
    for array in arrays.values():
        array.flush()
    record.write_text(json.dumps(wanted))
    return folder


def _run(jobs: list[tuple[PoolSpec, int]], num_workers: int) -> Iterator[tuple[np.ndarray, ...]]:
    if num_workers < 2:
        yield from map(_make_entry, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(
        num_workers, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        yield from pool.imap(_make_entry, jobs, chunksize=16)


def _make_entry(job: tuple[PoolSpec, int]) -> tuple[np.ndarray, ...]:
    spec, index = job
    scene = STYLES[spec.style](spec.seed, spec.split, index)
    shapes = [item.shape for item in scene.objects]
    categories = np.array([(KINDS.index(shape.kind), COLOUR_NAMES.index(shape.colour)) for shape in shapes])
    return (*stretch_scene(scene, spec.size_px, spec.grid_size), categories)


def stretch_scene(scene: Scene, size_px: int, grid_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A scene as a model of that input size sees it.

    Returns:
        uint8 image (3, size_px, size_px); uint8 coverage 0..255 of each object (N, grid_size, grid_size); float32
        boxes (N, 4) xyxy in pixels of the model input.
    """
    preprocess = Preprocess(size_px=size_px)
    pixels = preprocess(scene.image)
    image = ((pixels * 0.5 + 0.5) * 255.0).round().to(torch.uint8)
    masks = torch.from_numpy(scene.masks)
    coverage = [
        Image.fromarray(mask).resize((grid_size, grid_size), Image.Resampling.BOX)
        for mask in scene.masks * np.uint8(255)
    ]
    boxes = preprocess.boxes_to_model(boxes_from_masks(masks), (masks.shape[1], masks.shape[2]))
    return image.numpy(), np.stack([np.asarray(one) for one in coverage]), boxes.numpy()


class ScenePool(Dataset[dict[str, Tensor]]):
    """The scenes of a pool, whole; nothing about an item is random."""

    def __init__(self, folder: Path) -> None:
        names = ("images", "coverage", "boxes", "categories", "counts")
        self._arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}

    def __len__(self) -> int:
        return len(self._arrays["counts"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "image": torch.from_numpy(self._arrays["images"][index].copy()),
            "coverage": torch.from_numpy(self._arrays["coverage"][index].copy()),
            "boxes": torch.from_numpy(self._arrays["boxes"][index].copy()),
            "categories": torch.from_numpy(self._arrays["categories"][index].copy()),
            "count": torch.tensor(int(self._arrays["counts"][index])),
        }


def build_pools(
    folder: Path, config: Sam3Config, cfg: CfgNode, is_main: bool, names: Sequence[str]
) -> dict[str, ScenePool]:
    """What names and the detector are trained and validated on; collective over the run's ranks.

    Args:
        folder: Gets one folder for each pool.
        config: Of the model.
        cfg: Has ``SEED`` and, below ``DATA``, how many scenes each pool has, and ``NUM_WORKERS``.
        is_main: Whether this rank draws what is not there yet.
        names: Of "parade", "lineup", "alike" and "val".
    """
    from sam3_train.distributed import barrier

    counts = {"parade": "PARADES", "lineup": "LINEUPS", "alike": "SCENES", "val": "VAL_SCENES"}
    wanted = {}
    for name in names:
        split, style = ("val", "alike") if name == "val" else ("train", name)
        wanted[name] = PoolSpec.for_model(config, split, cfg.DATA[counts[name]], cfg.SEED, style)
    if is_main:
        for name, spec in wanted.items():
            build_pool(folder / f"pool_{name}", spec, cfg.DATA.NUM_WORKERS)
    barrier()
    return {name: ScenePool(folder / f"pool_{name}") for name in wanted}


def choose_objects(batch: dict[str, Tensor], num_chosen: int, shuffle: bool) -> dict[str, Tensor]:
    """Pick ``num_chosen`` objects of each scene; a scene with fewer gives some of them several times.

    Args:
        batch: Collated items of a `ScenePool`.
        num_chosen: Q.
        shuffle: Pick at random (torch's global generator), or the first ones.

    Returns:
        ``image`` (B, 3, S, S), ``coverage`` (B, Q, G, G), ``boxes`` (B, Q, 4), and ``occupied`` (B, G, G), the union of
        all objects.
    """
    rows = []
    for count in batch["count"].tolist():
        order = torch.randperm(count) if shuffle else torch.arange(count)
        rows.append(order.repeat(-(-num_chosen // count))[:num_chosen])
    chosen = torch.stack(rows).to(batch["boxes"].device)
    scene = torch.arange(len(rows), device=chosen.device)[:, None]
    return {
        "image": batch["image"],
        "coverage": batch["coverage"][scene, chosen],
        "boxes": batch["boxes"][scene, chosen],
        "occupied": batch["coverage"].amax(dim=1),
    }


def flip(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Flip each scene along x and y and swap x and y, each at random (torch's global generator); colours stay true.

    Args:
        batch: Collated items of a `ScenePool`.
    """
    images, coverage, boxes = [], [], []
    last = batch["image"].shape[-1] - 1
    for image, cover, box in zip(batch["image"], batch["coverage"], batch["boxes"], strict=True):
        flip_x, flip_y, swap = (torch.rand(3) < 0.5).tolist()
        if flip_x:
            image, cover = image.flip(-1), cover.flip(-1)
            box = torch.stack([last - box[:, 2], box[:, 1], last - box[:, 0], box[:, 3]], dim=1)
        if flip_y:
            image, cover = image.flip(-2), cover.flip(-2)
            box = torch.stack([box[:, 0], last - box[:, 3], box[:, 2], last - box[:, 1]], dim=1)
        if swap:
            image, cover, box = image.mT, cover.mT, box[:, [1, 0, 3, 2]]
        images.append(image)
        coverage.append(cover)
        boxes.append(box)
    return {**batch, "image": torch.stack(images), "coverage": torch.stack(coverage), "boxes": torch.stack(boxes)}


def augment(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Flip each scene along x and y, swap x and y, permute its colour channels, change its tones: each at random.

    Random draws come from torch's global generator, whose state the training loop saves.
    """
    views = [_augment_one({name: values[i] for name, values in batch.items()}) for i in range(len(batch["image"]))]
    return {name: torch.stack([view[name] for view in views]) for name in batch}


def _augment_one(scene: dict[str, Tensor]) -> dict[str, Tensor]:
    boxes, last = scene["boxes"], scene["image"].shape[-1] - 1
    flip_x, flip_y, swap, permute, tones = (torch.rand(5) < 0.5).tolist()
    maps = {name: scene[name] for name in ("image", "coverage", "occupied")}
    if flip_x:
        maps = {name: value.flip(-1) for name, value in maps.items()}
        boxes = torch.stack([last - boxes[:, 2], boxes[:, 1], last - boxes[:, 0], boxes[:, 3]], dim=1)
    if flip_y:
        maps = {name: value.flip(-2) for name, value in maps.items()}
        boxes = torch.stack([boxes[:, 0], last - boxes[:, 3], boxes[:, 2], last - boxes[:, 1]], dim=1)
    if swap:
        maps = {name: value.mT for name, value in maps.items()}
        boxes = boxes[:, [1, 0, 3, 2]]
    if permute:
        maps["image"] = maps["image"][torch.randperm(3)]
    if tones:
        gamma, gain, offset = torch.rand(3, 3, 1, 1).to(boxes.device)
        changed = (maps["image"] / 255.0) ** (0.7 + 0.7 * gamma) * (0.7 + 0.4 * gain) + 0.2 * offset - 0.05
        changed = changed * 255.0
        maps["image"] = changed.round().clamp(0, 255).to(torch.uint8)
    return {**maps, "boxes": boxes}
