"""Results that wait on the disk until they can be handed out last first."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_LENGTH = struct.Struct("<q")


@contextmanager
def open_spool(folder: Path | None = None) -> Iterator[Spool]:
    """An empty pile, whose file has no name or is removed at the end: nothing is left behind however a run ends.

    Args:
        folder: Where it takes space; None: where the system keeps temporary files, which may be in memory.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        yield Spool(file)


class Spool:
    """A pile of records in a file: memory stays the same however many there are."""

    def __init__(self, file: IO[bytes]) -> None:
        """
        Args:
            file: Empty; to be written, read and moved about in.
        """
        self._file = file
        self._num_records = 0

    def append(self, record: Any) -> None:
        """Put a record on the pile: numbers, texts, lists and dicts, as JSON has them."""
        text = json.dumps(record, separators=(",", ":")).encode()
        self._file.write(text + _LENGTH.pack(len(text)))
        self._num_records += 1

    def last_first(self, leave: int = 0) -> Iterator[Any]:
        """The records from the last one on, while nothing is added.

        Args:
            leave: This many, those added first, are left out.
        """
        end = self._file.seek(0, 2)
        for _ in range(self._num_records - leave):
            self._file.seek(end - _LENGTH.size)
            (length,) = _LENGTH.unpack(self._file.read(_LENGTH.size))
            end -= _LENGTH.size + length
            self._file.seek(end)
            yield json.loads(self._file.read(length))

    def __len__(self) -> int:
        return self._num_records
