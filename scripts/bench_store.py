"""Benchmark of the embedding store; a part of ``bench.py``.

    python scripts/bench.py stage1 --only store

What is compared is alike. A plain read copies one record after the other into one buffer, and so does the store with
`EmbeddingStore.read_into`: the same bytes and order, one thread, memory that is used again; what the store does more
(finding the key, checking the CRC) is its own cost. That row has the target. A loader wants each record in memory of
its own, which costs page faults: `EmbeddingStore.read_raw` stands beside a plain read into new buffers.

Disk speeds of a shared machine change from minute to minute, and with what the kernel did before. So each comparison
takes turns, in both orders; each cold read comes after an uncounted read of the same file, because in a virtual machine
pages that the kernel has just freed are faster than others; and a figure is the median of the turns' ratios.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sam3_train.embeddings import EmbeddingStore, EmbeddingWriter, StoreSpec, begin_export
from sam3_train.embeddings.crc import CRC_LIBRARY
from sam3_train.embeddings.key_index import KEY_INDEX_FILE, KeyIndex
from sam3_train.embeddings.rank_files import RankPaths

REAL_SHAPE = (1024, 72, 72)
MB = 1e6
Row = dict[str, Any]


def bench(quick: bool, device: torch.device) -> list[Row]:
    """All rows of this part."""
    with tempfile.TemporaryDirectory(prefix="bench-store-", dir=os.environ.get("BENCH_DIR")) as name:
        folder = Path(name)
        return [
            *bench_disk(folder, num_records=4 if quick else 24, turns=1 if quick else 10),
            *bench_key_index(folder, num_keys=2_000 if quick else 1_000_000),
        ]


def bench_disk(folder: Path, num_records: int, turns: int) -> list[Row]:
    """Store against plain sequential file I/O with records of the released size; cold reads, writes with fsync."""
    embeddings = np.random.default_rng(0).standard_normal((4, *REAL_SHAPE), dtype=np.float32).astype(np.float16)
    keys = [f"sa_{number}" for number in range(num_records)]
    spec = StoreSpec(REAL_SHAPE)
    size_mb = num_records * spec.record_bytes / MB
    speeds: dict[str, list[float]] = {}
    for turn in range(turns + 1):
        # The first turn is not counted. Each file is removed before the next is written, so that both get pages that
        # have just been freed.
        plain, store = folder / f"plain{turn}.bin", folder / f"store{turn}"
        begin_export(store, spec, keys)
        writes: dict[str, Callable[[], None]] = {
            "plain write": partial(write_plain, plain, embeddings, num_records),
            "store write": partial(write_store, store, embeddings, keys),
        }
        seconds = {name: measure(run) for name, run in in_order(writes, turn)}
        values = store / "rank0-values.bin"
        for name, run in in_order(cold_reads(plain, store, keys, spec.record_bytes), turn):
            path = plain if name.startswith("plain") else values
            drop_from_cache(path)
            read_plain(path, spec.record_bytes, reuse=True)
            drop_from_cache(path)
            seconds[name] = measure(run)
        seconds["store read, in memory"] = measure(partial(read_store, store, keys, reuse=True))
        plain.unlink()
        values.unlink()
        for name, value in seconds.items():
            speeds.setdefault(name, []).extend([size_mb / value] if turn else [])
    return disk_rows(speeds, f"median of {turns} turns of {size_mb:.0f} MB, CRC by {CRC_LIBRARY}")


def cold_reads(plain: Path, store: Path, keys: list[str], record_bytes: int) -> dict[str, Callable[[], None]]:
    """What is measured on files that are not in the cache."""
    return {
        "plain read": partial(read_plain, plain, record_bytes, reuse=True),
        "store read": partial(read_store, store, keys, reuse=True),
        "store read, CRC off": partial(read_store, store, keys, reuse=True, check_crc=False),
        "plain read, new buffers": partial(read_plain, plain, record_bytes, reuse=False),
        "store read, new arrays": partial(read_store, store, keys, reuse=False),
    }


def in_order(named: dict[str, Callable[[], None]], turn: int) -> list[tuple[str, Callable[[], None]]]:
    """Forwards in one turn, backwards in the next: whoever comes first has the disk or the cache in another state."""
    return list(named.items())[:: 1 if turn % 2 else -1]


def measure(run: Callable[[], None]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def disk_rows(speeds: dict[str, list[float]], note: str) -> list[Row]:
    """Medians, and the comparisons: medians of the turns' ratios."""
    rows: list[Row] = [
        {"name": name, "value": statistics.median(values), "unit": "MB/s"} for name, values in speeds.items()
    ]
    for name, against, has_target in (
        ("store write", "plain write", True),
        ("store read", "plain read", True),
        ("store read, new arrays", "plain read, new buffers", False),
        ("store read, new arrays", "plain read", False),
    ):
        share = statistics.median(a / b for a, b in zip(speeds[name], speeds[against], strict=True))
        row: Row = {"name": f"{name} / {against}", "value": 100.0 * share, "unit": "%", "note": note}
        rows.append({**row, "target": ">= 80", "met": share >= 0.8} if has_target else row)
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


def read_plain(path: Path, record_bytes: int, reuse: bool) -> None:
    """One file, record by record, into one buffer or into a new one each time."""
    buffer = np.empty(record_bytes, np.uint8)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer.data):
            if not reuse:
                buffer = np.empty(record_bytes, np.uint8)


def read_store(directory: Path, keys: list[str], reuse: bool, check_crc: bool = True) -> None:
    """Every record by key, into the same arrays or into new ones each time; the store is opened for it."""
    with EmbeddingStore(directory, check_crc=check_crc) as store:
        parts = store.codec.empty_parts(store.spec.shape)
        for key in keys:
            if reuse:
                store.read_into(key, parts)
            else:
                store.read_raw(key)


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
