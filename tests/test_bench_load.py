"""The measuring code of loading runs, on the tiny preset; and the full-size file would be the released one."""

from __future__ import annotations

import hashlib

import bench_load
import torch

from sam3.config import Sam3Config

# Of sorted lines "key (shape)" of the released file.
RELEASED = "08e2c4d04e2a363be9f610e2033961ffd005aeb17c45e41f49dc57afb401e197"


def test_rows() -> None:
    rows = {row["name"]: row for row in bench_load.bench(quick=True, device=torch.device("cpu"))}
    assert 4 < rows["random file, preset tiny"]["value"] < 40
    for way in bench_load.WAYS.values():
        assert rows[f"{way.label}: time"]["value"] > 0
        assert f"{way.label}: peak memory" in rows
    ours = rows["sam3.load_model: peak memory"]
    assert ours["value"] is None or ours["met"] == (ours["value"] <= bench_load.TARGET)


def test_the_full_size_file_has_the_released_names_and_shapes() -> None:
    tensors = bench_load.released_tensors(Sam3Config())
    lines = sorted(f"{key} {tuple(value.shape)}" for key, value in tensors.items())
    assert len(lines) == 1465
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == RELEASED
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    assert size == 3_449_659_104
