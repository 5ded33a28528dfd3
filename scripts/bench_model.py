"""The teacher at its real size beside Hugging Face's: seconds and peak memory of one image on the same random weights.

Both models share one set of weights in memory and run alternately, so that the machine's mood hits both.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hf_models import hf_vision_config
from torch import Tensor, nn

from sam3.config import Sam3Config
from sam3.hf_keys import released_to_hf
from sam3.model.sam3_image import Sam3Image
from sam3.model_builder import assemble_image_model
from sam3.released_names import released_state_dict

Row = dict[str, Any]
_HF_VISION = "detector_model.vision_encoder."


def build_pair(config: Sam3Config, device: torch.device, dtype: torch.dtype) -> tuple[Sam3Image, Any]:
    """Our image model (without SAM heads) and HF's vision model over the same tensors."""
    import transformers

    torch.manual_seed(0)
    ours = assemble_image_model(config, device=device, enable_detector=False).to(dtype).eval().requires_grad_(False)
    weights = released_to_hf(released_state_dict(ours))
    theirs: Any = transformers.Sam3VisionModel(hf_vision_config(config))
    theirs.to(device, dtype).eval().requires_grad_(False)
    vision = {k.removeprefix(_HF_VISION): v for k, v in weights.items() if k.startswith(_HF_VISION)}
    theirs.load_state_dict(vision, assign=True)
    return ours, theirs


class PeakMemory:
    """Bytes that a piece of code needs at its peak beyond what was there before; None where it cannot be measured."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        self.bytes = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before: int | None = torch.cuda.memory_allocated(self.device)
        else:
            self._before = _reset_peak_rss()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - (self._before or 0)
        elif self._before is not None:
            self.bytes = status_bytes("VmHWM") - self._before


def _reset_peak_rss() -> int | None:
    """Linux: forget the process's high-water mark; returns the memory in use, or None elsewhere."""
    try:
        # What glibc has kept for reuse would hide what the code takes from it.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return status_bytes("VmRSS")
    except (OSError, AttributeError):
        return None


def status_bytes(field: str) -> int:
    """Linux: a size that the kernel knows of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


class Run(NamedTuple):
    """One forward: seconds of the trunk and of trunk and neck, bytes at the peak, the coarsest map."""

    trunk_s: float
    total_s: float
    peak_bytes: int | None
    features: Tensor


def measure(forward: Callable[[], Tensor], trunk: nn.Module, device: torch.device) -> Run:
    """Run once; the trunk's time is taken by hooks."""
    marks: list[float] = []

    def mark(*_: object) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        marks.append(time.perf_counter())

    hooks = [trunk.register_forward_pre_hook(mark), trunk.register_forward_hook(mark)]
    with torch.no_grad(), PeakMemory(device) as memory:
        mark()
        features = forward()
        mark()
    for hook in hooks:
        hook.remove()
    start, trunk_start, trunk_end, end = marks
    return Run(trunk_end - trunk_start, end - start, memory.bytes, features)


def compare(config: Sam3Config, device: torch.device, dtype: torch.dtype, rounds: int) -> list[Row]:
    """Rows for one precision: the best of ``rounds`` alternating runs after one warm-up on a GPU."""
    ours, theirs = build_pair(config, device, dtype)
    image = torch.rand(1, 3, config.image_size_px, config.image_size_px, device=device).to(dtype) * 2 - 1
    vision = ours.backbone.vision_backbone
    candidates: dict[str, tuple[Callable[[], Tensor], nn.Module]] = {
        "ours": (lambda: ours.backbone.forward_image(image, need_sam2=False)["vision_features"], vision.trunk),
        "HF": (lambda: theirs(pixel_values=image).fpn_hidden_states[vision.num_levels - 1], theirs.backbone),
    }
    runs: dict[str, list[Run]] = {name: [] for name in candidates}
    for index in range(rounds + (device.type == "cuda")):
        for name, (forward, trunk) in candidates.items():
            result = measure(forward, trunk, device)
            if index or device.type != "cuda":
                runs[name].append(result)
    difference = float((runs["ours"][-1].features - runs["HF"][-1].features).abs().max())
    label = f"{config.name} {config.image_size_px} px {str(dtype).removeprefix('torch.')}"
    rows: list[Row] = []
    for field, what in (("trunk_s", "trunk"), ("total_s", "trunk + detector neck")):
        best = {name: min(getattr(run, field) for run in runs[name]) for name in candidates}
        rows.append({"name": f"{label}: {what}, HF", "value": best["HF"], "unit": "s"})
        rows.append(
            {
                "name": f"{label}: {what}, ours",
                "value": best["ours"],
                "unit": "s",
                "target": f"<= {best['HF']:.4g} (HF)",
                "met": best["ours"] <= best["HF"],
            }
        )
    for name in candidates:
        peaks = [run.peak_bytes for run in runs[name] if run.peak_bytes is not None]
        value = min(peaks) / 2**20 if peaks else None
        rows.append({"name": f"{label}: peak memory beyond weights, {name}", "value": value, "unit": "MiB"})
    rows.append({"name": f"{label}: largest difference of the features", "value": difference, "unit": ""})
    return rows


def bench(quick: bool, device: torch.device) -> list[Row]:
    """Rows for ``scripts/bench.py``; ``quick`` takes the tiny preset."""
    config = Sam3Config.preset("tiny" if quick else "sam3")
    rows = compare(config, device, torch.float32, rounds=3 if quick else 2)
    if device.type == "cuda":
        rows += compare(config, device, torch.bfloat16, rounds=3)
    return rows
