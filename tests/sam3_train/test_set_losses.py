"""The detector's losses."""

import pytest
import torch

from sam3.model.matcher import BinaryHungarianMatcherV2, SetTargets
from sam3_train.set_losses import SetLossWeights, presence_loss, set_losses

MATCHER = BinaryHungarianMatcherV2()


def perfect(present=True):
    """Two prompts with one object each (or none), found by query 1 exactly."""
    boxes = torch.full((2, 3, 4), 0.9)
    wanted = torch.tensor([[[0.3, 0.4, 0.2, 0.2]], [[0.6, 0.5, 0.3, 0.1]]])
    boxes[:, 1] = wanted[:, 0]
    masks = torch.zeros(2, 1, 8, 8)
    masks[0, :, 2:5, 1:4] = 1
    masks[1, :, 3:6, 3:7] = 1
    logits = torch.full((2, 3, 1), -20.0)
    logits[:, 1] = 20.0
    predicted = torch.full((2, 3, 8, 8), -20.0)
    predicted[:, 1] = masks[:, 0] * 40 - 20
    outputs = {
        "pred_logits": logits,
        "pred_boxes": boxes,
        "presence_logit_dec": torch.full((2, 1), 20.0 if present else -20.0),
        "pred_masks": predicted,
        "semantic_seg": (masks.amax(1, keepdim=True) if present else torch.zeros(2, 1, 8, 8)) * 40 - 20,
    }
    return outputs, SetTargets(wanted, torch.full((2, 1), present)), masks


def test_a_perfect_answer_costs_nothing():
    outputs, targets, masks = perfect()
    terms = set_losses(outputs, targets, masks, MATCHER)
    assert {name: round(float(value), 4) for name, value in terms.items()} == dict.fromkeys(terms, 0.0)
    assert {"loss", "score", "box", "giou", "presence", "mask_focal", "mask_dice", "semantic"} == set(terms)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("score", lambda out: out["pred_logits"][0, 1].fill_(-20.0)),
        ("score", lambda out: out["pred_logits"][0, 2].fill_(20.0)),
        ("box", lambda out: out["pred_boxes"][0, 1, 0].add_(0.15)),
        ("giou", lambda out: out["pred_boxes"][0, 1, 2].mul_(2)),
        ("mask_focal", lambda out: out["pred_masks"][0, 1].mul_(-1)),
        ("mask_dice", lambda out: out["pred_masks"][0, 1].fill_(-20.0)),
        ("presence", lambda out: out["presence_logit_dec"].mul_(-1)),
        ("semantic", lambda out: out["semantic_seg"].mul_(-1)),
    ],
)
def test_each_mistake_is_seen_by_its_term(name, spoil):
    outputs, targets, masks = perfect()
    spoil(outputs)
    terms = set_losses(outputs, targets, masks, MATCHER)
    assert terms[name] > 0.05
    assert terms["loss"] > 0.05


def test_an_unanswered_prompt_teaches_presence_and_nothing_about_queries():
    outputs, targets, masks = perfect(present=False)
    outputs["pred_logits"].fill_(3.0)
    right = set_losses(outputs, targets, masks, MATCHER)
    assert float(right["score"]) == float(right["box"]) == float(right["mask_dice"]) == 0.0
    assert right["loss"] < 1e-3
    outputs["presence_logit_dec"].fill_(20.0)
    assert presence_loss(outputs["presence_logit_dec"], targets) > 19


def test_inner_layers_and_the_one_to_many_half_are_judged_too():
    outputs, targets, masks = perfect()
    inner = {name: outputs[name].clone() for name in ("pred_logits", "pred_boxes", "presence_logit_dec")}
    inner["pred_boxes"][:, 1, 0] += 0.2
    outputs["aux_outputs"] = [inner]
    with_inner = set_losses(outputs, targets, masks, MATCHER)
    assert with_inner["box"] > 0.1
    many = {f"{name}_o2m": outputs[name].clone() for name in ("pred_logits", "pred_boxes", "pred_masks")}
    outputs.update(many)
    weights = SetLossWeights(one_to_many=0.5)
    # Query 1 is right, the other two of the second half should have claimed the object as well.
    assert set_losses(outputs, targets, masks, MATCHER, weights, 3)["loss"] > with_inner["loss"] + 1.0


def test_gradients_reach_every_head():
    outputs, targets, masks = perfect()
    leaves = {name: (value * 0.05).requires_grad_() for name, value in outputs.items() if name != "pred_boxes"}
    leaves["pred_boxes"] = (outputs["pred_boxes"] * 0.8).requires_grad_()
    set_losses(leaves, targets, masks, MATCHER)["loss"].backward()
    assert all(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in leaves.values())


def test_an_object_that_is_not_asked_for_gives_boxes_and_masks_and_a_low_score():
    outputs, targets, masks = perfect()
    asked = SetTargets(targets.boxes_btx, targets.valid_bt, torch.tensor([[True], [False]]))
    outputs["presence_logit_dec"][1] = -20.0
    outputs["semantic_seg"][1] = -20.0
    terms = set_losses(outputs, asked, masks, MATCHER)
    assert terms["loss"] < 1e-4, "prompt 1 is answered by nothing, so its scores do not count"
    both = SetTargets(
        targets.boxes_btx.repeat(1, 2, 1) + torch.tensor([[[0.0]], [[0.2]]]).transpose(0, 1)[..., :1],
        torch.ones(2, 2, dtype=torch.bool),
        torch.tensor([[True, False]] * 2),
    )
    outputs, _, _ = perfect()
    outputs["pred_boxes"][:, 2] = both.boxes_btx[:, 1]
    assert set_losses(outputs, both, None, MATCHER)["loss"] < 1e-4
    outputs["pred_logits"][:, 2] = 20.0
    assert set_losses(outputs, both, None, MATCHER)["score"] > 1.0
    outputs["pred_boxes"][:, 2, 0] += 0.3
    assert set_losses(outputs, both, None, MATCHER)["box"] > 0.1


def test_cross_entropy_is_focal_loss_without_its_discount():
    outputs, targets, masks = perfect()
    outputs["pred_logits"][:] = 0.0
    weights = SetLossWeights(score_alpha=0.5, score_gamma=0.0)
    score = set_losses(outputs, targets, masks, MATCHER, weights)["score"]
    assert float(score) == pytest.approx(0.5 * 3 * 0.6931, abs=1e-3)
