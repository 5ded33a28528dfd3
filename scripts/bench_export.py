"""Benchmark of the export: its loop against the teacher's forward alone, and its memory; a part of ``bench.py``.

    python scripts/bench.py stage1 --only export
    python scripts/bench_export.py --images 10000     # the memory of a long export alone

Both sides of a comparison run the same teacher with the same threads on the same images, which are in memory before it
starts. On the CPU checking, writing and syncing take time from the forward's cores, so it is measured with a thread per
core, and with one core left free. A teacher that takes milliseconds per image, which nobody exports, shows the loop at
its worst; the stand-in, one block of the real size at 1008 px, makes records of the real size.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_store import memory_mb
from PIL import Image
from torch.utils.data import Dataset

from sam3.config import Sam3Config
from sam3.model_builder import build_sam3_trunk
from sam3.preprocess import Preprocess
from sam3_train.data.augmentation import seed_of_key
from sam3_train.data.bad_images import BadImageLog
from sam3_train.data.distillation_loader import build_loader
from sam3_train.embeddings import EmbeddingWriter, StoreSpec, begin_export, plan_rank
from sam3_train.stop_signal import StopSignal
from sam3_train.teacher import Teacher
from stage1.export import export_batches

Row = dict[str, Any]
TINY = Sam3Config.preset("tiny")


def bench(quick: bool, device: torch.device) -> list[Row]:
    """All rows of this part."""
    turns, num_batches = (1, 2) if quick else (8, 20)
    with tempfile.TemporaryDirectory(prefix="bench-export-", dir=os.environ.get("BENCH_DIR")) as name:
        folder = Path(name)
        rows = bench_loop(folder, "tiny", random_teacher(device), 8, num_batches, turns)
        if device.type == "cpu" and torch.get_num_threads() > 1:
            with threads(torch.get_num_threads() - 1):
                rows += bench_loop(
                    folder, "tiny, a core left free", random_teacher(device), 8, 2 if quick else 20, turns
                )
        large = random_teacher(device, TINY if quick else stand_in())
        rows += bench_loop(folder, "stand-in", large, 2, 2 if quick else 3, 1 if quick else 3)
        del large
        return rows + bench_memory(folder, device, num_images=40 if quick else 10_000)


def stand_in() -> Sam3Config:
    """The released sizes with one block of 32: a fraction of a second per image on a CPU, and records of 10.6 MB."""
    config = Sam3Config.preset("sam3")
    return config.replace(trunk=dataclasses.replace(config.trunk, depth=1, global_blocks=(0,)))


def random_teacher(device: torch.device, config: Sam3Config = TINY) -> Teacher:
    """A trunk with random weights."""
    torch.manual_seed(0)
    trunk = build_sam3_trunk(config=config, load_from_HF=False, device=device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Teacher(trunk, config, Preprocess(config.image_size_px), device, dtype)


@contextlib.contextmanager
def threads(num_threads: int) -> Iterator[None]:
    """torch computes in so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bench_loop(folder: Path, name: str, teacher: Teacher, batch_size: int, num_batches: int, turns: int) -> list[Row]:
    """The loop with its copies, checks and writing, against the teacher's forward alone on the same images."""
    size = teacher.config.image_size_px
    images = torch.rand(batch_size, 3, size, size, generator=torch.Generator().manual_seed(0))
    num_images = batch_size * num_batches
    bare: list[Stopwatch] = []
    loop: list[Stopwatch] = []
    for turn in range(turns + 1):  # the first one warms up
        store = folder / f"{name}{turn}"
        sides: list[tuple[list[Stopwatch], Callable[[], None]]] = [
            (bare, partial(run_forward, teacher, images, num_batches)),
            (loop, partial(export_images, store, teacher, images, num_batches)),
        ]
        for watches, run in sides[:: 1 if turn % 2 else -1]:
            watch = Stopwatch()
            run()
            watch.stop()
            watches.extend([watch] if turn else [])
        (store / "rank0-values.bin").unlink()
    return loop_rows(name, bare, loop, num_images, f"{batch_size} x {num_batches} images, median of {turns} turns")


def loop_rows(name: str, bare: list[Stopwatch], loop: list[Stopwatch], num_images: int, note: str) -> list[Row]:
    """Medians over the turns."""
    pairs = list(zip(bare, loop, strict=True))
    overhead = statistics.median(100.0 * (b.wall_s / a.wall_s - 1.0) for a, b in pairs)
    extra_cpu = statistics.median(100.0 * (b.cpu_s / a.cpu_s - 1.0) for a, b in pairs)
    extra_ms = statistics.median(1e3 * (b.wall_s - a.wall_s) / num_images for a, b in pairs)
    forward_ms = statistics.median(1e3 * a.wall_s / num_images for a in bare)
    return [
        {"name": f"teacher forward alone ({name})", "value": forward_ms, "unit": "ms per image", "note": note},
        {
            "name": f"export loop over bare forward ({name})",
            "value": overhead,
            "unit": "% slower",
            "target": "<= 5",
            "met": overhead <= 5.0,
            "note": f"{extra_ms:.2f} ms per image; opening the store and the last sync included",
        },
        {
            "name": f"the same in processor time ({name})",
            "value": extra_cpu,
            "unit": "% more",
            "note": "all threads; does not depend on who else uses the machine",
        },
    ]


def export_images(store: Path, teacher: Teacher, images: torch.Tensor, num_batches: int) -> None:
    """The same images again and again, into a new store."""
    batches = repeated_batches(images, num_batches)
    export_synthetic(store, teacher, batches, num_batches * len(images), len(images))


class Stopwatch:
    """Wall and processor time since it was made."""

    def __init__(self) -> None:
        self._start = (time.perf_counter(), time.process_time())
        self.wall_s = self.cpu_s = 0.0

    def stop(self) -> None:
        """Fix both times."""
        self.wall_s, self.cpu_s = time.perf_counter() - self._start[0], time.process_time() - self._start[1]


def run_forward(teacher: Teacher, images: torch.Tensor, num_batches: int) -> None:
    """The bare forward passes, waited for."""
    for _ in range(num_batches):
        features = teacher(images)
    features.flatten()[0].item()


def repeated_batches(images: torch.Tensor, num_batches: int) -> Iterator[dict[str, Any]]:
    """Batches as the loader makes them, all with the same images."""
    for number in range(num_batches):
        keys = [f"sa_{number * len(images) + i}" for i in range(len(images))]
        yield {"key": keys, "seed": torch.zeros(len(images), dtype=torch.int64), "image": images, "bad": []}


def export_synthetic(
    directory: Path,
    teacher: Teacher,
    batches: Any,
    num_images: int,
    batch_size: int,
    watch: Callable[[int], object] = id,
) -> None:
    """An export without photos; ``watch`` is called with the number of images after each batch."""
    keys = [f"sa_{number}" for number in range(num_images)]
    begin_export(directory, StoreSpec(teacher.config.embedding_shape), keys, 1, batch_size)
    plan = plan_rank(directory, keys)
    in_background = teacher.device.type != "cpu"
    with StopSignal() as stop, EmbeddingWriter(directory, in_background=in_background) as writer:
        log = BadImageLog(None, 0)
        for counts in export_batches(teacher, batches, writer, plan.done_keys, log, stop, batch_size):
            watch(counts.num_images)
        if stop.requested:
            raise SystemExit(f"stopped by {stop.requested}")


class SyntheticPhotos(Dataset[dict[str, Any]]):
    """Photos of smooth noise that are made when they are asked for and go through the real preprocessing."""

    def __init__(self, num_images: int, preprocess: Preprocess) -> None:
        self.num_images, self.preprocess = num_images, preprocess

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, position: int) -> dict[str, Any]:
        key = f"sa_{position}"
        pixels = np.random.default_rng(position).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        image = self.preprocess(Image.fromarray(pixels))
        return {"key": key, "bad": "", "image": image, "seed": seed_of_key(0, key)}


def bench_memory(folder: Path, device: torch.device, num_images: int, batch_size: int = 8) -> list[Row]:
    """Anonymous memory of the exporting process over a long export: flat once it has started."""
    teacher = random_teacher(device)
    loader = build_loader(SyntheticPhotos(num_images, teacher.preprocess), None, batch_size, num_workers=1)
    samples: list[float] = []
    every = max(batch_size, num_images // 50 // batch_size * batch_size)

    def watch(num_done: int) -> None:
        if num_done % every == 0:
            samples.append(memory_mb("RssAnon"))

    start = time.perf_counter()
    export_synthetic(folder / "memory", teacher, loader, num_images, batch_size, watch)
    return memory_rows(samples, num_images, num_images / (time.perf_counter() - start))


def memory_rows(samples: list[float], num_images: int, images_per_s: float) -> list[Row]:
    """Memory in MB over an export of so many images, from its start to its end."""
    early, late = samples[: max(1, len(samples) // 10)], samples[-max(1, len(samples) // 2) :]
    growth = statistics.median(late) - statistics.median(early)
    return [
        {
            "name": f"memory at the start of a {num_images:,}-image export",
            "value": statistics.median(early),
            "unit": "MB",
            "note": "anonymous, process with the teacher; median of the first tenth",
        },
        {
            "name": "highest memory of it",
            "value": max(samples),
            "unit": "MB",
            "note": f"of {len(samples)} samples, lowest {min(samples):.0f}; {images_per_s:.1f} images/s",
        },
        {
            "name": "memory growth until its end",
            "value": growth,
            "unit": "MB",
            "target": "<= 16",
            "met": growth <= 16.0,
            "note": "median of the second half against that of the first tenth",
        },
    ]


def main(argv: list[str] | None = None) -> int:
    """The memory part alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000, metavar="N", help="images to export")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench-export-") as name:
        for row in bench_memory(Path(name), torch.device("cpu"), args.images):
            print(f"{row['name']}: {row['value']:.1f} {row['unit']} ({row['note']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
