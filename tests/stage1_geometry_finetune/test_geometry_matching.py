"""What is kept of the teacher's answers, how queries are matched to it, what differences cost, what is cached."""

from __future__ import annotations

import pytest
import torch
from geometry_world import CPU, make_prompts

from sam3.model.matcher import BinaryHungarianMatcherV2, Matches
from stage1_geometry_finetune.frozen_heads import DetectorAnswer
from stage1_geometry_finetune.losses import (
    GeometryLossWeights,
    box_term,
    mask_terms,
    object_weights,
    presence_term,
    score_term,
)
from stage1_geometry_finetune.matching import (
    MatchOptions,
    best_detections,
    dice_costs,
    match_detections,
    pack_masks,
    unpack_masks,
)
from stage1_geometry_finetune.refinement import refine_prompts
from stage1_geometry_finetune.routes import join_targets, prompted_query
from stage1_geometry_finetune.teacher_cache import TeacherCache

QUERIES, SIDE = 12, 24
OPTIONS = MatchOptions(max_detections=4, min_score=0.3)


def make_answer(num_prompts: int = 3, seed: int = 0) -> DetectorAnswer:
    """Random boxes with the masks that fill them; a few queries score high."""
    generator = torch.Generator().manual_seed(seed)
    centre = 0.25 + 0.5 * torch.rand(num_prompts, QUERIES, 2, generator=generator)
    size = 0.15 + 0.2 * torch.rand(num_prompts, QUERIES, 2, generator=generator)
    places = (torch.arange(SIDE) + 0.5) / SIDE
    in_x = (places - centre[..., :1]).abs() < size[..., :1] / 2
    in_y = (places - centre[..., 1:]).abs() < size[..., 1:] / 2
    masks = torch.where(in_y[..., :, None] & in_x[..., None, :], 4.0, -4.0)
    masks = masks + 0.3 * torch.randn(masks.shape, generator=generator)
    logits = -4 + 0.3 * torch.randn(num_prompts, QUERIES, generator=generator)
    for prompt in range(num_prompts):
        logits[prompt, : prompt + 1] += 6 - torch.arange(prompt + 1)
    return DetectorAnswer(masks, torch.cat([centre, size], -1), logits, torch.full((num_prompts,), 3.0))


def permuted(answer: DetectorAnswer, order: torch.Tensor) -> DetectorAnswer:
    return DetectorAnswer(
        answer.mask_logits[:, order], answer.boxes[:, order], answer.logits[:, order], answer.presence
    )


def test_kept_are_the_top_detections_above_the_score_and_always_the_best():
    """D-84."""
    answer = make_answer()
    detections = best_detections(answer, OPTIONS)
    assert detections.kept.sum(1).tolist() == [1, 2, 3]
    assert torch.equal(detections.logits, answer.logits.sort(dim=1, descending=True).values)
    for prompt in range(3):
        for slot in range(prompt + 1):
            assert torch.equal(detections.boxes[prompt, slot], answer.boxes[prompt, slot])
            assert torch.equal(detections.masks[prompt, slot] >= 128, answer.mask_logits[prompt, slot] > 0)
    nothing = best_detections(answer, MatchOptions(max_detections=4, min_score=2.0))
    assert nothing.kept.tolist() == [[True]] * 3, "the best one is kept whatever it scores"
    few = best_detections(answer, MatchOptions(max_detections=2, min_score=0.3))
    assert few.kept.sum(1).tolist() == [1, 2, 2]


def test_matching_finds_permuted_queries():
    """D-84: the same answers from other slots cost nothing more."""
    teacher = make_answer()
    detections, order = best_detections(teacher, OPTIONS), torch.randperm(QUERIES, generator=torch.manual_seed(1))
    student, matcher = permuted(teacher, order), BinaryHungarianMatcherV2()
    matches = match_detections(student, detections, matcher, 5.0)
    assert len(matches) == 6
    assert torch.equal(order[matches.query], matches.target), "the queries of these detections were the first"
    weights = torch.full((3,), 1 / 3)
    straight = match_detections(teacher, detections, matcher, 5.0)
    expected = score_term(teacher.logits, detections, straight, weights)
    torch.testing.assert_close(score_term(student.logits, detections, matches, weights), expected)


def test_masks_decide_between_queries_with_the_same_box_and_score():
    teacher = make_answer(1)
    detections = best_detections(teacher, OPTIONS)
    wrong = teacher.mask_logits[:, :1].flip(-1).roll(5, -1)
    twin = DetectorAnswer(
        torch.cat([wrong, teacher.mask_logits[:, :1]], 1),
        teacher.boxes[:, [0, 0]],
        teacher.logits[:, [0, 0]],
        teacher.presence,
    )
    assert match_detections(twin, detections, BinaryHungarianMatcherV2(), 5.0).query.tolist() == [1]
    costs = dice_costs(twin.mask_logits.sigmoid(), unpack_masks(detections.masks))
    assert costs.shape == (1, 2, 1)
    assert costs[0, 1, 0] < 0.3 < 0.5 < costs[0, 0, 0]


def test_masks_are_kept_in_a_byte_without_changing_their_outline():
    logits = torch.linspace(-9, 9, 4001).view(1, 1, -1)
    levels = pack_masks(logits)
    assert levels.dtype == torch.uint8
    assert torch.equal(levels >= 128, logits >= 0)
    assert (unpack_masks(levels) - logits.sigmoid()).abs().max() <= 1 / 512 + 1e-6
    inside = torch.zeros(1, 1, 4001, dtype=torch.bool)
    assert not pack_masks(logits, inside).any(), "nothing is found in padding"


def test_an_image_with_many_objects_counts_as_much_as_one_with_a_single_object():
    weights = object_weights(torch.tensor([0] * 16 + [2]))
    assert weights.sum().item() == pytest.approx(1.0)
    assert weights[:16].sum().item() == pytest.approx(0.5)
    assert weights[16].item() == pytest.approx(0.5), "the image without objects takes no part"
    assert object_weights(torch.zeros(0, dtype=torch.long)).tolist() == []


def test_mask_terms_judge_what_is_inside_the_image_alone():
    """D-85: what the padding of a letterbox holds costs nothing and gets no gradient."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 8, 8, generator=generator)
    teacher = torch.rand(2, 8, 8, generator=generator)
    inside = torch.zeros(2, 8, 8, dtype=torch.bool)
    inside[:, :6] = True
    weights = torch.tensor([0.25, 0.75])
    cropped = mask_terms(logits[:, :6], teacher[:, :6], weights)
    garbage = torch.where(inside, logits, 50.0).requires_grad_(True)
    padded = mask_terms(garbage, teacher, weights, inside)
    for a, b in zip(cropped, padded, strict=True):
        torch.testing.assert_close(a, b)
    (gradient,) = torch.autograd.grad(sum(padded), garbage)
    assert not gradient[~inside].any()
    assert gradient[inside].all()
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    assert mask_terms(logits, teacher, weights)[0].item() == pytest.approx(
        sum(w * entropy(a, b).item() for w, a, b in zip(weights.tolist(), logits, teacher, strict=True)), rel=1e-5
    )


def test_every_term_is_least_where_the_student_says_what_the_teacher_says():
    """The gradient vanishes there, so nothing pulls a perfect student away."""
    teacher = make_answer()
    detections, weights = best_detections(teacher, OPTIONS), object_weights(torch.tensor([0, 0, 1]))
    leaves = [values.clone().requires_grad_(True) for values in teacher]
    student = DetectorAnswer(*leaves)
    matches = match_detections(student, detections, BinaryHungarianMatcherV2(), 5.0)
    pair, target, query = matches.prompt, matches.target, matches.query
    pair_weights = (weights / detections.kept.sum(1))[pair]
    soft = torch.sigmoid(teacher.mask_logits[pair, query])
    terms = [
        mask_terms(student.mask_logits[pair, query], soft, pair_weights)[0],
        score_term(student.logits, detections, matches, weights),
        presence_term(student.presence, detections.presence, weights),
    ]
    for gradient in torch.autograd.grad(sum(terms), leaves, allow_unused=True):
        assert gradient is None or gradient.abs().max() < 1e-6
    assert box_term(student.boxes[pair, query], detections.boxes[pair, target], pair_weights).item() < 1e-5


def test_a_wrong_score_box_or_presence_costs():
    teacher = make_answer()
    detections, weights = best_detections(teacher, OPTIONS), object_weights(torch.tensor([0, 0, 1]))
    matches = match_detections(teacher, detections, BinaryHungarianMatcherV2(), 5.0)
    pair, target, query = matches.prompt, matches.target, matches.query
    right = score_term(teacher.logits, detections, matches, weights)
    for shift in (-2.0, 2.0):
        assert score_term(teacher.logits + shift, detections, matches, weights) > right + 0.05
        assert presence_term(teacher.presence + shift, detections.presence, weights) > presence_term(
            teacher.presence, detections.presence, weights
        )
    moved = teacher.boxes[pair, query] + 0.1
    assert box_term(moved, detections.boxes[pair, target], (weights / detections.kept.sum(1))[pair]) > 0.4


def test_weights_of_the_loss_must_not_be_negative():
    with pytest.raises(ValueError, match="weight mask_dice must be at least 0, got -1"):
        GeometryLossWeights(mask_dice=-1.0)


def test_refinement_clicks_lie_where_the_masks_disagree():
    """D-93: for each object by itself, even if a single pixel is wrong; as many as asked for, and not a draw apart."""
    prompts = make_prompts("bcxbc")
    teacher = prompts.masks.clone()
    student = teacher.clone()
    student[0] = False  # missed: positive
    student[1, :4] = True  # spills: negative
    y, x = teacher[2].nonzero()[0].tolist()
    student[2, y, x] = False  # one pixel
    side = teacher.shape[-1]
    torch.manual_seed(0)
    refined = refine_prompts(prompts, student, teacher, num_clicks=2)
    assert refined.is_point.sum(1).tolist() == [n + 2 for n in prompts.is_point.sum(1).tolist()]
    assert torch.equal(refined.has_box, prompts.has_box)
    assert (refined.prompt_ids < 0).all()
    for index in range(5):
        used = refined.is_point[index]
        assert used[: int(used.sum())].all(), "padding stays on the right"
        before = int(prompts.is_point[index].sum())
        clicks, labels = refined.points_xy[index][used][before:], refined.point_labels[index][used][before:]
        for (px, py), label in zip((clicks * side).long().tolist(), labels.tolist(), strict=True):
            assert label == int(teacher[index, py, px])
            if index < 3:
                assert teacher[index, py, px] != student[index, py, px]
    assert (refined.points_xy[2][-1] * side).long().tolist() == [x, y]


def test_refinement_clicks_follow_the_seed():
    prompts = make_prompts("bbbbb")
    student = prompts.masks.roll(3, -1)

    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return refine_prompts(prompts, student, prompts.masks).points_xy

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_the_prompted_object_is_told_from_others_that_are_alike():
    answer = make_answer(2)
    answer = answer._replace(logits=torch.zeros_like(answer.logits))  # the detector finds all of them
    prompts = make_prompts().select(torch.arange(2))
    x, y = (answer.boxes[1, 5, :2] * SIDE).long().tolist()
    outside = answer.mask_logits[1, :, y, x] <= 0
    prompts = prompts._replace(
        boxes_cxcywh=answer.boxes[:, 7].clone(),
        has_box=torch.tensor([True, False]),
        points_xy=torch.stack([torch.zeros(1, 2), answer.boxes[1:, 5, :2]]),
        point_labels=torch.ones(2, 1, dtype=torch.long),
        is_point=torch.tensor([[False], [True]]),
    )
    box, click = prompted_query(answer, prompts).tolist()
    assert box == 7
    assert not outside[click]


def test_targets_of_prompts_with_different_numbers_of_detections_are_joined():
    answer = make_answer()
    rows = [DetectorAnswer(*(values[i : i + 1] for values in answer)) for i in range(3)]
    joined = join_targets([best_detections(row, OPTIONS) for row in rows])
    for a, b in zip(joined, best_detections(answer, OPTIONS), strict=True):
        assert torch.equal(a, b)


def test_the_cache_keeps_what_fits_and_throws_nothing_out():
    """D-96: an epoch asks for everything before it asks again, so making room would lose what is needed next."""
    detections = best_detections(make_answer(), OPTIONS)
    size = sum(t.numel() * t.element_size() for t in detections)
    cache = TeacherCache(2 * size + 10)
    for key in "abc":
        assert cache.get(key, CPU) is None
        assert cache.put(key, detections) == (key != "c")
    assert len(cache) == 2
    assert cache.num_bytes == 2 * size
    found = [cache.get(key, CPU) for key in "abc"]
    assert found[2] is None
    assert all(torch.equal(a, b) for answer in found[:2] for a, b in zip(answer, detections, strict=True))
    assert cache.hit_rate == pytest.approx(2 / 6)
    assert not cache.put("a", detections), "it is there already"
    detections.masks.zero_()
    assert cache.get("a", CPU).masks.any(), "a copy is kept"
    with pytest.raises(ValueError, match="positive number of bytes, got 0"):
        TeacherCache(0)


def test_a_pair_of_matches_is_complete():
    """Every kept detection gets a query, and no query two."""
    detections = best_detections(make_answer(), OPTIONS)
    matches: Matches = match_detections(make_answer(seed=7), detections, BinaryHungarianMatcherV2(), 5.0)
    pairs = set(zip(matches.prompt.tolist(), matches.target.tolist(), strict=True))
    assert pairs == {tuple(index) for index in detections.kept.nonzero().tolist()}
    assert len(set(zip(matches.prompt.tolist(), matches.query.tolist(), strict=True))) == len(matches)
