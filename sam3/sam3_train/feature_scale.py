"""The scale of a teacher's features, measured before training so that the squared error has a unit.

The variances of a trunk's channels differ by orders of magnitude; a plain squared error is then about the few loud
ones, and its weight against the cosine term means something else for every teacher.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sam3_train.errors import UserError

NORMALIZATIONS = ("channel", "global", "none")
MIN_SHARE = 1e-3
"""Floor of a channel's variance as a share of the mean variance: a constant channel must not divide by zero."""


def measure_channel_variance(features: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Variance of each channel over images and valid cells.

    Args:
        features: Pairs of teacher features (B, C, G, G) and valid cells (B, 1, G, G).

    Returns:
        float32, (C,), on the CPU.

    Raises:
        UserError: If there is no valid cell, or a feature is not finite.
    """
    count, total, squares = 0.0, None, None
    for features_bchw, valid_b1hw in features:
        values_nc = features_bchw.permute(0, 2, 3, 1)[valid_b1hw[:, 0] > 0].cpu().double()
        sums, square_sums = values_nc.sum(0), values_nc.square().sum(0)
        total = sums if total is None else total + sums
        squares = square_sums if squares is None else squares + square_sums
        count += len(values_nc)
    if total is None or squares is None or not count:
        raise UserError(
            "no teacher feature to measure the variance on: none of the first images could be used; see "
            "bad_images.txt, or raise DISTILL.STATISTICS_IMAGES"
        )
    variance_c = squares / count - (total / count).square()
    if not variance_c.isfinite().all():
        raise UserError("a teacher feature is not finite: check the teacher's weights, or export the embeddings again")
    return variance_c.clamp(min=0.0).float()


def error_scale(variance_c: Tensor, normalization: str) -> Tensor:
    """What each channel's squared error is divided by, (C,).

    Args:
        variance_c: From `measure_channel_variance`.
        normalization: ``channel`` (its own variance), ``global`` (the mean variance) or ``none``.

    Raises:
        ValueError: If the normalization is unknown.
        UserError: If the features do not vary at all.
    """
    if normalization == "none":
        return torch.ones_like(variance_c)
    mean = variance_c.mean()
    if not mean > 0:
        raise UserError("the teacher's features are constant: check the teacher's weights")
    if normalization == "global":
        return mean.expand_as(variance_c).clone()
    if normalization == "channel":
        return variance_c.clamp(min=float(MIN_SHARE * mean))
    raise ValueError(f"DISTILL.NORMALIZE {normalization!r} is not one of {NORMALIZATIONS}")
