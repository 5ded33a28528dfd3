"""The measuring code of the memories, on the tiny model; its numbers mean nothing there."""

from __future__ import annotations

import bench_memory
import torch

from sam3.config import Sam3Config
from sam3.model.memory_bank import attended_memories

CPU = torch.device("cpu")


def test_both_memories_are_measured() -> None:
    rows = {row["name"]: row for row in bench_memory.bench(quick=True, device=CPU)}
    label = "tiny 252 px float32"
    assert rows[f"{label}: trunk and neck"]["value"] > 0
    for objects in ("1 object", "10 objects"):
        prefix = f"{label}, 7 memories, {objects}: "
        steps = ("memory attention", "mask decoder", "memory encoder")
        seconds = {side: [rows[f"{prefix}{step}, {side}"]["value"] for step in steps] for side in bench_memory.SIDES}
        ratio = rows[f"{prefix}memory attention, full / compressed"]
        assert ratio["value"] == seconds["full"][0] / seconds["compressed"][0]
        assert ratio["met"] == (ratio["value"] >= 10)
        whole = rows[f"{prefix}whole frame, full / compressed"]["value"]
        without = rows[f"{prefix}frame without trunk and neck, full / compressed"]["value"]
        assert abs(whole - 1) < abs(without - 1), "what both sides share brings them together"


def test_both_read_seven_memories() -> None:
    config = Sam3Config.preset("tiny")
    features = bench_memory.make_features(config, CPU)
    tokens = {}
    for side, tracker in bench_memory.build_trackers(config, CPU).items():
        with torch.inference_mode():
            bank = bench_memory.make_bank(tracker, features, 2)
        where = (bank, bench_memory.FRAME_IDX, tracker.settings, bench_memory.NUM_FRAMES)
        memories = attended_memories(*where)
        tokens[side] = tracker.memory_tokens(features, memories, [], bench_memory.NUM_FRAMES).spatial.shape
    assert tokens == {"full": (2, 7, 324, 16), "compressed": (2, 7, 64, 16)}


def test_bytes_of_a_memory() -> None:
    rows = {row["name"]: row for row in bench_memory.size_rows(Sam3Config.preset("tiny"), CPU)}
    assert rows["tiny: spatial memory of a frame, full"]["value"] == 2 * 16 * 18 * 18
    assert rows["tiny: spatial memory of a frame, compressed"]["value"] == 2 * 16 * 64
    assert rows["tiny: tokens, full / compressed"]["met"]
