"""A video's clicks, boxes and masks, checked once at the edge and brought into the model's frame."""

from __future__ import annotations

import logging
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sam3.model.tracker_state import PointPrompt, TrackerState
from sam3.preprocess import Preprocess
from sam3.sam.prompts import PromptError, to_array

if TYPE_CHECKING:
    from sam3.video.frame_source import FrameSource

logger = logging.getLogger(__name__)

_LABELS = (-1, 0, 1, 2, 3)
_EDGE = 1e-4
"""Share of the image by which rounding may put a point on the border outside."""


def require_frame(state: TrackerState, frame_idx: Any, name: str = "frame_idx", is_prompt: bool = False) -> int:
    """A frame index of the video.

    Args:
        state: The session.
        frame_idx: What the user said.
        name: The argument's name.
        is_prompt: The frame is for a prompt, and tracking has still to come to it.

    Raises:
        PromptError: If it is no integer, the video has no such frame, or reading on to it would lose frames.
    """
    if isinstance(frame_idx, bool) or not isinstance(frame_idx, Integral):
        raise PromptError(f"{name} must be an integer, got {frame_idx!r}")
    index = int(frame_idx)
    if is_prompt:
        state.require_no_loss(index)
    if not state.has_frame(index):
        num_frames = state.num_frames
        frames = "an unknown number of frames" if num_frames is None else f"frames 0 to {num_frames - 1}"
        raise PromptError(f"{name} {index} is out of range: the video has {frames}")
    return index


def require_object_id(obj_id: Any) -> int:
    """An object's id.

    Raises:
        PromptError: If it is no integer.
    """
    if isinstance(obj_id, bool) or not isinstance(obj_id, Integral):
        raise PromptError(f"obj_id must be an integer, got {obj_id!r}")
    return int(obj_id)


def require_count(value: Any, name: str, remedy: str = "") -> int:
    """A positive integer.

    Raises:
        PromptError: If it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise PromptError(f"{name} must be a positive integer, got {value!r}{remedy}")
    return int(value)


def require_same_video(source: FrameSource, height: int | None, width: int | None, num_frames: int | None) -> None:
    """Check that a video has the size and the length that were asked for, if any were.

    Raises:
        PromptError: If it has others.
    """
    for side, value, wanted in (("height", source.size_hw[0], height), ("width", source.size_hw[1], width)):
        if wanted not in (None, value):
            raise PromptError(f"the video's {side} is {value} pixels, video_{side} says {wanted!r}: leave it out")
    if num_frames not in (None, source.num_frames):
        length = "a number of frames that only its end tells" if source.num_frames is None else source.num_frames
        raise PromptError(f"the video's length is {length}, num_frames says {num_frames!r}: leave it out")


def limit_points(prompt: PointPrompt, max_points: int) -> PointPrompt:
    """The first half and the last half of ``max_points`` points, if there are more."""
    num_points = prompt.labels.shape[1]
    if num_points <= max_points:
        return prompt
    first = max_points // 2
    last = max_points - first
    logger.warning("%d points on one frame: the first %d and the last %d count", num_points, first, last)
    return PointPrompt(*(torch.cat([x[:, :first], x[:, -last:]], dim=1) for x in prompt))


def parse_points(
    points: Any,
    labels: Any,
    box: Any,
    rel_coordinates: bool,
    preprocess: Preprocess,
    size_hw: tuple[int, int],
) -> PointPrompt:
    """Clicks and a box as points in pixels of the model input; a box is its two corners, before the clicks.

    Args:
        points: x, y of P clicks, (P, 2) or (1, P, 2); None for a box alone.
        labels: (P,) or (1, P).
        box: x0, y0, x1, y1: (4,) or (1, 4), or None.
        rel_coordinates: Coordinates are fractions of the video's width and height, else pixels of the model input.
        preprocess: How frames become the model's input.
        size_hw: Height and width of the video.

    Raises:
        PromptError: If something is missing, misshapen, not finite, outside the image, or a label is unknown.
    """
    if points is None and labels is None and box is None:
        raise PromptError("no prompt: give points with labels, or a box")
    image_hw = preprocess.resized_hw(size_hw)
    bounds = np.array([1.0, 1.0] if rel_coordinates else image_hw[::-1], dtype=np.float32)
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    if box is not None:
        parts.append((_parse_box(box, bounds), np.array([2.0, 3.0], dtype=np.float32)))
    if points is not None or labels is not None:
        parts.append(_parse_clicks(points, labels, bounds))
    coords = torch.from_numpy(np.concatenate([xy for xy, _ in parts]))
    if rel_coordinates:
        coords = coords * torch.tensor([image_hw[1], image_hw[0]], dtype=torch.float32)
    kinds = torch.from_numpy(np.concatenate([label for _, label in parts]))
    return PointPrompt(coords[None], kinds.to(torch.int64)[None])


def parse_mask(mask: Any) -> Tensor:
    """A mask of one object, float32 (1, 1, h, w) in 0..1.

    Args:
        mask: (h, w) of any size, bool or numbers from 0 to 1; it covers the whole frame.

    Raises:
        PromptError: If it has another shape, or other values.
    """
    array = to_array(mask, "mask")
    if array.ndim != 2 or 0 in array.shape:
        raise PromptError(f"mask has shape {array.shape}, expected (height, width): one mask for one object")
    low, high = float(array.min()), float(array.max())
    if low < 0 or high > 1:
        raise PromptError(
            f"mask holds values from {low:g} to {high:g}, expected 0 outside and 1 on the object: pass mask > 0"
        )
    return torch.from_numpy(array.copy())[None, None]


def _parse_clicks(points: Any, labels: Any, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if points is None or labels is None:
        missing = "points" if points is None else "labels"
        raise PromptError(f"{missing} is missing: each point needs its coordinates and its label")
    coords, kinds = to_array(points, "points"), to_array(labels, "labels")
    if coords.ndim == 3 and coords.shape[0] == 1:
        coords = coords[0]
    if kinds.ndim == 2 and kinds.shape[0] == 1:
        kinds = kinds[0]
    if coords.ndim != 2 or coords.shape[-1] != 2 or coords.shape[:-1] != kinds.shape or len(coords) == 0:
        raise PromptError(
            f"points {coords.shape} and labels {kinds.shape} do not fit: expected (P, 2) and (P,) for one object"
        )
    unknown = sorted(set(kinds.tolist()) - set(_LABELS))
    if unknown:
        raise PromptError(
            f"labels holds {unknown[0]:g}: a label is 1 (on the object), 0 (off it), 2 or 3 (corners of a box) "
            "or -1 (padding)"
        )
    _require_inside("point", coords[kinds >= 0], bounds)
    return coords, kinds


def _parse_box(box: Any, bounds: np.ndarray) -> np.ndarray:
    """Its two corners, (2, 2)."""
    corners = to_array(box, "box")
    if corners.shape not in ((4,), (1, 4)):
        raise PromptError(f"box has shape {corners.shape}, expected (4,): x0, y0, x1, y1 of one object")
    corners = corners.reshape(2, 2)
    if (corners[0] > corners[1]).any():
        raise PromptError(
            f"box {corners.flatten().tolist()} is inverted: x0 <= x1 and y0 <= y1 (not x, y, width, height)"
        )
    _require_inside("box corner", corners, bounds)
    return corners


def _require_inside(kind: str, coords_xy: np.ndarray, bounds: np.ndarray) -> None:
    outside = coords_xy[((coords_xy < -_EDGE * bounds) | (coords_xy > (1 + _EDGE) * bounds)).any(axis=1)]
    if len(outside) == 0:
        return
    x, y = outside[0].tolist()
    if bounds.max() == 1:
        frame, remedy = "the frame's 0..1", "divide pixels by the video's width and height"
    else:
        frame, remedy = f"the model input's 0..{bounds[0]:g} x 0..{bounds[1]:g} pixels", "or use rel_coordinates=True"
    raise PromptError(f"{kind} ({x:g}, {y:g}) lies outside {frame}: clip it, {remedy}")
