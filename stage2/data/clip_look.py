"""How a clip is changed before it is learned: the same way on all of its frames, and its masks with it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)
_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))
"""Hue is an angle in the plane of the last two rows."""
_ROWS_AT_ONCE = 32
"""What fits into a processor's cache."""


@dataclass(frozen=True)
class LookSpec:
    """Which changes are drawn."""

    flip_share: float = 0.5
    """Clips that are mirrored left to right."""
    brightness: float = 0.1
    """Factors lie in 1 - this .. 1 + this."""
    contrast: float = 0.1
    saturation: float = 0.1
    hue: float = 0.03
    """Largest turn, as a share of the colour circle."""
    grey_share: float = 0.05
    """Clips that lose their colours."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} must lie in [0, 1], got {value}" for name, value in vars(self).items() if not 0.0 <= value <= 1.0
        ]
        if self.hue > 0.5:
            problems.append(f"hue is a share of the colour circle, 0.5 at most, got {self.hue}")
        if problems:
            raise ValueError("looks of clips: " + "; ".join(problems))


@dataclass(frozen=True)
class Look:
    """One drawn change."""

    is_flipped: bool = False
    matrix: Tensor | None = None
    """float64 (3, 3): new RGB from old; None leaves colours alone."""
    contrast: float = 1.0
    """Distances from the clip's mean grey grow by this."""

    def recolour(self, pixels_tchw: Tensor) -> Tensor:
        """The colours of a clip: uint8 (T, 3, H, W), changed in place; the mean grey is that of all frames."""
        if self.matrix is None:
            return pixels_tchw
        matrix = self.matrix.float()
        mean_rgb = torch.stack([frame[:, ::4, ::4].float().mean(dim=(1, 2)) for frame in pixels_tchw]).mean(dim=0)
        grey = float(torch.tensor(_LUMA) @ (matrix @ mean_rgb))
        offset = torch.full((3, 1), (1.0 - self.contrast) * grey)
        for frame in pixels_tchw:
            for rows in frame.split(_ROWS_AT_ONCE, dim=1):
                changed = torch.addmm(offset, matrix * self.contrast, rows.flatten(1).float())
                rows.copy_(changed.round_().clamp_(0, 255).view_as(rows))
        return pixels_tchw


def draw_look(spec: LookSpec | None, rng: np.random.Generator) -> Look:
    """Draw a change; None changes nothing."""
    if spec is None:
        return Look()
    flip, grey, *factors = rng.random(6)
    brightness, contrast, saturation, hue = (
        1.0 + (2.0 * draw - 1.0) * width
        for draw, width in zip(
            factors, (spec.brightness, spec.contrast, spec.saturation, 2.0 * np.pi * spec.hue), strict=True
        )
    )
    is_grey = grey < spec.grey_share
    angle = 0.0 if is_grey else hue - 1.0
    matrix = brightness * _saturated(0.0 if is_grey else saturation) @ _turned(angle)
    is_plain = contrast == 1.0 and torch.allclose(matrix, torch.eye(3, dtype=torch.float64), atol=1e-9)
    return Look(bool(flip < spec.flip_share), None if is_plain else matrix, contrast)


def _saturated(factor: float) -> Tensor:
    """Colours between their own grey (0) and themselves (1), or beyond."""
    luma = torch.tensor(_LUMA, dtype=torch.float64).expand(3, 3)
    return factor * torch.eye(3, dtype=torch.float64) + (1.0 - factor) * luma


def _turned(angle: float) -> Tensor:
    """Hues turned by an angle in radians, at equal brightness."""
    to_yiq = torch.tensor(_YIQ, dtype=torch.float64)
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    turn = torch.tensor([[1.0, 0.0, 0.0], [0.0, cos, -sin], [0.0, sin, cos]], dtype=torch.float64)
    return torch.linalg.inv(to_yiq) @ turn @ to_yiq
