"""How fast photos become model inputs: decoding and preprocessing per core, and whole loaders.

Called by ``bench.py stage1``. The photo is generated: smooth areas with texture, 2250 x 1500 pixels, JPEG quality 90,
about the size in bytes of one of SA-1B's.
"""

from __future__ import annotations

import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sam3.image_input import to_rgb_uint8
from sam3.preprocess import Preprocess
from sam3_train.data.decode import decode_image
from sam3_train.data.distillation_dataset import DistillationDataset
from sam3_train.data.distillation_loader import build_loader
from sam3_train.data.image_index import build_image_index

SIZE_WH = (2250, 1500)
GRID_SIZE = 72


def bench(quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """Rows for the report; see `scripts/bench.py`."""
    seconds = 0.2 if quick else 5.0
    size_wh, side = ((225, 150), 112) if quick else (SIZE_WH, 1008)
    photo = make_photo(size_wh)
    with single_thread():
        rows = bench_steps(photo, Preprocess(side), seconds)
    num_images = 8 if quick else 96
    for num_workers in sorted({0, 1, min(16, num_cores())}):
        rows.append(bench_loader(photo, Preprocess(side), num_workers, num_images))
    return rows


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_photo(size_wh: tuple[int, int]) -> bytes:
    """A JPEG file with structure at all scales, so that it decodes like a photo."""
    rng = np.random.default_rng(0)
    width, height = size_wh
    pixels = np.full((height, width, 3), 128.0)
    for cells, contrast in ((6, 60.0), (40, 25.0), (200, 10.0), (900, 6.0)):
        coarse = rng.normal(0.0, contrast, (max(2, cells * height // width), cells, 3)).astype(np.float32)
        planes = [
            np.asarray(Image.fromarray(coarse[..., channel]).resize(size_wh, Image.Resampling.BICUBIC))
            for channel in range(3)
        ]
        pixels += np.stack(planes, -1)
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def bench_steps(photo: bytes, preprocess: Preprocess, seconds: float) -> list[dict[str, Any]]:
    """Milliseconds of each step on one core, and images per second of all."""
    image = decode_image(photo, "the benchmark's photo")
    pixels = to_rgb_uint8(image)
    resized = preprocess.resize(pixels)
    steps: list[tuple[str, Callable[[], Any]]] = [
        ("decode JPEG", lambda: decode_image(photo, "the benchmark's photo")),
        ("to tensor", lambda: to_rgb_uint8(image)),
        ("resize", lambda: preprocess.resize(pixels)),
        ("normalise", lambda: preprocess.normalize(resized)),
    ]
    rows = [
        {"name": f"{name}, one core", "value": 1000 * seconds_per_call(step, seconds / 4), "unit": "ms"}
        for name, step in steps
    ]
    whole = seconds_per_call(lambda: preprocess(decode_image(photo, "the benchmark's photo")), seconds)
    side = preprocess.size_px
    note = f"{image.width} x {image.height}, {len(photo) / 1e6:.2f} MB JPEG to {side} x {side}"
    rows.append({"name": "decode and preprocess, one core", "value": 1 / whole, "unit": "images/s", "note": note})
    return rows


def bench_loader(photo: bytes, preprocess: Preprocess, num_workers: int, num_images: int) -> dict[str, Any]:
    """Images per second that reach the main process, workers already running."""
    batch_size = 4
    with tempfile.TemporaryDirectory() as folder:
        for number in range(num_images):
            (Path(folder) / f"{number:05d}.jpg").write_bytes(photo)
        index = build_image_index(folder, "folder", "train", val_fraction=0.0)
        dataset = DistillationDataset(index, preprocess, "online", GRID_SIZE)
        order = list(range(2 * batch_size * max(1, num_workers))) + list(range(num_images))
        loader = build_loader(dataset, [i % num_images for i in order], batch_size, num_workers=num_workers)
        batches = iter(loader)
        for _ in range(2 * max(1, num_workers)):
            next(batches)
        start = time.perf_counter()
        count = sum(len(batch["key"]) for batch in batches)
        speed = count / (time.perf_counter() - start)
    return {"name": f"loader, workers: {num_workers}", "value": speed, "unit": "images/s"}


def seconds_per_call(function: Callable[[], Any], seconds: float) -> float:
    """Median processor time of a call on this one core, over as many as fit (three at least), after one to warm up.

    Processor time, because what else runs on a shared machine is no property of the code.
    """
    function()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return statistics.median(times)


class single_thread:
    """torch computes on one core inside the block."""

    def __enter__(self) -> None:
        self.num_threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self.num_threads)
