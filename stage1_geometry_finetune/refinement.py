"""Clicks where student and teacher disagree: what a user who wants the teacher's mask would do next."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sam3.model.prompt_sampling import LABEL_POSITIVE, correction_clicks
from stage1_geometry_finetune.prompts import PromptBatch


def refine_prompts(
    prompts: PromptBatch,
    student_masks: Tensor,
    teacher_masks: Tensor,
    num_clicks: int = 1,
    generator: torch.Generator | None = None,
) -> PromptBatch:
    """The same prompts with further clicks, drawn for each object by itself.

    Every pixel that the two masks disagree on is equally likely, however few there are (D-93): positive where the
    student misses the teacher's mask, negative where it spills. Where they agree, a positive click inside confirms it.

    Args:
        prompts: Of K objects.
        student_masks: bool (K, M, M).
        teacher_masks: bool (K, M, M).
        num_clicks: Clicks per object.
        generator: Where they are drawn from; None: torch's global generator, which the loop seeds and stores.

    Returns:
        The prompts with up to ``num_clicks`` more columns of points. Their ids are negative: they depend on the student
        and never come back.
    """
    side = teacher_masks.shape[-1]
    for _ in range(num_clicks):
        clicks = correction_clicks(teacher_masks, student_masks, "uniform", generator)
        prompts = _add_point(
            prompts, (clicks.points_xy_px[:, 0] + 0.5) / side, (clicks.labels[:, 0] == LABEL_POSITIVE).long()
        )
    return prompts._replace(prompt_ids=torch.full_like(prompts.prompt_ids, -1))


def _add_point(prompts: PromptBatch, points_kx: Tensor, labels_k: Tensor) -> PromptBatch:
    """One more point for each object, right behind those that it has."""
    rows, behind = torch.arange(prompts.num_objects, device=points_kx.device), prompts.is_point.sum(1)
    points, labels = F.pad(prompts.points_xy, (0, 0, 0, 1)), F.pad(prompts.point_labels, (0, 1))
    is_point = F.pad(prompts.is_point, (0, 1))
    points[rows, behind], labels[rows, behind], is_point[rows, behind] = points_kx, labels_k, True
    used = int(is_point.sum(1).max()) if len(rows) else 0
    return prompts._replace(points_xy=points[:, :used], point_labels=labels[:, :used], is_point=is_point[:, :used])
