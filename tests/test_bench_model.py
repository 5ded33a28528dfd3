"""The measuring code runs, on the tiny preset; its numbers mean nothing there."""

from __future__ import annotations

import bench_model
import pytest
import torch

pytest.importorskip("transformers")


def test_teacher_beside_hf() -> None:
    rows = {row["name"]: row for row in bench_model.bench(quick=True, device=torch.device("cpu"))}
    label = "tiny 252 px float32: "
    assert rows[label + "largest difference of the features"]["value"] < 1e-4
    for name in ("trunk, HF", "trunk, ours", "trunk + detector neck, HF", "trunk + detector neck, ours"):
        assert rows[label + name]["value"] > 0
    ours = rows[label + "trunk, ours"]
    assert ours["met"] == (ours["value"] <= rows[label + "trunk, HF"]["value"])


def test_peak_memory_is_seen() -> None:
    with bench_model.PeakMemory(torch.device("cpu")) as memory:
        block = torch.ones(16_000_000)
        del block
    if memory.bytes is not None:
        assert 50_000_000 < memory.bytes < 200_000_000
