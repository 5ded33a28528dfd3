"""Frames and masks of one clip brought to the model's input, with the clip's look."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from sam3.preprocess import Preprocess
from sam3_train.data.mask_coverage import bounding_box, coverage_on_model
from stage2.data.clip_look import Look

_MOST = 255
_IS_SEEN = 127
"""`sam3.model.clip_forward.is_present` finds an object where more than half of some cell is covered."""


class ClipCanvas:
    """Knows where a video's pixels lie in the model's input.

    Args:
        size_hw: Of the video's frames.
        preprocess: That of the model.
        mask_side: M.
        look: Of the clip.
    """

    def __init__(self, size_hw: tuple[int, int], preprocess: Preprocess, mask_side: int, look: Look) -> None:
        self.size_hw = size_hw
        self.preprocess = preprocess
        self.mask_side = mask_side
        self.look = look
        self.resized_hw = preprocess.resized_hw(size_hw)

    def paint(self, frames: Iterable[Tensor], num_frames: int) -> Tensor:
        """The frames as bytes of the model's size; one at a time is in memory at its full size.

        Args:
            frames: uint8 (3, H, W) each.
            num_frames: How many, T.

        Returns:
            uint8 (T, 3, S, S), zeros in the padding.
        """
        height, width = self.resized_hw
        side = self.preprocess.size_px
        canvas = torch.zeros(num_frames, 3, side, side, dtype=torch.uint8)
        inside = canvas[..., :height, :width]
        for t, frame in enumerate(frames):
            resized = self.preprocess.resize(frame)
            inside[t] = resized.flip(-1) if self.look.is_flipped else resized
        self.look.recolour(inside)
        return canvas

    def cover(self, mask: np.ndarray) -> np.ndarray:
        """Share of each cell that a mask covers, in 255ths.

        Args:
            mask: bool (H, W).

        Returns:
            uint8 (M, M).
        """
        shown = mask[:, ::-1] if self.look.is_flipped else mask
        box = bounding_box(shown)
        if box is None:
            return np.zeros((self.mask_side, self.mask_side), np.uint8)
        top, bottom, left, right = box
        inside = shown[top:bottom, left:right]
        covered = coverage_on_model(inside, top, left, self.size_hw, self.preprocess, self.mask_side)
        return np.rint(covered.on_grid(self.mask_side).clip(0.0, 1.0) * _MOST).astype(np.uint8)


def is_seen(coverage: np.ndarray) -> np.ndarray:
    """Which objects the tracker's training takes for present: uint8 (K, M, M) to bool (K,)."""
    return np.asarray((coverage > _IS_SEEN).any(axis=(1, 2)))
