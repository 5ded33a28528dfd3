"""Batches on the device: on CUDA the next one is copied while the current one is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sam3_train.task import to_device
from sam3_train.throughput import Throughput


class DeviceBatches:
    """Hands out a loader's batches on the device.

    On CUDA the copy runs on a stream of its own: call `fetch_next` when the work on the current batch has been queued.
    The loader should pin its memory. Elsewhere a batch is fetched when it is asked for.

    Args:
        batches: The loader's iterator.
        device: Where batches go.
        throughput: Told how long the host waited.
    """

    def __init__(self, batches: Iterator[Any], device: torch.device, throughput: Throughput) -> None:
        self._batches = batches
        self._device = device
        self._throughput = throughput
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: list[Any] = []

    def take(self) -> Any:
        """The next batch, ready for use on the current stream."""
        if not self._next:
            self._load()
        batch = self._next.pop()
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            _record_stream(batch, current)
        return batch

    def fetch_next(self) -> None:
        """Start to copy the batch after the current one (CUDA only)."""
        if self._stream is not None and not self._next:
            self._load()

    def _load(self) -> None:
        with self._throughput.waiting():
            batch = next(self._batches)
        if self._stream is None:
            self._next.append(to_device(batch, self._device))
            return
        with torch.cuda.stream(self._stream):
            self._next.append(to_device(batch, self._device))


def _record_stream(batch: Any, stream: torch.cuda.Stream) -> None:
    # The allocator must not hand the memory out again before the computing stream is done with it.
    if isinstance(batch, Tensor):
        batch.record_stream(stream)
    elif isinstance(batch, Mapping):
        for value in batch.values():
            _record_stream(value, stream)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            _record_stream(value, stream)
