"""What stage 1 trains: a student that imitates the features of a frozen teacher trunk.

    images (B, 3, S, S) -> student -> (B, C, G, G)  ~  teacher features, stored or computed in the loop

Two terms, each averaged over channels, valid cells and images, so that a weight means the same at any size: the squared
error in units of the teacher's own variance (1 is what predicting the mean costs), and one minus the cosine along
channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sam3.checkpoint_keys import UnknownLayoutError, student_from_published, student_to_published
from sam3.model.student_encoder import StudentEncoder
from sam3_train.checkpoint import load_strict
from sam3_train.embeddings import Codec
from sam3_train.errors import UserError
from sam3_train.losses import masked_cosine, masked_mse
from sam3_train.task import Task

MaskAgreement = Callable[[Tensor, Tensor], Tensor]
"""Student and teacher features (B, C, G, G) -> IoU of the masks that both lead to, (B,)."""


@dataclass(frozen=True)
class LossWeights:
    """How the two terms are added."""

    mse: float = 1.0
    cosine: float = 1.0


class Stage1Task(Task):
    """One student and its loss. The teacher's features come with the batch (`stored_features`, `online_features`).

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
        super().__init__()
        self.student = student
        self.register_buffer("variance_c", variance_c.detach().float().clone(), persistent=False)
        self.weights = weights or LossWeights()
        self.mask_agreement = mask_agreement
        self.channels_last = channels_last
        if channels_last:
            self.student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Loss of a training batch.

        Args:
            batch: ``image`` (B, 3, S, S), ``teacher`` (B, C, G, G) and ``valid`` (B, 1, G, G), on one device.

        Returns:
            ``loss`` and its unweighted terms ``mse`` and ``cosine``.
        """
        features = self.student(self._images(batch))
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
        features, teacher, valid = self.student(self._images(batch)).float(), batch["teacher"], batch["valid"]
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

    def batch_size(self, batch: dict[str, Any]) -> int:
        """Number of images."""
        return len(batch["image"])

    def saved_state(self) -> dict[str, Tensor]:
        """The student under its published names."""
        return student_to_published(self.student.state_dict(), self.student.student.backbone)

    def load_saved_state(self, state_dict: Mapping[str, Tensor], where: str) -> None:
        """Load published names.

        Raises:
            UserError: If names or shapes are not this student's.
        """
        try:
            names = student_from_published(state_dict, self.student.student.backbone)
        except UnknownLayoutError as error:
            raise UserError(f"{where} holds no {self.student.student.backbone} student: {error}") from None
        load_strict(self.student, names, where)

    def _images(self, batch: dict[str, Any]) -> Tensor:
        images: Tensor = batch["image"]
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images


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


def stored_features(codec: Codec) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A step between loader and task that decodes stored embeddings on the batch's device.

    The copy to the device moves the stored types; float32 exists only there.
    """

    def prepare(batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "teacher": codec.to_float(batch["embedding"])}

    return prepare


def online_features(teacher: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The same for a teacher in the loop: `stage1.teacher.Teacher`. One pass serves all students."""

    def prepare(batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "teacher": teacher(batch["image"])}

    return prepare


def _per_image(loss: Callable[..., Tensor], *tensors_b: Tensor) -> Tensor:
    """A batch-averaged loss, image by image: (B,)."""
    return torch.stack([loss(*(tensor[i : i + 1] for tensor in tensors_b)) for i in range(len(tensors_b[0]))])
