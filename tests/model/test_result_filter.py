"""Which of the model's queries become results: threshold, non-maximum suppression, the best k, their order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou, nms

from sam3.model.detections import ResultFilter, pairwise_box_iou, pairwise_mask_iou

SCORES = torch.tensor([0.5, 0.9, 0.3, 0.8, 0.7])
BOXES = torch.tensor([[0, 0, 4, 4], [0, 0, 4, 4], [8, 8, 9, 9], [0, 0, 4, 3], [5, 5, 6, 6.0]])


def selected(**settings) -> list[int]:
    return ResultFilter(**settings).select(SCORES, BOXES, None).tolist()


def test_scores_must_lie_above_the_threshold() -> None:
    assert selected() == [1, 3, 4]
    assert selected(confidence_threshold=0.0) == [0, 1, 2, 3, 4]
    assert selected(confidence_threshold=0.95) == []


def test_order_and_number() -> None:
    assert selected(sort_by_score=True) == [1, 3, 4]
    assert selected(confidence_threshold=0.2, sort_by_score=True) == [1, 3, 4, 0, 2]
    assert selected(confidence_threshold=0.2, top_k=2) == [1, 3]
    assert selected(confidence_threshold=0.2, top_k=4) == [0, 1, 3, 4]
    assert selected(top_k=99) == [1, 3, 4]


def test_what_overlaps_a_better_result_is_dropped() -> None:
    assert selected(confidence_threshold=0.2, nms_iou=0.7) == [1, 2, 4]
    assert selected(confidence_threshold=0.2, nms_iou=0.8) == [1, 2, 3, 4]
    assert selected(confidence_threshold=0.2, nms_iou=0.7, top_k=2) == [1, 4]


@pytest.mark.parametrize("limit", [0.0, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_suppression_of_boxes_is_that_of_torchvision(limit: float) -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(60, 4, generator=generator)
    boxes = torch.cat([corners[:, :2], corners[:, :2] + corners[:, 2:] * 0.5], dim=1)
    scores = torch.rand(60, generator=generator)
    torch.testing.assert_close(pairwise_box_iou(boxes), box_iou(boxes, boxes))
    found = ResultFilter(confidence_threshold=0.0, nms_iou=limit, sort_by_score=True).select(scores, boxes, None)
    assert torch.equal(found, nms(boxes, scores, limit))


def test_masks_decide_where_there_are_masks() -> None:
    """Two objects in one box: a diagonal and the rest."""
    masks = torch.full((2, 6, 6), -1.0)
    masks[0] += 2 * torch.eye(6)
    masks[1] += 2 * (1 - torch.eye(6))
    boxes = torch.tensor([[0, 0, 6, 6.0]]).repeat(2, 1)
    scores = torch.tensor([0.9, 0.8])
    settings = ResultFilter(nms_iou=0.1)
    assert settings.select(scores, boxes, masks).tolist() == [0, 1]
    assert settings.select(scores, boxes, None).tolist() == [0]
    assert settings.select(scores, boxes, masks[:1].repeat(2, 1, 1)).tolist() == [0]
    empty = torch.full((2, 6, 6), -1.0)
    assert pairwise_mask_iou(empty).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"confidence_threshold": 1.5}, "confidence_threshold must lie in 0..1, got 1.5"),
        ({"confidence_threshold": float("nan")}, "got nan"),
        ({"confidence_threshold": "0.5"}, "confidence_threshold must lie in 0..1, got '0.5'"),
        ({"confidence_threshold": None}, "got None"),
        ({"nms_iou": -0.1}, "nms_iou must lie in 0..1"),
        ({"nms_iou": "0.5"}, "nms_iou must lie in 0..1 or be None, got '0.5'"),
        ({"top_k": 0}, "top_k must be a positive integer"),
        ({"top_k": 2.0}, "top_k must be a positive integer or None, got 2.0"),
        ({"top_k": float("nan")}, "got nan"),
        ({"top_k": True}, "got True"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResultFilter(**settings)


def test_settings_may_be_numbers_of_numpy_and_torch() -> None:
    settings = {"confidence_threshold": torch.tensor(0.2), "nms_iou": np.float32(0.7), "top_k": np.int64(2)}
    assert selected(**settings) == [1, 4]
