"""The released memory beside the compressed one at the real size: time of a frame, bytes of a memory.

The compressed memory is the one that ``stage2/configs/base_memory.yaml`` trains. Both trackers get the same random
features and read seven memories and their pointers, in turns, so that what else runs on the machine slows both. Trunk
and neck are the same on both sides and are timed once, with as many frames as objects need: one.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam3.config import Sam3Config
from sam3.model.memory_bank import FrameRecord, MemoryBank
from sam3.model.sam3_tracker import Sam3Tracker, TrackerFeatures
from sam3.model_builder import assemble_image_model, build_heads
from sam3_train.config import load_config
from stage2.config import get_defaults
from stage2.settings import memory_config

Row = dict[str, Any]
NUM_MEMORIES = 7
FRAME_IDX = NUM_MEMORIES
NUM_FRAMES = 100
TARGET_SPEEDUP = 10.0
TARGET_TOKENS = 64
"""Of a frame: at the real size 81 times fewer than the full memory has."""
SIDES = ("full", "compressed")
LONG_S = 10.0
"""A call that takes longer is not repeated to warm up: what is made at first use does not count in it."""
RECIPE = Path(__file__).resolve().parents[1] / "stage2/configs/base_memory.yaml"


def with_trained_memory(config: Sam3Config) -> Sam3Config:
    """A model description with the compressed memory of the recipe."""
    return config.with_efficient_memory(memory_config(load_config(get_defaults(), RECIPE), config.name))


def build_trackers(config: Sam3Config, device: torch.device) -> dict[str, Sam3Tracker]:
    """Both trackers with random weights."""
    trackers = {}
    for side in SIDES:
        torch.manual_seed(0)
        sizes = config if side == "full" else with_trained_memory(config)
        heads = build_heads(sizes, enable_tracker=True)
        assert isinstance(heads, Sam3Tracker)
        trackers[side] = heads.to(device).eval().requires_grad_(False)
    return trackers


def make_features(config: Sam3Config, device: torch.device) -> TrackerFeatures:
    """Random features of a frame."""
    dim, side = config.hidden_dim, config.grid_size
    shapes = ((1, dim // 8, 4 * side, 4 * side), (1, dim // 4, 2 * side, 2 * side), (1, dim, side, side))
    generator = torch.Generator().manual_seed(1)
    return TrackerFeatures(*(torch.randn(shape, generator=generator).to(device) for shape in shapes))


def make_bank(tracker: Sam3Tracker, features: TrackerFeatures, num_objects: int) -> MemoryBank:
    """One prompted frame and six tracked ones; all records are the same, which no time depends on."""
    config, device = tracker.config, features.coarse.device
    side = config.low_res_mask_size
    masks = torch.randn((num_objects, 1, side, side), generator=torch.Generator().manual_seed(2)).to(device)
    scores = torch.ones(num_objects, 1, device=device)
    memory = tracker.encode_memory(features, tracker.high_res(masks[:1]), scores[:1], is_mask_from_points=False)
    memory = memory.expand(num_objects, *memory.shape[1:]).contiguous()
    pointers = torch.randn((num_objects, config.hidden_dim), generator=torch.Generator().manual_seed(3)).to(device)
    record = FrameRecord(masks, pointers, scores, memory, scores[:, 0])
    return MemoryBank({0: record}, dict.fromkeys(range(1, NUM_MEMORIES), record))


def steps_of(
    tracker: Sam3Tracker, features: TrackerFeatures, bank: MemoryBank, num_objects: int
) -> dict[str, Callable[[], Any]]:
    """What tracking one frame does after trunk and neck, by name."""
    conditioned = features.coarse.expand(num_objects, -1, -1, -1)
    record = bank.cond[0]
    assert record.pred_masks is not None
    logits: Tensor = tracker.high_res(record.pred_masks)
    scores = record.object_score_logits
    return {
        "memory attention": lambda: tracker.condition(FRAME_IDX, features, bank, NUM_FRAMES),
        "mask decoder": lambda: tracker.decode(features, conditioned, num_objects, multimask_output=True),
        "memory encoder": lambda: tracker.encode_memory(features, logits, scores, is_mask_from_points=False),
    }


def time_once(step: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, GPU work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def time_trunk(config: Sam3Config, device: torch.device, repeats: int) -> float:
    """Seconds of trunk and neck for a frame, the median."""
    torch.manual_seed(0)
    model = assemble_image_model(config, device=device, enable_detector=False, enable_tracker=True).eval()
    image = torch.zeros(1, 3, config.image_size_px, config.image_size_px, device=device)
    step = functools.partial(model.tracker_features, image)
    step()
    return statistics.median(time_once(step, device) for _ in range(repeats))


@torch.inference_mode()
def compare(config: Sam3Config, device: torch.device, num_objects: int, repeats: int, trunk_s: float) -> list[Row]:
    """Rows of both sides for some objects."""
    trackers, features = build_trackers(config, device), make_features(config, device)
    steps = {
        side: steps_of(tracker, features, make_bank(tracker, features, num_objects), num_objects)
        for side, tracker in trackers.items()
    }
    objects = "1 object" if num_objects == 1 else f"{num_objects} objects"
    label = f"{config.name} {config.image_size_px} px float32, {NUM_MEMORIES} memories, {objects}"
    rows: list[Row] = []
    totals = dict.fromkeys(SIDES, 0.0)
    for name in steps["full"]:
        # The first call makes kernels and buffers.
        first = {side: time_once(steps[side][name], device) for side in SIDES}
        seconds = {side: [value] if value > LONG_S else [] for side, value in first.items()}
        for _ in range(repeats):
            for side in SIDES:
                if len(seconds[side]) < repeats:
                    seconds[side].append(time_once(steps[side][name], device))
        medians = {side: statistics.median(values) for side, values in seconds.items()}
        for side, value in medians.items():
            totals[side] += value
            rows.append({"name": f"{label}: {name}, {side}", "value": value, "unit": "s"})
        if name == "memory attention":
            speedup = medians["full"] / medians["compressed"]
            rows.append(_ratio(f"{label}: memory attention, full / compressed", speedup, TARGET_SPEEDUP))
    without, with_trunk = ((totals["full"] + shared) / (totals["compressed"] + shared) for shared in (0.0, trunk_s))
    rows.append(_ratio(f"{label}: frame without trunk and neck, full / compressed", without, None))
    rows.append(_ratio(f"{label}: whole frame, full / compressed", with_trunk, None))
    return rows


def _ratio(name: str, value: float, least: float | None) -> Row:
    row: Row = {"name": name, "value": value, "unit": "x"}
    return row if least is None else row | {"target": f">= {least:g}", "met": value >= least}


@torch.inference_mode()
def size_rows(config: Sam3Config, device: torch.device) -> list[Row]:
    """Tokens and bytes that are stored of a frame and an object."""
    features = make_features(config, device)
    records = {side: make_bank(t, features, 1).cond[0] for side, t in build_trackers(config, device).items()}
    rows: list[Row] = []
    sizes = {}
    for side, record in records.items():
        memory = record.maskmem_features
        assert memory is not None
        sizes[side] = memory.numel() * memory.element_size()
        rows.append({"name": f"{config.name}: spatial memory of a frame, {side}", "value": sizes[side], "unit": "B"})
        whole = f"{config.name}: all that is kept of a frame, its mask included, {side}"
        rows.append({"name": whole, "value": record.nbytes, "unit": "B"})
    fewer = sizes["full"] / sizes["compressed"]
    rows.append(_ratio(f"{config.name}: tokens, full / compressed", fewer, config.grid_size**2 // TARGET_TOKENS))
    return rows


def bench(quick: bool, device: torch.device) -> list[Row]:
    """Rows for ``scripts/bench.py``; ``quick`` takes the tiny model."""
    config = Sam3Config.preset("tiny" if quick else "sam3")
    on_gpu = device.type == "cuda"
    trunk_s = time_trunk(config, device, 10 if on_gpu else 1)
    rows: list[Row] = [
        {"name": f"{config.name} {config.image_size_px} px float32: trunk and neck", "value": trunk_s, "unit": "s"}
    ]
    for num_objects, repeats in ((1, 20), (10, 10)) if on_gpu else ((1, 3), (10, 1)):
        rows += compare(config, device, num_objects, repeats, trunk_s)
    return rows + size_rows(config, device)
