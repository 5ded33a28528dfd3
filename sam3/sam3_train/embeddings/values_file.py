"""Reading records from one rank's values file, straight into the caller's memory.

Positional reads and not a memory map: the kernel copies large pieces instead of taking a page fault for every 4 kB, its
read-ahead sees a sequence, and a file that shrinks or a disk that fails is an error instead of a signal that kills the
process.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from sam3_train.embeddings.crc import crc32
from sam3_train.embeddings.spec import StoreError

CHUNK_BYTES = 1 << 20  # read and checked together: the check finds the bytes in the processor's cache


class ValuesFile:
    """The records of one rank; threads may share it. It is closed when nobody uses it any more.

    Args:
        path: The file.
        record_bytes: Bytes of one record.

    Raises:
        StoreError: If the file cannot be opened.
    """

    def __init__(self, path: Path, record_bytes: int) -> None:
        self.path = path
        self.record_bytes = record_bytes
        self._lock = threading.Lock()
        try:
            self._file = io.FileIO(path)
        except OSError as error:
            raise StoreError(f"{path}: cannot be read ({error.strerror}); copy the file here again") from None

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; there are no reads afterwards."""
        file = getattr(self, "_file", None)
        if file is not None:
            file.close()

    def read(self, record: int, buffers: Sequence[memoryview], check: bool = True) -> int:
        """Fill buffers with the first bytes of a record.

        Args:
            record: Its number.
            buffers: Writable, contiguous, one byte per item; filled one behind the other.
            check: Compute the CRC-32 of what was read.

        Returns:
            The CRC-32; 0 without ``check``.

        Raises:
            StoreError: If the file ends early, or the disk fails.
        """
        position, crc = record * self.record_bytes, 0
        for buffer in buffers:
            while buffer:
                try:
                    num_read = self._read_some(buffer[:CHUNK_BYTES], position)
                except OSError as error:
                    raise StoreError(
                        f"{self.path}: record {record} cannot be read ({error}); repair the storage, or copy the file "
                        "from a good copy"
                    ) from None
                if not num_read:
                    raise StoreError(
                        f"{self.path}: ends at byte {position:,}, inside record {record}: it was cut while it was in "
                        "use; run the export again to repair it, or copy the file again"
                    )
                if check:
                    crc = crc32(buffer[:num_read], crc)
                buffer = buffer[num_read:]
                position += num_read
        return crc

    def announce(self, record: int) -> None:
        """Ask the operating system to load a record in the background, where it can be asked."""
        if hasattr(os, "posix_fadvise"):
            start = record * self.record_bytes
            os.posix_fadvise(self._file.fileno(), start, self.record_bytes, os.POSIX_FADV_WILLNEED)

    def _read_some(self, buffer: memoryview, position: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [buffer], position)
        with self._lock:  # one position for all threads
            self._file.seek(position)
            return self._file.readinto(buffer) or 0
