"""The tracker's losses: what they are on hand-made answers, and where gradients go."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sam3_train.losses import dice_loss, sigmoid_focal_loss
from sam3_train.tracking_losses import TrackingAnswer, TrackingLossWeights, tracking_losses


def make_answer(num_objects: int = 2, num_masks: int = 3, seed: int = 0) -> TrackingAnswer:
    generator = torch.Generator().manual_seed(seed)
    target = (torch.rand(num_objects, 8, 8, generator=generator) > 0.6).float()
    return TrackingAnswer(
        torch.randn(num_objects, num_masks, 8, 8, generator=generator).requires_grad_(),
        torch.rand(num_objects, num_masks, generator=generator).requires_grad_(),
        torch.randn(num_objects, 1, generator=generator).requires_grad_(),
        target,
        torch.ones(num_objects, dtype=torch.bool),
    )


def test_values_of_one_candidate() -> None:
    answer = make_answer(num_masks=1)
    losses = tracking_losses([answer])
    logits = answer.mask_logits[:, 0]
    focal, dice = sigmoid_focal_loss(logits, answer.target).mean(), dice_loss(logits, answer.target).mean()
    found, wanted = logits > 0, answer.target > 0.5
    actual = (found & wanted).sum((1, 2)) / (found | wanted).sum((1, 2))
    iou = (answer.ious[:, 0] - actual).abs().mean()
    score = torch.nn.functional.softplus(-answer.object_score_logits).mean()
    torch.testing.assert_close(losses["loss"], 20 * focal + dice + iou + score)
    torch.testing.assert_close(losses["iou"], iou)


def test_cross_entropy_treats_both_sides_of_a_doubtful_pixel_alike() -> None:
    """With SAM 2's focal loss a pixel that is as often in as out is left out; with alpha 0.5 and gamma 0 it is not."""
    answer = make_answer(num_objects=1, num_masks=1)
    half = torch.zeros(1, 8, 8)
    half[:, ::2] = 1.0
    doubtful = dataclasses.replace(answer, mask_logits=torch.zeros(1, 1, 8, 8, requires_grad=True), target=half)
    even = TrackingLossWeights(focal=2.0, dice=0.0, focal_alpha=0.5, focal_gamma=0.0)
    for weights, is_even in ((even, True), (TrackingLossWeights(dice=0.0), False)):
        (gradient,) = torch.autograd.grad(tracking_losses([doubtful], weights)["loss"], doubtful.mask_logits)
        pull = float(gradient.sum())
        assert abs(pull) < 1e-6 if is_even else pull > 0.1, "a positive pull makes the mask smaller"
    terms = tracking_losses([answer], even)
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(answer.mask_logits[:, 0], answer.target)
    torch.testing.assert_close(2.0 * terms["focal"], wanted)
    with pytest.raises(ValueError, match="focal_alpha must lie in 0"):
        TrackingLossWeights(focal_alpha=1.5)


def test_only_the_best_candidate_gets_a_mask_gradient() -> None:
    answer = make_answer()
    with torch.no_grad():  # candidate 1 of object 0 and 2 of object 1 are nearly right
        answer.mask_logits[0, 1] = 8 * answer.target[0] - 4
        answer.mask_logits[1, 2] = 8 * answer.target[1] - 4
    tracking_losses([answer])["loss"].backward()
    moved = answer.mask_logits.grad.abs().amax((2, 3)) > 0
    assert moved.tolist() == [[False, True, False], [False, False, True]]
    assert (answer.ious.grad != 0).all(), "every candidate's IoU is judged"


def test_other_candidates_get_their_share() -> None:
    answer = make_answer(num_objects=1)
    focal = sigmoid_focal_loss(answer.mask_logits[0], answer.target.expand(3, -1, -1))
    dice = dice_loss(answer.mask_logits[0], answer.target.expand(3, -1, -1))
    best = int((20 * focal + dice).argmin())
    weight = torch.full((3,), 0.25)
    weight[best] = 1.0
    losses = tracking_losses([answer], TrackingLossWeights(others=0.25))
    torch.testing.assert_close(losses["dice"], (dice * weight).sum() / weight.sum())


def test_absent_object_teaches_only_the_object_score() -> None:
    answer = dataclasses.replace(make_answer(), present=torch.tensor([True, False]))
    tracking_losses([answer])["loss"].backward()
    assert answer.mask_logits.grad[1].abs().max() == 0 and answer.ious.grad[1].abs().max() == 0
    assert answer.object_score_logits.grad[0] < 0 < answer.object_score_logits.grad[1]


def test_mask_terms_are_divided_by_all_objects() -> None:
    answer = make_answer()
    first = TrackingAnswer(*(value[:1] for value in vars(answer).values()))
    half = tracking_losses([dataclasses.replace(answer, present=torch.tensor([True, False]))])
    torch.testing.assert_close(half["dice"], tracking_losses([first])["dice"] / 2)


def test_mean_over_answers_does_not_depend_on_their_number() -> None:
    answers = [make_answer(seed=seed) for seed in range(3)]
    once, twice = tracking_losses(answers), tracking_losses(answers * 2)
    for name, value in once.items():
        torch.testing.assert_close(value, twice[name])


def test_answers_on_a_frame_add_up() -> None:
    """A tracked frame counts alike in a clip without corrections and in one whose first frame has seven of them."""
    first, tracked = make_answer(seed=0), make_answer(seed=1)
    alone = tracking_losses([first, tracked], num_frames=2)
    corrected = tracking_losses([*[first] * 8, tracked], num_frames=2)
    seven = tracking_losses([first] * 7, num_frames=2)
    for name, value in alone.items():
        torch.testing.assert_close(corrected[name], value + seven[name])


def test_bad_arguments() -> None:
    answer = make_answer()
    with pytest.raises(ValueError, match="no loss"):
        tracking_losses([])
    with pytest.raises(ValueError, match=r"ious has shape \(2, 2\)"):
        tracking_losses([dataclasses.replace(answer, ious=answer.ious[:, :2])])
    with pytest.raises(ValueError, match="weight dice must be at least 0"):
        TrackingLossWeights(dice=-1.0)
