"""What the text-prompted video model hands out for a frame, and how it is kept until somebody asks again."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam3.preprocess import Preprocess

_LEAST_EFFORT = 1
"""Of zlib: masks are so regular that more saves nothing."""


@dataclass(frozen=True)
class PackedMask:
    """A mask at the video's size without loss, in about a thousandth of its pixels' bytes."""

    data: bytes
    size_hw: tuple[int, int]

    @classmethod
    def pack(cls, mask_hw: np.ndarray) -> PackedMask:
        """From bool (H, W)."""
        return cls(zlib.compress(np.packbits(mask_hw).tobytes(), _LEAST_EFFORT), (mask_hw.shape[0], mask_hw.shape[1]))

    def unpack(self) -> np.ndarray:
        """Bool, (H, W)."""
        height, width = self.size_hw
        bits = np.frombuffer(zlib.decompress(self.data), dtype=np.uint8)
        return np.unpackbits(bits, count=height * width).astype(bool).reshape(height, width)


@dataclass
class FrameResult:
    """All objects of a processed frame, before any is hidden."""

    frame_idx: int
    low_res: dict[int, Tensor]
    """Object id -> logits, (4 G, 4 G)."""
    priorities: dict[int, float]
    """Object id -> who wins where masks overlap: the tracker's probability; on an object's first frame its score."""
    hidden: set[int] = field(default_factory=set)
    stats: dict[str, int] | None = None

    def at_video_size(self, preprocess: Preprocess, size_hw: tuple[int, int]) -> VideoSizeResult:
        """Enlarge the masks, one at a time."""
        masks = {}
        for obj_id, logits in self.low_res.items():
            enlarged = preprocess.masks_to_image(logits[None, None].to(torch.float32), size_hw)[0, 0]
            masks[obj_id] = (enlarged > 0).cpu().numpy()
        return VideoSizeResult(self.frame_idx, masks, dict(self.priorities), set(self.hidden), self.stats)


@dataclass
class VideoSizeResult:
    """A `FrameResult` with masks at the video's size, overlaps included."""

    frame_idx: int
    masks: dict[int, np.ndarray]
    """Object id -> bool, (H, W)."""
    priorities: dict[int, float]
    hidden: set[int]
    stats: dict[str, int] | None

    def outputs(self, living: Collection[int], scores: Mapping[int, float], size_hw: tuple[int, int]) -> dict[str, Any]:
        """What a user gets; see `Sam3VideoInference`.

        Args:
            living: Objects that exist now; others are left out.
            scores: Object id -> score.
            size_hw: Of the video.
        """
        ids = [i for i in sorted(self.masks) if i in living and i not in self.hidden and self.masks[i].any()]
        boxes = [_box_xywh(self.masks[i]) for i in ids]
        masks = _without_overlap([self.masks[i] for i in ids], [self.priorities[i] for i in ids])
        return {
            "out_obj_ids": np.array(ids, dtype=np.int64),
            "out_probs": np.array([scores[i] for i in ids], dtype=np.float32),
            "out_boxes_xywh": np.array(boxes, dtype=np.float32).reshape(-1, 4),
            "out_binary_masks": np.stack(masks) if masks else np.zeros((0, *size_hw), dtype=bool),
            "frame_stats": self.stats,
        }


@dataclass
class CachedFrame:
    """A `VideoSizeResult` as it is kept."""

    masks: dict[int, PackedMask]
    priorities: dict[int, float]
    hidden: set[int]
    stats: dict[str, int] | None


@dataclass
class OutputCache:
    """Frames that were handed out, by index."""

    frames: dict[int, CachedFrame] = field(default_factory=dict)

    def __contains__(self, frame_idx: int) -> bool:
        return frame_idx in self.frames

    def put(self, result: VideoSizeResult, living: Collection[int]) -> None:
        """Keep a frame; objects that are gone are left out."""
        masks = {i: PackedMask.pack(mask) for i, mask in result.masks.items() if i in living}
        priorities = {i: result.priorities[i] for i in masks}
        self.frames[result.frame_idx] = CachedFrame(masks, priorities, result.hidden & masks.keys(), result.stats)

    def get(self, frame_idx: int, size_hw: tuple[int, int]) -> VideoSizeResult:
        """A frame as it was; without any object if nothing is known of it."""
        cached = self.frames.get(frame_idx) or CachedFrame({}, {}, set(), None)
        masks = {i: packed.unpack() for i, packed in cached.masks.items()}
        return VideoSizeResult(frame_idx, masks, dict(cached.priorities), set(cached.hidden), cached.stats)

    def discard_objects(self, obj_ids: Collection[int]) -> None:
        """Forget objects on all frames."""
        for cached in self.frames.values():
            for obj_id in obj_ids:
                cached.masks.pop(obj_id, None)
                cached.priorities.pop(obj_id, None)
                cached.hidden.discard(obj_id)

    def keep_between(self, first: int, last: int) -> None:
        """Forget all frames outside of these."""
        for frame_idx in list(self.frames):
            if not first <= frame_idx <= last:
                del self.frames[frame_idx]


@dataclass
class HotstartBuffer:
    """Holds results back until it is known which objects stay."""

    delay: int
    """Results come out when so many are in; 0 and 1: at once."""
    waiting: list[FrameResult] = field(default_factory=list)

    def push(self, result: FrameResult) -> Iterator[FrameResult]:
        """Put in a result, take out those that need wait no longer."""
        self.waiting.append(result)
        while len(self.waiting) >= max(self.delay, 1):
            yield self.waiting.pop(0)

    def flush(self) -> Iterator[FrameResult]:
        """Take out the rest, at the end of a video."""
        while self.waiting:
            yield self.waiting.pop(0)


def _box_xywh(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Box of the pixels as fractions of the image; width and height without the last pixel, as released."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    height, width = mask.shape
    x, y = columns[0], rows[0]
    return x / width, y / height, (columns[-1] - x) / width, (rows[-1] - y) / height


def _without_overlap(masks: list[np.ndarray], priorities: list[float]) -> list[np.ndarray]:
    """Every pixel goes to one object: the one of highest priority that covers it, of equal ones the first."""
    if len(masks) < 2:
        return masks
    result = list(masks)
    taken = np.zeros_like(masks[0])
    for i in sorted(range(len(masks)), key=lambda i: -priorities[i]):
        result[i] = masks[i] & ~taken
        taken |= result[i]
    return result
