"""The export loop: images through the teacher, features into the store.

Four things run at once: loader workers decode, the device computes, a copy stream brings features to the host, and the
writer thread encodes, checks and writes. Each hands over through a bounded queue, so memory is flat and the slowest of
them sets the pace. On the CPU the teacher has all cores, and this thread does what comes after it.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sam3_train.data.bad_images import BadImageLog
from sam3_train.embeddings import EmbeddingWriter
from sam3_train.stop_signal import StopSignal
from sam3_train.teacher import Teacher

POLL_S = 0.2


@dataclass
class ExportCounts:
    """What one rank has done since it started."""

    num_images: int = 0
    """Images that are settled: written, quarantined or unreadable."""
    num_unreadable: int = 0
    wait_seconds: float = 0.0
    """Time the loop waited for images."""


class HostCopies:
    """Brings feature maps to the host as float16 while the device goes on computing.

    On CUDA a ring of page-locked buffers and a stream of its own; a buffer is free again when the writer is done with
    it, which also bounds the memory. On the CPU the features are there already.

    Args:
        teacher: Whose features are copied.
        batch_size: Most images of a batch.
        num_buffers: Batches on their way at once.
    """

    def __init__(self, teacher: Teacher, batch_size: int, num_buffers: int = 3) -> None:
        self._is_cuda = teacher.device.type == "cuda"
        self._free: queue.Queue[Tensor] = queue.Queue()
        if self._is_cuda:
            self._stream = torch.cuda.Stream(teacher.device)
            for _ in range(num_buffers):
                shape = (batch_size, *teacher.config.embedding_shape)
                self._free.put(torch.empty(shape, dtype=torch.float16, pin_memory=True))

    def start(
        self, features: Tensor, check: Callable[[], None]
    ) -> tuple[Tensor, Callable[[], None] | None, Callable[[], None] | None]:
        """Begin to copy features (B, C, G, G).

        Args:
            features: On the teacher's device.
            check: Called while waiting for a buffer; raises if nobody will free one any more.

        Returns:
            The host tensor, float16; a call that waits until it is filled; a call that frees it.
        """
        if not self._is_cuda:
            return features.to("cpu", torch.float16), None, None
        buffer = self._next_buffer(check)
        target = buffer[: len(features)]
        done = torch.cuda.Event()
        self._stream.wait_stream(torch.cuda.current_stream(features.device))
        with torch.cuda.stream(self._stream):
            half = features.to(torch.float16)
            features.record_stream(self._stream)
            target.copy_(half, non_blocking=True)
            done.record(self._stream)
        return target, done.synchronize, lambda: self._free.put(buffer)

    def _next_buffer(self, check: Callable[[], None]) -> Tensor:
        while True:
            try:
                return self._free.get(timeout=POLL_S)
            except queue.Empty:
                check()


def export_batches(
    teacher: Teacher,
    batches: Iterable[dict[str, Any]],
    writer: EmbeddingWriter,
    done_keys: frozenset[str],
    bad_log: BadImageLog,
    stop: StopSignal,
    batch_size: int,
) -> Iterator[ExportCounts]:
    """Export batches of a loader, yielding the counts so far after each.

    Args:
        teacher: Makes the features.
        batches: From `build_export_loader`.
        writer: Opened.
        done_keys: Keys that are settled already; they are computed with their batch but not written again.
        bad_log: Accounts for unreadable images.
        stop: The loop ends before the next batch once a signal has come.
        batch_size: Most images of a batch.

    Raises:
        StoreError: If the store cannot be written.
        UserError: If there are too many unreadable images.
    """
    counts, copies = ExportCounts(), HostCopies(teacher, batch_size)
    waiting_since = time.perf_counter()
    for batch in batches:
        counts.wait_seconds += time.perf_counter() - waiting_since
        fresh = [position for position, key in enumerate(batch["key"]) if key not in done_keys]
        if fresh:
            # The whole batch is computed even if a part is done: another batch size would round differently.
            features = teacher(batch["image"])
            host, wait_ready, release = copies.start(features, writer.raise_error)
            writer.put_batch(
                [batch["key"][position] for position in fresh],
                batch["seed"][fresh].tolist(),
                host if len(fresh) == len(host) else PickedRows(host, fresh),
                wait_ready,
                release,
            )
        for key, reason in batch["bad"]:
            if key not in done_keys:
                writer.quarantine(key, reason)
                counts.num_unreadable += 1
        bad_log.record(batch["bad"])
        counts.num_images += len(fresh) + sum(key not in done_keys for key, _ in batch["bad"])
        yield counts
        if stop.requested:
            return
        waiting_since = time.perf_counter()


class PickedRows:
    """Some rows of a host tensor that may still be on its way: indexing it at once would read too early."""

    def __init__(self, rows: Tensor, positions: list[int]) -> None:
        self._rows = rows
        self._positions = positions

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, position: int) -> Tensor:
        return self._rows[self._positions[position]]
