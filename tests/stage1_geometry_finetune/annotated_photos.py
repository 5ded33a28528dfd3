"""Photos with annotated shapes, as the dataset hands them to a prompt source."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sam3_train.data.augmentation import View
from sam3_train.data.distillation_dataset import Photo
from sam3_train.data.image_index import ImageIndex, build_image_index


def shape(hw: tuple[int, int], kind: str, seed: int = 0) -> np.ndarray:
    """A mask: ``corner`` rectangle in the bottom right, ``disc``, ``ring``, ``hairs`` of one pixel, or ``blob``."""
    height, width = hw
    y, x = np.mgrid[:height, :width]
    radius = np.hypot(y - height / 2, x - width / 2)
    if kind == "corner":
        return (y >= height - height // 4) & (x >= width - width // 3)
    if kind == "disc":
        return radius < min(hw) / 4
    if kind == "ring":
        return (radius < min(hw) * 0.4) & (radius > min(hw) * 0.3)
    if kind == "hairs":
        return (x % 7 == 3) & (y > height // 5) & (y < height - 3)
    rng = np.random.default_rng(seed)
    centre_y, centre_x = rng.uniform(0.1, 0.9, 2) * hw
    size = rng.uniform(0.05, 0.3) * min(hw)
    return np.hypot((y - centre_y) * rng.uniform(0.6, 1.6), x - centre_x) < size


def runs(mask: np.ndarray) -> dict[str, Any]:
    """Uncompressed RLE."""
    flat = mask.flatten(order="F").astype(np.int8)
    changes = np.flatnonzero(np.diff(flat, prepend=0))
    return {"size": list(mask.shape), "counts": np.diff([0, *changes, flat.size]).tolist()}


def record(masks: Sequence[np.ndarray], clicks: Sequence[Sequence[float]] | None = None) -> dict[str, Any]:
    """An SA-1B annotation file's content."""
    height, width = masks[0].shape
    entries = []
    for i, mask in enumerate(masks):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = [0.0, 0.0, 0.0, 0.0]
        if len(rows):
            box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
        points = [list(clicks[i])] if clicks is not None else [[0.0, 0.0]]
        entries.append(
            {
                "id": 100 + i,
                "segmentation": runs(mask),
                "bbox": [float(value) for value in box],
                "area": int(mask.sum()),
                "point_coords": points,
            }
        )
    return {"image": {"image_id": 1, "width": width, "height": height, "file_name": "sa_1.jpg"}, "annotations": entries}


def make_photos(root: Path, records: dict[str, dict[str, Any] | None], split: str = "train") -> ImageIndex:
    """An SA-1B tree with one photo per record (None: without annotation), as an index."""
    images, annotations = root / "images" / split, root / "annotations" / split
    images.mkdir(parents=True, exist_ok=True)
    annotations.mkdir(parents=True, exist_ok=True)
    for key, content in records.items():
        size = (60, 40) if content is None else (content["image"]["width"], content["image"]["height"])
        Image.new("RGB", size, (90, 120, 60)).save(images / f"{key}.jpg")
        if content is not None:
            (annotations / f"{key}.json").write_text(json.dumps(content))
    return build_image_index(root, "sa1b", split)


def photo_of(index: ImageIndex, position: int = 0, view: View | None = None, epoch: int = 0) -> Photo:
    """What the dataset would tell the prompt source."""
    width, height = index.open_image(position).size
    view = view or View()
    return Photo(index, position, index.key(position), view, (height, width), view.window((height, width))[2:], epoch)
