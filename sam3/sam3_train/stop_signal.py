"""SIGTERM and SIGINT ask for a stop at the next step boundary instead of ending the process at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class StopSignal:
    """While the ``with`` block runs, signals only set `requested`; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.requested: str | None = None
        """Name of the signal that came, or None."""
        self._previous: dict[signal.Signals, Any] = {}
        self._owner = os.getpid()

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
        if number == signal.SIGINT and self.requested == "SIGINT":
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
