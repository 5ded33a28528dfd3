"""Prompts as the detector and as the SAM heads take them."""

from __future__ import annotations

import torch
from torch import Tensor

from sam3.model.prompt import Prompt
from sam3.model.prompt_sampling import (
    LABEL_BOX_BOTTOM_RIGHT,
    LABEL_BOX_TOP_LEFT,
    LABEL_NEGATIVE,
    LABEL_POSITIVE,
)
from stage1_geometry_finetune.prompts import PromptBatch


def trim_points(prompts: PromptBatch) -> PromptBatch:
    """The same without columns of points that are padding for every object."""
    used = int(prompts.is_point.sum(1).max()) if prompts.is_point.numel() else 0
    return prompts._replace(
        points_xy=prompts.points_xy[:, :used],
        point_labels=prompts.point_labels[:, :used],
        is_point=prompts.is_point[:, :used],
    )


def to_geometric_prompt(prompts: PromptBatch) -> Prompt:
    """What `Sam3Image.forward_grounding` takes: boxes and points are positive or negative examples."""
    prompts = trim_points(prompts)
    boxes, box_mask = prompts.boxes_cxcywh[None], ~prompts.has_box[:, None]
    if not bool(prompts.has_box.any()):
        boxes, box_mask = boxes[:0], box_mask[:, :0]
    return Prompt(
        box_embeddings=boxes,
        box_mask=box_mask,
        point_embeddings=prompts.points_xy.transpose(0, 1),
        point_mask=~prompts.is_point,
        point_labels=prompts.point_labels.T,
    )


def layouts(prompts: PromptBatch) -> list[Tensor]:
    """Objects grouped by what they are asked with: int64 positions, one tensor for each layout.

    The SAM heads attend to padding, of which deployment never has any: prompts of different layouts can't share a pass.
    """
    kinds = prompts.is_point.sum(1) * 2 + prompts.has_box
    return [(kinds == kind).nonzero()[:, 0] for kind in kinds.unique()]


def to_sam_prompt(prompts: PromptBatch, image_size_px: int) -> tuple[Tensor, Tensor]:
    """Corners and clicks in pixels of the model's input, (K, N, 2), and their labels, (K, N), as deployed.

    Raises:
        ValueError: If the prompts differ in their layout, or are empty.
    """
    prompts = trim_points(prompts)
    has_box = bool(prompts.has_box.any())
    if not bool(prompts.is_point.all()) or has_box != bool(prompts.has_box.all()):
        raise ValueError("prompts of one pass through the SAM heads must have the same layout: see layouts()")
    labels = torch.where(prompts.point_labels > 0, LABEL_POSITIVE, LABEL_NEGATIVE)
    points = prompts.points_xy
    if has_box:
        centre, half = prompts.boxes_cxcywh[:, None, :2], prompts.boxes_cxcywh[:, None, 2:] / 2
        points = torch.cat([centre - half, centre + half, points], dim=1)
        corners = labels.new_tensor([LABEL_BOX_TOP_LEFT, LABEL_BOX_BOTTOM_RIGHT])
        labels = torch.cat([corners.expand(len(labels), 2), labels], dim=1)
    if not points.shape[1]:
        raise ValueError("a prompt has neither box nor point")
    return points * image_size_px - 0.5, labels
