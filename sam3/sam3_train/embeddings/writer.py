"""Appending to a store: a bounded queue in front of one thread that encodes, checks and writes.

Back-pressure: `EmbeddingWriter.put_batch` blocks while the queue is full, so host memory is bounded whatever the disk
does. Durability: the files are synced after ``sync_every`` records or ``sync_seconds``, whichever comes first. A killed
process loses nothing that was written (the operating system has it); a power failure loses at most the records since
the last sync, and resuming makes them again. A sync waits for the disk to take what is outstanding; it costs the time
the disk needs anyway, and the queue carries the teacher across it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import shutil
import struct
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from sam3_train.embeddings.codecs import count_nonfinite
from sam3_train.embeddings.rank_files import (
    ENTRY_DTYPE,
    INDEX_HEADER,
    TAIL_RECORDS_CHECKED,
    RankPaths,
    lock_for_writing,
    read_index,
    recover_rank,
)
from sam3_train.embeddings.spec import SEED_BYTES, StoreError, StoreInfo, encode_key, read_store_info

FULL_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
POLL_S = 0.2  # how long a blocked producer waits before it looks for an error of the thread


@dataclass
class _Batch:
    keys: Sequence[str]
    seeds: Sequence[int]
    embeddings: Any
    wait_ready: Callable[[], None] | None
    release: Callable[[], None] | None


@dataclass
class _Quarantine:
    key: str
    reason: str


@dataclass
class WriterStats:
    """Counts of one writer since it was opened; read from another thread for a progress line."""

    num_written: int = 0
    num_quarantined: int = 0
    num_bytes: int = 0
    write_seconds: float = 0.0
    sync_seconds: float = 0.0
    max_queue_depth: int = 0
    blocked_seconds: float = 0.0


class EmbeddingWriter:
    """Appends the records of one rank. Use as a context manager.

    Args:
        directory: The store; `sam3_train.embeddings.plan.begin_export` has prepared it.
        rank: Whose files are appended to.
        max_queued: Batches that may wait; one more `put_batch` blocks.
        sync_every: Records between syncs, at most 64 (what a resume checks).
        sync_seconds: Longest time between syncs while records arrive.

    Raises:
        StoreError: If the store was not prepared, or another process writes this rank.
    """

    def __init__(
        self,
        directory: str | Path,
        rank: int = 0,
        max_queued: int = 4,
        sync_every: int = 32,
        sync_seconds: float = 30.0,
    ) -> None:
        self.paths = RankPaths(Path(directory), rank)
        info = read_store_info(self.paths.directory)
        if info is None:
            raise StoreError(f"{directory}: no store.json; prepare the store with begin_export first")
        if not 1 <= sync_every <= TAIL_RECORDS_CHECKED:
            raise StoreError(f"sync_every {sync_every} must lie in 1..{TAIL_RECORDS_CHECKED}")
        self.info: StoreInfo = info
        self.stats = WriterStats()
        self.sync_every = sync_every
        self.sync_seconds = sync_seconds
        self._queue: queue.Queue[_Batch | _Quarantine | None] = queue.Queue(max_queued)
        self._error: BaseException | None = None
        self._files: _RankAppender | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> EmbeddingWriter:
        recover_rank(self.paths, self.info.spec, self.info.export_id)
        self._files = _RankAppender(self.paths, self.info)
        self._thread = threading.Thread(target=self._work, name=f"embedding-writer-{self.paths.rank}", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what is queued, sync and close. After an error in the body too: what is queued is valid work.

        Raises:
            StoreError: What stopped the thread; also in place of an error of the body, which has then not been saved.
        """
        assert self._thread is not None and self._files is not None
        if self._error is None:
            with contextlib.suppress(StoreError):  # raised again below
                self._hand_over(None)
        self._thread.join()
        self._files.close()
        if self._error is not None and self._error is not error:
            raise self._error from error

    @property
    def queue_depth(self) -> int:
        """Batches that wait to be written."""
        return self._queue.qsize()

    def put(self, key: str, seed: int, embedding_chw: Any) -> None:
        """Queue one record; see `put_batch`."""
        self.put_batch([key], [seed], embedding_chw[None])

    def put_batch(
        self,
        keys: Sequence[str],
        seeds: Sequence[int],
        embeddings_bchw: Any,
        wait_ready: Callable[[], None] | None = None,
        release: Callable[[], None] | None = None,
    ) -> None:
        """Queue records; blocks while the queue is full.

        Args:
            keys: B keys.
            seeds: B seeds, int32.
            embeddings_bchw: numpy array or CPU tensor of any floating type; cast to float16 when written. The caller
                leaves it alone until ``release`` is called.
            wait_ready: Called by the thread before it reads the embeddings, e.g. the wait for a copy from the device.
            release: Called by the thread when the memory may be used again.

        Raises:
            StoreError: What stopped the thread, e.g. a full disk; at once, not only at the end.
        """
        if not len(keys) == len(seeds) == len(embeddings_bchw):
            raise ValueError(f"{len(keys)} keys, {len(seeds)} seeds and {len(embeddings_bchw)} embeddings")
        self._hand_over(_Batch(list(keys), list(seeds), embeddings_bchw, wait_ready, release))

    def quarantine(self, key: str, reason: str) -> None:
        """Record that a key gets no embedding, and why; in order with the records."""
        self._hand_over(_Quarantine(key, reason))

    def raise_error(self) -> None:
        """Raise what stopped the thread, if anything did."""
        if self._error is not None:
            raise self._error

    def _hand_over(self, item: _Batch | _Quarantine | None) -> None:
        if self._thread is None:
            raise RuntimeError("EmbeddingWriter is a context manager: use it in a with statement")
        self.raise_error()
        start = time.perf_counter()
        while True:
            try:
                self._queue.put(item, timeout=POLL_S)
                break
            except queue.Full:
                self.raise_error()
        self.stats.blocked_seconds += time.perf_counter() - start
        self.stats.max_queue_depth = max(self.stats.max_queue_depth, self._queue.qsize())

    def _work(self) -> None:
        """Body of the thread: until None arrives or something fails."""
        assert self._files is not None
        unsynced, last_sync = 0, time.monotonic()
        try:
            while True:
                item = self._queue.get()
                if item is None:
                    break
                unsynced += self._write_quarantine(item) if isinstance(item, _Quarantine) else self._write(item)
                if unsynced >= self.sync_every or time.monotonic() - last_sync > self.sync_seconds:
                    self._sync()
                    unsynced, last_sync = 0, time.monotonic()
            self._sync()
        except BaseException as error:
            self._error = _explain(error, self.paths)

    def _write(self, batch: _Batch) -> int:
        assert self._files is not None
        if batch.wait_ready is not None:
            batch.wait_ready()
        start = time.perf_counter()
        for position, (key, seed) in enumerate(zip(batch.keys, batch.seeds, strict=True)):
            embedding = _to_float16(batch.embeddings[position])
            num_bad = count_nonfinite(embedding)
            if num_bad:
                reason = f"{num_bad} of {embedding.size} values are not finite in float16"
                self._write_quarantine(_Quarantine(key, reason))
            else:
                self.stats.num_bytes += self._files.append(key, seed, embedding)
                self.stats.num_written += 1
        if batch.release is not None:
            batch.release()
        self.stats.write_seconds += time.perf_counter() - start
        return len(batch.keys)

    def _write_quarantine(self, item: _Quarantine) -> int:
        assert self._files is not None
        self._files.append_quarantine(item.key, item.reason)
        self.stats.num_quarantined += 1
        return 1

    def _sync(self) -> None:
        assert self._files is not None
        start = time.perf_counter()
        self._files.sync()
        self.stats.sync_seconds += time.perf_counter() - start


class _RankAppender:
    """The open files of one rank; every append keeps them consistent or cuts its own torn tail."""

    def __init__(self, paths: RankPaths, info: StoreInfo) -> None:
        self.paths, self.spec = paths, info.spec
        self.has_new_quarantine = False
        self._buffer = np.empty(self.spec.record_bytes, np.uint8)
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

    def append(self, key: str, seed: int, embedding_chw: np.ndarray) -> int:
        """Write one record, its key and its index entry, in this order; returns the bytes of the record."""
        if tuple(embedding_chw.shape) != self.spec.shape:
            raise StoreError(
                f"{self.paths.values}: the embedding of {key!r} has shape {tuple(embedding_chw.shape)}, the store "
                f"{self.spec.shape}; export with the model the store was begun with"
            )
        key_line = encode_key(key) + b"\n"
        self._buffer[:SEED_BYTES] = np.frombuffer(struct.pack("<i", seed), np.uint8)
        self.spec.codec_object.encode_into(embedding_chw, self._buffer[SEED_BYTES:])
        keys_end = self.keys_end + len(key_line)
        crcs = (zlib.crc32(self._buffer.data), zlib.crc32(key_line[:-1]))
        entry = np.array([(keys_end, *crcs)], ENTRY_DTYPE)
        try:
            write_all(self.values_fd, self._buffer.data)
            write_all(self.keys_fd, memoryview(key_line))
            write_all(self.index_fd, memoryview(entry.tobytes()))
        except OSError:
            self._cut_torn_tail()
            raise
        self.num_records += 1
        self.keys_end = keys_end
        return len(self._buffer)

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
            os.fsync(self.quarantine_fd)
            self.has_new_quarantine = False
        for fd in (self.values_fd, self.keys_fd, self.index_fd):
            os.fsync(fd)

    def close(self) -> None:
        """Close the files; nothing is written."""
        self._open_files.close()

    def _cut_torn_tail(self) -> None:
        os.ftruncate(self.index_fd, INDEX_HEADER.size + self.num_records * ENTRY_DTYPE.itemsize)
        os.ftruncate(self.keys_fd, self.keys_end)
        os.ftruncate(self.values_fd, self.num_records * self.spec.record_bytes)
        # What was written before must survive even if the user now frees space by other means than a clean exit.
        self.sync()


def write_all(fd: int, data: memoryview) -> None:
    """Write every byte; a short write is continued, and a disk that takes nothing more raises OSError."""
    while data:
        data = data[os.write(fd, data) :]


def _open_for_append(path: Path, stack: contextlib.ExitStack) -> int:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    stack.callback(os.close, fd)
    return fd


def _to_float16(embedding_chw: Any) -> np.ndarray:
    """A float16 array in C order; a value beyond float16's range becomes infinite and is then quarantined."""
    if isinstance(embedding_chw, torch.Tensor):
        return embedding_chw.detach().to(torch.float16).contiguous().numpy()
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(embedding_chw, np.float16)


def _explain(error: BaseException, paths: RankPaths) -> BaseException:
    """Turn what the operating system said into a line that names file, value and remedy."""
    if isinstance(error, StoreError) or not isinstance(error, OSError):
        return error
    if error.errno in FULL_DISK_ERRNOS:
        free = shutil.disk_usage(paths.directory).free
        return StoreError(
            f"{paths.values}: the disk is full ({os.strerror(error.errno or 0)}; {free:,} bytes free). Every record "
            "written so far is kept: free some space and run the same command again to continue"
        )
    return StoreError(f"{paths.values}: cannot be written ({error}); repair the storage and run the same command again")
