"""Drawing prompts: what the loader's workers spend on an image of SA-1B's size; a part of ``bench.py``.

    python scripts/bench.py geometry --only prompts

The photo has 1500 x 2250 pixels and a hundred objects of log-uniform size as compressed RLE; of those up to sixteen are
chosen, decoded and turned into prompts and ground-truth masks. One process, as one worker would; in processor time, so
that other programs hardly count.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sam3.image_input import to_rgb_uint8
from sam3.preprocess import Preprocess
from sam3_train.data.augmentation import View
from sam3_train.data.distillation_dataset import Photo
from sam3_train.data.image_index import ImageIndex, build_image_index
from stage1_geometry_finetune.data import PromptExtras, PromptSpec
from stage1_geometry_finetune.data.prompt_drawing import POINT_SAMPLINGS

Row = dict[str, Any]
SA1B_HW = (1500, 2250)


def bench(quick: bool, device: torch.device) -> list[Row]:
    """All rows of this part; prompts are drawn on the CPU."""
    hw, num_objects, repeats = ((90, 130), 8, 2) if quick else (SA1B_HW, 100, 20)
    with tempfile.TemporaryDirectory(prefix="bench-prompts-") as name:
        index = make_annotated_photos(Path(name), hw, num_images=1, num_objects=num_objects)
        photos = [Photo(index, 0, index.key(0), View(), hw, hw, epoch) for epoch in range(repeats + 1)]
        rows = [_photo_row(index, hw, repeats)]
        for sampling in POINT_SAMPLINGS:
            rows.append(_row(f"prompts, points by {sampling}", photos, PromptSpec(point_sampling=sampling), hw))
        for max_objects in (1, 4, 64):
            rows.append(_row(f"prompts, up to {max_objects} objects", photos, PromptSpec(max_objects), hw))
    return rows


def make_annotated_photos(folder: Path, hw: tuple[int, int], num_images: int, num_objects: int) -> ImageIndex:
    """SA-1B's layout with smooth photos and random ellipses."""
    rng = np.random.default_rng(0)
    images, annotations = folder / "images/train", folder / "annotations/train"
    images.mkdir(parents=True)
    annotations.mkdir(parents=True)
    coarse = Image.fromarray(rng.integers(0, 256, (30, 45, 3), dtype=np.uint8)).resize(hw[::-1])
    pixels = np.asarray(coarse, np.int16) + rng.integers(-20, 21, (*hw, 3))
    photo = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    for number in range(num_images):
        photo.save(images / f"sa_{number}.jpg", quality=90)
        record = {
            "image": {"image_id": number, "height": hw[0], "width": hw[1], "file_name": f"sa_{number}.jpg"},
            "annotations": [_random_object(rng, hw, i) for i in range(num_objects)],
        }
        (annotations / f"sa_{number}.json").write_text(json.dumps(record))
    return build_image_index(folder, "sa1b", "train")


def _random_object(rng: np.random.Generator, hw: tuple[int, int], number: int) -> dict[str, Any]:
    """An ellipse with wavy edge, between a hundredth and a third of the shorter side in radius."""
    from pycocotools import mask as coco_mask

    radius = min(hw) * np.exp(rng.uniform(np.log(0.01), np.log(0.33)))
    centre_y, centre_x = rng.uniform(0.05, 0.95, 2) * hw
    y, x = np.ogrid[: hw[0], : hw[1]]
    stretched = (y - centre_y) * rng.uniform(0.6, 1.6)
    edge = radius * (1 + 0.1 * np.sin(7 * np.arctan2(stretched, x - centre_x)))
    mask = np.hypot(stretched, x - centre_x) < np.maximum(edge, 1.0)
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "id": number,
        "segmentation": {"size": list(hw), "counts": rle["counts"].decode()},
        "bbox": [float(value) for value in coco_mask.toBbox(rle)],
        "area": int(mask.sum()),
        "point_coords": [[float(centre_x), float(centre_y)]],
    }


def _photo_row(index: ImageIndex, hw: tuple[int, int], repeats: int) -> Row:
    preprocess = Preprocess()

    def load() -> None:
        preprocess(to_rgb_uint8(index.open_image(0)))

    load()
    times = [_seconds(load) for _ in range(repeats)]
    note = f"{hw[0]} x {hw[1]} px, without prompts, median of {repeats}"
    return {
        "name": "decoding and resizing the photo",
        "value": 1e3 * statistics.median(times),
        "unit": "ms",
        "note": note,
    }


def _row(name: str, photos: list[Photo], spec: PromptSpec, hw: tuple[int, int]) -> Row:
    extras = PromptExtras(spec, Preprocess(), mask_side=288)
    extras.load(photos[0])
    times, objects = [], 0
    for photo in photos[1:]:
        start = time.process_time()
        objects += extras.load(photo)["prompts"].num_objects
        times.append(time.process_time() - start)
    note = f"{objects / len(times):.3g} objects per image of {hw[0]} x {hw[1]} px, median of {len(times)} epochs"
    return {"name": name, "value": 1e3 * statistics.median(times), "unit": "ms per image", "note": note}


def _seconds(function: Any) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start
