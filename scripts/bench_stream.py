"""Constant memory: a stream of many frames must cost as much at its end as near its beginning, and give the same masks.

The tracker runs through `StreamingTracker` as it would on a camera, on features of a few random frames that come again
and again in place of the trunk's: that part of a frame cannot depend on how many came before, and takes most of the
time. Each measurement has a process of its own. Frames of an old and a young stream are timed by turns, in processor
time, so that other programs hardly count.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import statistics
import time
from typing import Any

import torch
from bench_model import status_bytes
from run_apart import run_apart

from sam3.config import Sam3Config
from sam3.model.sam3_tracker import TrackerFeatures
from sam3.model.sam3_tracking_predictor import Sam3TrackerPredictor
from sam3.model.streaming import StreamingTracker, StreamResult
from sam3.model.tracker_state import TrackerState
from sam3.model_builder import assemble_image_model

Row = dict[str, Any]
FRAME_HW = (48, 64)
_NUM_FEATURES = 7
_TIMED_FRAMES = 300
_PRESENCE_BIAS = 4.0
"""Added to the object score: with random weights, objects would be absent and their masks all the same."""


def choose_config(name: str) -> Sam3Config:
    """A preset, or ``quick``: ``tiny`` for a ninth of the image."""
    if name != "quick":
        return Sam3Config.preset(name)
    return Sam3Config.preset("tiny").replace(name=name, image_size_px=84)


class RepeatingFeatures(Sam3TrackerPredictor):
    """A predictor that sees the same few random frames again and again."""

    def __init__(self, preset: str, device: torch.device, **settings: Any) -> None:
        config = choose_config(preset)
        trunk = dataclasses.replace(config.trunk, embed_dim=64, depth=1, num_heads=1, global_blocks=(0,))
        torch.manual_seed(0)
        model = assemble_image_model(
            config.replace(trunk=trunk), device=device, enable_detector=False, enable_tracker=True
        )
        model.eval().requires_grad_(False)
        for parameter in list(model.tracker.sam_mask_decoder.pred_obj_score_head.parameters())[-1:]:
            parameter.fill_(_PRESENCE_BIAS)
        super().__init__(model, **settings)
        dim, side = config.hidden_dim, config.grid_size
        shapes = ((1, dim // 8, 4 * side, 4 * side), (1, dim // 4, 2 * side, 2 * side), (1, dim, side, side))
        self.seen = [TrackerFeatures(*(torch.randn(s, device=device) for s in shapes)) for _ in range(_NUM_FEATURES)]

    def frame_features(self, state: TrackerState, frame_idx: int) -> TrackerFeatures:
        """See `TrackerEngine`."""
        state.touch(frame_idx)
        return self.seen[frame_idx % _NUM_FEATURES]


def open_stream(predictor: Sam3TrackerPredictor, num_objects: int, policy: str, last_prompt: int) -> StreamingTracker:
    """A stream with a box for each object on the first frame, and a click now and then later."""
    tracker = StreamingTracker(predictor, memory_policy=policy)
    for i in range(num_objects):
        left = 0.1 + 0.1 * i
        tracker.add_points(i, box=[left, 0.2, left + 0.3, 0.7], frame_idx=0)
    for t in range(25, last_prompt, 25):
        tracker.add_points(t // 25 % num_objects, [[0.4, 0.3 + (t % 4) * 0.1]], [1], frame_idx=t)
    return tracker


def equal_frames(preset: str, device: torch.device, num_objects: int, num_frames: int, **settings: Any) -> int:
    """How many of the first frames have the very masks and scores of a stream that keeps everything."""
    predictor = RepeatingFeatures(preset, device, **settings)
    frame = torch.zeros(3, *FRAME_HW, dtype=torch.uint8)
    streams = [
        open_stream(predictor, num_objects, policy, num_frames) for policy in ("no_late_edits", "keep_everything")
    ]
    for t in range(num_frames):
        one, other = (stream.push(frame) for stream in streams)
        if not _same(one, other):
            return t
    return num_frames


def _same(one: StreamResult, other: StreamResult) -> bool:
    return (
        one.obj_ids == other.obj_ids
        and torch.equal(one.low_res_masks, other.low_res_masks)
        and torch.equal(one.object_score_logits, other.object_score_logits)
    )


def run_stream(preset: str, device: torch.device, num_objects: int, num_frames: int, settled: int) -> dict[str, Any]:
    """Track a long stream in this process, then frames of it and of a young stream by turns.

    By turns, because what else runs on a machine changes in the minutes between the two ends of a stream by more than
    what is looked for.

    Returns:
        ``resident`` bytes by frame of the long stream, ``bank_bytes`` of its records, ``old`` and ``young``: seconds of
        processor time (wall time on a GPU) of frames that follow ``num_frames`` and ``settled`` others.
    """
    predictor = RepeatingFeatures(preset, device)
    frame = torch.zeros(3, *FRAME_HW, dtype=torch.uint8)
    clock = time.perf_counter if device.type == "cuda" else time.process_time

    def push(stream: StreamingTracker) -> float:
        start = clock()
        masks = stream.push(frame).masks
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        del masks
        return clock() - start

    # The same prompts: each prompted frame stays in memory and is read from then on.
    old, young = (open_stream(predictor, num_objects, "no_late_edits", min(settled, 500)) for _ in range(2))
    resident: dict[int, int] = {}
    step = max(num_frames // 40, 5)
    for t in range(num_frames):
        push(old)
        if (t + 1) % step == 0:
            resident[t + 1] = resident_bytes(device)
    bank_bytes = sum(group.bank.nbytes for group in old.state.groups)
    for _ in range(settled):
        push(young)
    pairs = [(push(old), push(young)) for _ in range(min(settled, _TIMED_FRAMES))]
    return {
        "resident": resident,
        "bank_bytes": bank_bytes,
        "old": [pair[0] for pair in pairs],
        "young": [pair[1] for pair in pairs],
    }


def resident_bytes(device: torch.device) -> int:
    """Memory in use: of the process, or on the GPU."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)
    return status_bytes("VmRSS")


def stream_rows(preset: str, device: torch.device, num_objects: int, num_frames: int, settled: int) -> list[Row]:
    """Growth of memory and time after frame ``settled``."""
    found = run_apart(__file__, "stream", preset, device, num_objects, num_frames, settled)
    label = f"{preset}, {num_objects} object{'s' * (num_objects > 1)}, {num_frames:,} frames"
    resident = {int(t): value for t, value in found["resident"].items()}
    first = min(t for t in resident if t >= settled)
    before, most = resident[first], max(value for t, value in resident.items() if t >= first)
    young, old = (statistics.median(found[name]) for name in ("young", "old"))
    memory, duration = 100 * (most / before - 1), 100 * (old / young - 1)
    return [
        {"name": f"{label}: records in memory", "value": found["bank_bytes"] / 2**20, "unit": "MiB"},
        {"name": f"{label}: resident memory at frame {first:,}", "value": before / 2**20, "unit": "MiB"},
        _judged(f"{label}: most memory after that", memory, 1.0),
        {"name": f"{label}: time of a frame after {settled:,} others", "value": 1000 * young, "unit": "ms"},
        _judged(f"{label}: time of a frame after {num_frames:,} others", duration, 5.0),
    ]


def _judged(name: str, percent: float, limit: float) -> Row:
    return {"name": name, "value": percent, "unit": "% more", "target": f"< {limit:g} %", "met": percent < limit}


def equality_row(preset: str, device: torch.device, num_objects: int, num_frames: int) -> Row:
    """Whether dropping records changed anything."""
    same = run_apart(__file__, "equal", preset, device, num_objects, num_frames)["same"]
    name = f"{preset}, {num_objects} objects, prompts on the way: frames equal to the bit to keeping everything"
    return {"name": name, "value": same, "unit": "frames", "target": f"{num_frames}", "met": same == num_frames}


def bench(quick: bool, device: torch.device) -> list[Row]:
    """Rows for ``scripts/bench.py``; ``quick`` takes few frames."""
    num_frames, settled = (60, 30) if quick else (10_000, 1_000)
    small = "quick" if quick else "tiny"
    rows = [equality_row(small, device, num_objects, 40 if quick else 600) for num_objects in (1, 5)]
    for num_objects in (1, 5):
        rows += stream_rows(small, device, num_objects, num_frames, settled)
    return rows if quick else rows + stream_rows("sam3", device, 1, 30, 18)


def _main() -> None:
    parser = argparse.ArgumentParser(description="One measurement; called by bench().")
    parser.add_argument("what", choices=("stream", "equal"))
    parser.add_argument("preset")
    parser.add_argument("device", type=torch.device)
    parser.add_argument("num_objects", type=int)
    parser.add_argument("num_frames", type=int)
    parser.add_argument("settled", type=int, nargs="?", default=0, help="frames of the young stream")
    args = parser.parse_args()
    sizes = (args.preset, args.device, args.num_objects, args.num_frames)
    print(json.dumps(run_stream(*sizes, args.settled) if args.what == "stream" else {"same": equal_frames(*sizes)}))


if __name__ == "__main__":
    _main()
