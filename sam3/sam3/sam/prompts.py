"""A user's clicks, boxes and masks, checked once at the edge, then turned into what the SAM heads take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam3.preprocess import Preprocess
from sam3.sam.heads import SamFeatures

_LABELS = (-1, 0, 1, 2, 3)


class PromptError(ValueError):
    """A text, click, box or mask that cannot be used; the message names the value and says what would do."""


@dataclass(frozen=True)
class Prompts:
    """n prompts on one image, still in the image's coordinates. A box is its two corners, before the clicks."""

    points_xy: Tensor | None
    """(n, P, 2) float32."""
    labels: Tensor | None
    """(n, P) int64."""
    mask_logits: Tensor | None
    """(n, 1, S, S) float32."""
    normalize_coords: bool
    """Coordinates are pixels; otherwise fractions of width and height."""

    @property
    def num_prompts(self) -> int:
        """n."""
        return next(len(x) for x in (self.points_xy, self.mask_logits) if x is not None)

    @classmethod
    def parse(cls, point_coords: Any, point_labels: Any, box: Any, mask_input: Any, normalize_coords: bool) -> Prompts:
        """Check and combine the arguments of `SAM3InteractiveImagePredictor.predict`.

        Raises:
            PromptError: If something is missing, misshapen, not finite, or a label is unknown.
        """
        points, labels = _parse_points(point_coords, point_labels)
        if box is not None:
            corners = _parse_boxes(box)
            corner_labels = torch.tensor([[2, 3]]).expand(len(corners), -1)
            if points is None or labels is None:
                points, labels = corners, corner_labels
            elif len(points) != len(corners):
                raise PromptError(
                    f"{len(corners)} boxes and {len(points)} sets of points: they describe the same prompts, so give "
                    f"point_coords of shape ({len(corners)}, P, 2) and point_labels of shape ({len(corners)}, P)"
                )
            else:
                points, labels = torch.cat([corners, points], dim=1), torch.cat([corner_labels, labels], dim=1)
        masks = _parse_masks(mask_input)
        if points is None and masks is None:
            raise PromptError("no prompt: give point_coords with point_labels, box, or mask_input")
        if points is not None and masks is not None and len(points) != len(masks):
            raise PromptError(f"mask_input is for {len(masks)} prompts, but points and boxes are for {len(points)}")
        return cls(points, labels, masks, normalize_coords)

    def to_model(
        self, preprocess: Preprocess, original_hw: tuple[int, int], features: SamFeatures
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Points in pixels of the model input, labels, and mask logits, on the features' device.

        Raises:
            PromptError: If the mask prompts do not have the size of the model's low-resolution masks.
        """
        device = features.embedding.device
        points = self.points_xy
        if points is not None:
            if not self.normalize_coords:
                points = points * points.new_tensor([original_hw[1], original_hw[0]])
            points = preprocess.coords_to_model(points, original_hw).to(device)
        masks = self.mask_logits
        side = features.fine.shape[-1]
        if masks is not None and masks.shape[-2:] != (side, side):
            raise PromptError(
                f"mask_input is {masks.shape[-2]}x{masks.shape[-1]}, expected low-resolution logits of {side}x{side} "
                "(the third result of predict)"
            )
        labels = self.labels
        return points, None if labels is None else labels.to(device), None if masks is None else masks.to(device)


def to_array(value: Any, name: str) -> np.ndarray:
    """Numbers of any kind as a finite float32 array.

    Raises:
        PromptError: If they are no numbers, or not finite.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu().to(torch.float32).numpy()
    try:
        array = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError):
        raise PromptError(f"{name} must be an array of numbers, got {value!r}") from None
    if not np.isfinite(array).all():
        raise PromptError(f"{name} holds values that are not finite (NaN or infinite)")
    return array


def _parse_points(point_coords: Any, point_labels: Any) -> tuple[Tensor | None, Tensor | None]:
    if (point_coords is None) != (point_labels is None):
        missing = "point_labels" if point_labels is None else "point_coords"
        raise PromptError(f"{missing} is missing: each point needs its coordinates and its label")
    if point_coords is None:
        return None, None
    points, labels = to_array(point_coords, "point_coords"), to_array(point_labels, "point_labels")
    if points.ndim not in (2, 3) or points.shape[-1] != 2 or points.shape[:-1] != labels.shape or 0 in points.shape:
        raise PromptError(
            f"point_coords {points.shape} and point_labels {labels.shape} do not fit: expected (P, 2) and (P,), or "
            "(n, P, 2) and (n, P) for n prompts"
        )
    unknown = sorted(set(labels.ravel().tolist()) - set(_LABELS))
    if unknown:
        raise PromptError(
            f"point_labels holds {unknown[0]:g}: a label is 1 (on the object), 0 (off it), 2 or 3 (corners of a box) "
            "or -1 (padding)"
        )
    return (
        torch.from_numpy(points.reshape(-1, *points.shape[-2:]).copy()),
        torch.from_numpy(labels.reshape(-1, labels.shape[-1])).to(torch.long),
    )


def _parse_boxes(box: Any) -> Tensor:
    """(4,) or (n, 4) -> corners (n, 2, 2)."""
    boxes = to_array(box, "box")
    if boxes.ndim not in (1, 2) or boxes.shape[-1] != 4 or 0 in boxes.shape:
        raise PromptError(f"box has shape {boxes.shape}, expected (4,) or (n, 4): x0, y0, x1, y1")
    boxes = boxes.reshape(-1, 4)
    inverted = boxes[(boxes[:, :2] > boxes[:, 2:]).any(axis=1)]
    if len(inverted):
        raise PromptError(f"box {inverted[0].tolist()} is inverted: x0 <= x1 and y0 <= y1 (not x, y, width, height)")
    return torch.from_numpy(boxes.reshape(-1, 2, 2).copy())


def _parse_masks(mask_input: Any) -> Tensor | None:
    if mask_input is None:
        return None
    masks = to_array(mask_input, "mask_input")
    if masks.ndim == 2:
        masks = masks[None]
    if masks.ndim == 3:
        masks = masks[None]
    if masks.ndim != 4 or masks.shape[1] != 1 or 0 in masks.shape:
        raise PromptError(f"mask_input has shape {masks.shape}, expected (1, S, S), or (n, 1, S, S) for n prompts")
    return torch.from_numpy(masks.copy())
