"""Teacher and student on one image with one prompt, and what each costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from demo_drawing import STUDENT_RGB, TEACHER_RGB, draw_mask, draw_prompt, to_jpeg
from demo_page import Comparison, ModelRow
from PIL import Image


@dataclass(frozen=True)
class Prompt:
    """A box (x0, y0, x1, y1), or clicks (x, y) inside the object; pixels of the image."""

    box_xyxy_px: Sequence[float] | None = None
    points_xy_px: Sequence[Sequence[float]] = ()

    def __post_init__(self) -> None:
        if (self.box_xyxy_px is None) == (not self.points_xy_px):
            raise ValueError(f"a prompt is a box or clicks, got box {self.box_xyxy_px} and clicks {self.points_xy_px}")

    @property
    def words(self) -> str:
        """How the report calls it."""
        if self.box_xyxy_px is not None:
            return "box"
        return "one click" if len(self.points_xy_px) == 1 else f"{len(self.points_xy_px)} clicks"

    def arguments(self) -> dict[str, Any]:
        """Arguments of the interactive predictor's `predict`."""
        if self.box_xyxy_px is not None:
            return {"box": np.asarray(self.box_xyxy_px, np.float32), "multimask_output": False}
        labels = np.ones(len(self.points_xy_px), np.int64)
        points = np.asarray(self.points_xy_px, np.float32)
        return {"point_coords": points, "point_labels": labels, "multimask_output": len(labels) == 1}


def segment(predictor: Any, image: Image.Image, prompt: Prompt) -> np.ndarray:
    """The mask that the model itself scores best: bool, (H, W)."""
    predictor.set_image(image)
    masks, scores, _ = predictor.predict(**prompt.arguments())
    return np.asarray(masks[int(np.argmax(scores))]) > 0


def iou(first: np.ndarray, second: np.ndarray) -> float:
    """Intersection over union of two boolean masks; 1 if both are empty."""
    union = np.logical_or(first, second).sum()
    return float(np.logical_and(first, second).sum() / union) if union else 1.0


def compare(
    teacher: Any, student: Any, image: Image.Image, prompt: Prompt, title: str, truth_hw: np.ndarray | None = None
) -> Comparison:
    """Segment one image with both models and draw the three views.

    Args:
        teacher: `Sam3Image` with its interactive predictor.
        student: The same, with a student as its trunk.
        image: The photo.
        prompt: In pixels of the photo.
        title: What the report calls it.
        truth_hw: The exact mask, bool, (H, W), where there is one.
    """
    masks = [segment(model.inst_interactive_predictor, image, prompt) for model in (teacher, student)]
    points = prompt.points_xy_px
    views = (
        draw_prompt(image, prompt.box_xyxy_px, points, [1] * len(points)),
        draw_mask(image, masks[0], TEACHER_RGB),
        draw_mask(image, masks[1], STUDENT_RGB),
    )
    truth_ious = [None if truth_hw is None else iou(mask, truth_hw) for mask in masks]
    jpegs = (to_jpeg(views[0]), to_jpeg(views[1]), to_jpeg(views[2]))
    return Comparison(title, prompt.words, jpegs, iou(*masks), *truth_ious)


def median_ms(work: Callable[[], Any], repeats: int) -> float:
    """Median time of a call in milliseconds, after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times)


def describe_model(name: str, encoder: str, model: Any, path: Path, image: Image.Image, repeats: int) -> ModelRow:
    """Parameters, file size and CPU latency of a model."""
    predictor = model.inst_interactive_predictor
    box = Prompt((image.width * 0.25, image.height * 0.25, image.width * 0.75, image.height * 0.75)).arguments()
    encode_ms = median_ms(lambda: predictor.set_image(image), repeats)
    predict_ms = median_ms(lambda: predictor.predict(**box), repeats)
    trunk = model.backbone.vision_backbone.trunk
    return ModelRow(
        name=name,
        encoder=encoder,
        encoder_params=sum(parameter.numel() for parameter in trunk.parameters()),
        total_params=sum(parameter.numel() for parameter in model.parameters()),
        file_bytes=path.stat().st_size,
        encode_ms=encode_ms,
        predict_ms=predict_ms,
    )
