"""The store's benchmark measures real paths: run once at toy sizes, and its comparison logic with known numbers."""

from __future__ import annotations

import bench_store
import pytest
import torch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_records(monkeypatch):
    monkeypatch.setattr(bench_store, "REAL_SHAPE", (16, 72, 72))


def test_disk_rows_compare_store_and_plain_file(tmp_path):
    rows = {row["name"]: row for row in bench_store.bench_disk(tmp_path, num_records=6, turns=2)}
    assert {"plain write", "store write", "plain read", "store read", "store read, CRC off"} <= set(rows)
    assert all(row["value"] > 0 for row in rows.values())
    for name in ("store write / plain write", "store read / plain read"):
        assert rows[name]["target"] == ">= 80" and rows[name]["met"] == (rows[name]["value"] >= 80)
    assert not list(tmp_path.rglob("*values.bin")), "gigabytes stay behind"


def test_a_million_keys_would_take_24_bytes_each(tmp_path):
    """D-55: one table for all workers, nothing of it copied into each."""
    rows = {row["name"].split(": ")[1]: row["value"] for row in bench_store.bench_key_index(tmp_path, num_keys=20_000)}
    assert rows["file shared by all workers"] * 1e6 == pytest.approx(24 * 20_000, rel=0.01)
    assert rows["memory of its own per worker"] < 0.5


def test_the_loop_and_its_memory_are_measured(tmp_path):
    loop = bench_store.bench_export_loop(tmp_path, CPU, num_batches=1, turns=1)
    assert loop[0]["value"] > 0 and loop[1]["met"] == (loop[1]["value"] <= 5.0)
    memory = bench_store.bench_memory(tmp_path, CPU, num_images=16)
    assert memory[0]["value"] > 10 and memory[-1]["met"] == (memory[-1]["value"] <= 16.0)
