"""Box formats of the detector, and the logit that boxes are refined in."""

from __future__ import annotations

import torch
from torch import Tensor

INVERSE_SIGMOID_EPS = 1e-3
"""A coordinate is treated as if it were at least this far from 0 and from 1: logits stay within +-6.9078."""


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) centre and size -> (..., 4) left, top, right, bottom; nothing is clamped."""
    centre, half_size = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half_size, centre + half_size], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) left, top, right, bottom -> (..., 4) centre and size."""
    top_left, bottom_right = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(top_left + bottom_right) / 2, bottom_right - top_left], dim=-1)


def inverse_sigmoid(x: Tensor) -> Tensor:
    """Logit of values in [0, 1], in float32 at least; values outside count as 0 or 1.

    Both ``x`` and ``1 - x`` are raised to `INVERSE_SIGMOID_EPS`, each for itself, as the released model does.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32)).clamp(0, 1)
    return torch.log(x.clamp(min=INVERSE_SIGMOID_EPS) / (1 - x).clamp(min=INVERSE_SIGMOID_EPS))
