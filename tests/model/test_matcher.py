"""Assigning queries to objects."""

import itertools

import pytest
import torch
from torchvision.ops import generalized_box_iou

from sam3.model.matcher import BinaryHungarianMatcherV2, SetTargets, pairwise_giou


def corners(boxes):
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], dim=-1)


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(3, 6, 4, generator=generator) * 0.4 + 0.1
    wanted = torch.rand(3, 4, 4, generator=generator) * 0.4 + 0.1
    valid = torch.tensor([[True, True, False, False], [False] * 4, [True, False, True, True]])
    return torch.randn(3, 6, generator=generator), boxes, SetTargets(wanted, valid)


def test_giou_is_that_of_torchvision(problem):
    _, boxes, targets = problem
    wanted = torch.stack(
        [generalized_box_iou(corners(a), corners(b)) for a, b in zip(boxes, targets.boxes_btx, strict=True)]
    )
    assert torch.allclose(pairwise_giou(boxes, targets.boxes_btx), wanted, atol=1e-6)


def test_the_assignment_is_the_cheapest_of_all(problem):
    logits, boxes, targets = problem
    matcher = BinaryHungarianMatcherV2()
    costs = matcher._costs(logits, boxes, targets)
    matches = matcher(logits, boxes, targets)
    for b in range(3):
        objects = targets.valid_bt[b].nonzero()[:, 0].tolist()
        of_item = matches.prompt == b
        assert sorted(matches.target[of_item].tolist()) == objects
        paid = costs[b, matches.query[of_item], matches.target[of_item]].sum()
        cheapest = min(
            (
                sum(costs[b, q, t] for q, t in zip(queries, objects, strict=True))
                for queries in itertools.permutations(range(6), len(objects))
            ),
            default=torch.tensor(0.0),
        )
        assert abs(float(paid) - float(cheapest)) < 1e-5


def test_padding_does_not_move_an_assignment(problem):
    logits, boxes, targets = problem
    other = torch.where(targets.valid_bt[..., None], targets.boxes_btx, torch.full_like(targets.boxes_btx, 0.9))
    matcher = BinaryHungarianMatcherV2()
    first, second = matcher(logits, boxes, targets), matcher(logits, boxes, SetTargets(other, targets.valid_bt))
    assert torch.equal(first.query, second.query)
    assert torch.equal(first.target, second.target)


def test_one_to_many_gives_each_object_several_queries(problem):
    logits, boxes, targets = problem
    matches = BinaryHungarianMatcherV2()(logits, boxes, targets, repeats=3)
    counts = torch.bincount(matches.target[matches.prompt == 0], minlength=2)
    assert counts.tolist() == [3, 3]
    in_third = matches.prompt == 2
    assert len(matches.query[in_third].unique()) == int(in_third.sum()) == 6  # three objects, as far as queries reach


def test_objects_that_nobody_asks_for_get_queries_by_their_boxes_alone(problem):
    logits, boxes, targets = problem
    asked = torch.zeros_like(targets.valid_bt)
    asked[0, 0] = True
    targets = SetTargets(targets.boxes_btx, targets.valid_bt, asked)
    assert targets.num_objects_b.tolist() == [1, 0, 0]
    matcher = BinaryHungarianMatcherV2()
    matches, others = matcher(logits, boxes, targets), matcher(-3 * logits, boxes, targets)
    assert matches.target[matches.prompt == 2].sort().values.tolist() == [0, 2, 3]
    assert torch.equal(matches.query[matches.prompt == 2], others.query[others.prompt == 2])
    costs, flipped = matcher._costs(logits, boxes, targets), matcher._costs(-logits, boxes, targets)
    assert torch.equal(costs[..., 1:], flipped[..., 1:])
    assert not torch.allclose(costs[0, :, 0], flipped[0, :, 0])


def test_no_objects_at_all_give_no_pairs(problem):
    logits, boxes, targets = problem
    empty = SetTargets(targets.boxes_btx, torch.zeros_like(targets.valid_bt))
    assert len(BinaryHungarianMatcherV2()(logits, boxes, empty)) == 0


def test_a_prediction_that_is_not_finite_is_said(problem):
    logits, boxes, targets = problem
    boxes[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        BinaryHungarianMatcherV2()(logits, boxes, targets)
