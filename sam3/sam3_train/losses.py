"""Losses of every stage: feature imitation (masked MSE and cosine), and masks (Dice, focal, IoU prediction).

All are computed in float32 whatever the inputs' dtype, and averaged so that a value does not depend on the number of
channels, on padding or on the batch size: a weight then means the same everywhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_mse(
    student_bchw: Tensor, teacher_bchw: Tensor, valid_b1hw: Tensor | None = None, channel_var_c: Tensor | None = None
) -> Tensor:
    """Squared error, averaged over channels and each image's valid cells, then over images.

    Args:
        student_bchw: Student features, (B, C, H, W).
        teacher_bchw: Teacher features of the same shape; no gradient flows into them.
        valid_b1hw: 1 inside the unpadded image and 0 in its padding, (B, 1, H, W); None means all cells.
        channel_var_c: The teacher's variance per channel, (C,). If given, each channel's error is divided by it, so
            that predicting the channel's mean costs about 1 and loud channels do not drown quiet ones.

    Returns:
        Scalar >= 0.

    Raises:
        ValueError: If shapes do not agree, or (on the CPU) an image has no valid cell.
    """
    student, teacher, valid = _checked(student_bchw, teacher_bchw, valid_b1hw)
    error_bchw = (student - teacher).square()
    if channel_var_c is None:
        return _mean_over_valid(error_bchw.mean(1, keepdim=True), valid)
    if channel_var_c.shape != (student.shape[1],):
        raise ValueError(f"channel_var_c must have shape ({student.shape[1]},), got {tuple(channel_var_c.shape)}")
    precision_1c11 = channel_var_c.float().reciprocal()[None, :, None, None]
    return _mean_over_valid((error_bchw * precision_1c11).mean(1, keepdim=True), valid)


def masked_cosine(student_bchw: Tensor, teacher_bchw: Tensor, valid_b1hw: Tensor | None = None) -> Tensor:
    """One minus the channel-wise cosine similarity, averaged over each image's valid cells, then over images.

    Args:
        student_bchw: Student features, (B, C, H, W).
        teacher_bchw: Teacher features of the same shape; no gradient flows into them.
        valid_b1hw: 1 inside the unpadded image and 0 in its padding, (B, 1, H, W); None means all cells.

    Returns:
        Scalar in [0, 2].

    Raises:
        ValueError: If shapes do not agree, or (on the CPU) an image has no valid cell.
    """
    student, teacher, valid = _checked(student_bchw, teacher_bchw, valid_b1hw)
    return _mean_over_valid(1.0 - F.cosine_similarity(student, teacher, dim=1).unsqueeze(1), valid)


def dice_loss(logits_nhw: Tensor, targets_nhw: Tensor, smooth: float = 1.0) -> Tensor:
    """Soft Dice loss of each mask.

    Args:
        logits_nhw: Mask logits, (N, H, W).
        targets_nhw: Masks in 0..1, same shape.
        smooth: Added to numerator and denominator; an empty mask predicted empty then costs nothing.

    Returns:
        (N,) in [0, 1].
    """
    probabilities = logits_nhw.float().sigmoid().flatten(1)
    targets = targets_nhw.float().flatten(1)
    overlap = (probabilities * targets).sum(1)
    return 1.0 - (2.0 * overlap + smooth) / (probabilities.sum(1) + targets.sum(1) + smooth)


def sigmoid_focal_loss(logits_nhw: Tensor, targets_nhw: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss (Lin et al., 2017, equation 5) of each mask, averaged over its pixels.

    Args:
        logits_nhw: Mask logits, (N, H, W).
        targets_nhw: Masks in 0..1, same shape.
        alpha: Weight of positive pixels, 1 - alpha of negative ones; negative means no weighting.
        gamma: How strongly easy pixels are discounted.

    Returns:
        (N,) >= 0.
    """
    logits, targets = logits_nhw.float(), targets_nhw.float()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    probabilities = logits.sigmoid()
    missed = probabilities + targets - 2.0 * probabilities * targets
    loss = cross_entropy * missed.pow(gamma)
    if alpha >= 0:
        loss = loss * (alpha * targets + (1.0 - alpha) * (1.0 - targets))
    return loss.flatten(1).mean(1)


def iou_l1_loss(predicted_iou_n: Tensor, logits_nhw: Tensor, targets_nhw: Tensor) -> Tensor:
    """Absolute error of a predicted IoU against the IoU that the mask really has (no gradient into the mask).

    Args:
        predicted_iou_n: Predicted IoU, (N,).
        logits_nhw: Mask logits, (N, H, W); the mask is where they are positive.
        targets_nhw: Masks, true above 0.5, same shape as the logits.

    Returns:
        (N,) >= 0.
    """
    from sam3_train.metrics import mask_iou

    with torch.no_grad():
        actual_iou_n = mask_iou(logits_nhw > 0, targets_nhw > 0.5)
    return (predicted_iou_n.float() - actual_iou_n).abs()


def _checked(student: Tensor, teacher: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    if student.shape != teacher.shape or student.ndim != 4:
        raise ValueError(
            f"student features {tuple(student.shape)} and teacher features {tuple(teacher.shape)} must have the same "
            "shape (B, C, H, W)"
        )
    batch, _, height, width = student.shape
    if valid is not None and valid.shape != (batch, 1, height, width):
        raise ValueError(f"valid mask must be {(batch, 1, height, width)}, got {tuple(valid.shape)}")
    return student.float(), teacher.detach().float(), valid if valid is None else valid.float()


def _mean_over_valid(values_b1hw: Tensor, valid_b1hw: Tensor | None) -> Tensor:
    if valid_b1hw is None:
        return values_b1hw.mean()
    num_valid_b = valid_b1hw.sum((1, 2, 3))
    # Elsewhere looking at the values would make the host wait for the device in each step; the loss is NaN there, which
    # the loop counts as a skipped step.
    if num_valid_b.device.type == "cpu" and not num_valid_b.all():
        raise ValueError(f"image {int((num_valid_b == 0).nonzero()[0])} of the batch has no valid cell")
    # `where` and not a product alone: padding may hold anything, and 0 * inf would poison the sum.
    inside = torch.where(valid_b1hw > 0, values_b1hw * valid_b1hw, torch.zeros_like(values_b1hw))
    return (inside.sum((1, 2, 3)) / num_valid_b).mean()
