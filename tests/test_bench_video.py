"""The measuring code of the tracker runs, on the smallest models; its numbers mean nothing there."""

from __future__ import annotations

import gc
import json

import bench_stream
import bench_video
import pytest
import torch

CPU = torch.device("cpu")


def test_tracker_beside_hf(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    # Here, without seconds of imports each.
    monkeypatch.setattr(bench_video, "run_apart", lambda script, *arguments: bench_video.measure(*arguments))
    rows = {row["name"]: row for row in bench_video.compare("quick", CPU, 4)}
    label = "quick 84 px float32, 1 object: "
    difference = rows[label + "largest difference of mask logits"]
    assert difference["met"] and difference["value"] < 1e-4
    for what in ("click and first frame", "each of 3 tracked frames", "the last of them"):
        assert rows[f"{label}{what}, ours"]["value"] > 0 and rows[f"{label}{what}, HF"]["value"] > 0
    tracked = rows[label + "each of 3 tracked frames, ours"]
    assert tracked["met"] == (tracked["value"] <= rows[label + "each of 3 tracked frames, HF"]["value"])
    parts = [rows[f"{label}of a tracked frame, {part}, ours"]["value"] for part in bench_video.PARTS.values()]
    assert min(parts) > 0 and sum(parts) < tracked["value"]


def test_streams_keep_their_size_and_their_results(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    def run_here(script, what, *sizes):
        if what == "equal":
            return {"same": bench_stream.equal_frames(*sizes)}
        return json.loads(json.dumps(bench_stream.run_stream(*sizes)))

    monkeypatch.setattr(bench_stream, "run_apart", run_here)
    gc.freeze()  # so that what other tests left is not gone through at every look at the memory
    request.addfinalizer(gc.unfreeze)
    assert bench_stream.equality_row("quick", CPU, 2, 30)["met"]
    rows = {row["name"]: row for row in bench_stream.stream_rows("quick", CPU, 1, 40, 20)}
    label = "quick, 1 object, 40 frames: "
    assert 0.008 < rows[label + "records in memory"]["value"] < 0.016  # 7 memories of 36 tokens, 17 pointers
    memory = rows[label + "most memory after that"]
    assert memory["met"] == (memory["value"] < 1)
    assert rows[label + "time of a frame after 40 others"]["target"] == "< 5 %"


def test_a_stream_that_forgets_too_much_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(bank, fronts, config, num_frames, whole):
        small = prune(bank, fronts, config, num_frames, whole)
        small.non_cond = dict(list(small.non_cond.items())[-2:])
        return small

    from sam3.model import memory_policy

    prune = memory_policy.prune
    monkeypatch.setattr(memory_policy, "prune", forgetful)
    monkeypatch.setattr(bench_stream, "run_apart", lambda _, what, *sizes: {"same": bench_stream.equal_frames(*sizes)})
    assert bench_stream.equality_row("quick", CPU, 1, 8)["value"] == 4
