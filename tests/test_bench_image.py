"""The measuring code of the image model runs, on the tiny preset; its numbers mean nothing there."""

from __future__ import annotations

import bench_image
import pytest
import torch

pytest.importorskip("transformers")

CPU = torch.device("cpu")


def test_image_model_beside_hf(monkeypatch: pytest.MonkeyPatch) -> None:
    # Here, without four seconds of imports each.
    monkeypatch.setattr(bench_image, "run_apart", lambda script, *arguments: bench_image.measure(*arguments))
    rows = {row["name"]: row for row in bench_image.compare("tiny", CPU, num_prompts=2)}
    label = "tiny 252 px float32: "
    difference = rows[label + "largest difference of masks, boxes and scores"]
    assert difference["met"] and difference["value"] < 1e-4
    for what in ("one image with text and box", "encoding the image", "each of 2 further texts on the encoded image"):
        ours, theirs = rows[f"{label}{what}, ours"], rows[f"{label}{what}, HF"]
        assert ours["value"] > 0 and theirs["value"] > 0
        assert ours["met"] == (ours["value"] <= theirs["value"])
    weights = rows[label + "weights, ours"]["value"]
    assert weights == pytest.approx(rows[label + "weights, HF"]["value"], rel=0.01)
    assert 1 < rows[label + "live tensors at the peak, ours"]["value"] < 50


def test_imports_are_timed_in_fresh_processes() -> None:
    torch_alone, light, _ = bench_image.import_rows(runs=1)
    assert torch_alone["value"] > 0 and light["met"] == (light["value"] < 1.5 * torch_alone["value"])


def test_live_tensors_are_counted_once_and_until_they_go() -> None:
    weight = torch.ones(1000)
    with bench_image.LiveTensors([weight]) as live:
        first = weight + 1
        view = first[::2]
        assert live.bytes == 4000
        second = first * 2
        del first
        assert live.bytes == 8000  # the view keeps it
        del view, second
        assert live.bytes == 0
        torch.zeros(500).add_(1)
    assert live.peak_bytes == 8000
