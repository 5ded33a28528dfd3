"""J, F and J&F against hand-made cases and plain loops over pixels."""

from __future__ import annotations

import math

import pytest
import torch

from sam3_train.video_metrics import boundary_accuracy, mean_score, outline, region_similarity, score_clip


def square(top: int, left: int, side: int, size: int = 40) -> torch.Tensor:
    mask = torch.zeros(1, size, size, dtype=torch.bool)
    mask[:, top : top + side, left : left + side] = True
    return mask


def loop_outline(mask: torch.Tensor) -> set[tuple[int, int]]:
    height, width = mask.shape
    found = set()
    for y in range(height):
        for x in range(width):
            neighbours = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            inside = [(a, b) for a, b in neighbours if a < height and b < width]
            if any(bool(mask[y, x]) != bool(mask[a, b]) for a, b in inside):
                found.add((y, x))
    return found


def loop_f(predicted: torch.Tensor, truth: torch.Tensor, radius: int) -> float:
    found, wanted = loop_outline(predicted), loop_outline(truth)
    if not found or not wanted:
        return float(not found and not wanted)

    def near(a: set[tuple[int, int]], b: set[tuple[int, int]]) -> float:
        return sum(any(math.dist(p, q) <= radius for q in b) for p in a) / len(a)

    precision, recall = near(found, wanted), near(wanted, found)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_region_similarity_against_counting() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted = torch.rand(5, 9, 13, generator=generator) > 0.6
    truth = torch.rand(5, 9, 13, generator=generator) > 0.4
    for score, a, b in zip(region_similarity(predicted, truth).tolist(), predicted, truth, strict=True):
        pairs = list(zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
        both = sum(p and t for p, t in pairs)
        either = sum(p or t for p, t in pairs)
        assert score == pytest.approx(both / either)


def test_boundary_accuracy_against_plain_loops() -> None:
    generator = torch.Generator().manual_seed(1)
    smooth = torch.nn.functional.avg_pool2d(torch.rand(6, 1, 24, 30, generator=generator), 5, 1, 2)[:, 0]
    masks = smooth > 0.5
    for radius in (1, 2, 3):
        scores = boundary_accuracy(masks[:3], masks[3:], radius)
        for score, predicted, truth in zip(scores.tolist(), masks[:3], masks[3:], strict=True):
            assert score == pytest.approx(loop_f(predicted, truth, radius), abs=1e-6)


def test_empty_masks() -> None:
    empty, full = torch.zeros(1, 40, 40, dtype=torch.bool), square(10, 10, 12)
    assert region_similarity(empty, empty).item() == boundary_accuracy(empty, empty).item() == 1.0
    for predicted, truth in ((empty, full), (full, empty)):
        assert region_similarity(predicted, truth).item() == boundary_accuracy(predicted, truth).item() == 0.0


def test_shift_within_the_tolerance_costs_no_boundary_score() -> None:
    # A 40 x 40 image has a diagonal of 56.6 pixels, and so a tolerance of one pixel.
    truth = square(10, 10, 12)
    assert boundary_accuracy(square(11, 10, 12), truth).item() == pytest.approx(1.0)
    assert region_similarity(square(11, 10, 12), truth).item() == pytest.approx(11 / 13)
    assert boundary_accuracy(square(14, 14, 12), truth).item() < 0.3


def test_image_border_is_no_outline() -> None:
    half = torch.zeros(1, 10, 10, dtype=torch.bool)
    half[:, :, :4] = True
    assert outline(half).nonzero().tolist() == [[0, y, 3] for y in range(10)]
    assert not outline(torch.ones(1, 10, 10, dtype=torch.bool)).any()


def test_first_and_last_frame_do_not_count() -> None:
    truth = square(10, 10, 12).repeat(4, 1, 1)
    predicted = truth.clone()
    predicted[0], predicted[3] = False, False
    score = score_clip(predicted, truth)
    assert (score.region, score.boundary, score.j_and_f, score.num_frames) == (1.0, 1.0, 1.0, 2)
    named = score_clip(predicted, truth, scored=[True, True, False, False])
    assert named.region == named.boundary == 0.5


def test_objects_count_the_same_in_the_mean() -> None:
    truth = square(10, 10, 12).repeat(6, 1, 1)
    good, bad = score_clip(truth, truth), score_clip(torch.zeros_like(truth[:3]), truth[:3])
    mean = mean_score([good, bad])
    assert (mean.region, mean.boundary, mean.num_frames) == (0.5, 0.5, 5)


def test_bad_arguments() -> None:
    masks = square(1, 1, 5).repeat(2, 1, 1)
    with pytest.raises(ValueError, match=r"one shape \(N, H, W\)"):
        region_similarity(masks, masks[:1])
    with pytest.raises(ValueError, match="no frame of 2 is scored"):
        score_clip(masks, masks)
    with pytest.raises(ValueError, match=r"yes or no to 2 frames"):
        score_clip(masks, masks, scored=[True])
    with pytest.raises(ValueError, match="no object was scored"):
        mean_score([])
