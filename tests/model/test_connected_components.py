"""Component areas against a plain flood fill, and what filling does to a mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sam3.sam.connected_components import component_areas, fill_holes


def flood_fill_areas(mask: Tensor) -> Tensor:
    """One pixel at a time; slow and obvious."""
    height, width = mask.shape
    areas = torch.zeros(height, width, dtype=torch.long)
    seen: set[tuple[int, int]] = set()
    for y, x in mask.nonzero().tolist():
        if (y, x) in seen:
            continue
        component, stack = [], [(y, x)]
        seen.add((y, x))
        while stack:
            cy, cx = stack.pop()
            component.append((cy, cx))
            for ny in range(max(0, cy - 1), min(height, cy + 2)):
                for nx in range(max(0, cx - 1), min(width, cx + 2)):
                    if mask[ny, nx] and (ny, nx) not in seen:
                        seen.add((ny, nx))
                        stack.append((ny, nx))
        for cy, cx in component:
            areas[cy, cx] = len(component)
    return areas


@pytest.mark.parametrize("density", [0.05, 0.3, 0.4, 0.5, 0.9])
@pytest.mark.parametrize("size_hw", [(1, 1), (1, 17), (17, 1), (13, 29)])
def test_random_masks(density: float, size_hw: tuple[int, int]) -> None:
    masks = torch.rand(4, *size_hw, generator=torch.Generator().manual_seed(int(density * 100))) < density
    expected = torch.stack([flood_fill_areas(mask) for mask in masks])
    assert torch.equal(component_areas(masks), expected)


def spiral(size: int) -> Tensor:
    """One long thin component: the worst case for methods that spread labels step by step."""
    mask = torch.zeros(size, size, dtype=torch.bool)
    top, left, bottom, right = 0, 0, size - 1, size - 1
    while top <= bottom and left <= right:
        mask[top, left : right + 1] = True
        mask[top : bottom + 1, right] = True
        mask[bottom, left : right + 1] = True
        mask[top + 2 : bottom + 1, left] = True
        if left + 2 <= right:
            mask[top + 2, left : left + 2] = True
        top, left, bottom, right = top + 2, left + 2, bottom - 2, right - 2
    return mask


def test_spiral_and_empty_and_full_masks() -> None:
    masks = torch.stack([spiral(41), torch.zeros(41, 41, dtype=torch.bool), torch.ones(41, 41, dtype=torch.bool)])
    areas = component_areas(masks)
    assert torch.equal(areas[0], flood_fill_areas(masks[0]))
    assert not areas[1].any()
    assert (areas[2] == 41 * 41).all()
    assert component_areas(torch.zeros(0, 5, 5, dtype=torch.bool)).shape == (0, 5, 5)


def test_diagonal_neighbours_belong_together_and_masks_do_not_touch() -> None:
    assert (component_areas(torch.eye(6, dtype=torch.bool)[None])[0].diagonal() == 6).all()
    last_row_first_row = torch.zeros(2, 4, 4, dtype=torch.bool)
    last_row_first_row[0, 3], last_row_first_row[1, 0] = True, True
    assert component_areas(last_row_first_row).max() == 4


def make_mask() -> Tensor:
    """Background -3; an object of 20 x 20 at logit 2 with a hole of 4 and one of 5 pixels; an island of 3 pixels."""
    logits = torch.full((32, 32), -3.0)
    logits[4:24, 4:24] = 2.0
    logits[8:10, 8:10] = -1.0
    logits[15, 12:17] = -1.0
    logits[29, 2:5] = 1.0
    return logits


def test_holes_up_to_the_limit_are_filled() -> None:
    logits = make_mask()
    filled = fill_holes(logits[None, None], 0.0, 4, 0)[0, 0]
    assert (filled[8:10, 8:10] == 10.0).all()
    assert (filled[15, 12:17] == -1.0).all()
    changed = filled != logits
    assert changed.sum() == 4
    assert torch.equal(make_mask(), logits)


def test_islands_up_to_the_limit_are_removed() -> None:
    cleaned = fill_holes(make_mask()[None], 0.0, 0, 3)[0]
    assert (cleaned[29, 2:5] == -10.0).all()
    assert (cleaned != make_mask()).sum() == 3


def test_nothing_happens_without_limits() -> None:
    assert torch.equal(fill_holes(make_mask()[None], 0.0, 0, 0)[0], make_mask())
