"""Appending to one rank's files, and making what was appended durable while more is written.

A disk that is told to sync only when a batch is full idles while the next batch is prepared; here a thread syncs
whenever enough has gathered and the other goes on writing. The number of records that are not durable yet never exceeds
what a resume checks by CRC (`TAIL_RECORDS_CHECKED`), because a sync may make an index entry durable before its values.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sam3_train.embeddings.crc import crc32
from sam3_train.embeddings.rank_files import (
    ENTRY_DTYPE,
    INDEX_HEADER,
    TAIL_RECORDS_CHECKED,
    RankPaths,
    lock_for_writing,
    read_index,
)
from sam3_train.embeddings.spec import StoreInfo, encode_key

sync_data = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


@dataclass(frozen=True)
class Record:
    """One record, ready to be written."""

    key: str
    seed_bytes: bytes
    payload: memoryview
    crc: int
    """CRC-32 of seed and payload."""

    def __len__(self) -> int:
        return len(self.seed_bytes) + len(self.payload)


class RankAppender:
    """The open files of one rank; every append keeps them consistent or cuts its own torn tail."""

    def __init__(self, paths: RankPaths, info: StoreInfo) -> None:
        self.paths, self.spec = paths, info.spec
        self.has_new_quarantine = False
        with contextlib.ExitStack() as stack:
            self.index_fd = _open_for_append(paths.index, stack)
            lock_for_writing(self.index_fd, paths.index)
            self.keys_fd = _open_for_append(paths.keys, stack)
            self.values_fd = _open_for_append(paths.values, stack)
            self.quarantine_fd = _open_for_append(paths.quarantine, stack)
            entries = read_index(paths, info.export_id)
            self.num_records = len(entries)
            self.keys_end = int(entries["key_end"][-1]) if len(entries) else 0
            self._open_files = stack.pop_all()

    def append(self, records: Sequence[Record]) -> None:
        """Write records, then their keys, then their index entries.

        Raises:
            OSError: If the disk fails; as many of the records as it takes are there and durable.
        """
        try:
            self._write(records)
        except OSError:
            self._cut_torn_tail()
            if len(records) == 1:
                raise
            for record in records:
                self.append([record])

    def _write(self, records: Sequence[Record]) -> None:
        key_lines = [encode_key(record.key) + b"\n" for record in records]
        entries = np.empty(len(records), ENTRY_DTYPE)
        entries["key_end"] = self.keys_end + np.cumsum([len(line) for line in key_lines])
        entries["record_crc"] = [record.crc for record in records]
        entries["key_crc"] = [crc32(line[:-1]) for line in key_lines]
        pieces = [piece for record in records for piece in (record.seed_bytes, record.payload)]
        # Small records go out together; of a large one, a copy would cost more than a call.
        for piece in pieces if len(records) == 1 else [b"".join(pieces)]:
            write_all(self.values_fd, memoryview(piece))
        write_all(self.keys_fd, memoryview(b"".join(key_lines)))
        write_all(self.index_fd, memoryview(entries.tobytes()))
        self.num_records += len(records)
        self.keys_end = int(entries["key_end"][-1])

    def append_quarantine(self, key: str, reason: str) -> None:
        """Write one line into the quarantine file."""
        line = encode_key(key) + b"\t" + " ".join(reason.split()).encode("utf-8", "replace") + b"\n"
        size = os.fstat(self.quarantine_fd).st_size
        try:
            write_all(self.quarantine_fd, memoryview(line))
        except OSError:
            os.ftruncate(self.quarantine_fd, size)
            raise
        self.has_new_quarantine = True

    def sync(self) -> None:
        """Make every append so far durable: what an entry points at first, then the entry."""
        if self.has_new_quarantine:
            self.has_new_quarantine = False
            sync_data(self.quarantine_fd)
        for fd in (self.values_fd, self.keys_fd, self.index_fd):
            sync_data(fd)

    def close(self) -> None:
        """Close the files; nothing is written."""
        self._open_files.close()

    def _cut_torn_tail(self) -> None:
        os.ftruncate(self.index_fd, INDEX_HEADER.size + self.num_records * ENTRY_DTYPE.itemsize)
        os.ftruncate(self.keys_fd, self.keys_end)
        os.ftruncate(self.values_fd, self.num_records * self.spec.record_bytes)
        # What was written before must survive even if the user now frees space by other means than a clean exit.
        self.sync()


class BackgroundSync:
    """A thread that syncs a `RankAppender` after every so many appends or seconds. Use as a context manager.

    Args:
        files: What is synced.
        every: Appends after which a sync begins.
        seconds: Longest time after which it does.
        max_pending: Most appends that may be made without being durable.
    """

    def __init__(
        self, files: RankAppender, every: int, seconds: float, max_pending: int = TAIL_RECORDS_CHECKED
    ) -> None:
        self.sync_seconds = 0.0
        self._files, self._every, self._seconds, self._max_pending = files, every, seconds, max_pending
        self._changed = threading.Condition()
        self._num_appended = self._num_synced = 0
        self._is_closing = self._wants_room = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="embedding-sync", daemon=True)

    def __enter__(self) -> BackgroundSync:
        self._thread.start()
        return self

    def __exit__(self, error_type: type[BaseException] | None, *exc_info: object) -> None:
        """Sync what is left; an error of the body is not replaced."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join()
        if error_type is None:
            self._raise_error()

    def wait_for_room(self, num_appends: int) -> None:
        """Wait until so many appends may be made without too many that are not durable.

        Args:
            num_appends: At most ``max_pending``.

        Raises:
            OSError: What the disk answered to a sync.
        """
        with self._changed:
            while self._num_appended + num_appends - self._num_synced > self._max_pending and self._error is None:
                self._wants_room = True
                self._changed.notify_all()
                self._changed.wait()
            self._wants_room = False
        self._raise_error()

    def note_append(self, num_appends: int = 1) -> None:
        """Count appends that were made.

        Raises:
            OSError: What the disk answered to a sync.
        """
        with self._changed:
            self._num_appended += num_appends
            if self._num_appended - self._num_synced >= self._every:
                self._changed.notify_all()
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    self._wait_for_work()
                    target, is_last = self._num_appended, self._is_closing
                if target > self._num_synced:
                    start = time.perf_counter()
                    self._files.sync()
                    self.sync_seconds += time.perf_counter() - start
                with self._changed:
                    self._num_synced = target
                    self._changed.notify_all()
                if is_last:
                    return
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _wait_for_work(self) -> None:
        deadline = time.monotonic() + self._seconds
        while not (self._is_closing or self._wants_room or self._num_appended - self._num_synced >= self._every):
            if not self._changed.wait(deadline - time.monotonic()) and self._num_appended > self._num_synced:
                return
            if time.monotonic() >= deadline:
                deadline = time.monotonic() + self._seconds


def write_all(fd: int, data: memoryview) -> None:
    """Write every byte; a short write is continued, and a disk that takes nothing more raises OSError."""
    while data:
        data = data[os.write(fd, data) :]


def _open_for_append(path: Path, stack: contextlib.ExitStack) -> int:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    stack.callback(os.close, fd)
    return fd
