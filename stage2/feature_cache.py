"""Features of the frozen backbone on disk: computed once for all annotated frames, then no step runs the backbone.

A file per video, in half precision, below a folder that is named after everything that decides the features: a file
that is there is right. Frames are cached as they are, so clips that are read from here are not flipped or recoloured.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from sam3.checkpoint_io import write_atomically
from sam3.config import Sam3Config
from sam3.model.efficient_sam3_train import EfficientSam3Train
from sam3.model.tracker_memory import TrackerFeatures
from sam3.preprocess import Preprocess
from sam3_train.distributed import all_gather_object, patient_barrier
from sam3_train.distributed import rank as own_rank
from sam3_train.errors import UserError
from stage2.data.clip_canvas import ClipCanvas
from stage2.data.clip_look import Look
from stage2.data.clip_sources import checked_frame
from stage2.data.video_entry import BadVideoError, VideoEntry
from stage2.data.video_set import VideoSet

VERSION = 1
_BYTES = 2
_RECORD = "cache.json"
_LOOKED_FOR = 1024
"""Files of which each rank makes sure: the videos of all ranks are among them."""


class FeatureCache:
    """Where the features of videos are, for one backbone and one way to prepare frames.

    Args:
        folder: Of all caches; this one's is below it.
        config: The model's description, for the maps' sizes.
        preprocess: How frames are prepared.
        weights_sha256: Hash of the weights that the features depend on (`stage2.base_file.frozen_sha256`).
        dtype: What the backbone computes in; None: float32.

    Attributes:
        folder: This cache's own.
    """

    def __init__(
        self,
        folder: str | Path,
        config: Sam3Config,
        preprocess: Preprocess,
        weights_sha256: str,
        dtype: torch.dtype | None = None,
    ) -> None:
        dim, grid = config.hidden_dim, config.grid_size
        self.shapes = TrackerFeatures((dim // 8, 4 * grid, 4 * grid), (dim // 4, 2 * grid, 2 * grid), (dim, grid, grid))  # type: ignore[arg-type]
        self.sizes = [int(np.prod(shape)) for shape in self.shapes]
        self.preprocess = preprocess
        self.description: dict[str, Any] = {
            "version": VERSION,
            "weights_sha256": weights_sha256,
            "preprocess": preprocess.to_dict(),
            "computed_in": str(dtype or torch.float32).removeprefix("torch."),
            "maps": [list(shape) for shape in self.shapes],
        }
        digest = hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()
        self.folder = Path(folder) / digest[:16]

    @property
    def bytes_per_frame(self) -> int:
        """On disk."""
        return _BYTES * sum(self.sizes)

    def path(self, entry: VideoEntry) -> Path:
        """The file of a video; another one for other annotated frames, another size of them, or changed files."""
        said = f"{entry.stamp} {entry.size_hw} {entry.frame_numbers.tolist()}"
        return self.folder / f"{entry.name}.{hashlib.sha256(said.encode()).hexdigest()[:12]}.npy"

    def missing(self, videos: VideoSet) -> list[int]:
        """Which videos of a set have no file yet, by their places."""
        return [i for i in range(len(videos)) if not self.path(videos.entry(i)).is_file()]

    def bytes_to_write(self, videos: VideoSet) -> int:
        """What the missing videos will take."""
        return self.bytes_per_frame * sum(len(videos.entry(i).frame_numbers) for i in self.missing(videos))

    def read(self, entry: VideoEntry, rows: np.ndarray) -> TrackerFeatures:
        """Features of annotated frames of a video, float16 maps with a row for each.

        Args:
            entry: The video.
            rows: Which of its annotated frames, by their places in the entry.

        Raises:
            BadVideoError: If the file is missing or damaged.
        """
        path = self.path(entry)
        try:
            stored = np.load(path, mmap_mode="r")
        except FileNotFoundError:
            raise BadVideoError(f"{entry.name}: its features are not cached, there is no {path}") from None
        except (OSError, EOFError, ValueError) as error:
            raise BadVideoError(f"{entry.name}: {path} is damaged ({error}): delete it and start again") from None
        if stored.shape != (len(entry.frame_numbers), sum(self.sizes)) or stored.dtype != np.float16:
            found = f"{stored.shape} of {stored.dtype}"
            raise BadVideoError(f"{entry.name}: {path} is damaged (it holds {found}): delete it and start again")
        levels = torch.from_numpy(stored[rows]).split(self.sizes, dim=1)
        return TrackerFeatures(*(level.unflatten(1, shape) for level, shape in zip(levels, self.shapes, strict=True)))

    def write(self, entry: VideoEntry, frames: Iterable[TrackerFeatures]) -> Path:
        """Store the features of all annotated frames of a video; the file appears whole or not at all.

        Args:
            entry: The video.
            frames: Maps of one row per frame, some frames at a time, in the entry's order; stored as they come.

        Raises:
            UserError: If they are not finite in half precision, or the file cannot be written.
        """
        path, shape = self.path(entry), (len(entry.frame_numbers), sum(self.sizes))

        def save(temporary: Path) -> None:
            stored = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
            start = 0
            for some in frames:
                rows = torch.cat([level.flatten(1).to(torch.float16) for level in some], dim=1).cpu()
                if not bool(rows.isfinite().all()):
                    raise UserError(
                        f"{entry.name}: a feature is not finite in half precision: train without DATA.FEATURE_CACHE, "
                        "or check the checkpoint"
                    )
                stored[start : start + len(rows)] = rows.numpy()
                start += len(rows)
            assert start == shape[0], f"{entry.name}: {start} of {shape[0]} frames have features"
            stored.flush()

        try:
            write_atomically(path, save)
            record = self.folder / _RECORD
            if not record.is_file():
                write_atomically(record, lambda temporary: _write_text(temporary, json.dumps(self.description)))
        except OSError as error:
            raise UserError(f"DATA.FEATURE_CACHE: cannot write {path}: {error.strerror or error}") from None
        return path


def fill_feature_cache(
    cache: FeatureCache,
    model: EfficientSam3Train,
    videos: VideoSet,
    *,
    frames_at_once: int = 8,
    dtype: torch.dtype | None = None,
    rank: int = 0,
    world_size: int = 1,
    shows_progress: bool = False,
) -> list[tuple[str, str]]:
    """Compute what is missing of some videos, each rank its share, and wait for the other ranks. Collective.

    Args:
        cache: Receives the features.
        model: Whose backbone computes them; on its device.
        videos: All of their annotated frames are stored.
        frames_at_once: Images that pass the backbone together.
        dtype: What the backbone computes in, as the cache was told.
        rank: This process.
        world_size: Number of processes.
        shows_progress: Draw a bar.

    Returns:
        Name and reason of this rank's videos that cannot be read. A clip of one of them is replaced later, as it would
        be without a cache.

    Raises:
        UserError: If the disk is too small, a file cannot be written, or ranks do not see each other's files.
    """
    missing = cache.missing(videos)
    _require_room(cache, videos, missing)
    patient_barrier()  # all ranks have looked before the first one writes
    bad: list[tuple[str, str]] = []
    for i in tqdm(missing[rank::world_size], desc="features of frames", unit="video", disable=not shows_progress):
        entry = videos.entry(i)
        try:
            cache.write(entry, _computed(model, videos, entry, cache.preprocess, frames_at_once, dtype))
        except BadVideoError as error:
            bad.append((entry.name, str(error)))
    patient_barrier()
    _require_shared(cache, videos, missing, [name for names in all_gather_object(bad) for name, _ in names])
    return bad


def release_backbone(model: EfficientSam3Train) -> None:
    """Let the backbone go, where every feature comes from a cache: its memory is free then."""
    model.backbone = nn.Identity()  # type: ignore[assignment]


def _computed(
    model: EfficientSam3Train,
    videos: VideoSet,
    entry: VideoEntry,
    preprocess: Preprocess,
    frames_at_once: int,
    dtype: torch.dtype | None,
) -> Iterator[TrackerFeatures]:
    """Features of a video's annotated frames, some frames at a time."""
    canvas = ClipCanvas(entry.size_hw, preprocess, 1, Look())
    height, width = canvas.resized_hw
    with closing(videos.layout.open_frames(entry.name)) as frames:
        for start in range(0, len(entry.frame_numbers), frames_at_once):
            numbers = entry.frame_numbers[start : start + frames_at_once].tolist()
            pixels = canvas.paint((checked_frame(frames.frame(n), entry, n) for n in numbers), len(numbers))
            images = preprocess.normalize(pixels[..., :height, :width].to(model.no_mem_embed.device))
            yield from model.clip_features(images[:, None], len(images), dtype)


def _require_shared(cache: FeatureCache, videos: VideoSet, written: list[int], bad: list[str]) -> None:
    """Look for some of the files that were just written, by this process or others."""
    for i in written[:_LOOKED_FOR]:
        entry = videos.entry(i)
        if entry.name not in bad and not cache.path(entry).is_file():
            raise UserError(
                f"DATA.FEATURE_CACHE: rank {own_rank()} does not see {cache.path(entry)}, which another rank has "
                "written: name a folder that all machines share"
            )


def _require_room(cache: FeatureCache, videos: VideoSet, missing: list[int]) -> None:
    wanted = cache.bytes_per_frame * sum(len(videos.entry(i).frame_numbers) for i in missing)
    folder = next(path for path in (cache.folder, *cache.folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise UserError(
            f"DATA.FEATURE_CACHE: features take {wanted / 2**30:.1f} GiB, {folder} has {free / 2**30:.1f} GiB free; "
            "train on fewer videos (DATA.SUBSET_FRACTION), name a folder on a larger disk, or leave it empty"
        )


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
