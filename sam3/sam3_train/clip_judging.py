"""What a tracked clip's answers should have been, and how well it was tracked: for losses and for logs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sam3.model.clip_forward import ClipResult, is_present
from sam3_train.metrics import mask_iou
from sam3_train.tracking_losses import TrackingAnswer


def judged_answers(result: ClipResult, coverage_tbhw: Tensor) -> list[TrackingAnswer]:
    """Every answer of a clip with what it should have been.

    Args:
        result: From `sam3.model.clip_forward.forward_clip`.
        coverage_tbhw: What it was given.
    """
    present = is_present(coverage_tbhw)
    return [
        TrackingAnswer(sam.mask_logits, sam.ious, sam.object_score_logits, coverage_tbhw[t], present[t])
        for t, sam in result.answers
    ]


def absent_loss(answers: list[TrackingAnswer]) -> Tensor:
    """Cross entropy of the object score over absent objects alone, which are few; 0 where there are none."""
    scores = torch.cat([answer.object_score_logits[~answer.present] for answer in answers]).float()
    return F.binary_cross_entropy_with_logits(scores, torch.zeros_like(scores), reduction="sum") / max(1, len(scores))


@torch.no_grad()
def tracked_ious(result: ClipResult, coverage_tbhw: Tensor) -> tuple[Tensor, Tensor]:
    """IoU of the last answer on each frame, (T, B), and whether it was tracked, neither prompted nor corrected, bool.

    An object that is absent and found absent scores 1.
    """
    truth = coverage_tbhw > 0.5
    given = {*result.plan.prompted, *result.plan.corrected}
    tracked = [t for t in range(len(truth)) if t not in given]
    iou = truth.new_ones(truth.shape[:2], dtype=torch.float32)
    for t in tracked:
        iou[t] = mask_iou(result.outputs[t].pred_masks[:, 0] > 0, truth[t])
    is_tracked = torch.zeros_like(iou, dtype=torch.bool)
    is_tracked[tracked] = True
    return iou, is_tracked
