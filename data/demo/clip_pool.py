"""Training clips of the tiny tracker: features of the frozen trunk, computed once, and exact masks.

The pool draws from the photos of the demo world's train (or val) split, with clip numbers far beyond those of the world
itself. It holds no images: a tracker reads nothing but the features. Half precision; about 0.2 MB a frame.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_clips import NUM_OBJECTS, make_clip
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from sam3.model.sam3_tracker import TrackerFeatures
from sam3.preprocess import Preprocess

POOL_VERSION = 1
FIRST_INDEX = 1_000_000
CLIP_FRAMES = 48
"""Length of the clips that frames are taken from; the demo world's own have as many."""
MAX_STEP = 4
"""Largest distance between frames that are kept: objects then move up to four times as fast."""
MAX_OBJECTS = NUM_OBJECTS[1]
FEATURES_PER_PASS = 8
VANISHING_SHARE = 0.6
"""Of the cuts that are drawn at random: so many show, where a clip can, an object that is gone later. With fewer, a
tracker learns that everything is always there."""


@dataclass(frozen=True)
class ClipPoolSpec:
    """What decides the bytes of a pool."""

    split: str
    num_clips: int
    kept_frames: int
    """Frames that are kept of each clip."""
    seed: int
    size_px: int
    grid_size: int
    """Side of the stored mask coverage: that of the mask decoder's logits."""
    features_sha256: str
    """Hash of all weights that the features depend on."""
    version: int = POOL_VERSION

    @classmethod
    def for_model(cls, model: Any, split: str, num_clips: int, kept_frames: int, seed: int) -> ClipPoolSpec:
        """A pool of a model's features."""
        config = model.config
        size, grid = config.image_size_px, config.low_res_mask_size
        return cls(split, num_clips, kept_frames, seed, size, grid, features_sha256(model))

    def num_bytes(self, config: Any) -> int:
        """What the pool takes on disk."""
        cells = config.hidden_dim * config.grid_size**2
        features = 2 * (cells + 4 * cells // 4 + 16 * cells // 8)  # coarse, middle, fine
        return self.num_clips * self.kept_frames * (features + MAX_OBJECTS * self.grid_size**2)


def features_sha256(model: Any) -> str:
    """Hash of the weights that `Sam3Image.tracker_features` depends on."""
    digest = hashlib.sha256()
    parts = ("backbone.vision_backbone.trunk.", "backbone.vision_backbone.sam2_convs.")
    for name, value in sorted(model.state_dict().items()):
        if name.startswith(parts) or ".sam_mask_decoder.conv_s" in name:
            digest.update(name.encode())
            numbers = torch.view_as_real(value) if value.is_complex() else value
            digest.update(numbers.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def build_pool(folder: Path, spec: ClipPoolSpec, model: Any, num_workers: int = 1) -> Path:
    """Draw the clips and compute their features, unless ``folder`` holds them already.

    Args:
        folder: Gets ``coarse.npy``, ``middle.npy``, ``fine.npy``, ``coverage.npy``, ``counts.npy`` and, last,
            ``pool.json``.
        spec: What to draw.
        model: In eval mode, with the tracker's features.
        num_workers: Processes that draw clips; the result does not depend on it.

    Returns:
        The folder.
    """
    record = folder / "pool.json"
    if record.is_file() and json.loads(record.read_text()) == asdict(spec):
        return folder
    record.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    config, size = model.config, (spec.num_clips, spec.kept_frames)
    dim, grid = config.hidden_dim, config.grid_size
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "fine": ((*size, dim // 8, 4 * grid, 4 * grid), np.float16),
        "middle": ((*size, dim // 4, 2 * grid, 2 * grid), np.float16),
        "coarse": ((*size, dim, grid, grid), np.float16),
        "coverage": ((*size, MAX_OBJECTS, spec.grid_size, spec.grid_size), np.uint8),
        "counts": ((spec.num_clips,), np.int64),
    }
    arrays = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
        for name, (shape, dtype) in shapes.items()
    }
    jobs = [(spec, FIRST_INDEX + i) for i in range(spec.num_clips)]
    with tqdm(total=len(jobs), desc=f"tracker clips ({spec.split})", unit="clip") as bar:
        for i, (images, coverage) in enumerate(_run(jobs, num_workers)):
            arrays["coverage"][i, :, : coverage.shape[1]], arrays["counts"][i] = coverage, coverage.shape[1]
            for start in range(0, len(images), FEATURES_PER_PASS):
                features = encode_frames(model, images[start : start + FEATURES_PER_PASS])
                for name, values in features._asdict().items():
                    arrays[name][i, start : start + FEATURES_PER_PASS] = values.cpu().numpy()
            bar.update()
    for array in arrays.values():
        array.flush()
    record.write_text(json.dumps(asdict(spec)))
    return folder


@torch.inference_mode()
def encode_frames(model: Any, images: np.ndarray) -> TrackerFeatures:
    """Features of uint8 frames (N, 3, S, S), already at the model's size, as float16."""
    device = next(model.parameters()).device
    pixels = torch.stack([model.preprocess.normalize(torch.from_numpy(image)) for image in images])
    features = model.tracker_features(pixels.to(device))
    return TrackerFeatures(*(values.to(torch.float16) for values in features))


def _run(jobs: list[tuple[ClipPoolSpec, int]], num_workers: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if num_workers < 1:
        yield from map(draw_clip, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(
        num_workers, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        yield from pool.imap(draw_clip, jobs, chunksize=2)


def draw_clip(job: tuple[ClipPoolSpec, int]) -> tuple[np.ndarray, np.ndarray]:
    """Frames as the model sees them, uint8 (T, 3, S, S), and coverage 0..255 of each object, uint8 (T, N, G, G).

    At least one object is in the first frame that is kept.
    """
    spec, index = job
    rng = np.random.default_rng([spec.seed, index])
    clip = make_clip(spec.seed, spec.split, index, CLIP_FRAMES)
    step = int(rng.integers(1, MAX_STEP + 1))
    step = min(step, (CLIP_FRAMES - 1) // max(1, spec.kept_frames - 1))
    last_start = CLIP_FRAMES - 1 - step * (spec.kept_frames - 1)
    frames = int(rng.integers(0, last_start + 1)) + step * np.arange(spec.kept_frames)
    if rng.random() < 0.5:
        frames = frames[::-1]  # objects that vanish appear, and the reverse
    drawn = [clip.frame(int(t)) for t in frames]
    preprocess = Preprocess(size_px=spec.size_px)
    images, coverage = [], []
    for image, masks in drawn:
        images.append(((preprocess(image) * 0.5 + 0.5) * 255.0).round().to(torch.uint8).numpy())
        coverage.append(np.stack([_shrink(mask, spec.grid_size) for mask in masks]))
    return np.stack(images), np.stack(coverage)


def _shrink(mask: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(mask * np.uint8(255)).resize((side, side), Image.Resampling.BOX))


class ClipPool(Dataset[dict[str, Tensor]]):
    """The clips of a pool, whole; nothing about an item is random."""

    def __init__(self, folder: Path) -> None:
        names = ("fine", "middle", "coarse", "coverage", "counts")
        self._arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}

    def __len__(self) -> int:
        return len(self._arrays["counts"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = {
            name: torch.from_numpy(self._arrays[name][index].copy())
            for name in ("fine", "middle", "coarse", "coverage")
        }
        return {**item, "count": torch.tensor(int(self._arrays["counts"][index]))}


@dataclass(frozen=True)
class ClipBatch:
    """Objects of several clips of one length, tracked at once."""

    features: list[TrackerFeatures]
    """Of each frame, one row per object, float32."""
    coverage_tbhw: Tensor
    """float32, 0..1."""
    clip_of_object: Tensor
    """Which clip of the batch each object belongs to, (B,)."""


def choose_clips(batch: dict[str, Tensor], num_frames: int, num_chosen: int, shuffle: bool) -> ClipBatch:
    """Cut ``num_frames`` frames out of each clip and pick ``num_chosen`` of the objects that their first frame shows.

    Clips with fewer objects there give all they have. A cut whose first frame shows nothing is moved. With ``shuffle``,
    objects that vanish are preferred.

    Args:
        batch: Collated items of a `ClipPool`.
        num_frames: T.
        num_chosen: Most objects of each clip.
        shuffle: Start, distance of frames and objects at random (torch's global generator), or always the same.

    Raises:
        ValueError: If the clips are shorter, or none shows an object.
    """
    total = batch["coverage"].shape[1]
    if num_frames > total:
        raise ValueError(f"clips of {num_frames} frames can't be cut from stored ones of {total}")
    maps: list[TrackerFeatures] = []
    coverage, owners = [], []
    for i, count in enumerate(batch["count"].tolist()):
        covered = batch["coverage"][i, :, :count]
        shown = (covered > 127).flatten(2).sum(2) >= 4  # (total, count): a few cells at least
        frames = _cut(shown, num_frames, shuffle)
        if frames is None:
            continue
        visible = shown[frames[0]].nonzero()[:, 0]
        order = visible[torch.randperm(len(visible))] if shuffle else visible
        if shuffle:
            order = order[torch.argsort(shown[frames][:, order].all(dim=0).int(), stable=True)]  # who vanishes first
        chosen = order[:num_chosen]
        rows = [batch[name][i, frames].float() for name in TrackerFeatures._fields]
        maps += [TrackerFeatures(*rows)] * len(chosen)
        coverage.append(covered[frames][:, chosen].float() / 255.0)
        owners += [i] * len(chosen)
    if not maps:
        raise ValueError("no clip of the batch shows an object")
    features = [
        TrackerFeatures(*(torch.stack([getattr(one, name)[t] for one in maps]) for name in TrackerFeatures._fields))
        for t in range(num_frames)
    ]
    device = batch["coverage"].device
    return ClipBatch(features, torch.cat(coverage, dim=1), torch.tensor(owners, device=device))


def _cut(shown: Tensor, num_frames: int, shuffle: bool) -> Tensor | None:
    """Indices of frames, the first of which shows something; None if no frame can be the first."""
    total = len(shown)
    cuts = [
        start + step * torch.arange(num_frames)
        for step in (1, 2)
        for start in range(total - step * (num_frames - 1))
        if shown[start].any()
    ]
    if not cuts or not shuffle:
        return cuts[0] if cuts else None
    if float(torch.rand(())) < VANISHING_SHARE:
        cuts = [cut for cut in cuts if (shown[cut[0]] & ~shown[cut].all(dim=0)).any()] or cuts
    return cuts[int(torch.randint(len(cuts), ()))]
