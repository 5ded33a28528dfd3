"""The measuring code of the tracker runs, on the smallest models; its numbers mean nothing there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import bench_stream
import bench_video
import pytest
import torch

CPU = torch.device("cpu")


def test_tracker_beside_hf(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(bench_video, "measure_apart", bench_video.measure)  # without seconds of imports each
    rows = {row["name"]: row for row in bench_video.compare("quick", CPU, 4)}
    label = "quick 168 px float32, 1 object: "
    difference = rows[label + "largest difference of mask logits"]
    assert difference["met"] and difference["value"] < 1e-4
    for what in ("click and first frame", "each of 3 tracked frames", "the last of them"):
        assert rows[f"{label}{what}, ours"]["value"] > 0 and rows[f"{label}{what}, HF"]["value"] > 0
    tracked = rows[label + "each of 3 tracked frames, ours"]
    assert tracked["met"] == (tracked["value"] <= rows[label + "each of 3 tracked frames, HF"]["value"])
    parts = [rows[f"{label}of a tracked frame, {part}, ours"]["value"] for part in bench_video.PARTS.values()]
    assert min(parts) > 0 and sum(parts) < tracked["value"]


def test_streams_keep_their_size_and_their_results(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_here(what, *sizes):
        if what == "equal":
            return {"same": bench_stream.equal_frames(*sizes)}
        return json.loads(json.dumps(bench_stream.run_stream(*sizes)))

    monkeypatch.setattr(bench_stream, "run_apart", run_here)
    assert bench_stream.equality_row("tiny", CPU, 2, 30)["met"]
    rows = {row["name"]: row for row in bench_stream.stream_rows("tiny", CPU, 1, 40, 20)}
    label = "tiny, 1 object, 40 frames: "
    assert 0.05 < rows[label + "records in memory"]["value"] < 0.2
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
    row = bench_stream.equality_row
    monkeypatch.setattr(bench_stream, "run_apart", lambda what, *sizes: {"same": bench_stream.equal_frames(*sizes)})
    assert row("tiny", CPU, 1, 8)["value"] == 4


@pytest.mark.parametrize(
    ("module", "call", "arguments"),
    [
        (bench_stream, "run_apart", ("stream", "tiny", CPU, 1, 3)),
        (bench_video, "measure_apart", ("ours", "tiny", CPU, 3, Path("found.pt"))),
    ],
)
def test_a_measurement_runs_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch, module, call, arguments) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, len(commands) - 1, 'a warning\n{"seconds": 2.5}\n', "no memory")

    monkeypatch.setattr(module.subprocess, "run", run)
    assert getattr(module, call)(*arguments) == {"seconds": 2.5}
    assert commands == [[sys.executable, module.__file__, *map(str, arguments)]]
    with pytest.raises(RuntimeError, match="no memory"):
        getattr(module, call)(*arguments)
