"""The rules that join a frame's detections with the tracked objects: pure functions of masks, scores and counts.

Behaviour of Meta's SAM 3 package 0.1.4, restated from its public behaviour; no code is shared. Two things are added:
objects that a user clicked are exempt from the probation of new objects, and histories are counters that end with the
probation, so that their size follows the number of living objects and not the length of the video.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sam3.model.video_config import VideoConfig

_ALWAYS_OCCLUDED = 100_000
"""Stands for the last occlusion of an object that goes on this very frame: later than any other."""
NEVER = -1


def mask_iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of every pair; 0 where both are empty.

    Args:
        first: bool, (N, h, w).
        second: bool, (M, h, w).

    Returns:
        float32, (N, M), on the CPU.
    """
    a, b = first.flatten(1).to(torch.float32), second.flatten(1).to(torch.float32)
    intersection = a @ b.T
    union = a.sum(dim=1)[:, None] + b.sum(dim=1) - intersection
    return (intersection / union.clamp(min=1)).cpu()


@dataclass(frozen=True)
class Association:
    """How the detections of a frame and the tracked objects belong together."""

    new_detections: list[int]
    """Detections that become objects, in their order."""
    matched: dict[int, list[int]]
    """Detection -> ids of all objects that it overlaps, in the objects' order; only detections with any."""
    unmatched_ids: list[int]
    """Objects with a mask that no detection confirms."""
    empty_ids: list[int]
    """Objects without a mask on this frame."""
    sure_detections: dict[int, int]
    """Object id -> the detection that is sure enough to renew it."""


def associate(
    det_masks: Tensor, det_scores: Sequence[float], trk_masks: Tensor, trk_ids: Sequence[int], config: VideoConfig
) -> Association:
    """Match detections and tracked objects by the overlap of their masks.

    Args:
        det_masks: bool, (N, h, w).
        det_scores: N probabilities.
        trk_masks: bool, (M, h, w).
        trk_ids: M object ids.
        config: Thresholds.
    """
    is_empty = (~trk_masks.flatten(1).any(dim=1)).tolist()
    empty_ids = [obj_id for obj_id, empty in zip(trk_ids, is_empty, strict=True) if empty]
    with_mask = [obj_id for obj_id, empty in zip(trk_ids, is_empty, strict=True) if not empty]
    if not trk_ids:
        return Association(list(range(len(det_scores))), {}, [], [], {})
    if not len(det_scores):
        return Association([], {}, with_mask, empty_ids, {})
    iou = mask_iou(det_masks, trk_masks)
    is_confirmed = dict(zip(trk_ids, (iou >= config.trk_assoc_iou_thresh).any(dim=0).tolist(), strict=True))
    new, matched, sure = [], {}, {}
    best_ious, best_tracks = iou.max(dim=1)
    for d, (score, row) in enumerate(zip(det_scores, (iou >= config.assoc_iou_thresh).tolist(), strict=True)):
        overlapped = [obj_id for obj_id, overlaps in zip(trk_ids, row, strict=True) if overlaps]
        if overlapped:
            matched[d] = overlapped
        elif score >= config.new_det_thresh:
            new.append(d)
            continue
        if score >= config.high_conf_thresh and best_ious[d] >= config.high_iou_thresh:
            sure[trk_ids[int(best_tracks[d])]] = d
    return Association(new, matched, [i for i in with_mask if not is_confirmed[i]], empty_ids, sure)


def limit_new_objects(
    new_detections: Sequence[int], det_scores: Sequence[float], num_tracked: int, config: VideoConfig
) -> list[int]:
    """Which of the new detections fit under the limit of objects: all in their order, or the best, best first."""
    room = max(0, config.max_num_objects - num_tracked)
    if len(new_detections) <= room:
        return list(new_detections)
    return sorted(new_detections, key=lambda d: -det_scores[d])[:room]


def detections_to_recondition(
    association: Association, trk_logits: Mapping[int, float], frame_idx: int, config: VideoConfig
) -> dict[int, int]:
    """Object id -> detection, for the objects that are renewed on this frame.

    Args:
        association: Of this frame.
        trk_logits: Object id -> the tracker's object score, a logit.
        frame_idx: This frame.
        config: Thresholds.
    """
    every = config.recondition_every_nth_frame
    if not every or frame_idx % every:
        return {}
    pairs = association.sure_detections.items()
    return {obj_id: d for obj_id, d in pairs if trk_logits[obj_id] > config.high_track_logit}


@dataclass
class Probation:
    """What is remembered of one object to decide whether it stays."""

    first_frame: int
    keep_alive: int
    num_unmatched: int = 0
    """Frames without confirmation, in all and not in a row."""
    is_from_user: bool = False
    """The user clicked it; it stays until the user removes it."""


@dataclass
class Hotstart:
    """The probation of new objects, and the keep-alive counts. Its size follows the number of living objects."""

    config: VideoConfig
    objects: dict[int, Probation] = field(default_factory=dict)
    pair_counts: dict[tuple[int, int], int] = field(default_factory=dict)
    """(Older object, younger object) -> how often both overlapped one detection, counted once for each detection."""

    def add(self, obj_ids: Iterable[int], frame_idx: int, is_from_user: bool = False) -> None:
        """Take in new objects; of one that is known, only that the user clicked it is noted."""
        for obj_id in obj_ids:
            known = self.objects.setdefault(obj_id, Probation(frame_idx, self.config.init_trk_keep_alive))
            known.is_from_user |= is_from_user

    def discard(self, obj_ids: Iterable[int]) -> None:
        """Forget objects that are gone."""
        gone = set(obj_ids)
        for obj_id in gone:
            self.objects.pop(obj_id, None)
        self.pair_counts = {pair: count for pair, count in self.pair_counts.items() if gone.isdisjoint(pair)}

    def update(self, association: Association, frame_idx: int, reverse: bool = False) -> tuple[set[int], set[int]]:
        """Count what happened on a frame.

        Args:
            association: Of this frame, with the objects that were tracked before it.
            frame_idx: This frame.
            reverse: Tracking goes towards smaller indices.

        Returns:
            Ids of objects that end on this frame, and of those that are hidden on it.
        """
        self._forget_finished(frame_idx, reverse)
        self._count_keep_alive(association)
        removed = set()
        for obj_id in association.unmatched_ids:
            known = self.objects[obj_id]
            if self._is_on_probation(obj_id, frame_idx, reverse):
                known.num_unmatched += 1
                if known.num_unmatched >= self.config.hotstart_unmatch_thresh:
                    removed.add(obj_id)
        for older, younger in self._shared_detections(association, reverse):
            if self._is_on_probation(younger, frame_idx, reverse):
                count = self.pair_counts[older, younger] = self.pair_counts.get((older, younger), 0) + 1
                if count >= self.config.hotstart_dup_thresh:
                    removed.add(younger)
        return removed, self._hidden() - removed

    def _is_on_probation(self, obj_id: int, frame_idx: int, reverse: bool) -> bool:
        known = self.objects[obj_id]
        age = known.first_frame - frame_idx if reverse else frame_idx - known.first_frame
        return age < self.config.hotstart_delay and not known.is_from_user

    def _shared_detections(self, association: Association, reverse: bool) -> list[tuple[int, int]]:
        """Pairs (older, younger) that overlapped one detection, once for each detection that they share."""
        pairs = []
        for obj_ids in association.matched.values():
            first_frames = {obj_id: self.objects[obj_id].first_frame for obj_id in obj_ids}
            oldest = (max if reverse else min)(obj_ids, key=first_frames.__getitem__)
            pairs += [(oldest, obj_id) for obj_id in obj_ids if obj_id != oldest]
        return pairs

    def _count_keep_alive(self, association: Association) -> None:
        config = self.config
        matched = {obj_id for obj_ids in association.matched.values() for obj_id in obj_ids}
        lost = set(association.unmatched_ids)
        if config.decrease_trk_keep_alive_for_empty_masklets:
            lost.update(association.empty_ids)
        for obj_id in matched:
            known = self.objects[obj_id]
            known.keep_alive = min(config.max_trk_keep_alive, known.keep_alive + 1)
        for obj_id in lost:
            known = self.objects[obj_id]
            known.keep_alive = max(config.min_trk_keep_alive, known.keep_alive - 1)

    def _hidden(self) -> set[int]:
        if self.config.suppress_unmatched_only_within_hotstart:
            return set()
        return {i for i, known in self.objects.items() if known.keep_alive <= 0 and not known.is_from_user}

    def _forget_finished(self, frame_idx: int, reverse: bool) -> None:
        """Drop counts that nothing can ask for again: the younger object has passed its probation."""
        for obj_id, known in self.objects.items():
            if known.num_unmatched and not self._is_on_probation(obj_id, frame_idx, reverse):
                known.num_unmatched = 0
        self.pair_counts = {
            pair: count
            for pair, count in self.pair_counts.items()
            if self._is_on_probation(pair[1], frame_idx, reverse)
        }


def suppress_recently_occluded(
    masks: Tensor,
    obj_ids: Sequence[int],
    last_occluded: Mapping[int, int],
    frame_idx: int,
    threshold: float,
    newly_removed: Iterable[int] = (),
    reverse: bool = False,
) -> tuple[list[bool], dict[int, int]]:
    """Of two objects that cover the same place, find the one that came back later from an occlusion.

    Args:
        masks: bool, (N, h, w).
        obj_ids: N ids.
        last_occluded: Object id -> frame on which it was last empty or suppressed, `NEVER` or missing if never.
        frame_idx: This frame.
        threshold: IoU from which two objects cover the same place; 0 for no suppression.
        newly_removed: Objects that end on this frame.
        reverse: Tracking goes towards smaller indices.

    Returns:
        Whether each object is suppressed, and ``last_occluded`` of these objects after this frame.
    """
    gone = set(newly_removed)
    last = [last_occluded.get(obj_id, _ALWAYS_OCCLUDED if obj_id in gone else NEVER) for obj_id in obj_ids]
    suppressed = [False] * len(obj_ids)
    if threshold > 0 and len(obj_ids) > 1:
        overlapping = (mask_iou(masks, masks) >= threshold).triu(diagonal=1).nonzero().tolist()
        for i, j in overlapping:
            for mine, other in ((i, j), (j, i)):
                is_later = last[mine] < last[other] if reverse else last[mine] > last[other]
                suppressed[mine] |= is_later and last[other] > NEVER
    is_empty = (~masks.flatten(1).any(dim=1)).tolist()
    table = {
        obj_id: frame_idx if hidden or empty else value
        for obj_id, hidden, empty, value in zip(obj_ids, suppressed, is_empty, last, strict=True)
    }
    return suppressed, table
