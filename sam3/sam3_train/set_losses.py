"""Set losses of an open-vocabulary detector: objects are matched to queries, then each part is judged.

The usual ones (DETR, Carion et al., 2020; SAM 3's recipe): focal loss on the class scores of all queries, L1 and GIoU
on matched boxes, focal and Dice on matched masks, binary cross entropy on presence. Scores, boxes and masks are judged
only for prompts that something in the image answers; whether anything does is the presence token's question alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sam3.model.matcher import BinaryHungarianMatcherV2, Matches, SetTargets, pairwise_giou
from sam3.model.scoring import ONE_TO_MANY
from sam3_train.losses import dice_loss, sigmoid_focal_loss


@dataclass(frozen=True)
class SetLossWeights:
    """Weights of the terms; defaults as SAM 3's cost weights where it has one."""

    score: float = 2.0
    box: float = 5.0
    giou: float = 2.0
    mask_focal: float = 20.0
    mask_dice: float = 2.0
    presence: float = 1.0
    semantic: float = 2.0
    one_to_many: float = 1.0
    """Factor on all terms of the one-to-many branch."""
    score_alpha: float = 0.25
    """Focal weight of queries that have an object; 1 - alpha of those that have none."""
    score_gamma: float = 2.0
    """How strongly easy scores are discounted; 0 is cross entropy, whose scores are probabilities."""


def set_losses(
    outputs: Mapping[str, Any],
    targets: SetTargets,
    masks_bthw: Tensor | None,
    matcher: BinaryHungarianMatcherV2,
    weights: SetLossWeights | None = None,
    one_to_many_repeats: int = 4,
) -> dict[str, Tensor]:
    """All terms for what `Sam3Image.forward_grounding` returns in training.

    Args:
        outputs: ``pred_logits`` (B, Q, 1), ``pred_boxes`` (B, Q, 4), ``presence_logit_dec`` (B, 1); if there are any,
            ``pred_masks`` (B, Q, h, w), ``semantic_seg`` (B, 1, h, w), ``aux_outputs`` (a list of such dicts for the
            inner layers) and the same names with ``_o2m``.
        targets: Objects per prompt.
        masks_bthw: Their masks in 0..1 at the masks' resolution, (B, T, h, w); None if there are none to learn from.
        matcher: Assigns objects to queries, for each layer by itself.
        weights: Weights of the terms in ``loss``.
        one_to_many_repeats: Queries per object in the one-to-many branch.

    Returns:
        ``loss``, and the unweighted terms ``score``, ``box``, ``giou``, ``presence`` (sums over layers) and, with
        masks, ``mask_focal``, ``mask_dice`` and ``semantic``.
    """
    weights = weights or SetLossWeights()
    terms: dict[str, Tensor] = {}
    loss = outputs["pred_logits"].new_zeros((), dtype=torch.float32)
    for layer in (outputs, *outputs.get("aux_outputs", ())):
        for suffix, repeats, factor in (("", 1, 1.0), (ONE_TO_MANY, one_to_many_repeats, weights.one_to_many)):
            if layer.get("pred_logits" + suffix) is None:
                continue
            judged = _judge(layer, suffix, targets, masks_bthw, matcher, weights, repeats)
            if not suffix and layer.get("presence_logit_dec") is not None:
                judged["presence"] = presence_loss(layer["presence_logit_dec"], targets)
            loss = loss + factor * sum(getattr(weights, name) * value for name, value in judged.items())
            if not suffix:
                _add(terms, judged)
    if masks_bthw is not None and outputs.get("semantic_seg") is not None:
        terms["semantic"] = semantic_loss(outputs["semantic_seg"], targets, masks_bthw)
        loss = loss + weights.semantic * terms["semantic"]
    return {"loss": loss, **{name: value.detach() for name, value in terms.items()}}


def _judge(
    layer: Mapping[str, Any],
    suffix: str,
    targets: SetTargets,
    masks_bthw: Tensor | None,
    matcher: BinaryHungarianMatcherV2,
    weights: SetLossWeights,
    repeats: int,
) -> dict[str, Tensor]:
    logits_bq = layer["pred_logits" + suffix][..., 0]
    boxes_bqx = layer["pred_boxes" + suffix]
    matches = matcher(logits_bq, boxes_bqx, targets, repeats)
    judged = {"score": score_loss(logits_bq, matches, targets, weights.score_alpha, weights.score_gamma)}
    judged["box"], judged["giou"] = box_losses(boxes_bqx, matches, targets)
    masks = layer.get("pred_masks" + suffix)
    if masks_bthw is not None and masks is not None:
        judged["mask_focal"], judged["mask_dice"] = mask_losses(masks, matches, masks_bthw)
    return judged


def score_loss(logits_bq: Tensor, matches: Matches, targets: SetTargets, alpha: float = 0.25, gamma: float = 2.0):
    """Focal loss of the class scores, summed over the queries of answered prompts, per matched pair.

    A query whose object is not asked for should score low, as one without an object. A prompt that nothing answers says
    nothing about queries: its score is presence times class score.
    """
    wanted = torch.zeros_like(logits_bq, dtype=torch.float32)
    wanted[matches.prompt, matches.query] = targets.answers_bt[matches.prompt, matches.target].float()
    # One pixel per "mask" makes the shared focal loss an elementwise one.
    focal_bq = sigmoid_focal_loss(logits_bq.reshape(-1, 1, 1), wanted.view(-1, 1, 1), alpha, gamma).view_as(wanted)
    answered_b1 = (targets.num_objects_b > 0).float()[:, None]
    return (focal_bq * answered_b1).sum() / max(len(matches), 1)


def box_losses(boxes_bqx: Tensor, matches: Matches, targets: SetTargets) -> tuple[Tensor, Tensor]:
    """Mean L1 distance of normalised (cx, cy, w, h) and mean of 1 - GIoU over matched pairs; 0 without pairs."""
    predicted = boxes_bqx[matches.prompt, matches.query].float()
    wanted = targets.boxes_btx[matches.prompt, matches.target].float()
    count = max(len(matches), 1)
    giou = pairwise_giou(predicted[:, None], wanted[:, None])[:, 0, 0]
    return F.l1_loss(predicted, wanted, reduction="sum") / count, (1.0 - giou).sum() / count


def mask_losses(masks_bqhw: Tensor, matches: Matches, masks_bthw: Tensor) -> tuple[Tensor, Tensor]:
    """Mean focal and Dice loss over matched pairs; 0 without pairs."""
    logits = masks_bqhw[matches.prompt, matches.query]
    wanted = masks_bthw[matches.prompt, matches.target]
    count = max(len(matches), 1)
    return sigmoid_focal_loss(logits, wanted).sum() / count, dice_loss(logits, wanted).sum() / count


def presence_loss(presence_b1: Tensor, targets: SetTargets) -> Tensor:
    """Binary cross entropy: does anything in the image answer the prompt?"""
    present_b = (targets.num_objects_b > 0).float()
    return F.binary_cross_entropy_with_logits(presence_b1.float().reshape(-1), present_b)


def semantic_loss(logits_b1hw: Tensor, targets: SetTargets, masks_bthw: Tensor) -> Tensor:
    """Cross entropy and Dice of the union of all objects that answer a prompt, mean over prompts."""
    valid = targets.answers_bt[..., None, None]
    union_bhw = torch.where(valid, masks_bthw.float(), torch.zeros_like(masks_bthw, dtype=torch.float32)).amax(dim=1)
    logits_bhw = logits_b1hw[:, 0].float()
    entropy = F.binary_cross_entropy_with_logits(logits_bhw, union_bhw)
    return entropy + dice_loss(logits_bhw, union_bhw).mean()


def _add(terms: dict[str, Tensor], judged: Mapping[str, Tensor]) -> None:
    for name, value in judged.items():
        terms[name] = terms[name] + value if name in terms else value
