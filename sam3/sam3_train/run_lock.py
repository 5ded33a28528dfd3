"""One run per folder at a time: two would overwrite each other's checkpoints."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from sam3_train.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no POSIX locks; runs are not guarded there
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = ".lock"


class RunLock:
    """Holds ``.lock`` in a run's folder until `release` or the end of the process, however it ends.

    A POSIX record lock: a loader's worker that outlives a killed process does not inherit it.

    Raises:
        UserError: If another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor: int | None = None
        if fcntl is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"cannot write in the output folder {folder}: {error.strerror}; choose another") from None
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"another run is writing to {folder}: wait for it, end it, or choose another --output"
                ) from None
            return  # a file system without locks
        self._descriptor = descriptor

    def release(self) -> None:
        """Let others use the folder."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
