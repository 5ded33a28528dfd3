"""Clicks and boxes drawn from masks: what a user would have done, for training and for evaluation.

Coordinates name pixels by their index, (0, 0) being the middle of the top-left pixel, x before y, and travel with the
size of the grid they were drawn on (`PointPrompts.frame_hw`), because masks are drawn on one grid, models prompted on
another. Random draws take a ``torch.Generator``; without one, torch's global generator decides: the CPU's for clicks,
that of the boxes' device for their noise. Results are on the mask's device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LABEL_PADDING, LABEL_NEGATIVE, LABEL_POSITIVE, LABEL_BOX_TOP_LEFT, LABEL_BOX_BOTTOM_RIGHT = -1, 0, 1, 2, 3


@dataclass(frozen=True)
class PointPrompts:
    """Clicks or box corners of B objects, K each."""

    points_xy_px: Tensor
    """float32 (B, K, 2), pixels of the frame."""
    labels: Tensor
    """int64 (B, K): -1 padding, 0 negative, 1 positive, 2 and 3 corners of a box."""
    frame_hw: tuple[int, int]
    """Height and width of the grid that the coordinates count pixels of."""

    def scaled_to(self, frame_hw: tuple[int, int]) -> PointPrompts:
        """The same places counted in pixels of another grid over the same image.

        A pixel's middle stays where it is in the image, so index x of a grid of width W becomes (x + 0.5) s - 0.5.
        """
        scale = self.points_xy_px.new_tensor([frame_hw[1] / self.frame_hw[1], frame_hw[0] / self.frame_hw[0]])
        return PointPrompts((self.points_xy_px + 0.5) * scale - 0.5, self.labels, frame_hw)

    def followed_by(self, other: PointPrompts) -> PointPrompts:
        """These prompts and then the others, object by object.

        Raises:
            ValueError: If the two count pixels of different grids.
        """
        if self.frame_hw != other.frame_hw:
            raise ValueError(f"prompts of frames {self.frame_hw} and {other.frame_hw} can't be joined: scale one")
        points = torch.cat([self.points_xy_px, other.points_xy_px], dim=1)
        return PointPrompts(points, torch.cat([self.labels, other.labels], dim=1), self.frame_hw)


class _Extent(NamedTuple):
    low: Tensor
    high: Tensor


def boxes_from_masks(masks_bhw: Tensor) -> Tensor:
    """The tightest box around each mask.

    Args:
        masks_bhw: Boolean or 0/1, (B, H, W).

    Returns:
        float32 (B, 4), xyxy: indices of the first and the last pixel inside, so a single pixel gives x0 = x1.

    Raises:
        ValueError: If a mask is empty.
    """
    masks = _checked(masks_bhw)
    x, y = _extent(masks.any(dim=1)), _extent(masks.any(dim=2))
    return torch.stack([x.low, y.low, x.high, y.high], dim=1).to(torch.float32)


def jitter_boxes(
    boxes_xyxy_px: Tensor,
    frame_hw: tuple[int, int],
    scale: float = 0.1,
    max_shift_px: float = 20.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Move the corners of boxes as a hand would: normal noise, clipped.

    Args:
        boxes_xyxy_px: (B, 4).
        frame_hw: Boxes are cut to this frame.
        scale: Standard deviation of the noise relative to the box's side; the clipping is at twice that.
        max_shift_px: No corner moves further than this.
        generator: Source of the noise.

    Returns:
        (B, 4) boxes whose second corner is not before the first.
    """
    corners = boxes_xyxy_px.unflatten(1, (2, 2))
    deviation = (corners[:, 1] - corners[:, 0] + 1.0)[:, None] * scale
    limit = (2 * deviation).clamp(max=max_shift_px)
    shift = _randn(corners.shape, corners, generator) * deviation
    moved = corners + shift.clamp(-limit, limit)
    edge = moved.new_tensor([frame_hw[1] - 1, frame_hw[0] - 1])
    moved = moved.clamp(min=0).minimum(edge)
    return torch.cat([moved.amin(dim=1), moved.amax(dim=1)], dim=1)


def box_prompts(boxes_xyxy_px: Tensor, frame_hw: tuple[int, int]) -> PointPrompts:
    """Boxes (B, 4) as the two labelled corners that the SAM heads read."""
    labels = torch.tensor([LABEL_BOX_TOP_LEFT, LABEL_BOX_BOTTOM_RIGHT], device=boxes_xyxy_px.device)
    return PointPrompts(boxes_xyxy_px.unflatten(1, (2, 2)), labels.expand(len(boxes_xyxy_px), 2), frame_hw)


def uniform_clicks(masks_bhw: Tensor, generator: torch.Generator | None = None) -> PointPrompts:
    """One positive click per mask, every pixel of it being equally likely.

    Raises:
        ValueError: If a mask is empty.
    """
    masks = _checked(masks_bhw)
    return _clicks(_uniform_pixel(masks, generator), masks, torch.ones(len(masks), dtype=torch.bool))


def centre_clicks(masks_bhw: Tensor) -> PointPrompts:
    """One positive click per mask on its innermost pixel: the one furthest from the outside and from the border.

    Raises:
        ValueError: If a mask is empty.
    """
    masks = _checked(masks_bhw)
    return _clicks(_innermost_pixel(masks)[0], masks, torch.ones(len(masks), dtype=torch.bool))


def correction_clicks(
    truth_bhw: Tensor,
    predicted_bhw: Tensor,
    method: str = "uniform",
    generator: torch.Generator | None = None,
) -> PointPrompts:
    """The next click of a user who sees a wrong mask: positive where it misses the object, negative where it spills.

    Args:
        truth_bhw: Masks to reach, boolean or 0/1, (B, H, W).
        predicted_bhw: Masks so far, same shape.
        method: "uniform": any wrong pixel, all equally likely (for training). "centre": the innermost pixel of the
            larger of the two kinds of error (for evaluation; no randomness).
        generator: Source of randomness for "uniform".

    Returns:
        One click per object. Where nothing is wrong, it is a positive one inside the truth (a negative one anywhere if
        the truth is empty), which confirms what is there.

    Raises:
        ValueError: If the shapes differ or the method is unknown.
    """
    if method not in ("uniform", "centre"):
        raise ValueError(f"method {method!r} is not one of ('uniform', 'centre')")
    if truth_bhw.shape != predicted_bhw.shape or truth_bhw.ndim != 3:
        shapes = f"{tuple(truth_bhw.shape)} and {tuple(predicted_bhw.shape)}"
        raise ValueError(f"truth and prediction must have one shape (B, H, W), got {shapes}")
    truth, predicted = truth_bhw.bool(), predicted_bhw.bool()
    missed, spilled = truth & ~predicted, predicted & ~truth
    if method == "uniform":
        wrong = missed | spilled
        done = ~wrong.flatten(1).any(dim=1)
        empty = ~truth.flatten(1).any(dim=1)
        region = torch.where(done[:, None, None], truth | empty[:, None, None], wrong)
        pixel = _uniform_pixel(region, generator)
        positive = truth.flatten(1).gather(1, pixel[:, None])[:, 0]
        return _clicks(pixel, truth, positive)
    missed_pixel, missed_depth = _innermost_pixel(missed)
    spilled_pixel, spilled_depth = _innermost_pixel(spilled)
    done = (missed_depth == 0) & (spilled_depth == 0)
    inner_pixel, inner_depth = _innermost_pixel(truth)
    positive = torch.where(done, inner_depth > 0, missed_depth >= spilled_depth)
    pixel = torch.where(done, inner_pixel, torch.where(positive, missed_pixel, spilled_pixel))
    return _clicks(pixel, truth, positive)


def distance_to_outside(masks_bhw: Tensor) -> Tensor:
    """Squared Euclidean distance of each pixel to the nearest one outside its mask; beyond the border is outside.

    Exact: along columns by scanning, then along rows by taking the lower envelope over all columns (Felzenszwalb and
    Huttenlocher, "Distance Transforms of Sampled Functions", 2012, without their linear-time hull). Work is done in the
    bounding box of all masks only.

    Args:
        masks_bhw: Boolean, (B, H, W).

    Returns:
        float32 (B, H, W), 0 outside.
    """
    result = torch.zeros(masks_bhw.shape, device=masks_bhw.device)
    if not masks_bhw.any():
        return result
    rows, columns = _extent(masks_bhw.any(dim=2).any(dim=0)[None]), _extent(masks_bhw.any(dim=1).any(dim=0)[None])
    top, bottom, left, right = int(rows.low), int(rows.high) + 1, int(columns.low), int(columns.high) + 1
    inside = masks_bhw[:, top:bottom, left:right]
    vertical = torch.minimum(_steps_from_outside(inside), _steps_from_outside(inside.flip(1)).flip(1)) ** 2
    width = right - left
    x = torch.arange(width, device=masks_bhw.device, dtype=torch.float32)
    nearest = torch.minimum(x + 1, width - x) ** 2  # the first columns outside the bounding box are outside the mask
    squared = vertical.minimum(nearest)
    for column in range(width):
        squared = squared.minimum(vertical[..., column, None] + (x - column) ** 2)
    result[:, top:bottom, left:right] = squared
    return result


def _steps_from_outside(inside_bhw: Tensor) -> Tensor:
    """Rows since the last one outside the mask, counting from above; 0 outside. float32 (B, H, W)."""
    row = torch.arange(1, inside_bhw.shape[1] + 1, device=inside_bhw.device)[:, None].expand(inside_bhw.shape[1:])
    last_outside = torch.where(inside_bhw, 0, row).cummax(dim=1).values
    return (row - last_outside).to(torch.float32)


def _innermost_pixel(masks_bhw: Tensor) -> tuple[Tensor, Tensor]:
    """Flat index of the pixel deepest inside each mask, and its squared depth (0 for an empty mask), both (B,)."""
    pixels, depths = [], []
    for mask in masks_bhw:
        depth, pixel = distance_to_outside(mask[None]).flatten().max(dim=0)
        pixels.append(pixel)
        depths.append(depth)
    return torch.stack(pixels), torch.stack(depths)


def _uniform_pixel(masks_bhw: Tensor, generator: torch.Generator | None) -> Tensor:
    """Flat index of a pixel drawn uniformly from each mask, (B,)."""
    order = masks_bhw.flatten(1).cumsum(dim=1)
    total = order[:, -1:].cpu()
    device = generator.device if generator is not None else total.device
    # float64 on the CPU alone, as MPS has none; elsewhere float32, whose 24 bits tell all pixels of a mask apart.
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    draw = torch.rand(len(order), 1, generator=generator, device=device, dtype=dtype).cpu().double()
    number = (draw * total).long() + 1
    return torch.searchsorted(order, number.to(order.device))[:, 0]


def _clicks(pixel: Tensor, masks_bhw: Tensor, positive: Tensor) -> PointPrompts:
    height, width = masks_bhw.shape[1:]
    points = torch.stack([pixel % width, pixel // width], dim=1).to(torch.float32)
    labels = torch.where(positive.to(pixel.device), LABEL_POSITIVE, LABEL_NEGATIVE)
    return PointPrompts(points[:, None], labels[:, None], (height, width))


def _extent(occupied_bn: Tensor) -> _Extent:
    occupied = occupied_bn.to(torch.uint8)
    return _Extent(occupied.argmax(dim=1), occupied.shape[1] - 1 - occupied.flip(1).argmax(dim=1))


def _randn(shape: torch.Size, like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else like.device
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(like.device)


def _checked(masks_bhw: Tensor) -> Tensor:
    if masks_bhw.ndim != 3:
        raise ValueError(f"masks must be (B, H, W), got {tuple(masks_bhw.shape)}")
    masks = masks_bhw.bool()
    empty = (~masks.flatten(1).any(dim=1)).nonzero()
    if len(empty):
        raise ValueError(f"mask {int(empty[0])} of {len(masks)} is empty: there is nothing to click on")
    return masks
