"""Small SA-1B trees and tars, made on the spot."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def make_jpeg(seed: int, size_wh: tuple[int, int] = (48, 32)) -> bytes:
    """A smooth random photo as JPEG bytes; another seed gives other pixels."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    stream = io.BytesIO()
    coarse.resize(size_wh, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def make_annotation(image_id: int, size_wh: tuple[int, int] = (48, 32)) -> dict:
    """An SA-1B record with two rectangles: one as a polygon, one as uncompressed RLE."""
    width, height = size_wh
    mask = np.zeros((height, width), np.uint8)
    mask[4:12, 8:20] = 1
    flat = mask.flatten(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *changes, flat.size]).tolist()
    common = {"predicted_iou": 0.9, "stability_score": 0.95, "crop_box": [0, 0, width, height]}
    return {
        "image": {"image_id": image_id, "width": width, "height": height, "file_name": f"sa_{image_id}.jpg"},
        "annotations": [
            {
                "id": 1,
                "segmentation": {"size": [height, width], "counts": counts},
                "bbox": [8.0, 4.0, 12.0, 8.0],
                "area": 96,
                "point_coords": [[12.0, 8.0]],
                **common,
            },
            {
                "id": 2,
                "segmentation": [[20.0, 16.0, 40.0, 16.0, 40.0, 28.0, 20.0, 28.0]],
                "bbox": [20.0, 16.0, 20.0, 12.0],
                "area": 240,
                "point_coords": [[30.0, 20.0]],
                **common,
            },
        ],
    }


def make_sa1b_tree(root: Path, train: Iterable[int] = range(6), val: Iterable[int] = range(100, 103)) -> Path:
    """Images and annotations of some ids in SA-1B layout below ``root``; returns ``root``."""
    for split, ids in (("train", train), ("val", val)):
        (root / "images" / split).mkdir(parents=True, exist_ok=True)
        (root / "annotations" / split).mkdir(parents=True, exist_ok=True)
        for image_id in ids:
            (root / "images" / split / f"sa_{image_id}.jpg").write_bytes(make_jpeg(image_id))
            annotation = json.dumps(make_annotation(image_id))
            (root / "annotations" / split / f"sa_{image_id}.json").write_text(annotation)
    return root


def make_sa1b_tar(path: Path, ids: Iterable[int], with_annotations: bool = True) -> Path:
    """A tar as SA-1B ships them: ``./sa_N.jpg`` and ``./sa_N.json`` side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for image_id in ids:
            add_member(tar, f"./sa_{image_id}.jpg", make_jpeg(image_id))
            if with_annotations:
                add_member(tar, f"./sa_{image_id}.json", json.dumps(make_annotation(image_id)).encode())
    return path


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Append a regular file to an open tar."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
