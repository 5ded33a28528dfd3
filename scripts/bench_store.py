"""Benchmark of the embedding store and of the export loop around the teacher; a part of ``bench.py``.

    python scripts/bench.py stage1 --only store
    python scripts/bench_store.py --images 10000      # the memory of a long export alone

Disk speeds of a shared machine change from minute to minute, so each comparison takes turns: plain, store, plain, store
and so on; its figure is the median of the turns' ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from sam3.config import Sam3Config
from sam3.model_builder import build_sam3_trunk
from sam3.preprocess import Preprocess
from sam3_train.data.augmentation import seed_of_key
from sam3_train.data.bad_images import BadImageLog
from sam3_train.embeddings import EmbeddingStore, EmbeddingWriter, StoreSpec, begin_export, plan_rank
from sam3_train.embeddings.key_index import KEY_INDEX_FILE, KeyIndex
from sam3_train.embeddings.rank_files import RankPaths
from sam3_train.stop_signal import StopSignal
from stage1.data.build import build_loader
from stage1.export import export_batches
from stage1.teacher import Teacher

REAL_SHAPE = (1024, 72, 72)
MB = 1e6
STORE_READS = (("store read", True, 2), ("store read, one thread", True, 1), ("store read, CRC off", False, 2))
"""Name, whether CRCs are checked, threads. Two, because training always reads in several workers."""
Row = dict[str, Any]


def bench(quick: bool, device: torch.device) -> list[Row]:
    """All rows of this part."""
    with tempfile.TemporaryDirectory(prefix="bench-store-", dir=os.environ.get("BENCH_DIR")) as name:
        folder = Path(name)
        return [
            *bench_disk(folder, num_records=4 if quick else 64, turns=1 if quick else 5),
            *bench_key_index(folder, num_keys=2_000 if quick else 1_000_000),
            *bench_export_loop(folder, device, num_batches=2 if quick else 20, turns=1 if quick else 5),
            *bench_memory(folder, device, num_images=40 if quick else 10_000),
        ]


def bench_disk(folder: Path, num_records: int, turns: int) -> list[Row]:
    """Store against plain sequential file I/O with records of the released size; cold reads, writes with fsync."""
    embeddings = np.random.default_rng(0).standard_normal((4, *REAL_SHAPE), dtype=np.float32).astype(np.float16)
    keys = [f"sa_{number}" for number in range(num_records)]
    spec = StoreSpec(REAL_SHAPE)
    size_mb = num_records * spec.record_bytes / MB
    speeds: dict[str, list[float]] = {}

    def measure(name: str, run: Callable[[], None]) -> None:
        start = time.perf_counter()
        run()
        if turn:
            speeds.setdefault(name, []).append(size_mb / (time.perf_counter() - start))

    for turn in range(turns + 1):
        # The first turn is not counted: memory that a virtual machine has never touched is slow once. Each file is
        # removed before the next is written, so that both get pages that have just been freed.
        plain, store = folder / f"plain{turn}.bin", folder / f"store{turn}"
        measure("plain write", partial(write_plain, plain, embeddings, num_records))
        drop_from_cache(plain)
        measure("plain read", partial(read_plain, plain, spec.record_bytes))
        plain.unlink()
        begin_export(store, spec, keys)
        measure("store write", partial(write_store, store, embeddings, keys))
        for name, check_crc, threads in STORE_READS:
            drop_from_cache(store / "rank0-values.bin")
            measure(name, partial(read_store, store, keys, check_crc, threads))
        measure("store read, in memory", partial(read_store, store, keys, check_crc=True, threads=1))
        (store / "rank0-values.bin").unlink()
    rows: list[Row] = [
        {"name": name, "value": statistics.median(values), "unit": "MB/s"} for name, values in speeds.items()
    ]
    for name, against in (("store write", "plain write"), ("store read", "plain read")):
        share = statistics.median(a / b for a, b in zip(speeds[name], speeds[against], strict=True))
        rows.append(
            {
                "name": f"{name} / {against}",
                "value": 100.0 * share,
                "unit": "%",
                "target": ">= 80",
                "met": share >= 0.8,
                "note": f"median of {turns} turns of {size_mb:.0f} MB",
            }
        )
    return rows


def write_plain(path: Path, embeddings: np.ndarray, num_records: int) -> None:
    """One file, one write per record, one fsync."""
    with open(path, "wb", buffering=0) as file:
        for number in range(num_records):
            file.write(embeddings[number % len(embeddings)].data)
        os.fsync(file.fileno())


def write_store(directory: Path, embeddings: np.ndarray, keys: list[str]) -> None:
    """The same through the writer: seed, finite check, CRC, keys, index, and syncs."""
    with EmbeddingWriter(directory) as writer:
        for number, key in enumerate(keys):
            writer.put(key, number, embeddings[number % len(embeddings)])


def read_plain(path: Path, record_bytes: int) -> None:
    """One file, record by record into one buffer."""
    buffer = bytearray(record_bytes)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            continue


def read_store(directory: Path, keys: list[str], check_crc: bool, threads: int) -> None:
    """Every record by key, by as many threads as a loader might have workers."""
    with EmbeddingStore(directory, check_crc=check_crc) as store, ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(keys), 8):  # a few at a time, so that what was read can be freed
            list(pool.map(store.read_raw, keys[start : start + 8]))


def drop_from_cache(path: Path) -> None:
    """Ask the kernel to forget a file's pages, so that the next read comes from the disk."""
    if hasattr(os, "posix_fadvise"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def bench_key_index(folder: Path, num_keys: int) -> list[Row]:
    """Cost of finding records by key in a large store."""
    paths = RankPaths(folder, 0)
    paths.keys.write_text("".join(f"sa_{number}\n" for number in range(num_keys)))
    start = time.perf_counter()
    KeyIndex(folder, [paths], [num_keys])
    build_s = time.perf_counter() - start
    before = memory_mb("RssAnon")
    index = KeyIndex(folder, [paths], [num_keys])
    wanted = [f"sa_{number}" for number in np.random.default_rng(0).integers(0, num_keys, 2000)]
    start = time.perf_counter()
    found = all(index.find(key) is not None for key in wanted)
    lookup_us = (time.perf_counter() - start) / len(wanted) * 1e6
    own_mb = memory_mb("RssAnon") - before
    size_mb = (folder / KEY_INDEX_FILE).stat().st_size / MB
    note = f"{num_keys:,} keys" if found else "keys were NOT found"
    return [
        {"name": "key index: build once", "value": build_s, "unit": "s", "note": note},
        {"name": "key index: file shared by all workers", "value": size_mb, "unit": "MB", "note": note},
        {"name": "key index: memory of its own per worker", "value": max(0.0, own_mb), "unit": "MB", "note": note},
        {"name": "key index: look-up", "value": lookup_us, "unit": "us", "note": note},
    ]


def memory_mb(field: str) -> float:
    """A line of this process's status, e.g. ``RssAnon``; nan where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(float(line.split()[1]) * 1024 / MB for line in lines if line.startswith(field + ":"))


def random_teacher(device: torch.device) -> Teacher:
    """The tiny preset's trunk with random weights."""
    config = Sam3Config.preset("tiny")
    torch.manual_seed(0)
    trunk = build_sam3_trunk(config=config, load_from_HF=False, device=device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Teacher(trunk, config, Preprocess(config.image_size_px), device, dtype)


def bench_export_loop(folder: Path, device: torch.device, num_batches: int, turns: int) -> list[Row]:
    """The loop with its copies, checks and writing, against the teacher's forward alone on the same images."""
    teacher, batch_size = random_teacher(device), 8
    size = teacher.config.image_size_px
    images = torch.rand(batch_size, 3, size, size, generator=torch.Generator().manual_seed(0))
    extra_wall, extra_cpu, bare_rates = [], [], []
    for turn in range(turns + 1):
        bare = Stopwatch()
        run_forward(teacher, images, num_batches)
        bare.stop()
        loop = Stopwatch()
        batches = repeated_batches(images, num_batches)
        export_synthetic(folder / f"loop{turn}", teacher, batches, num_batches * batch_size, batch_size)
        loop.stop()
        if turn:  # the first one warms up
            extra_wall.append(100.0 * (loop.wall_s / bare.wall_s - 1.0))
            extra_cpu.append(100.0 * (loop.cpu_s / bare.cpu_s - 1.0))
            bare_rates.append(num_batches * batch_size / bare.wall_s)
    overhead = statistics.median(extra_wall)
    return [
        {"name": "teacher forward alone (tiny)", "value": statistics.median(bare_rates), "unit": "images/s"},
        {
            "name": "export loop over bare forward",
            "value": overhead,
            "unit": "% slower",
            "target": "<= 5",
            "met": overhead <= 5.0,
            "note": f"median of {turns} turns of {num_batches} batches of {batch_size}, opening and last sync included",
        },
        {
            "name": "the same in processor time",
            "value": statistics.median(extra_cpu),
            "unit": "% more",
            "note": "all threads; does not depend on who else uses the machine",
        },
    ]


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
    with StopSignal() as stop, EmbeddingWriter(directory) as writer:
        log = BadImageLog(None, 0)
        for counts in export_batches(teacher, batches, writer, plan.done_keys, log, stop, batch_size):
            watch(counts.num_images)


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
    seconds = time.perf_counter() - start
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
            "note": f"of {len(samples)} samples, lowest {min(samples):.0f}; {num_images / seconds:.1f} images/s",
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
    with tempfile.TemporaryDirectory(prefix="bench-store-") as name:
        for row in bench_memory(Path(name), torch.device("cpu"), args.images):
            print(f"{row['name']}: {row['value']:.1f} {row['unit']} ({row['note']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
