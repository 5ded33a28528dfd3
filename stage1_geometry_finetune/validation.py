"""How a fine-tuned student is validated: prompts that follow from the annotated masks alone, and means per image."""

from __future__ import annotations

import torch
from torch import Tensor

from sam3.model.box_ops import xyxy_to_cxcywh
from sam3.model.prompt_sampling import boxes_from_masks, centre_clicks
from stage1_geometry_finetune.prompts import PromptBatch

PROMPT_KINDS = ("box", "click")


def prompts_from_masks(prompts: PromptBatch) -> dict[str, PromptBatch]:
    """The tightest box and the innermost click of every object whose mask has a pixel left at the masks' size.

    Args:
        prompts: Whose masks are read; what they ask with is not.

    Returns:
        ``box`` and ``click`` -> prompts of the same objects. Their ids are negative: nothing keeps answers to them.
    """
    prompts = prompts.select(prompts.masks.flatten(1).any(1))
    side = prompts.masks.shape[-1]
    num, like = prompts.num_objects, prompts.boxes_cxcywh
    if num:
        edges = boxes_from_masks(prompts.masks) + like.new_tensor([0.0, 0.0, 1.0, 1.0])  # its far edge, not its pixel
        boxes = xyxy_to_cxcywh(edges / side)
        clicks = (centre_clicks(prompts.masks).points_xy_px + 0.5) / side
    else:
        boxes, clicks = like.new_zeros(0, 4), like.new_zeros(0, 1, 2)
    yes = torch.ones(num, dtype=torch.bool, device=like.device)
    common = prompts._replace(prompt_ids=torch.full_like(prompts.prompt_ids, -1))
    none = common._replace(
        boxes_cxcywh=torch.zeros_like(boxes),
        has_box=~yes,
        points_xy=clicks[:, :0],
        point_labels=prompts.prompt_ids.new_zeros(num, 0),
        is_point=yes[:, None][:, :0],
    )
    labels = torch.ones_like(prompts.prompt_ids)[:, None]
    return {
        "box": none._replace(boxes_cxcywh=boxes, has_box=yes),
        "click": none._replace(points_xy=clicks, point_labels=labels, is_point=yes[:, None]),
    }


def image_means(values_k: Tensor, image_of_object: Tensor, num_images: int) -> Tensor:
    """Mean over the objects of each image, (B,); NaN for an image without any."""
    sums, counts = values_k.new_zeros(num_images), values_k.new_zeros(num_images)
    sums = sums.index_add(0, image_of_object, values_k)
    return sums / counts.index_add(0, image_of_object, torch.ones_like(values_k))
