"""What tasks that train a student have in common: its images, and how checkpoints name its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sam3.checkpoint_keys import UnknownLayoutError, student_from_published, student_to_published
from sam3.model.student_encoder import StudentEncoder
from sam3_train.checkpoint import load_strict
from sam3_train.errors import UserError
from sam3_train.task import Task


class StudentTask(Task):
    """A task around one student; what else it holds is frozen, or saved by the subclass.

    Args:
        student: What is trained.
        channels_last: Memory format of images and of the student's kernels.
    """

    def __init__(self, student: StudentEncoder, channels_last: bool = True) -> None:
        super().__init__()
        self.student = student
        self.channels_last = channels_last
        if channels_last:
            self.student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def student_features(self, batch: dict[str, Any]) -> Tensor:
        """The student's features (B, C, G, G) of the batch's ``image`` (B, 3, S, S)."""
        images: Tensor = batch["image"]
        features: Tensor = self.student(
            images.contiguous(memory_format=torch.channels_last) if self.channels_last else images
        )
        return features

    def batch_size(self, batch: dict[str, Any]) -> int:
        """Number of images."""
        return len(batch["image"])

    def saved_state(self) -> dict[str, Tensor]:
        """The student under its published names (``backbone.model.*``, ``head.*``)."""
        return student_to_published(self.student.state_dict(), self.student.student.backbone)

    def load_saved_state(self, state_dict: Mapping[str, Tensor], where: str) -> None:
        """Load published names.

        Raises:
            UserError: If names or shapes are not this student's.
        """
        backbone = self.student.student.backbone
        try:
            names = student_from_published(state_dict, backbone)
        except UnknownLayoutError as error:
            raise UserError(f"{where} holds no {backbone} student: {error}") from None
        load_strict(self.student, names, where)
