"""What the text-prompted video model is told of frames, objects and clicks, checked."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch

from sam3.model.sam3_tracker import PointInputs
from sam3.preprocess import Preprocess
from sam3.sam.prompts import PromptError, to_array
from sam3.video.frame_source import FrameRangeError, FrameSource

_POINT_LABELS = (0.0, 1.0)


def parse_clicks(
    points: Any, labels: Any, is_relative: bool, preprocess: Preprocess, size_hw: tuple[int, int]
) -> PointInputs:
    """Clicks on one object of one frame, in pixels of the model input, (1, P, 2), with labels (1, P).

    Args:
        points: x, y of P clicks, (P, 2) or (1, P, 2).
        labels: 1 on the object, 0 off it, P of them.
        is_relative: Coordinates are fractions of the video's width and height, else its pixels.
        preprocess: Of the model.
        size_hw: Of the video.

    Raises:
        PromptError: If something is missing or malformed, or a point lies outside the video.
    """
    if points is None or labels is None:
        raise PromptError("a click needs points and point_labels")
    values = torch.as_tensor(to_array(points, "point"), dtype=torch.float32)
    if values.ndim not in (2, 3) or values.shape[-1] != 2 or (values.ndim == 3 and len(values) != 1):
        raise PromptError(f"points have shape {tuple(values.shape)}, expected (n, 2): x, y")
    values = values.reshape(-1, 2)
    marks = torch.as_tensor(to_array(labels, "label"), dtype=torch.float32).reshape(-1)
    if not len(values) or len(marks) != len(values):
        raise PromptError(f"{len(marks)} labels for {len(values)} points: give one each, and at least one point")
    for mark in marks.tolist():
        if mark not in _POINT_LABELS:
            raise PromptError(f"label {mark:g} of a point: a label is 1 (the object) or 0 (not the object)")
    width_height = values.new_tensor([size_hw[1], size_hw[0]])
    pixels = values * width_height if is_relative else values
    if ((pixels < 0) | (pixels > width_height)).any():
        what = "a fraction of width and height" if is_relative else "in pixels of the video"
        raise PromptError(
            f"a point lies outside the image ({size_hw[1]} x {size_hw[0]} pixels): {values.tolist()}; "
            f"each must be {what} (rel_coordinates={is_relative})"
        )
    return preprocess.coords_to_model(pixels, size_hw)[None], marks[None]


def require_frame(frames: FrameSource, frame_idx: Any) -> int:
    """A frame index that the video has.

    Raises:
        PromptError: If it is no integer.
        FrameRangeError: If there is no such frame.
    """
    if not is_integer(frame_idx):
        raise PromptError(f"a frame index is an integer, got {frame_idx!r}")
    if not frames.has_frame(frame_idx):
        count = "an unknown number of" if frames.num_frames is None else str(frames.num_frames)
        raise FrameRangeError(f"{frames.name}: has no frame {frame_idx}; it has {count} frames, counted from 0")
    return int(frame_idx)


def require_obj_id(obj_id: Any) -> int:
    """An object's id.

    Raises:
        PromptError: If it is no integer from 0 on.
    """
    if not is_integer(obj_id) or obj_id < 0:
        raise PromptError(f"obj_id must be an integer from 0 on, got {obj_id!r}")
    return int(obj_id)


def is_integer(value: Any) -> bool:
    """Also numpy's, which outputs have."""
    return isinstance(value, Integral) and not isinstance(value, bool)
