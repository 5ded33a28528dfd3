"""The benchmarks of store and export measure real paths: run once at toy sizes, and their verdicts on known numbers."""

from __future__ import annotations

import bench_export
import bench_store
import pytest
import torch

from sam3_train.embeddings import EmbeddingStore

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_records(monkeypatch):
    monkeypatch.setattr(bench_store, "REAL_SHAPE", (16, 72, 72))


def test_disk_rows_compare_store_and_plain_file(tmp_path, monkeypatch):
    read = []
    read_into = EmbeddingStore.read_into
    monkeypatch.setattr(EmbeddingStore, "read_into", lambda *args: read.append(args[1]) or read_into(*args))
    rows = {row["name"]: row for row in bench_store.bench_disk(tmp_path, num_records=6, turns=2)}
    assert {"plain write", "store write", "plain read", "store read", "store read, CRC off"} <= set(rows)
    assert all(row["value"] > 0 for row in rows.values())
    assert set(read) == {f"sa_{number}" for number in range(6)}
    assert not list(tmp_path.rglob("*values.bin")), "gigabytes stay behind"


@pytest.mark.parametrize(("store_read", "is_met"), [(79.0, False), (81.0, True)])
def test_a_slow_read_misses_its_target(store_read, is_met):
    """The verdict follows the median of the turns' ratios, whatever the absolute speeds of a turn were."""
    plain = [100.0, 1000.0, 10.0]
    speeds = dict.fromkeys(("plain write", "plain read", "plain read, new buffers", "store write"), plain)
    speeds["store read"] = [plain[0] * 0.1, plain[1] * store_read / 100, plain[2] * 2]
    speeds["store read, new arrays"] = [share / 2 for share in plain]
    rows = {row["name"]: row for row in bench_store.disk_rows(speeds, "")}
    assert rows["store read / plain read"]["value"] == pytest.approx(store_read)
    assert rows["store read / plain read"]["met"] is is_met
    assert rows["store write / plain write"]["met"] is True
    assert rows["store read, new arrays / plain read, new buffers"]["value"] == pytest.approx(50.0)
    assert "met" not in rows["store read, new arrays / plain read, new buffers"]


def test_a_million_keys_would_take_24_bytes_each(tmp_path):
    """D-55: one table for all workers, nothing of it copied into each."""
    rows = {row["name"].split(": ")[1]: row["value"] for row in bench_store.bench_key_index(tmp_path, num_keys=20_000)}
    assert rows["file shared by all workers"] * 1e6 == pytest.approx(24 * 20_000, rel=0.01)
    assert rows["memory of its own per worker"] < 0.5


def test_the_export_loop_is_measured_with_what_it_writes(tmp_path, monkeypatch):
    written = []
    export_synthetic = bench_export.export_synthetic

    def export_and_count(store, *args):
        export_synthetic(store, *args)
        written.append(len(EmbeddingStore(store)))

    monkeypatch.setattr(bench_export, "export_synthetic", export_and_count)
    rows = bench_export.bench_loop(tmp_path, "tiny", bench_export.random_teacher(CPU), 2, num_batches=2, turns=1)
    assert written == [4, 4] and rows[0]["value"] > 0
    assert not list(tmp_path.rglob("*values.bin"))


@pytest.mark.parametrize(("loop_s", "is_met"), [(1.04, True), (1.06, False)])
def test_a_slow_loop_misses_its_target(loop_s, is_met):
    def watch(wall_s):
        stopped = bench_export.Stopwatch()
        stopped.wall_s, stopped.cpu_s = wall_s, 2 * wall_s
        return stopped

    bare, loop = [watch(1.0), watch(2.0), watch(4.0)], [watch(loop_s), watch(2 * loop_s), watch(40.0)]
    forward, overhead, processor = bench_export.loop_rows("tiny", bare, loop, 100, "")
    assert forward["value"] == pytest.approx(20.0)
    assert overhead["value"] == processor["value"] == pytest.approx(100 * (loop_s - 1))
    assert overhead["met"] is is_met
    assert overhead["note"].startswith(f"{20 * (loop_s - 1):.2f} ms per image")


def test_the_memory_of_an_export_is_measured(tmp_path):
    memory = bench_export.bench_memory(tmp_path, CPU, num_images=16)
    assert memory[0]["value"] > 10


@pytest.mark.parametrize(("late_mb", "is_met"), [(510.0, True), (520.0, False)])
def test_memory_that_grows_misses_its_target(late_mb, is_met):
    rows = bench_export.memory_rows([500.0] * 5 + [late_mb] * 45, 10_000, 100.0)
    assert rows[-1]["value"] == pytest.approx(late_mb - 500.0)
    assert rows[-1]["met"] is is_met
