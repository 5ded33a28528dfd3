"""What happens to the masks of several objects after the mask decoder: who owns a pixel, which holes are filled.

All functions take logits, (B, 1, H, W) for B objects of one frame, treat what lies above 0 as foreground, and leave
their argument alone. Rules of the released tracker.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sam3.preprocess import Preprocess
from sam3.sam.connected_components import component_areas

NO_OBJECT_LOGIT = -1024.0
"""Mask logits of an object that is not in the frame."""
BACKGROUND_LOGIT = -10.0
"""Highest logit that a pixel keeps where another object won it."""
MIN_AREA_KEPT = 0.3
"""An object that loses more than the rest of its area to others is taken for a duplicate."""
_FILLED_LOGIT = 0.1


def apply_non_overlapping_constraints(masks_b1hw: Tensor, background: float = BACKGROUND_LOGIT) -> Tensor:
    """Give each pixel to the object with the highest logit there; of equal ones to the first.

    Returns:
        The same shape: the winner's logits are kept, the others' clamped to at most ``background``. A single object is
        returned as it is.
    """
    if masks_b1hw.shape[0] <= 1:
        return masks_b1hw
    return torch.where(_wins(masks_b1hw), masks_b1hw, masks_b1hw.clamp(max=background))


def suppress_object_pw_area_shrinkage(masks_b1hw: Tensor, min_area_kept: float = MIN_AREA_KEPT) -> Tensor:
    """Empty the masks of objects that would lose most of their pixels to others.

    Returns:
        The same shape. Objects that `apply_non_overlapping_constraints` would leave less than ``min_area_kept`` of
        their area are clamped to at most -10 everywhere; all others keep their logits, overlaps included.
    """
    if masks_b1hw.shape[0] <= 1:
        return masks_b1hw
    foreground = masks_b1hw > 0
    area_before = foreground.sum(dim=(-2, -1)).clamp(min=1)
    area_after = (foreground & _wins(masks_b1hw)).sum(dim=(-2, -1))
    keeps_area = (area_after / area_before >= min_area_kept)[..., None, None]
    return torch.where(keeps_area, masks_b1hw, masks_b1hw.clamp(max=BACKGROUND_LOGIT))


def apply_object_wise_non_overlapping_constraints(
    masks_b1hw: Tensor, scores_b: Tensor, background: float = BACKGROUND_LOGIT
) -> Tensor:
    """Give each pixel to the object with the highest score among those whose mask covers it.

    Args:
        masks_b1hw: Mask logits.
        scores_b: One score per object, (B,) or (B, 1). An object whose score is not above 0 loses all its pixels.
        background: Highest logit of a pixel outside its object.

    Returns:
        The same shape.
    """
    scores = scores_b.reshape(-1, 1, 1, 1).to(masks_b1hw.dtype)
    claims = torch.where(masks_b1hw > 0, scores, background)
    owned = claims > 0
    if masks_b1hw.shape[0] > 1:
        owned &= _wins(claims)
    return torch.where(owned, masks_b1hw, masks_b1hw.clamp(max=background))


def fill_holes_in_mask_scores(
    masks_b1hw: Tensor, max_area: float, fill_holes: bool = True, remove_sprinkles: bool = True
) -> Tensor:
    """Fill small holes, then remove small islands; both by 8-connected components.

    Args:
        masks_b1hw: Mask logits; B may be 0.
        max_area: Background components of at most this many pixels become foreground (+0.1); then foreground
            components of at most this many pixels, and at most half of the object's area, become background (-0.1).
            0: nothing happens.
        fill_holes: Whether to do the first.
        remove_sprinkles: Whether to do the second.
    """
    if max_area <= 0 or masks_b1hw.numel() == 0:
        return masks_b1hw
    masks = masks_b1hw.flatten(0, 1)
    if fill_holes:
        background = masks <= 0
        masks = torch.where(background & (component_areas(background) <= max_area), _FILLED_LOGIT, masks)
    if remove_sprinkles:
        foreground = masks > 0
        limit = (foreground.sum(dim=(-2, -1), keepdim=True) // 2).clamp(max=int(max_area))
        masks = torch.where(foreground & (component_areas(foreground) <= limit), -_FILLED_LOGIT, masks)
    return masks.view_as(masks_b1hw)


def video_to_square(
    masks_b1hw: Tensor, preprocess: Preprocess, video_hw: tuple[int, int], size_px: int, padding: float
) -> Tensor:
    """Resize masks from the video's frame to the model's square one, antialiased.

    Args:
        masks_b1hw: Masks or logits that cover the whole video frame at any resolution, (B, 1, h, w) float.
        preprocess: How frames become the model's input.
        video_hw: Height and width of the video.
        size_px: Side of the result; any size, it stands for the whole model input.
        padding: Value outside the image, where ``preprocess`` pads.

    Returns:
        (B, 1, size_px, size_px).
    """
    height, width = preprocess.resized_hw(video_hw)
    scale = size_px / preprocess.size_px
    inner_hw = max(1, round(height * scale)), max(1, round(width * scale))
    if masks_b1hw.shape[-2:] != inner_hw:
        masks_b1hw = F.interpolate(masks_b1hw, inner_hw, mode="bilinear", align_corners=False, antialias=True)
    if inner_hw == (size_px, size_px):
        return masks_b1hw
    return F.pad(masks_b1hw, (0, size_px - inner_hw[1], 0, size_px - inner_hw[0]), value=padding)


def _wins(values_b1hw: Tensor) -> Tensor:
    """Whether an object holds the highest value at a pixel, bool (B, 1, H, W); of equal ones the first does."""
    objects = torch.arange(values_b1hw.shape[0], device=values_b1hw.device)[:, None, None, None]
    return objects == values_b1hw.argmax(dim=0, keepdim=True)
