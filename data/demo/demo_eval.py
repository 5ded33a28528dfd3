"""Scores of a promptable model on scenes with exact masks, through the predictor that a user calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from demo_scenes import make_scene

from sam3.model.prompt_sampling import boxes_from_masks, centre_clicks, correction_clicks

NUM_CLICKS = 3


@dataclass(frozen=True)
class EvalScene:
    """One image and the masks that a model should find in it."""

    image: np.ndarray
    """uint8 RGB, (H, W, 3)."""
    masks: np.ndarray
    """bool (N, H, W)."""
    categories: tuple[str, ...]
    """What each object is: "red circle"."""


def generate_test_scenes(count: int, seed: int = 0) -> list[EvalScene]:
    """The first ``count`` scenes of the demo world's test split, before they are compressed."""
    scenes = (make_scene(seed, "test", index) for index in range(count))
    return [
        EvalScene(scene.image, scene.masks, tuple(item.shape.category for item in scene.objects)) for scene in scenes
    ]


def evaluate_promptable(model: Any, scenes: Iterable[Any], max_objects: int | None = None) -> dict[str, float]:
    """Mean IoU over objects, at the images' own size, for three kinds of prompt.

    A box is the tightest one, without noise. A click is on the innermost pixel; of the three candidates the one with
    the highest predicted IoU is taken. Three clicks: the same click, then twice the innermost pixel of the largest
    error, each time with the previous logits.

    Args:
        model: Has ``inst_interactive_predictor``.
        scenes: Each has ``image`` (uint8 RGB array or PIL image) and ``masks``, bool (N, H, W).
        max_objects: Only so many objects of each scene.

    Returns:
        ``box``, ``one_click``, ``three_clicks``: mean IoU; ``num_objects``.
    """
    predictor = model.inst_interactive_predictor
    found: dict[str, list[float]] = {"box": [], "one_click": [], "three_clicks": []}
    for scene in scenes:
        predictor.set_image(scene.image)
        masks = torch.from_numpy(np.asarray(scene.masks[:max_objects]))
        if not len(masks):
            continue
        answers, _, _ = predictor.predict(box=boxes_from_masks(masks).numpy(), multimask_output=False)
        found["box"] += _ious(answers.reshape(masks.shape), masks)
        one, three = _click_answers(predictor, masks)
        found["one_click"] += _ious(one, masks)
        found["three_clicks"] += _ious(three, masks)
    if not found["box"]:
        raise ValueError("there is nothing to evaluate: the scenes hold no object")
    return {**{kind: float(np.mean(ious)) for kind, ious in found.items()}, "num_objects": len(found["box"])}


def _click_answers(predictor: Any, masks: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Masks after one click and after `NUM_CLICKS`, each (N, H, W), for all objects of the image that is set."""
    clicks = centre_clicks(masks)
    answers, ious, low_res = predictor.predict(
        clicks.points_xy_px.numpy(), clicks.labels.numpy(), multimask_output=True
    )
    if len(masks) == 1:
        answers, ious, low_res = answers[None], ious[None], low_res[None]
    rows, best = np.arange(len(masks)), ious.argmax(axis=1)
    first = current = answers[rows, best]
    logits = low_res[rows, best][:, None]
    for _ in range(NUM_CLICKS - 1):
        clicks = clicks.followed_by(correction_clicks(masks, torch.from_numpy(current > 0), method="centre"))
        answers, _, logits = predictor.predict(
            clicks.points_xy_px.numpy(), clicks.labels.numpy(), mask_input=logits, multimask_output=False
        )
        current = answers.reshape(masks.shape)
        logits = logits.reshape(len(masks), 1, *logits.shape[-2:])
    return first, current


def _ious(answers: np.ndarray, masks: torch.Tensor) -> list[float]:
    found, truth = answers > 0, masks.numpy()
    inside, either = (found & truth).sum((1, 2)), (found | truth).sum((1, 2))
    return (inside / np.maximum(either, 1)).tolist()
