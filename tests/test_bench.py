"""scripts/bench.py: the table, the JSON, and that one broken part spoils no other."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import types

import bench
import pytest
import torch


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, types.ModuleType]:
    """Two stand-ins for the parts: one that measures, one that breaks."""
    good, bad = types.ModuleType("bench_good"), types.ModuleType("bench_bad")
    good.calls = []

    def measure(quick, device):
        good.calls.append((quick, device.type))
        return [
            {"name": "write", "value": 1234.5678, "unit": "MB/s", "target": ">= 80%", "met": True},
            {"name": "read | map", "value": 0.012345, "unit": "s", "met": False, "note": "cold"},
        ]

    def break_down(quick, device):
        raise RuntimeError("no such file")

    good.bench, bad.bench = measure, break_down
    monkeypatch.setitem(sys.modules, "bench_good", good)
    monkeypatch.setitem(sys.modules, "bench_bad", bad)
    monkeypatch.setitem(bench.PARTS, "stage1", {"bad": ("bench_bad", "Broken"), "good": ("bench_good", "Working")})
    return {"good": good, "bad": bad}


def test_writes_a_table_and_json(parts, tmp_path, capsys):
    assert bench.main(["stage1", "--quick", "--device", "cpu", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "stage1.json").read_text())
    assert record["parts"]["good"][0]["value"] == 1234.5678
    assert record["facts"]["torch"]
    table = (tmp_path / "stage1.md").read_text()
    assert "| write | 1,235 | MB/s | >= 80% | yes |  |" in table
    assert "| read / map | 0.01235 | s |  | no | cold |" in table
    assert parts["good"].calls == [(True, "cpu")]


def test_a_part_that_breaks_is_a_row_with_its_reason(parts, tmp_path, capsys):
    assert bench.main(["stage1", "--device", "cpu", "--output", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "stage1.json").read_text())["parts"]["bad"]
    assert row["value"] is None
    assert row["note"] == "not measured: RuntimeError: no such file"
    assert "Traceback" in capsys.readouterr().err


def test_only_runs_the_named_parts_and_refuses_unknown_ones(parts, tmp_path, capsys):
    assert bench.main(["stage1", "--only", "good", "--device", "cpu", "--output", str(tmp_path)]) == 0
    assert list(json.loads((tmp_path / "stage1.json").read_text())["parts"]) == ["good"]
    assert bench.main(["stage1", "--only", "god", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: --only god: stage1 has the parts bad, good\n"


@pytest.mark.parametrize("module_name", [module for parts in bench.PARTS.values() for module, _ in parts.values()])
def test_every_part_has_the_function_that_is_called(module_name):
    signature = inspect.signature(importlib.import_module(module_name).bench)
    signature.bind(quick=True, device=torch.device("cpu"))
