"""Small annotated videos drawn here, in the layout of SA-V's extracted frames: two squares on a shaded ground."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from sam3.coco_rle import encode_mask
from stage2.data.sav_annotation import ANNOTATED_EVERY

SIZE_HW = (144, 192)
SIDE_PX = 36
COLOURS = ((235, 60, 40), (40, 90, 235))


def square(number: int, index: int) -> np.ndarray:
    """Where an object is: the first walks along the top, the second sits in the bottom right corner; bool (H, W)."""
    height, width = SIZE_HW
    mask = np.zeros(SIZE_HW, bool)
    if index == 0:
        left = 2 * number % (width - SIDE_PX)
        mask[8 : 8 + SIDE_PX, left : left + SIDE_PX] = True
    else:
        mask[height - SIDE_PX :, width - SIDE_PX :] = True
    return mask


def write_videos(root: Path, names: tuple[str, ...], num_frames: int = 33) -> Path:
    """Write ``<name>/00000.jpg`` for every annotated frame and ``<name>/<name>_manual.json``.

    Args:
        root: The data set's folder.
        names: Of the videos, which differ in their ground.
        num_frames: Of each.

    Returns:
        ``root``.
    """
    for seed, name in enumerate(names):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        numbers = range(0, num_frames, ANNOTATED_EVERY)
        for number in numbers:
            Image.fromarray(_frame(number, seed)).save(folder / f"{number:05d}.jpg", quality=90)
        record = {
            "video_id": name,
            "video_frame_count": num_frames,
            "video_height": SIZE_HW[0],
            "video_width": SIZE_HW[1],
            "masklet": [[dict(encode_mask(square(number, index))) for index in (0, 1)] for number in numbers],
            "masklet_id": [0, 1],
        }
        (folder / f"{name}_manual.json").write_text(json.dumps(record), encoding="utf-8")
    return root


def _frame(number: int, seed: int) -> np.ndarray:
    """uint8 RGB, (H, W, 3)."""
    rows, columns = np.mgrid[: SIZE_HW[0], : SIZE_HW[1]] / max(SIZE_HW)
    shades = [110 + 60 * np.sin(6 * rows * (1 + channel) + 5 * columns + seed) for channel in range(3)]
    pixels = np.stack(shades, axis=-1).astype(np.uint8)
    for index, colour in enumerate(COLOURS):
        pixels[square(number, index)] = colour
    return pixels
