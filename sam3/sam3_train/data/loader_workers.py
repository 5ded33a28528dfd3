"""Data loader workers that survive a stop signal for as long as the run needs them, and not longer.

A stop signal often goes to a whole process group (torchrun, Slurm, Ctrl-C). A run then still has to finish its step and
save, and a worker that died would break that off; so workers ignore the signal. But the same signal is how the
interpreter and torch end workers that did not end by themselves; so there comes a moment when it counts.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import weakref
from typing import Any

import torch
from torch.utils.data import DataLoader


class LoaderWorkers:
    """The workers of one loader; ``start`` is its ``worker_init_fn``.

    Args:
        num_workers: How many.
    """

    def __init__(self, num_workers: int) -> None:
        self._owner = os.getpid()
        self._may_end = torch.zeros((), dtype=torch.int64).share_memory_()
        self._pids = torch.zeros(num_workers, dtype=torch.int64).share_memory_()
        self._at_exit = False

    def start(self, worker_id: int) -> None:
        """Prepare a worker, in its own process: one thread, and stop signals as described above."""
        torch.set_num_threads(1)
        self._pids[worker_id] = os.getpid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, number: int, frame: Any) -> None:
        if self._may_end:
            os._exit(0)

    def end_with(self, loader: DataLoader[Any]) -> None:
        """End the workers when the loader is no longer used."""
        weakref.finalize(loader, self.end).atexit = False

    def end_at_exit(self) -> None:
        """End the workers when the interpreter exits, before it waits for them; to be called when they have started."""
        if not self._at_exit:
            self._at_exit = True
            atexit.register(self.end)

    def end(self) -> None:
        """End the workers now."""
        if os.getpid() != self._owner:
            return  # a copy in a forked process
        self._may_end.fill_(1)
        pids = set(self._pids.tolist())
        for child in multiprocessing.active_children():
            if child.pid in pids:
                child.terminate()
        atexit.unregister(self.end)
