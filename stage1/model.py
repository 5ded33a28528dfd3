"""What stage 1 trains: a student that imitates the features of a frozen teacher trunk.

    images (B, 3, S, S) -> student -> (B, C, G, G)  ~  teacher features, stored or computed in the loop

Two terms, each averaged over channels, valid cells and images, so that a weight means the same at any size: the squared
error in units of the teacher's own variance (1 is what predicting the mean costs), and one minus the cosine along
channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sam3.model.student_encoder import StudentEncoder
from sam3_train.losses import masked_cosine, masked_mse
from sam3_train.student_task import StudentTask

MaskAgreement = Callable[[Tensor, Tensor], Tensor]
"""Student and teacher features (B, C, G, G) -> IoU of the masks that both lead to, (B,)."""


@dataclass(frozen=True)
class LossWeights:
    """How the two terms are added."""

    mse: float = 1.0
    cosine: float = 1.0


class Stage1Task(StudentTask):
    """One student and its loss. The teacher's features come with the batch (`sam3_train.teacher`).

    Args:
        student: What is trained.
        variance_c: What each channel's squared error is divided by, (C,); ones for nothing.
        weights: Of the two terms.
        mask_agreement: Adds ``mask_iou`` to the validation; nothing of it is trained or saved.
        channels_last: Memory format of images and kernels.
    """

    variance_c: Tensor

    def __init__(
        self,
        student: StudentEncoder,
        variance_c: Tensor,
        weights: LossWeights | None = None,
        mask_agreement: MaskAgreement | None = None,
        channels_last: bool = True,
    ) -> None:
        super().__init__(student, channels_last)
        self.register_buffer("variance_c", variance_c.detach().float().clone(), persistent=False)
        self.weights = weights or LossWeights()
        self.mask_agreement = mask_agreement

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Loss of a training batch.

        Args:
            batch: ``image`` (B, 3, S, S), ``teacher`` (B, C, G, G) and ``valid`` (B, 1, G, G), on one device.

        Returns:
            ``loss`` and its unweighted terms ``mse`` and ``cosine``.
        """
        features = self.student_features(batch)
        mse = masked_mse(features, batch["teacher"], batch["valid"], self.variance_c)
        cosine = masked_cosine(features, batch["teacher"], batch["valid"])
        return {"loss": self.weights.mse * mse + self.weights.cosine * cosine, "mse": mse, "cosine": cosine}

    def validate(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Metrics of a validation batch, one value per image.

        Returns:
            ``loss``, ``mse``, ``cosine``, ``similarity`` (mean over cells of the cosine along channels),
            ``channel_similarity`` (mean over channels of the cosine along cells) and, with mask agreement,
            ``mask_iou``; (B,) each.
        """
        features, teacher, valid = self.student_features(batch).float(), batch["teacher"], batch["valid"]
        mse = _per_image(partial(masked_mse, channel_var_c=self.variance_c), features, teacher, valid)
        cosine = _per_image(masked_cosine, features, teacher, valid)
        metrics = {
            "loss": self.weights.mse * mse + self.weights.cosine * cosine,
            "mse": mse,
            "cosine": cosine,
            "similarity": 1.0 - cosine,
            "channel_similarity": channel_similarity(features, teacher, valid),
        }
        if self.mask_agreement is not None:
            metrics["mask_iou"] = self.mask_agreement(features, teacher)
        return metrics


def channel_similarity(student_bchw: Tensor, teacher_bchw: Tensor, valid_b1hw: Tensor) -> Tensor:
    """How alike each channel's map is: cosine over the valid cells, averaged over channels.

    A student that gives every cell the teacher's mean feature scores high along channels and low here.

    Args:
        student_bchw: Student features, (B, C, H, W).
        teacher_bchw: Teacher features of the same shape.
        valid_b1hw: 1 inside the image and 0 in its padding.

    Returns:
        (B,) in [-1, 1]. Maps are centred first, so a constant map counts 0.
    """
    inside = valid_b1hw > 0
    count = inside.sum((2, 3), keepdim=True)

    def centred(features: Tensor) -> Tensor:
        kept = torch.where(inside, features, 0.0)
        return torch.where(inside, features - kept.sum((2, 3), keepdim=True) / count, 0.0).flatten(2)

    return F.cosine_similarity(centred(student_bchw), centred(teacher_bchw), dim=2).mean(1)


def _per_image(loss: Callable[..., Tensor], *tensors_b: Tensor) -> Tensor:
    """A batch-averaged loss, image by image: (B,)."""
    return torch.stack([loss(*(tensor[i : i + 1] for tensor in tensors_b)) for i in range(len(tensors_b[0]))])
