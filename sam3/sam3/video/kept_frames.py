"""Frames of a source that gives each of them only once, as far back as they are asked for again."""

from __future__ import annotations

import io
import zlib
from collections import deque

import numpy as np
from PIL import Image

_NUM_PLAIN = 2
"""Of frames that are all kept, the last ones are not compressed: they are the most likely to be read."""


class KeptFrames:
    """The last frames of a source, by index.

    A window of frames is kept as it is. Where all are kept, all but the newest are compressed without loss, as PNG
    does: a video's noise leaves about half of their size (3 MB of a frame of 1920 x 1080), for 0.1 s of a CPU a frame.
    """

    def __init__(self, num_kept: int | None) -> None:
        """
        Args:
            num_kept: How many, 1 or more; None: all.
        """
        self.num_kept = num_kept
        """May change at any time; what is gone stays gone."""
        self.num_seen = 0
        self._plain: deque[np.ndarray] = deque()
        self._packed: deque[bytes] = deque()

    @property
    def oldest(self) -> int:
        """Index of the oldest frame that is there."""
        return self.num_seen - len(self._plain) - len(self._packed)

    def append(self, pixels: np.ndarray) -> None:
        """Take the next frame, uint8 RGB (H, W, 3)."""
        self._plain.append(pixels)
        self.num_seen += 1
        if self.num_kept is None:
            while len(self._plain) > _NUM_PLAIN:
                self._packed.append(_pack(self._plain.popleft()))
            return
        while len(self._plain) + len(self._packed) > self.num_kept:
            (self._packed or self._plain).popleft()

    def __getitem__(self, index: int) -> np.ndarray:
        place = index - self.oldest
        if not 0 <= place < len(self):
            raise IndexError(f"frames {self.oldest} to {self.num_seen - 1} are kept, not {index}")
        if place < len(self._packed):
            return _unpack(self._packed[place])
        return self._plain[place - len(self._packed)]

    def __len__(self) -> int:
        return len(self._plain) + len(self._packed)

    def clear(self) -> None:
        """Let all frames go."""
        self._plain.clear()
        self._packed.clear()


def _pack(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # Of the ways to deflate, the one that is both fast and, after PNG's filters, as small as the slow ones.
    Image.fromarray(pixels).save(buffer, "png", compress_level=1, compress_type=zlib.Z_RLE)
    return buffer.getvalue()


def _unpack(packed: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(packed)) as image:
        return np.array(image)
