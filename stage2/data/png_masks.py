"""Masks in PNG files: one file per frame with an object's number in each pixel, or one file per object and frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sam3.image_input import ImageInputError, open_image
from stage2.data.video_entry import BadVideoError

VOID = 255
"""Pixels that belong to nobody knows what; they count as background."""
_INDEX_MODES = ("P", "L", "1")


def read_labels(path: Path, size_hw: tuple[int, int]) -> np.ndarray:
    """The values of a PNG's pixels, uint8 (H, W).

    Raises:
        BadVideoError: If the file cannot be decoded, has another size than the video, or holds colours.
    """
    try:
        image = open_image(path)
    except ImageInputError as error:
        raise BadVideoError(str(error)) from None
    if (image.height, image.width) != size_hw:
        raise BadVideoError(
            f"{path}: the masks are {image.width} x {image.height} pixels, the video {size_hw[1]} x {size_hw[0]}"
        )
    if image.mode not in _INDEX_MODES:
        raise BadVideoError(f"{path}: holds colours ({image.mode}), not one number per object (a palette or grey PNG)")
    return np.asarray(image).astype(np.uint8)


def label_areas(labels: np.ndarray) -> np.ndarray:
    """Pixels of each value, int64 (256,), background and void left out."""
    areas = np.bincount(labels.ravel(), minlength=256)
    areas[[0, VOID]] = 0
    return areas
