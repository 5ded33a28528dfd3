"""What the student's answers cost, measured against the teacher's.

    total = embedding * MSE
          + for each route: route * (mask_bce * BCE + mask_dice * Dice + score * .. + presence * .. + box * ..)

Every term is a mean over the detections of an object, then over the objects of an image, then over images: an image
with sixteen objects counts as much as one with a single object, and a prompt that finds ten things as much as one that
finds one. Masks are judged inside the image only, never in the padding of a letterbox.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sam3.model.matcher import Matches, pairwise_giou
from sam3_train.losses import dice_loss
from stage1_geometry_finetune.matching import TeacherDetections

_OUTSIDE = -1e4
"""A logit whose probability and cross entropy with 0 are exactly 0."""


@dataclass(frozen=True)
class GeometryLossWeights:
    """How the terms are added."""

    embedding: float = 1.0
    """Squared error of the features in units of the teacher's variance (1 is what predicting the mean costs)."""
    mask_bce: float = 1.0
    """Cross entropy of the student's masks with the teacher's probabilities, mean over pixels."""
    mask_dice: float = 1.0
    """Dice of the same."""
    score: float = 0.2
    """Squared error of scores. Detector: those of all queries. SAM heads: the predicted IoUs. Small, because scores
    react to features much more sharply than masks do: cross entropy in its place has ten times the gradient of all
    other terms together."""
    presence: float = 0.1
    """Detector: cross entropy of the presence score. SAM heads: of the object score."""
    box: float = 0.5
    """Detector: L1 distance of normalised boxes plus 1 - GIoU."""
    detector: float = 1.0
    """Factor on the route through the detector; 0: it is not run."""
    sam: float = 0.0
    """Factor on the route through the SAM heads; 0: it is not run."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0.0:
                raise ValueError(f"geometry loss: weight {name} must be at least 0, got {value}")


def object_weights(image_of_object: Tensor) -> Tensor:
    """Share of each object in the mean over objects of an image and then over images that have any: (K,), sum 1."""
    if not len(image_of_object):
        return image_of_object.new_zeros(0, dtype=torch.float32)
    counts = image_of_object.bincount()
    return 1.0 / (counts[image_of_object] * (counts > 0).sum()).float()


def mask_terms(
    logits_mhw: Tensor, teacher_mhw: Tensor, weights_m: Tensor, inside_mhw: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross entropy and Dice of pairs of masks, each a weighted sum.

    Args:
        logits_mhw: The student's, (M, H, W).
        teacher_mhw: The teacher's probabilities, (M, H, W).
        weights_m: Of the pairs, (M,).
        inside_mhw: bool, False in padding, (M, H, W); None: no padding.
    """
    logits, teacher = logits_mhw.float(), teacher_mhw.float()
    if inside_mhw is not None:
        logits, teacher = logits.masked_fill(~inside_mhw, _OUTSIDE), teacher.masked_fill(~inside_mhw, 0.0)
    entropy = F.binary_cross_entropy_with_logits(logits, teacher, reduction="none").mean((1, 2))
    if inside_mhw is not None:
        entropy = entropy / inside_mhw.float().mean((1, 2)).clamp(min=1.0 / max(1, inside_mhw.shape[-1] ** 2))
    return (entropy * weights_m).sum(), (dice_loss(logits, teacher) * weights_m).sum()


def score_term(logits_kq: Tensor, detections: TeacherDetections, matches: Matches, weights_k: Tensor) -> Tensor:
    """Squared error of class scores: sum over an object's queries per kept detection, weighted sum over objects.

    A matched query should score what its detection scores. The others have no counterpart by position; they are
    compared in order, the highest with the teacher's highest, so that the order of queries plays no role.
    """
    is_free = torch.ones_like(logits_kq, dtype=torch.bool)
    is_free[matches.prompt, matches.query] = False
    wanted = torch.zeros_like(logits_kq, dtype=torch.float32)
    teacher = detections.logits.sigmoid()
    wanted[matches.prompt, matches.query] = teacher[matches.prompt, matches.target]
    # Both sides hold the same number of free logits: all but as many as detections were kept.
    ranks = logits_kq.detach().masked_fill(~is_free, torch.inf).argsort(dim=1, descending=True, stable=True)
    counts_k1 = detections.kept.sum(1, keepdim=True)
    is_rest = torch.arange(logits_kq.shape[1], device=logits_kq.device) >= counts_k1
    by_rank = torch.where(is_rest, teacher, wanted.gather(1, ranks))
    wanted = torch.zeros_like(wanted).scatter(1, ranks, by_rank)
    error = (logits_kq.float().sigmoid() - wanted).square().sum(1)
    return (error / counts_k1[:, 0] * weights_k).sum()


def presence_term(logits_k: Tensor, teacher_logits_k: Tensor, weights_k: Tensor) -> Tensor:
    """Cross entropy of presence with the teacher's probability, weighted sum over objects."""
    wanted = teacher_logits_k.float().sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits_k.float(), wanted, reduction="none")
    return (entropy * weights_k).sum()


def box_term(boxes_mx: Tensor, teacher_mx: Tensor, weights_m: Tensor) -> Tensor:
    """L1 distance of normalised (cx, cy, w, h), (M, 4), plus 1 - GIoU, weighted sum over pairs."""
    boxes, teacher = boxes_mx.float(), teacher_mx.float()
    giou = pairwise_giou(boxes[:, None], teacher[:, None])[:, 0, 0]
    return (((boxes - teacher).abs().sum(1) + 1.0 - giou) * weights_m).sum()
