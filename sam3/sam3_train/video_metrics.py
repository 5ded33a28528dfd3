"""How well masks follow an object through a clip: J, F and their mean, as the DAVIS benchmark defines them.

J is the IoU of a frame's mask with the truth. F compares outlines: the harmonic mean of the share of predicted outline
pixels that lie close to the true outline, and the reverse. Perazzi et al., "A Benchmark Dataset and Evaluation
Methodology for Video Object Segmentation", 2016, sections 4.1 and 4.2; what counts as outline, as close and as a
perfect score of empty masks follows the evaluation of DAVIS 2017. Runs on the masks' device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sam3_train.metrics import mask_iou

CLOSE_SHARE_OF_DIAGONAL = 0.008
"""Outline pixels count as matched up to this distance, a share of the image's diagonal, rounded up to pixels."""


@dataclass(frozen=True)
class ClipScore:
    """Means over the scored frames of one object, 0..1."""

    region: float
    """J."""
    boundary: float
    """F."""
    num_frames: int

    @property
    def j_and_f(self) -> float:
        """J&F, the mean of the two."""
        return 0.5 * (self.region + self.boundary)


def region_similarity(predicted_nhw: Tensor, truth_nhw: Tensor) -> Tensor:
    """J of each mask: intersection over union, 1 where both are empty.

    Args:
        predicted_nhw: bool, (N, H, W).
        truth_nhw: bool, same shape.

    Returns:
        float32, (N,).

    Raises:
        ValueError: If the shapes differ.
    """
    _check_shapes(predicted_nhw, truth_nhw)
    return mask_iou(predicted_nhw.bool(), truth_nhw.bool())


def boundary_accuracy(predicted_nhw: Tensor, truth_nhw: Tensor, max_distance_px: int | None = None) -> Tensor:
    """F of each mask: harmonic mean of the outlines' precision and recall, 1 where both have no outline.

    Args:
        predicted_nhw: bool, (N, H, W).
        truth_nhw: bool, same shape.
        max_distance_px: Up to where outline pixels match; None: 0.8% of the image's diagonal, rounded up.

    Returns:
        float32, (N,).

    Raises:
        ValueError: If the shapes differ.
    """
    _check_shapes(predicted_nhw, truth_nhw)
    height, width = predicted_nhw.shape[-2:]
    if max_distance_px is None:
        max_distance_px = math.ceil(CLOSE_SHARE_OF_DIAGONAL * math.hypot(height, width))
    found, wanted = outline(predicted_nhw), outline(truth_nhw)
    precision = _share(found, _dilate(wanted, max_distance_px))
    recall = _share(wanted, _dilate(found, max_distance_px))
    # An outline where there should be none (or the reverse) scores 0, two that are both missing score 1.
    both = found.flatten(1).any(1) & wanted.flatten(1).any(1)
    neither = ~found.flatten(1).any(1) & ~wanted.flatten(1).any(1)
    total = precision + recall
    score = torch.where(total > 0, 2 * precision * recall / total.clamp(min=1e-12), torch.zeros_like(total))
    return torch.where(both, score, neither.float())


def outline(masks_nhw: Tensor) -> Tensor:
    """One pixel wide outlines: pixels that differ from their right, lower or lower right neighbour; bool (N, H, W).

    The image's border is no outline: a mask that touches it is open there.
    """
    masks = masks_nhw.bool()
    edges = torch.zeros_like(masks)
    across = masks[:, :, :-1] ^ masks[:, :, 1:]
    down = masks[:, :-1] ^ masks[:, 1:]
    edges[:, :, :-1] |= across
    edges[:, :-1] |= down
    edges[:, :-1, :-1] |= masks[:, :-1, :-1] ^ masks[:, 1:, 1:]
    return edges


def score_clip(predicted_thw: Tensor, truth_thw: Tensor, scored: Sequence[bool] | Tensor | None = None) -> ClipScore:
    """J and F of one object over a clip.

    Args:
        predicted_thw: bool masks, (T, H, W).
        truth_thw: bool, same shape; empty where the object is absent, which must then be found empty.
        scored: Which frames count, (T,). None: all but the first and the last, as in DAVIS, where the first is given.

    Raises:
        ValueError: If shapes differ or no frame is scored.
    """
    _check_shapes(predicted_thw, truth_thw)
    num_frames = len(truth_thw)
    if scored is None:
        kept = torch.ones(num_frames, dtype=torch.bool)
        kept[0] = kept[-1] = False
    else:
        kept = torch.as_tensor(scored, dtype=torch.bool)
        if kept.shape != (num_frames,):
            raise ValueError(f"scored must say yes or no to {num_frames} frames, got shape {tuple(kept.shape)}")
    kept = kept.to(truth_thw.device)
    if not bool(kept.any()):
        raise ValueError(f"no frame of {num_frames} is scored: a clip needs three frames, or name the frames in scored")
    predicted, truth = predicted_thw[kept], truth_thw[kept]
    regions, boundaries = region_similarity(predicted, truth), boundary_accuracy(predicted, truth)
    return ClipScore(float(regions.mean()), float(boundaries.mean()), len(truth))


def mean_score(scores: Sequence[ClipScore]) -> ClipScore:
    """Mean over objects, each counting the same however many frames it has.

    Raises:
        ValueError: If there is none.
    """
    if not scores:
        raise ValueError("there is nothing to average: no object was scored")
    count = len(scores)
    return ClipScore(
        sum(score.region for score in scores) / count,
        sum(score.boundary for score in scores) / count,
        sum(score.num_frames for score in scores),
    )


def _dilate(edges_nhw: Tensor, radius_px: int) -> Tensor:
    """Pixels within a Euclidean distance of an edge pixel."""
    steps = torch.arange(-radius_px, radius_px + 1, device=edges_nhw.device)
    disk = (steps[:, None] ** 2 + steps**2 <= radius_px**2).float()
    reached = F.conv2d(edges_nhw[:, None].float(), disk[None, None], padding=radius_px)
    return reached[:, 0] > 0.5


def _share(edges_nhw: Tensor, near_nhw: Tensor) -> Tensor:
    """Share of edge pixels that lie near, (N,); 0 without edges."""
    matched = (edges_nhw & near_nhw).flatten(1).sum(1).float()
    return matched / edges_nhw.flatten(1).sum(1).float().clamp(min=1)


def _check_shapes(predicted: Tensor, truth: Tensor) -> None:
    if predicted.shape != truth.shape or truth.ndim != 3:
        raise ValueError(
            f"predicted and true masks must have one shape (N, H, W), got {tuple(predicted.shape)} and "
            f"{tuple(truth.shape)}"
        )
