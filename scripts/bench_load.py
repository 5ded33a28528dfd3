"""Loading a file of ``sam3.pt``'s size: seconds and peak memory of `sam3.load_model` beside loading by hand.

A random file with all tensors of the released one (3.45 GB at full size) is written to a temporary folder. Each way to
load it runs in a process of its own; the file is in the page cache by then, so the seconds are not those of the disk.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from bench_model import PeakMemory
from run_apart import run_apart
from torch import Tensor, nn

from sam3.config import Sam3Config

if TYPE_CHECKING:
    from sam3.model.sam3_image import Sam3Image

Row = dict[str, Any]
TARGET = 1.2
"""Peak memory of load_model over the file's size."""


def released_tensors(config: Sam3Config) -> dict[str, Tensor]:
    """All tensors of a released file, on the meta device: 1,465 for ``sam3``."""
    from sam3.model_builder import assemble_image_model
    from sam3.released_names import released_state_dict

    return released_state_dict(assemble_image_model(config, device="meta", enable_tracker=True))


def write_random_checkpoint(path: Path, config: Sam3Config) -> None:
    """A flat file as Meta's, with small random numbers and true rotary tables."""
    from sam3.model.vitdet import ViT

    generator = torch.Generator().manual_seed(0)
    weights = {
        key: torch.empty(tensor.shape).normal_(std=0.02, generator=generator)
        for key, tensor in released_tensors(config).items()
        if not tensor.is_complex()
    }
    prefix = "detector.backbone.vision_backbone.trunk."
    with torch.device("meta"):
        trunk = ViT(config.trunk, config.image_size_px)
    for name, module in trunk.named_modules():
        if name.endswith(".attn"):
            weights[f"{prefix}{name}.freqs_cis"] = module.released_table(torch.device("cpu"))
    torch.save(weights, path)


# --- ways to load, each in a process of its own -----------------------------------------------------------------------


class Way(NamedTuple):
    """A way to load: its name in the table, what has to be there before, and the load itself."""

    label: str
    prepare: Callable[[], Any]
    load: Callable[[Path, Any], Any]


def _nothing() -> None:
    return None


def _load_model(path: Path, _: None) -> nn.Module:
    from sam3 import load_model

    return load_model(path, device="cpu")


def _fresh_model() -> Sam3Image:
    from sam3.model_builder import assemble_image_model

    return assemble_image_model(Sam3Config.preset(os.environ["BENCH_LOAD_PRESET"]), enable_tracker=True)


def _by_hand(path: Path, model: Sam3Image) -> nn.Module:
    """The whole file in memory, copied into a model that already has weights."""
    from sam3.released_names import from_released

    weights = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(from_released(weights, model.config), strict=False)
    return model.eval()


def _inspect(path: Path, _: None) -> Any:
    from sam3.inspection import inspect_checkpoint

    return inspect_checkpoint(path, values=False)


WAYS = {
    "load_model": Way("sam3.load_model", _nothing, _load_model),
    "by_hand": Way("torch.load + load_state_dict", _fresh_model, _by_hand),
    "inspect": Way("sam3.inspect", _nothing, _inspect),
}


def _child(way: str, path: Path) -> None:
    """Measure one way and print the figures as JSON; all imports happen before the clock starts."""
    import sam3.inspection
    import sam3.loading
    import sam3.model.text_encoder  # noqa: F401 (built by name)

    with PeakMemory(torch.device("cpu")) as memory:
        start = time.perf_counter()
        prepared = WAYS[way].prepare()
        prepare_seconds = time.perf_counter() - start
        start = time.perf_counter()
        result = WAYS[way].load(path, prepared)
        seconds = time.perf_counter() - start
        read_seconds = None
        if isinstance(result, nn.Module):
            start = time.perf_counter()
            # Every weight is read once, as the first prediction would.
            checksum = sum(float(p.sum()) for p in result.parameters())
            read_seconds = time.perf_counter() - start
            assert checksum == checksum
    figures = {"seconds": seconds, "prepare_seconds": prepare_seconds, "read_seconds": read_seconds}
    print(json.dumps(figures | {"peak_bytes": memory.bytes}))


def _rows(way: str, figures: dict[str, Any], file_bytes: int) -> list[Row]:
    label = WAYS[way].label
    rows: list[Row] = [{"name": f"{label}: time", "value": figures["seconds"], "unit": "s"}]
    if figures["prepare_seconds"] > 0.001:
        rows[0]["note"] = f"into a model whose building took {figures['prepare_seconds']:.1f} s before"
    if figures["read_seconds"] is not None:
        rows.append({"name": f"{label}: then reading each weight", "value": figures["read_seconds"], "unit": "s"})
    if figures["peak_bytes"] is None:
        rows.append({"name": f"{label}: peak memory", "value": None, "unit": "x file", "note": "needs Linux"})
        return rows
    ratio = figures["peak_bytes"] / file_bytes
    row: Row = {
        "name": f"{label}: peak memory",
        "value": ratio,
        "unit": "x file",
        "note": f"{figures['peak_bytes'] / 1e6:,.0f} MB beyond the imports",
    }
    if way == "load_model":
        row |= {"target": f"<= {TARGET}", "met": ratio <= TARGET, "note": f"{row['note']}, all weights read"}
    return [*rows, row]


def bench(quick: bool, device: torch.device) -> list[Row]:
    """Rows for ``scripts/bench.py``; ``quick`` takes the tiny preset. Loading is measured on the CPU in any case."""
    config = Sam3Config.preset("tiny" if quick else "sam3")
    with tempfile.TemporaryDirectory() as folder:
        size = sum(tensor.numel() * tensor.element_size() for tensor in released_tensors(config).values())
        free = shutil.disk_usage(folder).free
        if free < 1.1 * size:
            raise OSError(f"{folder} has {free / 1e9:.1f} GB free, the file takes {size / 1e9:.1f}: set TMPDIR")
        path = Path(folder) / "sam3.pt"
        write_random_checkpoint(path, config)
        file_bytes = path.stat().st_size
        rows: list[Row] = [{"name": f"random file, preset {config.name}", "value": file_bytes / 1e6, "unit": "MB"}]
        for way in WAYS:
            preset = {"BENCH_LOAD_PRESET": config.name}
            rows += _rows(way, run_apart(__file__, "--child", way, path, environment=preset), file_bytes)
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] != ["--child"]:
        sys.exit("run this through scripts/bench.py")
    _child(sys.argv[2], Path(sys.argv[3]))
