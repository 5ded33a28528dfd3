"""What an export says before, while and after it runs."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sam3_train.embeddings import CODECS, EmbeddingWriter, StoreSpec
from sam3_train.embeddings.rank_files import ENTRY_DTYPE
from sam3_train.log import RunLog
from sam3_train.teacher import Teacher
from stage1.export import ExportCounts

KEY_BYTES = 32  # a generous guess at a key's line
LOG_EVERY_S = 30.0


@dataclass(frozen=True)
class ExportEstimate:
    """What lies ahead, over all ranks."""

    num_images: int
    num_missing: int
    record_bytes: int
    free_bytes: int

    @property
    def needed_bytes(self) -> int:
        """Bytes that the missing records will take, with keys and index entries."""
        return self.num_missing * (self.record_bytes + ENTRY_DTYPE.itemsize + KEY_BYTES)

    def lines(self, spec: StoreSpec) -> list[str]:
        """The estimate in words."""
        per_image = f"{self.record_bytes:,} bytes each ({spec.codec}, shape {' x '.join(map(str, spec.shape))})"
        return [
            f"images: {self.num_images:,}, of them {self.num_missing:,} to export at {per_image}",
            f"disk: {format_bytes(self.needed_bytes)} to write, {format_bytes(self.free_bytes)} free",
        ]

    def problem(self, directory: Path, spec: StoreSpec) -> str | None:
        """One line if the disk cannot hold the export."""
        if self.needed_bytes <= self.free_bytes:
            return None
        smallest = min(CODECS.values(), key=lambda codec: codec.payload_bytes(spec.shape))
        needed, free, small = (
            format_bytes(count)
            for count in (self.needed_bytes, self.free_bytes, self.num_missing * smallest.payload_bytes(spec.shape))
        )
        return (
            f"{directory}: the export needs {needed}, {free} are free. Use another --output, free some space, store "
            f"less (DISTILL.CODEC {smallest.name}: {small}; DATA.NUM_SAMPLES, DATA.SUBSET), or train without a store "
            "(DISTILL.ONLINE_TEACHER)"
        )


def free_bytes(directory: Path) -> int:
    """Free bytes on the disk that will hold ``directory``, which need not exist yet."""
    existing = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def measure_seconds_per_image(teacher: Teacher, batch_size: int) -> float:
    """Time of the teacher's forward per image: a warm-up, then the best of up to three passes within two seconds."""
    size = teacher.config.image_size_px
    num_images = batch_size if teacher.device.type == "cuda" else 1
    images = torch.zeros(num_images, 3, size, size, device=teacher.device)
    teacher(images)
    times: list[float] = []
    while not times or (len(times) < 3 and sum(times) < 2.0):
        start = time.perf_counter()
        teacher(images).flatten()[0].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return min(times) / num_images


def format_bytes(num_bytes: float) -> str:
    """Megabytes below one gigabyte, gigabytes above."""
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def format_seconds(seconds: float) -> str:
    """``3 h 20 min``, ``4 min 5 s`` or ``12 s``."""
    seconds = max(0, round(seconds))
    if seconds >= 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60} min"
    return f"{seconds // 60} min {seconds % 60} s" if seconds >= 60 else f"{seconds} s"


class ExportProgress:
    """A progress bar on the main rank, and a line in the log every half minute.

    Args:
        log: The run's log.
        num_missing: Images this rank has to settle.
        writer: For bytes and queue depth.
        world_size: Ranks that work alike.
    """

    def __init__(self, log: RunLog, num_missing: int, writer: EmbeddingWriter, world_size: int) -> None:
        self.log, self.writer, self.num_missing = log, writer, num_missing
        self.start = self.last_line = time.monotonic()
        self.last_numbers: dict[str, float] = {}
        title = "export" if world_size == 1 else f"export (rank 0 of {world_size})"
        is_shown = log.is_main and "TQDM_DISABLE" not in os.environ
        self.bar = tqdm(
            total=num_missing,
            desc=title,
            unit="image",
            disable=not is_shown,
            mininterval=0.5 if sys.stderr.isatty() else 5.0,
        )

    def __enter__(self) -> ExportProgress:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.bar.close()

    def update(self, counts: ExportCounts) -> None:
        """Show the newest counts."""
        stats, seconds = self.writer.stats, time.monotonic() - self.start
        rate = counts.num_images / max(seconds, 1e-9)
        self.bar.set_postfix_str(
            f"{format_bytes(stats.num_bytes)}, {stats.num_bytes / 1e6 / max(seconds, 1e-9):.0f} MB/s, "
            f"queue {self.writer.queue_depth}, waiting for images {counts.wait_seconds / max(seconds, 1e-9):.0%}",
            refresh=False,
        )
        self.bar.update(counts.num_images - self.bar.n)
        if time.monotonic() - self.last_line >= LOG_EVERY_S:
            self.last_line = time.monotonic()
            numbers = {"images_per_s": rate, "bytes": stats.num_bytes, "queue": self.writer.queue_depth}
            self.log.numbers("export", 0, counts.num_images, numbers)
            remaining = format_seconds((self.num_missing - counts.num_images) / max(rate, 1e-9))
            self.log.info(
                f"{counts.num_images}/{self.num_missing} images, {rate:.2f} images/s, eta {remaining}, "
                f"{format_bytes(stats.num_bytes)}, queue {self.writer.queue_depth}"
            )


def summary_lines(results: Sequence[dict[str, Any]], seconds: float) -> list[str]:
    """What all ranks did, from `rank_result` of each."""
    total = {name: sum(result[name] for result in results) for name in results[0]}
    mean = {name: value / len(results) for name, value in total.items()}
    seconds = max(seconds, 1e-9)
    rate = (total["num_written"] + total["num_quarantined"]) / seconds
    lines = [
        f"exported {total['num_written']:,} embeddings ({format_bytes(total['num_bytes'])}) in "
        f"{format_seconds(seconds)}: {rate:.2f} images/s, {total['num_bytes'] / 1e6 / seconds:.1f} MB/s",
        f"per rank: waited for images {mean['wait_seconds']:.1f} s and for the disk {mean['blocked_seconds']:.1f} s; "
        f"syncing took {mean['sync_seconds']:.1f} s",
    ]
    if total["num_quarantined"]:
        lines.append(
            f"warning: {total['num_quarantined']} images have no embedding ({total['num_unreadable']} unreadable, the "
            "others not finite); rankN-quarantine.txt lists them, training leaves them out. To try them again, delete "
            "that file and start the same command"
        )
    return lines


def rank_result(counts: ExportCounts, writer: EmbeddingWriter) -> dict[str, Any]:
    """One rank's share of the summary."""
    stats = writer.stats
    return {
        "num_written": stats.num_written,
        "num_quarantined": stats.num_quarantined,
        "num_unreadable": counts.num_unreadable,
        "num_bytes": stats.num_bytes,
        "wait_seconds": counts.wait_seconds,
        "blocked_seconds": stats.blocked_seconds,
        "sync_seconds": stats.sync_seconds,
    }
