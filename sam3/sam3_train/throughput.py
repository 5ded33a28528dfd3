"""How fast a run is, and what it waits for."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

import torch


class Throughput:
    """Counts of the time since the last `window`.

    Waiting is what the device does: on CUDA the gaps between steps on its own clock (the host runs ahead, so the time
    that it spends in the loader says little), elsewhere the time that the host waits for the loader.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._saved_at = time.monotonic()
        self._last_end: torch.cuda.Event | None = None
        self.reset()

    def reset(self) -> None:
        """Start a new window."""
        self._start = time.perf_counter()
        self._waited_s = 0.0
        self._gaps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.num_images = 0
        """Images over all ranks in this window."""

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time of the host inside the block counts as waiting for data, where there is no CUDA."""
        start = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - start

    def step_begins(self) -> None:
        """The next step's first batch is there, and its first kernel is about to be queued."""
        if self._device.type == "cuda" and self._last_end is not None:
            self._gaps.append((self._last_end, _recorded_event()))
            self._last_end = None

    def step_ends(self) -> None:
        """The step's last kernel has been queued."""
        if self._device.type == "cuda":
            self._last_end = _recorded_event()

    def window(self) -> dict[str, float]:
        """``images_per_s`` over all ranks, ``data_wait_share`` in 0..1, ``peak_memory_mb``; starts a new window.

        On CUDA the caller has just read a value from the device, so the recorded steps have ended.
        """
        elapsed_s = max(1e-9, time.perf_counter() - self._start)
        waited_s = self._waited_s
        if self._device.type == "cuda":
            waited_s = sum(end.elapsed_time(begin) for end, begin in self._gaps) / 1e3
        numbers = {
            "images_per_s": self.num_images / elapsed_s,
            "data_wait_share": min(1.0, waited_s / elapsed_s),
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


def spell_duration(seconds: float) -> str:
    """``45s``, ``12m05s`` or ``3h07m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
