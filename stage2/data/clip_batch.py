"""A clip, and several clips of one length as a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate

from sam3.model.tracker_memory import TrackerFeatures
from sam3.preprocess import Preprocess


class Clip(NamedTuple):
    """T frames and K objects of one video."""

    name: str
    pixels: Tensor
    """uint8 (T, 3, S, S): resized as the model sees them, zeros in a letterbox's padding; (T, 3, 0, 0) where
    ``features`` take their place."""
    resized_hw: Tensor
    """int64 (2,): the part that is no padding."""
    coverage: Tensor
    """uint8 (T, K, M, M): share of each cell over the model's input that an object covers, in 255ths."""
    frame_numbers: Tensor
    """int64 (T,): of the video; descending where time runs backwards."""
    object_ids: Tensor
    """int64 (K,): what the annotation calls the objects."""
    num_frames: int
    """Of the whole video."""
    features: TrackerFeatures | None = None
    """What the tracker reads of the frames, T rows, from a `stage2.feature_cache.FeatureCache`."""


class ClipBatch(NamedTuple):
    """C clips of T frames with B objects in all; tensors only, so that it is pinned and moved like any batch.

    Pixels stay bytes until they are needed (`images`): a quarter of the memory on the way to the device.
    """

    pixels: Tensor
    """uint8 (C, T, 3, S, S), or (C, T, 3, 0, 0)."""
    resized_hw: Tensor
    """int64 (C, 2)."""
    coverage: Tensor
    """uint8 (T, B, M, M), in 255ths."""
    clip_of_object: Tensor
    """int64 (B,): which clip of the batch each object belongs to, ascending."""
    frame_numbers: Tensor
    """int64 (C, T)."""
    object_ids: Tensor
    """int64 (B,)."""
    num_frames: Tensor
    """int64 (C,): of the whole videos."""
    features: TrackerFeatures | None = None
    """Maps of (C, T, channels, height, width), in place of pixels."""

    @property
    def num_clips(self) -> int:
        """C."""
        return self.pixels.shape[0]

    @property
    def length(self) -> int:
        """T."""
        return self.pixels.shape[1]

    @property
    def num_objects(self) -> int:
        """B."""
        return len(self.clip_of_object)

    def images(self, preprocess: Preprocess, frames: slice | None = None) -> Tensor:
        """Frames as the model's input, made on the batch's device: float32 (C, T, 3, S, S).

        Args:
            preprocess: That of the data set.
            frames: Some of the T frames; None: all.

        Raises:
            ValueError: If the batch holds features in place of pixels.
        """
        if not self.pixels.numel():
            raise ValueError("a batch of cached features has no images")
        chosen = self.pixels[:, frames or slice(None)]
        if preprocess.mode == "stretch":
            return preprocess.normalize(chosen)
        clips = zip(chosen, self.resized_hw.tolist(), strict=True)
        return torch.stack([preprocess.normalize(clip[..., :height, :width]) for clip, (height, width) in clips])

    def coverage_tbhw(self) -> Tensor:
        """What `sam3.model.clip_forward.forward_clip` takes: float32 (T, B, M, M), 0..1."""
        return self.coverage.to(torch.float32).div_(255.0)


def join_clips(clips: Sequence[Clip]) -> ClipBatch:
    """A batch of clips of one length.

    Raises:
        ValueError: If lengths differ, or some clips hold features and others pixels.
    """
    lengths = sorted({len(clip.pixels) for clip in clips})
    if len(lengths) != 1:
        raise ValueError(f"the clips of a batch must have one length, got {lengths}")
    maps = [clip.features for clip in clips if clip.features is not None]
    if len(maps) not in (0, len(clips)):
        raise ValueError(f"{len(maps)} of the {len(clips)} clips of a batch hold features, the others pixels")
    owners = [torch.full((len(clip.object_ids),), i, dtype=torch.int64) for i, clip in enumerate(clips)]
    return ClipBatch(
        # Not torch.stack: in a worker this stacks right into the memory that it shares with the main process.
        pixels=default_collate([clip.pixels for clip in clips]),
        resized_hw=torch.stack([clip.resized_hw for clip in clips]),
        coverage=torch.cat([clip.coverage for clip in clips], dim=1),
        clip_of_object=torch.cat(owners),
        frame_numbers=torch.stack([clip.frame_numbers for clip in clips]),
        object_ids=torch.cat([clip.object_ids for clip in clips]),
        num_frames=torch.tensor([clip.num_frames for clip in clips], dtype=torch.int64),
        features=TrackerFeatures(*map(default_collate, map(list, zip(*maps, strict=True)))) if maps else None,
    )


def collate_clips(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A loader's batch.

    Args:
        items: From a `ClipDataset`.

    Returns:
        ``key`` the names of the C videos, ``bad`` a list of (name, reason) of videos that were met and replaced, and
        ``clips``, a `ClipBatch`; or only ``error``, if something ends the run.
    """
    errors = [item["error"] for item in items if "error" in item]
    if errors:
        return {"error": errors[0]}
    clips = [item["clip"] for item in items]
    return {
        "key": [clip.name for clip in clips],
        "bad": [pair for item in items for pair in item["bad"]],
        "clips": join_clips(clips),
    }
