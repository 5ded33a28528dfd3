"""A user's texts, boxes and points for the detector, checked once at the edge.

Coordinates become fractions of the image's width and height, boxes centre and size: what the detector's `Prompt` holds.
Boxes may reach over the edge of the image; what lies beside it altogether is a mistake.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sam3.model.prompt import Prompt
from sam3.model.tokenizer import PADDING_ID, SimpleTokenizer
from sam3.sam.prompts import PromptError, to_array

_LOG = logging.getLogger(__name__)

BOX_FORMATS = ("cxcywh", "xyxy_px", "xywh_px")
"""Centre and size as fractions of the image; corners in pixels; corner and size in pixels."""
POINT_FORMATS = ("xy", "xy_px")
"""Fractions of the image; pixels."""
_LARGEST_BOX = 2
"""In widths and heights of the image; `Prompt` refuses larger ones."""


def parse_texts(prompt: Any) -> list[str]:
    """One text or several.

    Raises:
        PromptError: If a text is empty, or something is not a text.
    """
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise PromptError(f"a text prompt must be a string or a list of strings, got {prompt!r}")
    if not texts:
        raise PromptError("no text: the list of text prompts is empty")
    for text in texts:
        if not text.strip():
            raise PromptError(
                "the text prompt is empty: name what to find, e.g. 'red car'; to search by boxes or points alone, "
                "leave the text out"
            )
    return list(texts)


def warn_of_cut_texts(texts: Sequence[str], tokenizer: SimpleTokenizer) -> None:
    """Log a warning for each text that the model reads only the beginning of, as the released model does in silence."""
    length = tokenizer.context_length
    is_cut = tokenizer(texts, context_length=length + 1)[:, -1] != PADDING_ID
    for text, cut in zip(texts, is_cut.tolist(), strict=True):
        if cut:
            _LOG.warning(
                "the text prompt %r... is too long: the model reads its first %d tokens and nothing after them",
                text[:40],
                length - 2,
            )


def parse_boxes(boxes: Any, original_hw: tuple[int, int], box_format: str = "cxcywh") -> Tensor:
    """One box or several.

    Args:
        boxes: (4,) or (n, 4), an array, a tensor or nested lists.
        original_hw: Height and width of the image in pixels.
        box_format: One of `BOX_FORMATS`.

    Returns:
        cx, cy, w, h as fractions of the image, float32, (n, 4).

    Raises:
        PromptError: If the shape is wrong, or a box is not finite, inverted, without area or beside the image.
    """
    if box_format not in BOX_FORMATS:
        raise PromptError(f"box_format {box_format!r} is not one of {BOX_FORMATS}")
    given = to_array(boxes, "box")
    if given.ndim not in (1, 2) or given.shape[-1] != 4 or 0 in given.shape:
        raise PromptError(f"box has shape {given.shape}, expected (4,) or (n, 4): {_meaning(box_format)}")
    values = torch.tensor(given.reshape(-1, 4), dtype=torch.float64)
    first, second = values[:, :2], values[:, 2:]
    size = second - first if box_format == "xyxy_px" else second
    center = first if box_format == "cxcywh" else first + size / 2
    in_pixels = box_format != "cxcywh"
    if in_pixels:
        width_height = values.new_tensor([original_hw[1], original_hw[0]])
        center, size = center / width_height, size / width_height
    for box, c, s in zip(values.tolist(), center, size, strict=True):
        if (s < 0).any():
            raise PromptError(f"box {_plain(box)} is inverted: it must be {_meaning(box_format)}")
        if (s == 0).any():
            raise PromptError(f"box {_plain(box)} has no area: for a single place use a point prompt")
        if (c + s / 2 <= 0).any() or (c - s / 2 >= 1).any():
            raise PromptError(
                f"box {_plain(box)} lies outside the image ({original_hw[1]} x {original_hw[0]} pixels): it must be "
                f"{_meaning(box_format)}" + ("" if in_pixels else _pixel_hint(box, "box_format='xyxy_px'"))
            )
        if (s > _LARGEST_BOX).any():
            raise PromptError(f"box {_plain(box)} is more than {_LARGEST_BOX} times as large as the image")
    return torch.cat([center, size], dim=1).to(torch.float32)


def parse_points(points: Any, original_hw: tuple[int, int], point_format: str = "xy") -> Tensor:
    """One point or several.

    Args:
        points: (2,) or (n, 2), an array, a tensor or nested lists.
        original_hw: Height and width of the image in pixels.
        point_format: One of `POINT_FORMATS`.

    Returns:
        x, y as fractions of the image, float32, (n, 2).

    Raises:
        PromptError: If the shape is wrong, or a point is not finite or outside the image.
    """
    if point_format not in POINT_FORMATS:
        raise PromptError(f"point_format {point_format!r} is not one of {POINT_FORMATS}")
    given = to_array(points, "point")
    if given.ndim not in (1, 2) or given.shape[-1] != 2 or 0 in given.shape:
        raise PromptError(f"point has shape {given.shape}, expected (2,) or (n, 2): x, y")
    values = torch.tensor(given.reshape(-1, 2), dtype=torch.float64)
    in_pixels = point_format == "xy_px"
    fractions = values / values.new_tensor([original_hw[1], original_hw[0]]) if in_pixels else values
    for point, fraction in zip(values.tolist(), fractions, strict=True):
        if ((fraction < 0) | (fraction > 1)).any():
            raise PromptError(
                f"point {_plain(point)} lies outside the image ({original_hw[1]} x {original_hw[0]} pixels)"
                + ("" if in_pixels else _pixel_hint(point, "point_format='xy_px'"))
            )
    return fractions.to(torch.float32)


def parse_labels(labels: Any, count: int, what: str) -> Tensor:
    """Which prompts are examples (1, True) and which counter-examples (0, False).

    Args:
        labels: One label for all, or one each.
        count: Number of prompts.
        what: "box" or "point", for errors.

    Returns:
        int64, (count,).

    Raises:
        PromptError: If the number does not fit or a label is neither.
    """
    values = to_array(labels, "label").reshape(-1)
    if len(values) not in (1, count):
        raise PromptError(f"{len(values)} labels for {count} {what} prompts: give one for all, or one each")
    for value in values.tolist():
        if value not in (0.0, 1.0):
            raise PromptError(f"label {value:g} of a {what}: a label is 1 (find the like) or 0 (exclude the like)")
    return torch.tensor(values, dtype=torch.float32).to(torch.int64).expand(count).clone()


def rows_of_one_image(
    values: Tensor, labels: Tensor, image_index: int, num_images: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """What `Prompt.append_boxes` and `Prompt.append_points` take, for prompts on one image of several.

    Args:
        values: Boxes (n, 4) or points (n, 2).
        labels: (n,).
        image_index: Whose they are.
        num_images: I; for the other images they are padding.
        device: Where the prompt is.

    Returns:
        Values (n, I, D), labels (n, I), mask (I, n).
    """
    mask = torch.ones(num_images, len(values), dtype=torch.bool, device=device)
    mask[image_index] = False
    return (
        values[:, None].repeat(1, num_images, 1).to(device),
        labels[:, None].repeat(1, num_images).to(device),
        mask,
    )


def select_rows(prompt: Prompt, rows: Tensor) -> Prompt:
    """Boxes and points of B prompts, from those of I images: row ``rows[b]`` for prompt b.

    Raises:
        PromptError: If the prompt is null, which means that not even empty sequences were given.
    """
    fields = {}
    for kind in ("box", "point"):
        for what, dim in (("embeddings", 1), ("mask", 0), ("labels", 1)):
            value = getattr(prompt, f"{kind}_{what}")
            if value is None:
                raise PromptError("the geometric prompt is null: make it with empty boxes or points")
            fields[f"{kind}_{what}"] = value.index_select(dim, rows)
    return Prompt(**fields)


def _meaning(box_format: str) -> str:
    return {
        "cxcywh": "centre x, centre y, width, height as fractions of the image",
        "xyxy_px": "x0, y0, x1, y1 in pixels with x0 < x1 and y0 < y1",
        "xywh_px": "x, y, width, height in pixels",
    }[box_format]


def _pixel_hint(values: list[float], remedy: str) -> str:
    return f"; if these are pixels, pass {remedy}" if max(map(abs, values)) > 2 else ""


def _plain(values: list[float]) -> str:
    return "[" + ", ".join(f"{value:g}" for value in values) + "]"
