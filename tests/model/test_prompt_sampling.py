"""Clicks and boxes drawn from masks."""

from __future__ import annotations

import pytest
import torch

from sam3.model.prompt_sampling import (
    LABEL_BOX_BOTTOM_RIGHT,
    LABEL_BOX_TOP_LEFT,
    LABEL_NEGATIVE,
    LABEL_POSITIVE,
    PointPrompts,
    box_prompts,
    boxes_from_masks,
    centre_clicks,
    correction_clicks,
    distance_to_outside,
    jitter_boxes,
    uniform_clicks,
)


def rectangle(top: int, bottom: int, left: int, right: int, hw: tuple[int, int] = (40, 60)) -> torch.Tensor:
    """A mask whose rows top..bottom-1 and columns left..right-1 are set, (1, H, W)."""
    mask = torch.zeros(1, *hw, dtype=torch.bool)
    mask[:, top:bottom, left:right] = True
    return mask


def values_at(masks: torch.Tensor, prompts: PointPrompts) -> list[bool]:
    """The mask's value under each object's first click."""
    points = prompts.points_xy_px[:, 0].long()
    return [bool(mask[y, x]) for mask, (x, y) in zip(masks, points.tolist(), strict=True)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_box_is_tight_and_an_object_in_the_corner_keeps_all_its_pixels():
    masks = torch.cat([rectangle(3, 10, 5, 20), rectangle(32, 40, 50, 60), rectangle(0, 1, 0, 1)])
    expected = [[5, 3, 19, 9], [50, 32, 59, 39], [0, 0, 0, 0]]
    assert boxes_from_masks(masks).tolist() == expected


def test_jittered_boxes_stay_in_the_frame_near_the_object_and_ordered():
    masks = torch.cat([rectangle(32, 40, 50, 60), rectangle(0, 8, 0, 10), rectangle(10, 30, 10, 50)]).repeat(200, 1, 1)
    exact = boxes_from_masks(masks)
    boxes = jitter_boxes(exact, (40, 60), scale=0.1, max_shift_px=3.0, generator=generator())
    assert boxes[:, 0::2].min() >= 0 and boxes[:, 0::2].max() <= 59
    assert boxes[:, 1::2].min() >= 0 and boxes[:, 1::2].max() <= 39
    assert (boxes[:, :2] <= boxes[:, 2:]).all()
    assert (boxes - exact).abs().max() <= 3.0
    assert (boxes - exact).abs().max() > 1.0
    assert torch.equal(boxes, jitter_boxes(exact, (40, 60), 0.1, 3.0, generator()))


def test_jitter_scales_with_the_object():
    masks = torch.cat([rectangle(10, 14, 10, 14)] * 300 + [rectangle(5, 35, 5, 55)] * 300)
    shift = (jitter_boxes(boxes_from_masks(masks), (40, 60), generator=generator()) - boxes_from_masks(masks)).abs()
    assert shift[300:, 0].mean() > 5 * shift[:300, 0].mean()


def test_uniform_clicks_reach_every_pixel_of_a_corner_object_and_no_other():
    mask = rectangle(38, 40, 57, 60)
    clicks = uniform_clicks(mask.expand(400, -1, -1), generator())
    assert clicks.frame_hw == (40, 60)
    assert (clicks.labels == LABEL_POSITIVE).all()
    seen = {tuple(point) for point in clicks.points_xy_px[:, 0].long().tolist()}
    assert seen == {(x, y) for x in (57, 58, 59) for y in (38, 39)}


def test_uniform_clicks_are_decided_by_the_generator():
    masks = rectangle(0, 40, 0, 60).expand(20, -1, -1)
    first, again = (uniform_clicks(masks, generator(3)).points_xy_px for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, uniform_clicks(masks, generator(4)).points_xy_px)


def test_distance_equals_brute_force():
    mask = torch.rand(3, 17, 23, generator=generator()) > 0.25
    padded = torch.nn.functional.pad(mask, (1, 1, 1, 1))
    expected = torch.zeros(3, 17, 23)
    for b in range(3):
        outside = (~padded[b]).nonzero() - 1
        for y in range(17):
            for x in range(23):
                expected[b, y, x] = ((outside - torch.tensor([y, x])) ** 2).sum(1).min()
    assert torch.equal(distance_to_outside(mask), expected)
    assert not distance_to_outside(torch.zeros(2, 4, 4, dtype=torch.bool)).any()


def test_centre_click_lies_deep_inside_also_where_the_centroid_is_outside():
    ring = rectangle(5, 35, 5, 35) & ~rectangle(10, 30, 10, 35)
    clicks = centre_clicks(torch.cat([rectangle(10, 21, 20, 41), ring]))
    assert values_at(torch.cat([rectangle(10, 21, 20, 41), ring]), clicks) == [True, True]
    assert clicks.points_xy_px[0, 0, 1] == 15
    assert 25 <= clicks.points_xy_px[0, 0, 0] <= 35


def test_centre_click_counts_the_image_border_as_outside():
    clicks = centre_clicks(rectangle(30, 40, 50, 60))
    assert clicks.points_xy_px[0, 0].tolist() in [[54, 34], [55, 34], [54, 35], [55, 35]]


@pytest.mark.parametrize("method", ["uniform", "centre"])
def test_correction_is_positive_where_missed_and_negative_where_spilled(method: str):
    truth = rectangle(10, 30, 10, 30)
    missing_right, spilled_left = rectangle(10, 30, 10, 20), rectangle(10, 30, 0, 30)
    clicks = correction_clicks(truth.repeat(2, 1, 1), torch.cat([missing_right, spilled_left]), method, generator())
    assert clicks.labels[:, 0].tolist() == [LABEL_POSITIVE, LABEL_NEGATIVE]
    assert 20 <= clicks.points_xy_px[0, 0, 0] < 30
    assert clicks.points_xy_px[1, 0, 0] < 10


def test_correction_at_the_centre_goes_to_the_larger_error():
    truth = rectangle(10, 30, 10, 30)
    predicted = (truth & ~rectangle(10, 14, 10, 14)) | rectangle(10, 30, 40, 60)
    clicks = correction_clicks(truth, predicted, "centre")
    assert clicks.labels.item() == LABEL_NEGATIVE
    assert clicks.points_xy_px[0, 0, 0] >= 40


@pytest.mark.parametrize("method", ["uniform", "centre"])
def test_correction_of_a_perfect_mask_confirms_it(method: str):
    truth = torch.cat([rectangle(0, 5, 0, 5), torch.zeros(1, 40, 60, dtype=torch.bool)])
    clicks = correction_clicks(truth, truth.clone(), method, generator())
    assert clicks.labels[:, 0].tolist() == [LABEL_POSITIVE, LABEL_NEGATIVE]
    assert values_at(truth, clicks) == [True, False]


def test_scaling_keeps_the_place_in_the_image():
    corner = PointPrompts(torch.tensor([[[59.0, 39.0], [0.0, 0.0]]]), torch.ones(1, 2, dtype=torch.long), (40, 60))
    scaled = corner.scaled_to((80, 240))
    assert scaled.points_xy_px[0].tolist() == [[237.5, 78.5], [1.5, 0.5]]
    assert scaled.frame_hw == (80, 240)
    assert torch.allclose(scaled.scaled_to((40, 60)).points_xy_px, corner.points_xy_px)


def test_prompts_of_different_frames_are_not_joined():
    click = centre_clicks(rectangle(0, 10, 0, 10))
    with pytest.raises(ValueError, match=r"\(40, 60\) and \(80, 120\)"):
        click.followed_by(click.scaled_to((80, 120)))
    both = box_prompts(boxes_from_masks(rectangle(0, 10, 0, 10)), (40, 60)).followed_by(click)
    assert both.labels.tolist() == [[LABEL_BOX_TOP_LEFT, LABEL_BOX_BOTTOM_RIGHT, LABEL_POSITIVE]]
    assert both.points_xy_px.shape == (1, 3, 2)


def test_bad_masks_are_refused_with_their_number():
    empty = torch.cat([rectangle(0, 5, 0, 5), torch.zeros(1, 40, 60, dtype=torch.bool)])
    for draw in (boxes_from_masks, uniform_clicks, centre_clicks):
        with pytest.raises(ValueError, match="mask 1 of 2 is empty"):
            draw(empty)
    with pytest.raises(ValueError, match=r"\(B, H, W\)"):
        boxes_from_masks(torch.ones(4, 4))
    with pytest.raises(ValueError, match="random"):
        correction_clicks(empty, empty, method="random")
    with pytest.raises(ValueError, match="one shape"):
        correction_clicks(empty, empty[:1])
