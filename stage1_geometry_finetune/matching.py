"""What is distilled of the detector: the teacher's best detections, and the student's queries that stand for them.

The teacher answers each prompt with 200 queries, nearly all of which mean nothing. Kept are its top detections above a
score, at least the best one. The student's queries may say the same in another order (D-84), so each kept detection is
given the query that costs least in class, box and mask together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sam3.model.matcher import BinaryHungarianMatcherV2, Matches, SetTargets
from stage1_geometry_finetune.frozen_heads import DetectorAnswer

LEVELS = 256
"""Steps in which probabilities of the teacher's masks are kept; more than half is `LEVELS` / 2 or more."""
COST_SIDE = 72
"""Masks are compared at this resolution at most when queries are matched."""
_LARGEST = 100.0
"""Stands for infinity among logits, normalised boxes and costs."""


@dataclass(frozen=True)
class MatchOptions:
    """Which detections count, and what a wrong mask costs."""

    max_detections: int = 8
    """Kept per prompt at most."""
    min_score: float = 0.3
    """Kept only from this score on, the best one excepted."""
    mask_cost: float = 5.0
    """Weight of the Dice cost of masks, beside SAM 3's costs: class 2, box 5, GIoU 2."""


class TeacherDetections(NamedTuple):
    """What is kept of the teacher's answer to K prompts: T detections at most, the best first."""

    masks: Tensor
    """Probabilities in `LEVELS` steps, uint8 (K, T, M, M); see `unpack_masks`."""
    kept: Tensor
    """bool (K, T): False where a prompt has fewer."""
    boxes: Tensor
    """Normalised (cx, cy, w, h), (K, T, 4)."""
    logits: Tensor
    """Class logits of all Q queries, highest first: the first are those of the kept detections. (K, Q)."""
    presence: Tensor
    """Presence logits, (K,)."""

    def select(self, objects: Tensor) -> TeacherDetections:
        """Those of some prompts."""
        return TeacherDetections(*(field[objects] for field in self))


def pack_masks(mask_logits: Tensor, inside: Tensor | None = None) -> Tensor:
    """Probabilities of masks in `LEVELS` steps, a byte each.

    Every target passes through this, whether it comes from the cache or not, so that both make the same loss.

    Args:
        mask_logits: (..., M, M).
        inside: bool, broadcasts to them: False in padding, where nothing is; None: no padding.
    """
    levels = (mask_logits.float().sigmoid() * LEVELS).floor().clamp(max=LEVELS - 1).to(torch.uint8)
    return levels if inside is None else levels * inside


def unpack_masks(levels: Tensor) -> Tensor:
    """Probabilities, float32: off by 1 / 512 at most."""
    return (levels.float() + 0.5) / LEVELS


def best_detections(answer: DetectorAnswer, options: MatchOptions, inside: Tensor | None = None) -> TeacherDetections:
    """Keep the top detections of each prompt.

    Args:
        answer: The teacher's, for K prompts.
        options: How many, and from which score on.
        inside: False in padding, (K, M, M); None: no padding.
    """
    logits, order = answer.logits.float().sort(dim=1, descending=True, stable=True)
    scores = answer.scores.gather(1, order)
    kept = scores[:, : options.max_detections] >= options.min_score
    kept[:, 0] = True
    # As few slots as the prompt with the most detections needs.
    slots = int(kept.sum(1).max()) if len(kept) else 1
    kept, top = kept[:, :slots], order[:, :slots]
    rows = torch.arange(len(top), device=top.device)[:, None]
    masks = pack_masks(answer.mask_logits[rows, top], None if inside is None else inside[:, None])
    masks, boxes = masks * kept[..., None, None], answer.boxes[rows, top].float() * kept[..., None]
    return TeacherDetections(masks, kept, boxes, logits, answer.presence.float())


@torch.no_grad()
def match_detections(
    answer: DetectorAnswer, detections: TeacherDetections, matcher: BinaryHungarianMatcherV2, mask_cost: float
) -> Matches:
    """Give each kept detection a query of the student.

    Args:
        answer: The student's, for K prompts.
        detections: The teacher's.
        matcher: Assigns; brings the costs of class and box.
        mask_cost: Weight of the Dice cost of masks.

    Returns:
        As many pairs as detections are kept; ``target`` counts the detections of a prompt.
    """
    student = _coarse(answer.mask_logits.detach().float().sigmoid())
    costs = mask_cost * dice_costs(student, _coarse(unpack_masks(detections.masks)))
    # A student (or a teacher in the loop) may overflow for a step. The loss is then not finite, and the loop skips the
    # step and counts it; an assignment that does not exist would end the run instead.
    logits, boxes, wanted, costs = (
        torch.nan_to_num(values.detach().float(), nan=0.0, posinf=_LARGEST, neginf=-_LARGEST)
        for values in (answer.logits, answer.boxes, detections.boxes, costs)
    )
    return matcher(logits, boxes, SetTargets(wanted, detections.kept), more_costs_bqt=costs)


def dice_costs(masks_bqhw: Tensor, targets_bthw: Tensor) -> Tensor:
    """One minus the soft Dice of each mask with each target of the same prompt, (B, Q, T)."""
    masks, targets = masks_bqhw.flatten(2), targets_bthw.flatten(2)
    overlap = masks @ targets.transpose(1, 2)
    total = masks.sum(2)[:, :, None] + targets.sum(2)[:, None]
    return 1 - (2 * overlap + 1) / (total + 1)


def _coarse(masks_bqhw: Tensor) -> Tensor:
    side = masks_bqhw.shape[-1]
    return F.avg_pool2d(masks_bqhw, max(1, side // COST_SIDE)) if masks_bqhw.shape[1] else masks_bqhw
