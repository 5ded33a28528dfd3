"""Losses of a tracked clip, after SAM 2's recipe: every answer of the mask decoder on every frame is judged.

From SAM 2 (https://arxiv.org/abs/2408.00714, appendix D.2.2): focal loss and Dice on the best of the candidates, an L1
loss on all predicted IoUs, and cross entropy on whether the object is there, weighted 20 : 1 : 1 : 1. Masks and IoUs
count only on frames that show the object. Two things differ: SAM 2 sums over frames, here they are averaged, so that a
weight and a learning rate mean the same for clips of 4 and of 16 frames; and the masks are judged before an object that
is found absent loses its mask, because a mask that was replaced by a constant teaches nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sam3_train.losses import dice_loss, iou_l1_loss, sigmoid_focal_loss


@dataclass(frozen=True)
class TrackingLossWeights:
    """How much each term counts."""

    focal: float = 20.0
    dice: float = 1.0
    iou: float = 1.0
    object_score: float = 1.0
    others: float = 0.0
    """How much the masks of the candidates that are not the best one count, relative to it. SAM 2 gives them nothing;
    a small model's IoU head takes one of them by mistake more often, and its mask should not be arbitrary then."""
    focal_alpha: float = 0.25
    """Weight of an object's pixels in the focal loss; others get the rest. Below 0.5 doubtful pixels are left out of
    masks: a tracker that reads its own masks then shrinks them from frame to frame, the more the smaller it is."""
    focal_gamma: float = 2.0
    """How strongly the focal loss discounts easy pixels; 0: cross entropy, whose logits say how sure the mask is."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0.0:
                raise ValueError(f"tracking loss: weight {name} must be at least 0, got {value}")
        if self.focal_alpha > 1.0:
            raise ValueError(f"tracking loss: focal_alpha must lie in 0..1, got {self.focal_alpha}")


@dataclass(frozen=True)
class TrackingAnswer:
    """One answer of the mask decoder for B objects on one frame, with what it should have been."""

    mask_logits: Tensor
    """(B, K, h, w), K candidates, before absent objects lose their masks."""
    ious: Tensor
    """Predicted IoUs, (B, K)."""
    object_score_logits: Tensor
    """(B, 1)."""
    target: Tensor
    """Share of each pixel that the object covers, (B, h, w), 0..1; empty where it is absent."""
    present: Tensor
    """Whether the frame shows the object, bool (B,)."""


def answer_terms(answer: TrackingAnswer, weights: TrackingLossWeights) -> dict[str, Tensor]:
    """Unweighted terms of one answer: ``focal``, ``dice``, ``iou``, ``object_score``, each a mean over the B objects.

    An object that the frame does not show counts in the mean, with 0 for all but the object score.

    Raises:
        ValueError: If shapes do not fit together.
    """
    _check(answer)
    num_objects, num_masks = answer.mask_logits.shape[:2]
    logits = answer.mask_logits.flatten(0, 1)
    targets = answer.target.repeat_interleave(num_masks, dim=0)
    focal = sigmoid_focal_loss(logits, targets, weights.focal_alpha, weights.focal_gamma).view(num_objects, num_masks)
    dice = dice_loss(logits, targets).view(num_objects, num_masks)
    best = (weights.focal * focal + weights.dice * dice).detach().argmin(dim=1, keepdim=True)
    candidates = torch.full_like(focal, weights.others).scatter(1, best, 1.0)
    candidates = candidates / candidates.sum(dim=1, keepdim=True)
    iou = iou_l1_loss(answer.ious.flatten(), logits, targets).view(num_objects, num_masks).mean(dim=1)
    share = answer.present.to(focal.dtype) / num_objects
    score = answer.object_score_logits.float()[:, 0]
    return {
        "focal": ((focal * candidates).sum(dim=1) * share).sum(),
        "dice": ((dice * candidates).sum(dim=1) * share).sum(),
        "iou": (iou * share).sum(),
        "object_score": F.binary_cross_entropy_with_logits(score, answer.present.float()),
    }


def tracking_losses(
    answers: Iterable[TrackingAnswer], weights: TrackingLossWeights | None = None, num_frames: int | None = None
) -> dict[str, Tensor]:
    """The loss of a clip.

    Args:
        answers: Every answer on every frame.
        weights: Of the terms; None: SAM 2's.
        num_frames: Of the clip: the answers on a frame add up, as in SAM 2, so that a frame teaches as much beside a
            corrected one as it does alone. None: answers are averaged.

    Returns:
        ``loss`` and its unweighted terms, scalars: means over objects and frames (or answers).

    Raises:
        ValueError: If there is no answer, or shapes do not fit together.
    """
    weights = weights or TrackingLossWeights()
    per_answer = [answer_terms(answer, weights) for answer in answers]
    if not per_answer:
        raise ValueError("a clip without answers has no loss")
    count = len(per_answer) if num_frames is None else num_frames
    terms = {name: torch.stack([one[name] for one in per_answer]).sum() / count for name in per_answer[0]}
    loss = sum((getattr(weights, name) * term for name, term in terms.items()), torch.zeros_like(terms["dice"]))
    return {"loss": loss, **terms}


def _check(answer: TrackingAnswer) -> None:
    shape = answer.mask_logits.shape
    if answer.mask_logits.ndim != 4:
        raise ValueError(f"mask logits must be (B, K, h, w), got {tuple(shape)}")
    wanted = {
        "ious": (shape[0], shape[1]),
        "object_score_logits": (shape[0], 1),
        "target": (shape[0], *shape[2:]),
        "present": (shape[0],),
    }
    for name, expected in wanted.items():
        found = tuple(getattr(answer, name).shape)
        if found != expected:
            raise ValueError(f"{name} has shape {found}, but mask logits {tuple(shape)} need {expected}")
