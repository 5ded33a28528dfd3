"""Batches of small drawn clips for the memory's training task: coloured squares that walk over a dark ground."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sam3.config import EfficientMemoryConfig
from sam3.model.efficient_sam3_model_builder import build_efficient_sam3_train
from sam3.model.efficient_sam3_train import EfficientSam3Train
from stage2.data.clip_batch import Clip, collate_clips

TEACHER_FILE = Path(__file__).parents[2] / "data" / "demo" / "tiny_teacher.safetensors"
SIDE, CELLS = 252, 72
COLOURS = ((250, 40, 40), (40, 220, 60))


def make_model(memory: EfficientMemoryConfig | None = None, seed: int = 0) -> EfficientSam3Train:
    """The shipped tiny model with a fresh compressed memory."""
    torch.manual_seed(seed)
    return build_efficient_sam3_train(TEACHER_FILE, memory=memory, device="cpu")


def make_clip(name: str, length: int, start_px: int = 30, num_objects: int = 2, absent: tuple[int, ...] = ()) -> Clip:
    """Squares of 60 pixels; the first walks right, the second left below it; ``absent``: frames without the second."""
    pixels = torch.full((length, 3, SIDE, SIDE), 50, dtype=torch.uint8)
    masks = torch.zeros(length, num_objects, SIDE, SIDE)
    for t in range(length):
        for k in range(num_objects):
            if k == 1 and t in absent:
                continue
            left = start_px + 8 * t if k == 0 else 150 - 8 * t
            rows, columns = slice(20 + 100 * k, 80 + 100 * k), slice(left, left + 60)
            masks[t, k, rows, columns] = 1.0
            pixels[t, :, rows, columns] = torch.tensor(COLOURS[k], dtype=torch.uint8)[:, None, None]
    coverage = torch.nn.functional.adaptive_avg_pool2d(masks, CELLS)
    return Clip(
        name=name,
        pixels=pixels,
        resized_hw=torch.tensor([SIDE, SIDE]),
        coverage=(coverage * 255).round().to(torch.uint8),
        frame_numbers=torch.arange(length),
        object_ids=torch.arange(num_objects),
        num_frames=length,
    )


def make_batch(length: int = 4, num_clips: int = 2, **options: Any) -> dict[str, Any]:
    """A loader's batch."""
    clips = [make_clip(f"clip_{i}", length, start_px=20 + 12 * i, **options) for i in range(num_clips)]
    return collate_clips([{"clip": clip, "bad": []} for clip in clips])
