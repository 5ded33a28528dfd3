"""What the index knows of a video: which frames are annotated, and how much of each its objects cover."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sam3_train.errors import UserError

ABSENT, UNKNOWN = 0, 255
"""Area codes of an object that is not there, and of one that nobody annotated on this frame."""
_FULL_FRAME = 254
_STEPS_PER_OCTAVE = 8


class BadVideoError(UserError):
    """A video that cannot be used; the message names it and says why."""


@dataclass(frozen=True)
class VideoEntry:
    """One video with A annotated frames and K objects."""

    name: str
    size_hw: tuple[int, int]
    num_frames: int
    """Of the video, annotated or not."""
    frame_numbers: np.ndarray
    """int32 (A,): the annotated frames, ascending."""
    objects: np.ndarray
    """int32 (K,): what the annotation calls the objects."""
    area_codes: np.ndarray
    """uint8 (A, K), from `encode_areas`."""
    stamp: int = 0
    """Of its files, as the index knows them (`stage2.data.layouts.stamp_of`)."""


def encode_areas(areas_px: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Areas as one byte each, in eighths of an octave: 50,000 videos have some fifty million of them.

    Args:
        areas_px: Pixels, -1 where nobody annotated the object.
        size_hw: Of the frames.

    Returns:
        uint8 of the same shape: `ABSENT`, `UNKNOWN`, or a code that grows with the area.
    """
    shares = np.maximum(areas_px, 1) / (size_hw[0] * size_hw[1])
    codes = np.clip(np.ceil(_FULL_FRAME + _STEPS_PER_OCTAVE * np.log2(shares)), 1, _FULL_FRAME)
    return np.select([areas_px < 0, areas_px == 0], [UNKNOWN, ABSENT], codes).astype(np.uint8)


def is_visible(area_codes: np.ndarray, min_area: float) -> np.ndarray:
    """Where an object covers about this share of the frame or more (to an eighth of an octave), and one pixel at least.

    Args:
        area_codes: From `encode_areas`.
        min_area: Share of the frame, 0..1.
    """
    least = 1
    if min_area > 0:
        least = max(1, int(np.ceil(_FULL_FRAME + _STEPS_PER_OCTAVE * np.log2(min_area))))
    return (area_codes >= least) & (area_codes != UNKNOWN)
