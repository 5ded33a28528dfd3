"""The two ways from features to masks that the student's features are judged by.

Each route answers the same prompts on teacher and student features with the same frozen parts. What the teacher says
becomes targets, image by image, so that they do not depend on the batch an image is in; what the student says is
compared with them, a few objects at a time, because the 200 masks of a single object take 66 MB at full size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sam3.model.matcher import BinaryHungarianMatcherV2, pairwise_giou
from sam3.sam.heads import SamFeatures
from sam3_train.metrics import mask_iou
from stage1_geometry_finetune.frozen_heads import DetectorAnswer, DetectorMaps, FrozenHeads
from stage1_geometry_finetune.losses import box_term, mask_terms, presence_term, score_term
from stage1_geometry_finetune.matching import (
    LEVELS,
    MatchOptions,
    TeacherDetections,
    best_detections,
    match_detections,
    pack_masks,
    unpack_masks,
)
from stage1_geometry_finetune.prompt_formats import layouts
from stage1_geometry_finetune.prompts import PromptBatch


class SamTargets(NamedTuple):
    """What is kept of the teacher's SAM heads on K prompts: T candidates at most."""

    masks: Tensor
    """Probabilities in `LEVELS` steps, uint8 (K, T, M, M)."""
    kept: Tensor
    """bool (K, T): the three candidates of a single click, the one mask of any other prompt."""
    candidates: Tensor
    """Which of the four masks each is, int64 (K, T)."""
    ious: Tensor
    """Predicted IoU of each, (K, T)."""
    presence: Tensor
    """Logit of "the object is in the image", (K,)."""

    def select(self, objects: Tensor) -> SamTargets:
        """Those of some prompts."""
        return SamTargets(*(values[objects] for values in self))


@dataclass
class Judged:
    """How a student's answers to K prompts compare with the teacher's."""

    terms: dict[str, Tensor]
    """Unweighted terms, and the IoU of the compared masks (``mask_iou``), means over objects as in `losses`."""
    student_masks: Tensor
    """What either says about the very object that was prompted, bool (K, M, M)."""
    teacher_masks: Tensor
    """The teacher's."""

    @classmethod
    def nothing(cls, prompts: PromptBatch) -> Judged:
        """To be added to."""
        return cls({}, torch.zeros_like(prompts.masks), torch.zeros_like(prompts.masks))

    def add(self, terms: dict[str, Tensor], objects: Tensor, student_masks: Tensor, teacher_masks: Tensor) -> None:
        """What a pass over some of the objects gave."""
        for name, value in terms.items():
            self.terms[name] = self.terms[name] + value if name in self.terms else value
        self.student_masks[objects], self.teacher_masks[objects] = student_masks, teacher_masks


class Route(Protocol):
    """One way from features to masks. Targets are NamedTuples of tensors with K first, then T slots."""

    name: ClassVar[str]

    def maps(self, features_bchw: Tensor, of_teacher: bool) -> Any:
        """The neck's maps of B images."""

    def targets(self, maps: Any, prompts: PromptBatch, inside_kmm: Tensor | None) -> Any:
        """What the teacher says; without gradients."""

    def judge(
        self, maps: Any, prompts: PromptBatch, targets: Any, weights_k: Tensor, inside_kmm: Tensor | None
    ) -> Judged:
        """What the student says, compared."""

    def masks(self, maps: Any, prompts: PromptBatch, of_teacher: bool) -> Tensor:
        """The mask that a user would take for the prompted object, bool (K, M, M)."""


@dataclass
class DetectorRoute:
    """Geometry encoder, fusion, decoder and mask head, asked with the "visual" token: one query set per object."""

    name: ClassVar[str] = "detector"
    teacher: FrozenHeads
    student: FrozenHeads
    options: MatchOptions = field(default_factory=MatchOptions)
    objects_per_pass: int = 4
    matcher: BinaryHungarianMatcherV2 = field(default_factory=BinaryHungarianMatcherV2)

    def maps(self, features_bchw: Tensor, of_teacher: bool) -> DetectorMaps:
        """The detector's neck."""
        return (self.teacher if of_teacher else self.student).detector_maps(features_bchw)

    @torch.no_grad()
    def targets(self, maps: DetectorMaps, prompts: PromptBatch, inside_kmm: Tensor | None) -> TeacherDetections:
        """The teacher's best detections."""
        parts = []
        for objects in _passes(prompts, self.objects_per_pass):
            answer = self.teacher.detect(maps, prompts.select(objects))
            parts.append(best_detections(answer, self.options, None if inside_kmm is None else inside_kmm[objects]))
        return join_targets(parts)

    def judge(
        self,
        maps: DetectorMaps,
        prompts: PromptBatch,
        targets: TeacherDetections,
        weights_k: Tensor,
        inside_kmm: Tensor | None,
    ) -> Judged:
        """The student's matched queries beside the teacher's detections."""
        judged = Judged.nothing(prompts)
        for objects in _passes(prompts, self.objects_per_pass):
            asked, wanted, weights = prompts.select(objects), targets.select(objects), weights_k[objects]
            answer = self.student.detect(maps, asked)
            matches = match_detections(answer, wanted, self.matcher, self.options.mask_cost)
            pair, target, query = matches.prompt, matches.target, matches.query
            logits = answer.mask_logits[pair, query]
            pair_weights = (weights / wanted.kept.sum(1))[pair]
            levels = wanted.masks[pair, target]
            inside = None if inside_kmm is None else inside_kmm[objects][pair]
            terms = _mask_terms(logits, levels, pair_weights, inside) | {
                "score": score_term(answer.logits, wanted, matches, weights),
                "presence": presence_term(answer.presence, wanted.presence, weights),
                "box": box_term(answer.boxes[pair, query], wanted.boxes[pair, target], pair_weights),
            }
            teacher_masks = wanted.masks >= LEVELS // 2
            overlap = mask_iou(teacher_masks, asked.masks[:, None]).masked_fill(~wanted.kept, -1.0)
            chosen = overlap.argmax(1)
            rows = torch.arange(len(chosen), device=chosen.device)
            query_of = torch.zeros_like(wanted.kept, dtype=torch.long).index_put((pair, target), query)
            student_masks = answer.mask_logits.detach()[rows, query_of[rows, chosen]] > 0
            judged.add(terms, objects, student_masks, teacher_masks[rows, chosen])
        return judged

    @torch.no_grad()
    def masks(self, maps: DetectorMaps, prompts: PromptBatch, of_teacher: bool) -> Tensor:
        """Of the detections, the likely one that lies where the prompt does."""
        heads, found = self.teacher if of_teacher else self.student, torch.zeros_like(prompts.masks)
        for objects in _passes(prompts, self.objects_per_pass):
            asked = prompts.select(objects)
            answer = heads.detect(maps, asked)
            rows = torch.arange(len(objects), device=objects.device)
            found[objects] = answer.mask_logits[rows, prompted_query(answer, asked)] > 0
        return found


@dataclass
class SamRoute:
    """Prompt encoder and mask decoder: what an interactive user runs."""

    name: ClassVar[str] = "sam"
    teacher: FrozenHeads
    student: FrozenHeads
    objects_per_pass: int = 16

    def maps(self, features_bchw: Tensor, of_teacher: bool) -> SamFeatures:
        """The SAM heads' neck."""
        return (self.teacher if of_teacher else self.student).sam_maps(features_bchw)

    @torch.no_grad()
    def targets(self, maps: SamFeatures, prompts: PromptBatch, inside_kmm: Tensor | None) -> SamTargets:
        """The teacher's candidates that deployment would show."""
        is_ambiguous = one_click(prompts)
        kept = torch.stack([torch.ones_like(is_ambiguous), is_ambiguous, is_ambiguous], dim=1)
        candidates = torch.arange(3, device=kept.device) + is_ambiguous[:, None].long()
        candidates = candidates * kept
        side, num = self.teacher.mask_side, len(kept)
        masks = prompts.masks.new_zeros((num, 3, side, side), dtype=torch.uint8)
        ious, presence = masks.new_zeros((num, 3), dtype=torch.float32), masks.new_zeros(num, dtype=torch.float32)
        for objects in _passes_by_layout(prompts, self.objects_per_pass):
            output = self.teacher.segment(maps, prompts.select(objects))
            rows = torch.arange(len(objects), device=objects.device)[:, None]
            chosen = candidates[objects]
            inside = None if inside_kmm is None else inside_kmm[objects][:, None]
            masks[objects] = pack_masks(output.mask_logits[rows, chosen], inside) * kept[objects][..., None, None]
            ious[objects] = output.ious[rows, chosen].float() * kept[objects]
            presence[objects] = output.object_score_logits[:, 0].float()
        slots = 3 if bool(is_ambiguous.any()) else 1
        return SamTargets(masks[:, :slots], kept[:, :slots], candidates[:, :slots], ious[:, :slots], presence)

    def judge(
        self,
        maps: SamFeatures,
        prompts: PromptBatch,
        targets: SamTargets,
        weights_k: Tensor,
        inside_kmm: Tensor | None,
    ) -> Judged:
        """The student's candidates beside the teacher's; each mask token is its own, so nothing is matched."""
        judged = Judged.nothing(prompts)
        for objects in _passes_by_layout(prompts, self.objects_per_pass):
            wanted, weights = targets.select(objects), weights_k[objects]
            output = self.student.segment(maps, prompts.select(objects))
            pair, slot = wanted.kept.nonzero(as_tuple=True)
            candidate = wanted.candidates[pair, slot]
            pair_weights = (weights / wanted.kept.sum(1))[pair]
            inside = None if inside_kmm is None else inside_kmm[objects][pair]
            error = (output.ious[pair, candidate].float() - wanted.ious[pair, slot]).square()
            logits, levels = output.mask_logits[pair, candidate], wanted.masks[pair, slot]
            terms = _mask_terms(logits, levels, pair_weights, inside) | {
                "score": (error * pair_weights).sum(),
                "presence": presence_term(output.object_score_logits[:, 0], wanted.presence, weights),
            }
            rows = torch.arange(len(objects), device=objects.device)
            best = wanted.ious.masked_fill(~wanted.kept, -1.0).argmax(1)
            student_masks = output.mask_logits.detach()[rows, wanted.candidates[rows, best]] > 0
            judged.add(terms, objects, student_masks, wanted.masks[rows, best] >= LEVELS // 2)
        return judged

    @torch.no_grad()
    def masks(self, maps: SamFeatures, prompts: PromptBatch, of_teacher: bool) -> Tensor:
        """The candidate with the highest predicted IoU after a click, the single mask after any other prompt."""
        heads, found = self.teacher if of_teacher else self.student, torch.zeros_like(prompts.masks)
        for objects in _passes_by_layout(prompts, self.objects_per_pass):
            asked = prompts.select(objects)
            output = heads.segment(maps, asked)
            shown = heads.model.heads.select(output, multimask_output=bool(one_click(asked).all()))
            rows = torch.arange(len(objects), device=objects.device)
            found[objects] = shown.mask_logits[rows, shown.ious.argmax(1)] > 0
        return found


def one_click(prompts: PromptBatch) -> Tensor:
    """Which prompts are a single click, bool (K,): it may mean a part or the whole."""
    return (prompts.is_point.sum(1) == 1) & ~prompts.has_box


def prompted_query(answer: DetectorAnswer, prompts: PromptBatch) -> Tensor:
    """The query that stands for the very object that was pointed at, (K,): the detector finds all that are alike.

    Its score counts as much as how well its box agrees with the prompted one, and its mask with the clicks.
    """
    fit = answer.scores
    iou = pairwise_giou(answer.boxes.float(), prompts.boxes_cxcywh[:, None].float())[..., 0].clamp(min=0)
    fit = torch.where(prompts.has_box[:, None], fit * iou, fit)
    if prompts.points_xy.shape[1]:
        side = answer.mask_logits.shape[-1]
        x, y = (prompts.points_xy * side).long().clamp(0, side - 1).unbind(-1)
        at_clicks = answer.mask_logits.flatten(2).gather(2, (y * side + x)[:, None].expand(-1, fit.shape[1], -1)) > 0
        agrees = (at_clicks == (prompts.point_labels > 0)[:, None]) | ~prompts.is_point[:, None]
        fit = fit * agrees.all(2)
    return (fit + 1e-6 * answer.scores).argmax(1)


def join_targets(parts: list[Any]) -> Any:
    """Targets of several groups of prompts as those of all: slots are padded to the most that a prompt needs."""
    slots = max(part.kept.shape[1] for part in parts)
    padded = []
    for part in parts:
        own = part.kept.shape[1]
        # A field belongs to slots if it is as long there and is no field of queries.
        fields = {
            name: F.pad(values, (0, 0) * (values.ndim - 2) + (0, slots - own)) if name in _SLOT_FIELDS else values
            for name, values in part._asdict().items()
        }
        padded.append(type(part)(**fields))
    return type(parts[0])(*(torch.cat(values) for values in zip(*padded, strict=True)))


_SLOT_FIELDS = ("masks", "kept", "boxes", "candidates", "ious")


def _mask_terms(logits: Tensor, levels: Tensor, weights_m: Tensor, inside: Tensor | None) -> dict[str, Tensor]:
    entropy, dice = mask_terms(logits, unpack_masks(levels), weights_m, inside)
    found, wanted = logits.detach() > 0, levels >= LEVELS // 2
    if inside is not None:
        found = found & inside
    return {"mask_bce": entropy, "mask_dice": dice, "mask_iou": (mask_iou(found, wanted) * weights_m).sum()}


def _passes(prompts: PromptBatch, size: int) -> Iterator[Tensor]:
    if prompts.num_objects:
        yield from torch.arange(prompts.num_objects, device=prompts.has_box.device).split(size)


def _passes_by_layout(prompts: PromptBatch, size: int) -> Iterator[Tensor]:
    for objects in layouts(prompts):
        yield from objects.split(size)
