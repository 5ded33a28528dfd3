"""One step of the geometry fine-tune at the released size, with random weights; a part of ``bench.py``.

    python scripts/bench.py geometry --only real

One image of 1008 px, one object, float32 on a CPU, the frozen parts recomputed in the backward pass. It has to fit into
24 GiB. Each route is measured in a process of its own, because memory that one has used is not always given back.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_geometry import GIB, Bench, part_rows
from bench_model import PeakMemory, status_bytes
from bench_prompts import SA1B_HW, make_annotated_photos
from run_apart import run_apart

from sam3.config import Sam3Config
from stage1_geometry_finetune.data import PromptSpec

Row = dict[str, Any]
BACKBONE = "repvit_m1_1"
MEMORY_TARGET_GIB = 24


def bench(quick: bool, device: torch.device) -> list[Row]:
    """All rows of this part."""
    rows: list[Row] = []
    for route in ("detector", "SAM heads"):
        rows += run_apart(__file__, "tiny" if quick else "sam3", route, device)
    return rows


def measure(preset: str, route: str, device: torch.device) -> list[Row]:
    """Rows of one route."""
    config, hw = Sam3Config.preset(preset), (60, 90) if preset == "tiny" else SA1B_HW
    backbone = "demo_cnn" if preset == "tiny" else BACKBONE
    with tempfile.TemporaryDirectory(prefix="bench-geometry-") as name:
        index = make_annotated_photos(Path(name), hw, num_images=1, num_objects=4)
        bench = Bench(config, backbone, index, route, device, 1, PromptSpec(1, min_area=0))
        weights = sum(p.numel() for p in bench.task.parameters())
        with PeakMemory(device) as peak:
            seconds = bench.timed_step()
    label, note = f"{preset}, {route}: ", f"{backbone}, 1 image of {config.image_size_px} px, 1 object, {bench.dtype}"
    rows = part_rows(label, seconds, note)
    total = None if peak.bytes is None else _whole_peak(device) / GIB
    rows.append(
        {
            "name": f"{label}peak memory of the process",
            "value": total,
            "unit": "GiB",
            "target": f"< {MEMORY_TARGET_GIB}",
            "met": None if total is None else total < MEMORY_TARGET_GIB,
            "note": f"{weights / 1e6:.1f} M trained parameters; weights, gradients and optimizer included",
        }
    )
    if peak.bytes is not None:
        rows.append({"name": f"{label}of it for the step", "value": peak.bytes / GIB, "unit": "GiB", "note": note})
    return rows


def _whole_peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return status_bytes("VmHWM")


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2], torch.device(sys.argv[3]))))
