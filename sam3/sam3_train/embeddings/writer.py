"""Appending to a store: bounded queues in front of two threads, one that encodes and checks, one that writes.

Where the caller computes on the CPU itself, both are better done in its own thread: a thread that is pushed from its
core for a millisecond holds up all others of the same matrix product.

Back-pressure: `EmbeddingWriter.put_batch` blocks while the queue is full, so host memory is bounded whatever the disk
does. Durability: a third thread syncs the files after ``sync_every`` records or ``sync_seconds``, whichever comes
first, while more records are written. A killed process loses nothing that was written (the operating system has it); a
power failure loses at most 64 records, and resuming makes them again. Syncing costs the time that the disk needs for
the bytes in any case; ``scripts/bench_store.py`` compares with a plain file.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from sam3_train.embeddings.codecs import count_nonfinite
from sam3_train.embeddings.crc import crc32
from sam3_train.embeddings.rank_appender import BackgroundSync, RankAppender, Record
from sam3_train.embeddings.rank_files import TAIL_RECORDS_CHECKED, RankPaths, recover_rank
from sam3_train.embeddings.spec import StoreError, StoreInfo, read_store_info

FULL_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
GROUPS_AHEAD = 3  # groups of encoded records that may wait for the disk
GROUP_BYTES = 4 << 20
GROUP_RECORDS = 16
"""Records are written in groups of at most this number that end once they reach this size. One by one, small records
would wake two threads each time, and each time push a thread of the forward from its core while the others wait for it.
"""
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


_Piece = list[Record] | _Quarantine | Callable[[], None]


@dataclass
class WriterStats:
    """Counts of one writer since it was opened; read from another thread for a progress line."""

    num_written: int = 0
    num_quarantined: int = 0
    num_bytes: int = 0
    sync_seconds: float = 0.0
    max_queue_depth: int = 0
    blocked_seconds: float = 0.0


class EmbeddingWriter:
    """Appends the records of one rank. Use as a context manager.

    Args:
        directory: The store; `sam3_train.embeddings.plan.begin_export` has prepared it.
        rank: Whose files are appended to.
        max_queued: Batches that may wait; one more `put_batch` blocks.
        sync_every: Records after which a sync begins, at most 64 (what a resume checks).
        sync_seconds: Longest time between syncs while records arrive.
        in_background: Encode and write in threads, while the caller's device computes. False: in the calling thread.

    Raises:
        StoreError: If the store was not prepared, or another process writes this rank.
    """

    def __init__(
        self,
        directory: str | Path,
        rank: int = 0,
        max_queued: int = 4,
        sync_every: int = 16,
        sync_seconds: float = 30.0,
        in_background: bool = True,
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
        self.in_background = in_background
        self._batches: queue.Queue[_Batch | _Quarantine | None] = queue.Queue(max_queued)
        self._groups: queue.Queue[_Piece | None] = queue.Queue(GROUPS_AHEAD)
        self._error: BaseException | None = None
        self._files: RankAppender | None = None
        self._sync: BackgroundSync | None = None
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> EmbeddingWriter:
        recover_rank(self.paths, self.info.spec, self.info.export_id)
        self._files = RankAppender(self.paths, self.info)
        self._sync = BackgroundSync(self._files, self.sync_every, self.sync_seconds)
        self._sync.__enter__()
        for stage in (self._encode_all, self._write_all) if self.in_background else ():
            thread = threading.Thread(target=self._run_stage, args=(stage,), name="embedding-writer", daemon=True)
            self._threads.append(thread)
            thread.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what is queued, sync and close. After an error in the body too: what is queued is valid work.

        Raises:
            StoreError: What stopped the thread; also in place of an error of the body, which has then not been saved.
        """
        assert self._files is not None and self._sync is not None
        if self._threads:
            with contextlib.suppress(StoreError):  # raised again below
                self._hand_over(self._batches, None)
        for thread in self._threads:
            thread.join()
        self._run_stage(partial(self._sync.__exit__, None))
        self.stats.sync_seconds = self._sync.sync_seconds
        self._files.close()
        if self._error is not None and self._error is not error:
            raise self._error from error

    @property
    def queue_depth(self) -> int:
        """Batches that wait to be written."""
        return self._batches.qsize()

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
        self._queue_up(_Batch(list(keys), list(seeds), embeddings_bchw, wait_ready, release))

    def quarantine(self, key: str, reason: str) -> None:
        """Record that a key gets no embedding, and why; in order with the records."""
        self._queue_up(_Quarantine(key, reason))

    def raise_error(self) -> None:
        """Raise what stopped the thread, if anything did."""
        if self._error is not None:
            raise self._error

    def _queue_up(self, item: _Batch | _Quarantine) -> None:
        if self._sync is None:
            raise RuntimeError("EmbeddingWriter is a context manager: use it in a with statement")
        start = time.perf_counter()
        if self.in_background:
            self._hand_over(self._batches, item)
        else:
            self.raise_error()
            self._run_stage(partial(self._do_now, item))
            self.raise_error()
        self.stats.blocked_seconds += time.perf_counter() - start
        self.stats.max_queue_depth = max(self.stats.max_queue_depth, self._batches.qsize())

    def _do_now(self, item: _Batch | _Quarantine) -> None:
        for piece in self._pieces(item):
            self._append(piece)

    def _hand_over(self, target: queue.Queue[Any], item: Any) -> None:
        """Put an item, waiting for room unless a thread has failed."""
        while True:
            self.raise_error()
            try:
                target.put(item, timeout=POLL_S)
                return
            except queue.Full:
                continue

    def _take(self, source: queue.Queue[Any]) -> Any:
        """The next item; None at the end, also if the other thread has failed and there will be none."""
        while True:
            try:
                return source.get(timeout=POLL_S)
            except queue.Empty:
                if self._error is not None:
                    return None

    def _run_stage(self, stage: Callable[[], None]) -> None:
        """Body of a thread; the first error of either is kept for the caller and ends the other."""
        try:
            stage()
        except BaseException as error:
            if self._error is None:
                self._error = _explain(error, self.paths)

    def _encode_all(self) -> None:
        try:
            while (item := self._take(self._batches)) is not None:
                for piece in self._pieces(item):
                    self._hand_over(self._groups, piece)
        finally:
            # After an error too, so that what was encoded before is written and synced.
            with contextlib.suppress(StoreError):
                self._hand_over(self._groups, None)

    def _pieces(self, item: _Batch | _Quarantine) -> Iterator[_Piece]:
        """What is to be done for an item, in order: groups of records, quarantined keys, and freeing its memory."""
        if isinstance(item, _Quarantine):
            yield item
            return
        if item.wait_ready is not None:
            item.wait_ready()
        group: list[Record] = []
        for position, (key, seed) in enumerate(zip(item.keys, item.seeds, strict=True)):
            try:
                encoded = self._encode(key, seed, item.embeddings[position])
            except StoreError:
                if group:
                    yield group  # what was encoded before is valid work
                raise
            if isinstance(encoded, Record):
                group.append(encoded)
                if len(group) < min(GROUP_RECORDS, self.sync_every) and sum(map(len, group)) < GROUP_BYTES:
                    continue
            if group:
                yield group
                group = []
            if isinstance(encoded, _Quarantine):
                yield encoded
        if group:
            yield group
        if item.release is not None:
            yield item.release

    def _encode(self, key: str, seed: int, embedding_chw: Any) -> Record | _Quarantine:
        embedding = _to_float16(embedding_chw)
        if tuple(embedding.shape) != self.info.spec.shape:
            raise StoreError(
                f"{self.paths.values}: the embedding of {key!r} has shape {tuple(embedding.shape)}, the store "
                f"{self.info.spec.shape}; export with the model the store was begun with"
            )
        num_bad = count_nonfinite(embedding)
        if num_bad:
            return _Quarantine(key, f"{num_bad} of {embedding.size} values are not finite in float16")
        payload = self.info.spec.codec_object.encode(embedding).data
        seed_bytes = struct.pack("<i", seed)
        return Record(key, seed_bytes, payload, crc32(payload, crc32(seed_bytes)))

    def _write_all(self) -> None:
        while (piece := self._take(self._groups)) is not None:
            self._append(piece)

    def _append(self, piece: _Piece) -> None:
        assert self._files is not None and self._sync is not None
        if isinstance(piece, list):
            self._sync.wait_for_room(len(piece))
            self._files.append(piece)
            self._sync.note_append(len(piece))
            self.stats.num_written += len(piece)
            self.stats.num_bytes += sum(map(len, piece))
        elif isinstance(piece, _Quarantine):
            self._sync.wait_for_room(1)
            self._files.append_quarantine(piece.key, piece.reason)
            self._sync.note_append()
            self.stats.num_quarantined += 1
        else:
            piece()


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
