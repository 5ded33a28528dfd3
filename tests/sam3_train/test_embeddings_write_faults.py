"""The embedding store while it is written: full and slow disks, kills, bad values; nothing that was whole is lost."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fault_injection import file_size, run_and_kill
from fixtures_embeddings import KEYS, assert_one_line, make_embedding, make_seed, make_spec, make_store, store_bytes

from sam3_train.embeddings import (
    EmbeddingStore,
    EmbeddingWriter,
    StoreError,
    begin_export,
    plan_rank,
    rank_appender,
)
from sam3_train.embeddings.rank_files import INDEX_HEADER
from sam3_train.embeddings.verify import verify_store
from sam3_train.embeddings.writer import WriterStats

RECORD = make_spec().record_bytes


class FullDisk:
    """Stands in for the write call: the folder holds so many bytes, the last of them torn, then the disk is full."""

    def __init__(self, folder: Path, num_bytes: int) -> None:
        self.folder, self.num_bytes = folder, num_bytes

    def __call__(self, fd: int, data: memoryview) -> None:
        num_used = sum(path.stat().st_size for path in self.folder.glob("rank*")) - INDEX_HEADER.size
        taken = min(max(0, self.num_bytes - num_used), len(data))
        os.write(fd, data[:taken])
        if taken < len(data):
            raise OSError(errno.ENOSPC, "No space left on device")


def put_all(directory: Path, batch_size: int, in_background: bool) -> None:
    """Export everything in batches; the writer puts a batch of small records on the disk as a group."""
    begin_export(directory, make_spec(), KEYS, batch_size=2)
    with EmbeddingWriter(directory, in_background=in_background) as out:
        for start in range(0, len(KEYS), batch_size):
            keys = KEYS[start : start + batch_size]
            out.put_batch(keys, [make_seed(key) for key in keys], np.stack([make_embedding(key) for key in keys]))


@pytest.mark.parametrize("in_background", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4, len(KEYS)])
@pytest.mark.parametrize("num_bytes", [0, 60, RECORD * 3 + 40, RECORD * 3 + 65, RECORD * 6 + 120])
def test_a_full_disk_loses_nothing_and_resumes(tmp_path, monkeypatch, num_bytes, batch_size, in_background):
    """Wherever the last byte falls: values, key or index entry; what was whole stays whole."""
    make_store(tmp_path / "whole")
    with monkeypatch.context() as patched, pytest.raises(StoreError) as info:
        patched.setattr(rank_appender, "write_all", FullDisk(tmp_path / "full", num_bytes))
        put_all(tmp_path / "full", batch_size, in_background)
    assert_one_line(info.value, "rank0-values.bin: the disk is full", "bytes free", "run the same command again")
    kept = len(EmbeddingStore(tmp_path / "full"))
    assert kept == num_bytes // (RECORD + 16 + 5)
    make_store(tmp_path / "full")
    assert store_bytes(tmp_path / "full") == store_bytes(tmp_path / "whole")


def test_an_error_of_the_writer_surfaces_in_the_export_loop(tmp_path, monkeypatch):
    """The loop learns of a full disk at its next image, not after the last."""

    def fail(fd, data):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(rank_appender, "write_all", fail)
    begin_export(tmp_path, make_spec(), KEYS)
    num_put = 0
    with pytest.raises(StoreError, match=r"rank0-values\.bin: cannot be written"), EmbeddingWriter(tmp_path) as out:
        for _ in range(10_000):
            out.put("k", 0, make_embedding("k"))
            num_put += 1
            time.sleep(0.001)
    assert num_put < 1000


def test_a_slow_disk_slows_the_export_down_instead_of_filling_memory(tmp_path, monkeypatch):
    """D-11: the queue is bounded; putting more blocks."""
    gate = threading.Event()
    write_all = rank_appender.write_all

    def wait_and_write(fd, data):
        gate.wait(10)
        write_all(fd, data)

    monkeypatch.setattr(rank_appender, "write_all", wait_and_write)
    begin_export(tmp_path, make_spec(), KEYS)
    num_put = []

    def produce():
        with EmbeddingWriter(tmp_path, max_queued=3) as out:
            for key in KEYS:
                out.put(key, 0, make_embedding(key))
                num_put.append(out.queue_depth)
            stats.append(out.stats)

    stats: list[WriterStats] = []
    thread = threading.Thread(target=produce)
    thread.start()
    time.sleep(0.6)
    # Three wait to be encoded, one is being encoded, three wait for the disk and one is being written.
    assert len(num_put) == 8
    gate.set()
    thread.join(10)
    assert len(num_put) == len(KEYS) and stats[0].max_queue_depth <= 3 and stats[0].blocked_seconds > 0.3
    assert list(EmbeddingStore(tmp_path).keys()) == KEYS


def test_kill_9_in_the_middle_of_a_record(tmp_path):
    """D-10: large records, so that kills fall into writes; the torn tail is cut and made again."""
    spec = make_spec(shape=(64, 72, 72))
    keys = [f"sa_{number}" for number in range(24)]
    make_store(tmp_path / "whole", keys, spec=spec)
    values = tmp_path / "killed/rank0-values.bin"
    for number in range(6):
        size = int((number + 0.5) * 3.4 * spec.record_bytes)
        outcome = run_and_kill(
            lambda argv: make_store(tmp_path / "killed", keys, spec=spec) and 0,
            [],
            lambda size=size: file_size(values) > size,
        )
        assert outcome in (-signal.SIGKILL, 0)
    make_store(tmp_path / "killed", keys, spec=spec)
    assert store_bytes(tmp_path / "killed") == store_bytes(tmp_path / "whole")


class SlowSync:
    """Files whose sync takes a moment; remembers how many appends each sync found."""

    def __init__(self) -> None:
        self.num_appended = 0
        self.seen: list[int] = []

    def sync(self) -> None:
        self.seen.append(self.num_appended)
        time.sleep(0.02)


@pytest.mark.parametrize("group", [1, 8, 10])
def test_no_more_records_are_at_risk_than_a_resume_checks(group):
    """A power failure may cost what is not synced; beyond 64 such records an append waits for the disk."""
    files = SlowSync()
    with rank_appender.BackgroundSync(files, every=4, seconds=60.0, max_pending=10) as sync:
        for _ in range(200 // group):
            sync.wait_for_room(group)
            files.num_appended += group
            sync.note_append(group)
            assert files.num_appended - (files.seen[-2] if len(files.seen) > 1 else 0) <= 20
    assert files.seen[-1] == 200
    assert max(later - earlier for earlier, later in zip([0, *files.seen], files.seen, strict=False)) <= 10


def test_a_lone_record_is_synced_after_a_while():
    files = SlowSync()
    with rank_appender.BackgroundSync(files, every=100, seconds=0.05) as sync:
        files.num_appended += 1
        sync.note_append()
        time.sleep(0.3)
        assert files.seen == [1]


@pytest.mark.parametrize("in_background", [True, False])
def test_a_sync_that_fails_ends_the_export(tmp_path, monkeypatch, in_background):
    """Some file systems report a full disk only when they are told to sync."""

    def fail(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    begin_export(tmp_path, make_spec(), KEYS)
    with monkeypatch.context() as patched, pytest.raises(StoreError, match="the disk is full"):
        patched.setattr(rank_appender, "sync_data", fail)
        with EmbeddingWriter(tmp_path, sync_every=2, in_background=in_background) as out:
            for key in KEYS:
                out.put(key, 0, make_embedding(key))


@pytest.mark.parametrize("in_background", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 70000.0])
def test_values_that_are_not_finite_are_quarantined(tmp_path, bad, in_background):
    """D-20: an overflow is counted and named, never stored; training skips the key too."""
    begin_export(tmp_path, make_spec(), KEYS[:3])
    with EmbeddingWriter(tmp_path, in_background=in_background) as out:
        embedding = torch.ones(1, 3, 2, 4)
        out.put_batch(KEYS[:1], [1], embedding)
        embedding = embedding.clone()
        embedding[0, 1, 1, 1] = bad
        out.put_batch(KEYS[1:2], [2], embedding)
        out.quarantine(KEYS[2], "unreadable:\nno image")
    store = EmbeddingStore(tmp_path)
    assert list(store.keys()) == KEYS[:1]
    coverage = store.require_coverage(KEYS[:3])
    assert coverage.num_present == 1
    assert coverage.quarantined == {
        KEYS[1]: "1 of 24 values are not finite in float16",
        KEYS[2]: "unreadable: no image",
    }
    with pytest.raises(StoreError, match="it was quarantined: 1 of 24"):
        store.read(KEYS[1])
    assert plan_rank(tmp_path, KEYS[:3]).batches == []
    assert not verify_store(tmp_path).problems


@pytest.mark.parametrize("in_background", [True, False])
def test_an_interruption_writes_what_is_queued(tmp_path, in_background):
    """D-30: a context manager and no destructor; leaving it for whatever reason ends the thread and keeps the work."""
    begin_export(tmp_path, make_spec(), KEYS)
    with pytest.raises(KeyboardInterrupt), EmbeddingWriter(tmp_path, in_background=in_background) as out:
        for key in KEYS[:4]:
            out.put(key, 0, make_embedding(key))
        raise KeyboardInterrupt
    assert list(EmbeddingStore(tmp_path).keys()) == KEYS[:4]
    assert not any(thread.name.startswith("embedding-writer") for thread in threading.enumerate())


def test_two_exports_cannot_write_one_rank(tmp_path):
    make_store(tmp_path, stop_after=2)
    with EmbeddingWriter(tmp_path):
        child = os.fork()
        if child == 0:
            try:
                EmbeddingWriter(tmp_path).__enter__()
            except StoreError as error:
                os._exit(7 if "another process is writing this store" in str(error) else 1)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
