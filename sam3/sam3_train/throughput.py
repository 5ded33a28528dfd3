"""How fast a run is, and what it waits for."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

import torch


class Throughput:
    """Counts of the time since the last `window`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._saved_at = time.monotonic()
        self.reset()

    def reset(self) -> None:
        """Start a new window."""
        self._start = time.perf_counter()
        self._waited_s = 0.0
        self.num_images = 0
        """Images over all ranks in this window."""

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside the block counts as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - start

    def window(self) -> dict[str, float]:
        """``images_per_s`` over all ranks, ``data_wait_share`` in 0..1, ``peak_memory_mb``; starts a new window."""
        elapsed_s = max(1e-9, time.perf_counter() - self._start)
        numbers = {
            "images_per_s": self.num_images / elapsed_s,
            "data_wait_share": self._waited_s / elapsed_s,
            "peak_memory_mb": peak_memory_mb(self._device),
        }
        self.reset()
        return numbers

    def mark_saved(self) -> None:
        """A checkpoint has just been written."""
        self._saved_at = time.monotonic()

    def minutes_since_save(self) -> float:
        """Minutes since the last checkpoint or the start."""
        return (time.monotonic() - self._saved_at) / 60.0


def peak_memory_mb(device: torch.device) -> float:
    """The most memory used so far, in MiB: of the GPU on CUDA, of this process elsewhere (0 where unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
