"""Areas of connected components, for filling holes in masks: torch only, without a loop over pixels.

A mask is cut into horizontal runs; runs of neighbouring rows that touch are the edges of a graph, and the graph's
components are found by hooking and pointer jumping (Shiloach and Vishkin, 1982), which takes a logarithmic number of
vectorised rounds. Runs on any device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def component_areas(masks_bhw: Tensor) -> Tensor:
    """The area of the 8-connected component that each pixel belongs to.

    Args:
        masks_bhw: bool, (B, H, W); the masks are independent of each other.

    Returns:
        int64, (B, H, W): pixels in the component, 0 outside the mask.
    """
    # One empty row and column around every mask, so that in the flattened batch no run reaches into another row
    # or mask.
    padded = F.pad(masks_bhw, (1, 1, 1, 1))
    row_length = padded.shape[-1]
    flat = padded.flatten()
    inside = flat.nonzero().flatten()
    areas = torch.zeros(flat.shape, dtype=torch.long, device=flat.device)
    if len(inside):
        is_start = ~flat[inside - 1]
        starts, ends = inside[is_start], inside[~flat[inside + 1]]
        labels = _component_labels(len(starts), *_touching_runs(starts, ends, row_length))
        run_areas = torch.zeros_like(starts).scatter_add_(0, labels, ends - starts + 1)[labels]
        areas[inside] = run_areas[is_start.cumsum(0) - 1]
    return areas.view(padded.shape)[:, 1:-1, 1:-1]


def _touching_runs(starts: Tensor, ends: Tensor, row_length: int) -> tuple[Tensor, Tensor]:
    """Pairs of runs in neighbouring rows that share a side or a corner, as two index vectors."""
    # The runs of the next row that touch a run are consecutive.
    first = torch.searchsorted(ends, starts + row_length - 1)
    last = torch.searchsorted(starts, ends + row_length + 1, right=True)
    counts = (last - first).clamp(min=0)
    upper = torch.repeat_interleave(torch.arange(len(starts), device=starts.device), counts)
    offsets = torch.arange(len(upper), device=starts.device) - torch.repeat_interleave(
        counts.cumsum(0) - counts, counts
    )
    return upper, first[upper] + offsets


def _component_labels(num_nodes: int, edge_a: Tensor, edge_b: Tensor) -> Tensor:
    """The smallest node of each node's component, (num_nodes,)."""
    labels = torch.arange(num_nodes, device=edge_a.device)
    while True:
        label_a, label_b = labels[edge_a], labels[edge_b]
        if bool((label_a == label_b).all()):
            return labels
        lower = torch.minimum(label_a, label_b)
        labels = labels.scatter_reduce(0, torch.maximum(label_a, label_b), lower, "amin")
        while True:  # every label becomes its root
            jumped = labels[labels]
            if bool((jumped == labels).all()):
                break
            labels = jumped


def fill_holes(mask_logits: Tensor, threshold: float, max_hole_area: float, max_sprinkle_area: float) -> Tensor:
    """Close small holes and remove small islands of masks given as logits.

    Args:
        mask_logits: (..., H, W).
        threshold: What lies above is foreground.
        max_hole_area: Background components of at most this many pixels become ``threshold + 10``; 0 for none.
        max_sprinkle_area: Then foreground components of at most this many pixels become ``threshold - 10``.

    Returns:
        The same shape; the argument is not changed.
    """
    shape = mask_logits.shape
    logits = mask_logits.flatten(0, -3) if mask_logits.ndim > 2 else mask_logits[None]
    if max_hole_area > 0:
        background = logits <= threshold
        is_hole = background & (component_areas(background) <= max_hole_area)
        logits = torch.where(is_hole, threshold + 10.0, logits)
    if max_sprinkle_area > 0:
        foreground = logits > threshold
        is_sprinkle = foreground & (component_areas(foreground) <= max_sprinkle_area)
        logits = torch.where(is_sprinkle, threshold - 10.0, logits)
    return logits.view(shape)
