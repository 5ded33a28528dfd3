"""SIGTERM and SIGINT ask for a stop at the next step boundary instead of ending the process at once.

A signal that reaches one rank alone stops all of them: `StopSignal` tells the others through the run's `FailureWatch`.
Outside a `StopSignal` both signals raise KeyboardInterrupt, which ends a command with one line and exit code 130.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from sam3_train.failure_watch import FailureWatch


class StopSignal:
    """While the ``with`` block runs, signals only set `requested`; a second SIGINT interrupts at once.

    Args:
        watch: The run's; None for a run of one process.
    """

    def __init__(self, watch: FailureWatch | None = None) -> None:
        self._watch = watch
        self._signal: str | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._owner = os.getpid()

    @property
    def requested(self) -> str | None:
        """Name of the signal that came, with its rank if it came to another one, or None."""
        return self._signal or (self._watch.stop_heard if self._watch is not None else None)

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            # A loader's worker inherits this handler. Ctrl-C reaches it too, but the main process decides.
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if number == signal.SIGINT and self._signal == "SIGINT":
            raise KeyboardInterrupt
        self._signal = signal.Signals(number).name
        if self._watch is not None:
            self._watch.announce_stop(self._signal)


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """While the ``with`` block runs, SIGTERM raises KeyboardInterrupt, as SIGINT does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked worker inherits this handler
            os._exit(128 + number)
        raise KeyboardInterrupt(signal.Signals(number).name)

    previous = signal.signal(signal.SIGTERM, interrupt) or signal.SIG_DFL
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
