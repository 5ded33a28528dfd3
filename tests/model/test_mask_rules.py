"""Who owns a pixel, which duplicates go, which holes are filled: each rule on masks small enough to read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sam3.model.mask_rules import (
    apply_non_overlapping_constraints,
    apply_object_wise_non_overlapping_constraints,
    fill_holes_in_mask_scores,
    suppress_object_pw_area_shrinkage,
    video_to_square,
)
from sam3.preprocess import Preprocess


def rows(*objects: list[float]) -> Tensor:
    """One row of pixels per object, as (B, 1, 1, W)."""
    return torch.tensor(objects)[:, None, None]


def test_a_pixel_belongs_to_the_highest_logit_and_of_equal_ones_to_the_first() -> None:
    masks = rows([3.0, 2.0, -1.0, -20.0], [1.0, 2.0, 4.0, -12.0])
    before = masks.clone()
    expected = rows([3.0, 2.0, -10.0, -20.0], [-10.0, -10.0, 4.0, -12.0])
    assert torch.equal(apply_non_overlapping_constraints(masks), expected)
    assert torch.equal(masks, before)


def test_a_single_object_shares_with_nobody() -> None:
    masks = rows([3.0, -2.0])
    assert torch.equal(apply_non_overlapping_constraints(masks), masks)
    assert torch.equal(suppress_object_pw_area_shrinkage(masks), masks)


def test_objects_that_lose_most_of_their_area_go_and_the_others_keep_overlaps() -> None:
    big = [5.0] * 8 + [-5.0] * 2
    inside = [1.0] * 8 + [1.0] * 2  # keeps 2 of 10
    beside = [-5.0] * 5 + [1.0] * 3 + [2.0] * 2  # keeps 2 of 5
    out = suppress_object_pw_area_shrinkage(rows(big, inside, beside))
    assert torch.equal(out[0], rows(big)[0])
    assert torch.equal(out[1], torch.full((1, 1, 10), -10.0))
    assert torch.equal(out[2], rows(beside)[0])


def test_an_empty_mask_counts_as_shrunk() -> None:
    out = suppress_object_pw_area_shrinkage(rows([-1.0, -30.0], [2.0, 2.0]))
    assert torch.equal(out, rows([-10.0, -30.0], [2.0, 2.0]))


def test_scores_decide_between_whole_objects() -> None:
    masks = rows([9.0, 9.0, -3.0], [1.0, -1.0, 1.0], [5.0, 5.0, 5.0])
    out = apply_object_wise_non_overlapping_constraints(masks, torch.tensor([0.4, 0.7, 0.0]))
    assert torch.equal(out, rows([-10.0, 9.0, -10.0], [1.0, -10.0, 1.0], [-10.0, -10.0, -10.0]))
    alone = apply_object_wise_non_overlapping_constraints(rows([9.0, -3.0]), torch.tensor([[-0.5]]), -7.0)
    assert torch.equal(alone, rows([-7.0, -7.0]))


def test_small_holes_fill_and_small_islands_go() -> None:
    mask = torch.full((1, 1, 12, 12), -4.0)
    mask[..., 1:8, 1:8] = 6.0
    mask[..., 3, 3] = -1.0  # a hole of 2, joined by a corner
    mask[..., 4, 4] = -1.0
    mask[..., 10, 10:12] = 6.0  # an island of 2
    out = fill_holes_in_mask_scores(mask, 2)
    assert out[0, 0, 3, 3] == pytest.approx(0.1)
    assert out[0, 0, 4, 4] == pytest.approx(0.1)
    assert out[0, 0, 10, 10:12].tolist() == pytest.approx([-0.1, -0.1])
    assert (out > 0).sum() == 49
    assert torch.equal(fill_holes_in_mask_scores(mask, 2, remove_sprinkles=False)[0, 0, 10], mask[0, 0, 10])
    assert torch.equal(fill_holes_in_mask_scores(mask, 2, fill_holes=False)[0, 0, :9], mask[0, 0, :9])
    assert fill_holes_in_mask_scores(mask, 0) is mask


def test_an_object_is_not_removed_as_its_own_island() -> None:
    mask = torch.full((2, 1, 9, 9), -4.0)
    mask[0, 0, 4, 4:7] = 1.0  # 3 pixels in one piece: more than half of itself
    mask[1, 0, 0, 0] = 1.0  # two pieces of 1 and 3: the smaller goes
    mask[1, 0, 4, 4:7] = 1.0
    out = fill_holes_in_mask_scores(mask, 16) > 0
    assert out.sum(dim=(1, 2, 3)).tolist() == [3, 3]
    assert not out[1, 0, 0, 0]


def test_no_object_at_all() -> None:
    empty = torch.zeros(0, 1, 5, 5)
    for rule in (apply_non_overlapping_constraints, suppress_object_pw_area_shrinkage):
        assert rule(empty).shape == (0, 1, 5, 5)
    assert fill_holes_in_mask_scores(empty, 16).shape == (0, 1, 5, 5)
    assert apply_object_wise_non_overlapping_constraints(empty, torch.zeros(0)).shape == (0, 1, 5, 5)


@pytest.mark.parametrize("mode", ["stretch", "letterbox"])
@pytest.mark.parametrize("size_px", [64, 128])
def test_a_mask_goes_to_the_model_and_back(mode: str, size_px: int) -> None:
    preprocess = Preprocess(size_px=64, mode=mode)
    mask = torch.zeros(1, 1, 40, 80)
    mask[..., 10:30, 20:60] = 1.0
    square = video_to_square(mask, preprocess, (40, 80), size_px, padding=-3.0)
    assert square.shape == (1, 1, size_px, size_px)
    assert bool((square[..., -1, :] == (0.0 if mode == "stretch" else -3.0)).all())
    back = preprocess.masks_to_image(square, (40, 80))
    assert ((back > 0.5) != (mask > 0.5)).float().mean() < 0.02
