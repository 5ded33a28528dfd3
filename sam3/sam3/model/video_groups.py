"""Objects that the text-prompted video model tracks together: those first seen on one frame.

Behaviour of Meta's SAM 3 package 0.1.4, restated from its public behaviour; no code is shared. A group holds indices
and a memory bank and no weights; what it does is a function of the tracker that is passed in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sam3.model.mask_rules import (
    NO_OBJECT_LOGIT,
    apply_non_overlapping_constraints,
    suppress_object_pw_area_shrinkage,
    video_to_square,
)
from sam3.model.memory_bank import FrameRecord, MemoryBank
from sam3.model.memory_pruning import Front, prune
from sam3.model.sam3_tracker import PointInputs, Sam3Tracker, TrackerFeatures
from sam3.preprocess import Preprocess

_MASK_LOGIT = 1024.0
"""Logits of a mask that was given and not predicted: + inside, - outside."""
_PRESENT_SCORE = 10.0
_PREVIOUS_LOGITS_RANGE = 32.0


@dataclass(frozen=True)
class Scene:
    """What stays the same on all frames of a video."""

    tracker: Sam3Tracker
    preprocess: Preprocess
    size_hw: tuple[int, int]
    """Of the video, in pixels."""
    num_frames: int
    """Of the video; for a live one a number above every index."""

    @property
    def low_res_size(self) -> int:
        """Side of the tracker's low-resolution masks."""
        return self.tracker.config.grid_size * 4


@dataclass
class TrackedGroup:
    """B objects with one memory bank, whose rows are the objects."""

    obj_ids: list[int]
    first_frame: int
    bank: MemoryBank = field(default_factory=MemoryBank)
    clicked_frames: set[int] = field(default_factory=set)
    """Conditioning frames that a user made, among those in the bank."""
    is_whole: bool = True
    """No frame or memory was dropped."""

    def record(self, frame_idx: int) -> FrameRecord | None:
        """What is known of a frame."""
        return self.bank.cond.get(frame_idx) or self.bank.non_cond.get(frame_idx)

    def propagate(
        self, scene: Scene, features: TrackerFeatures, frame_idx: int, reverse: bool, run_mem_encoder: bool
    ) -> FrameRecord:
        """Track the objects to a frame; a conditioning frame gives what is stored of it.

        The record is put into the bank, without a memory unless ``run_mem_encoder``.
        """
        stored = self.bank.cond.get(frame_idx)
        if stored is not None and stored.pred_masks is not None:
            return stored
        record = scene.tracker.track_step(
            frame_idx,
            features,
            self.bank,
            is_init_cond_frame=False,
            num_frames=scene.num_frames,
            num_objects=len(self.obj_ids),
            track_in_reverse=reverse,
            run_mem_encoder=run_mem_encoder,
        )
        self.bank.non_cond[frame_idx] = record
        return record

    def put_memory(self, frame_idx: int, memory: Tensor) -> None:
        """Give the record of a frame its spatial memory, (B, Cm, G, G)."""
        store = self.bank.cond if frame_idx in self.bank.cond else self.bank.non_cond
        store[frame_idx] = replace(store[frame_idx], maskmem_features=memory)

    def recondition(self, scene: Scene, features: TrackerFeatures, frame_idx: int, masks: dict[int, Tensor]) -> None:
        """Renew objects from detections: the frame becomes a conditioning frame of all objects of the group.

        The renewed objects take score, pointer and stored mask from the detection; the spatial memory of the frame
        is encoded later, from the tracked masks.

        Args:
            scene: Of the video.
            features: Of the frame.
            frame_idx: A frame that was propagated to.
            masks: Object id -> detection mask logits, (4 G, 4 G).
        """
        rows = [self.obj_ids.index(obj_id) for obj_id in masks]
        size = scene.tracker.mask_prompt_size
        prompts = (resize(torch.stack(list(masks.values()))[:, None], size) > 0).to(torch.float32)
        output = scene.tracker.use_mask_as_output(features, prompts)
        record = self.bank.cond.get(frame_idx) or self.bank.non_cond.pop(frame_idx)
        assert record.pred_masks is not None
        at = (torch.tensor(rows, device=record.obj_ptr.device),)
        self.bank.cond[frame_idx] = replace(
            record,
            pred_masks=record.pred_masks.index_put(at, stored_mask_logits(scene, prompts)),
            obj_ptr=record.obj_ptr.index_put(at, output.obj_ptr),
            object_score_logits=record.object_score_logits.index_put(at, output.object_score_logits),
            eff_iou_score=None,
        )

    def click(
        self, scene: Scene, features: TrackerFeatures, frame_idx: int, obj_id: int, points: PointInputs, window: int
    ) -> Tensor:
        """Correct one object by clicks; the frame becomes a conditioning frame of all objects of the group.

        Args:
            scene: Of the video.
            features: Of the frame.
            frame_idx: The clicked frame.
            obj_id: One of the group's.
            points: Pixels of the model input, (1, P, 2), and labels (1, P).
            window: Conditioning frames at most so far away that no user made lose that rank.

        Returns:
            Low-resolution logits of the object, (1, 1, 4 G, 4 G).
        """
        row, known = self.obj_ids.index(obj_id), self.record(frame_idx)
        previous = None
        if known is not None and known.pred_masks is not None:
            previous = known.pred_masks[row : row + 1].clamp(-_PREVIOUS_LOGITS_RANGE, _PREVIOUS_LOGITS_RANGE)
        clicked = scene.tracker.track_step(
            frame_idx,
            features,
            MemoryBank(),
            is_init_cond_frame=known is None,
            num_frames=scene.num_frames,
            point_inputs=points,
            run_mem_encoder=False,
            prev_sam_mask_logits=previous,
            use_prev_mem_frame=False,
        )
        record = self._with_row(scene, features, known, row, clicked)
        assert clicked.pred_masks is not None and record.pred_masks is not None
        memory = encode_prompted_memory(scene.tracker, features, record.pred_masks, record.object_score_logits)
        self.bank.non_cond.pop(frame_idx, None)
        self.bank.cond[frame_idx] = replace(record, maskmem_features=memory)
        self.clicked_frames.add(frame_idx)
        self._demote_near(frame_idx, window)
        return clicked.pred_masks

    def _with_row(
        self, scene: Scene, features: TrackerFeatures, known: FrameRecord | None, row: int, clicked: FrameRecord
    ) -> FrameRecord:
        """The record of a frame with one object replaced; objects of which nothing is known there are absent."""
        assert clicked.pred_masks is not None and clicked.iou_score is not None
        count, like = len(self.obj_ids), clicked.pred_masks
        if known is not None and known.pred_masks is not None:
            masks, pointers, scores = known.pred_masks, known.obj_ptr, known.object_score_logits
        else:
            masks = like.new_full((count, *like.shape[1:]), NO_OBJECT_LOGIT)
            scores = clicked.object_score_logits.new_full((count, 1), _PRESENT_SCORE)
            pointers = clicked.obj_ptr.expand(count, -1)
            if count > 1:
                size = scene.tracker.config.image_size_px
                empty = scene.tracker.use_mask_as_output(features, like.new_zeros(1, 1, size, size))
                pointers = empty.obj_ptr.expand(count, -1)
        at = (torch.tensor([row], device=masks.device),)
        return FrameRecord(
            pred_masks=masks.index_put(at, clicked.pred_masks),
            obj_ptr=pointers.index_put(at, clicked.obj_ptr),
            object_score_logits=scores.index_put(at, clicked.object_score_logits),
            iou_score=clicked.iou_score.expand(count).clone(),
            is_from_points=True,
        )

    def _demote_near(self, frame_idx: int, window: int) -> None:
        for t in [t for t in self.bank.cond if t not in self.clicked_frames and abs(t - frame_idx) <= window]:
            self.bank.non_cond[t] = self.bank.cond.pop(t)

    def without(self, obj_ids: Iterable[int], shared_iou_score: bool) -> TrackedGroup | None:
        """The group of the other objects; None if there are none."""
        gone = set(obj_ids)
        rows = [row for row, obj_id in enumerate(self.obj_ids) if obj_id not in gone]
        if len(rows) == len(self.obj_ids):
            return self
        if not rows:
            return None
        bank = self.bank.select_objects(rows, shared_iou_score)
        return replace(self, obj_ids=[self.obj_ids[row] for row in rows], bank=bank)

    def prune(
        self, scene: Scene, fronts: Sequence[Front], first_whole: int, last_whole: int, click_window: int
    ) -> None:
        """Drop what tracking from the fronts can never read, whatever clicks come at the fronts or ahead of them.

        Args:
            scene: Of the video.
            fronts: Where tracking may go on, and be corrected.
            first_whole: From this frame to the last one everything is kept.
            last_whole: That frame.
            click_window: As for `click`; a click makes tracking read conditioning frames that were too far before.
        """
        settings, bank = scene.tracker.settings, self.bank
        kept = prune(bank, fronts, settings, scene.num_frames, lambda t: first_whole <= t <= last_whole)
        unsafe = {t for t in bank.cond.keys() - self.clicked_frames if _is_in_reach(t, fronts, click_window)}
        safe = MemoryBank({t: record for t, record in bank.cond.items() if t not in unsafe})
        spare = prune(safe, fronts, settings, scene.num_frames).cond
        cond = {}
        for t, record in bank.cond.items():
            known = kept.cond.get(t)
            if t in unsafe:
                cond[t] = replace(record, pred_masks=None if known is None else known.pred_masks)
            elif t in spare and not first_whole <= t <= last_whole:
                cond[t] = spare[t]
            elif known is not None:
                cond[t] = known
        pruned = MemoryBank(cond, kept.non_cond)
        self.is_whole &= _num_memories(pruned) == _num_memories(bank)
        self.bank = pruned
        self.clicked_frames &= self.bank.cond.keys()


def _num_memories(bank: MemoryBank) -> tuple[int, int]:
    """Frames, and those with a spatial memory."""
    records = [*bank.cond.values(), *bank.non_cond.values()]
    return len(records), sum(record.maskmem_features is not None for record in records)


def _is_in_reach(frame_idx: int, fronts: Sequence[Front], window: int) -> bool:
    """Whether a click at a front or ahead of it can take the rank of conditioning frame from a frame."""
    return any(not front.is_behind(frame_idx) or front.distance(frame_idx) <= window for front in fronts)


def new_group(
    scene: Scene, features: TrackerFeatures, frame_idx: int, obj_ids: Sequence[int], mask_logits: Tensor
) -> TrackedGroup:
    """Start tracking objects from their detection masks.

    Args:
        scene: Of the video.
        features: Of the frame.
        frame_idx: Where they were detected.
        obj_ids: B ids.
        mask_logits: Of the detections, (B, 1, 4 G, 4 G).
    """
    masks = (resize(mask_logits, scene.tracker.mask_prompt_size) > 0).to(torch.float32)
    output = scene.tracker.use_mask_as_output(features, masks)
    low_res = stored_mask_logits(scene, masks)
    record = FrameRecord(
        pred_masks=low_res,
        obj_ptr=output.obj_ptr,
        object_score_logits=output.object_score_logits,
        maskmem_features=encode_prompted_memory(scene.tracker, features, low_res, output.object_score_logits),
        iou_score=output.iou_score,
        is_from_points=True,
    )
    return TrackedGroup(list(obj_ids), frame_idx, MemoryBank(cond={frame_idx: record}))


def stored_mask_logits(scene: Scene, masks: Tensor) -> Tensor:
    """Low-resolution logits that stand for given masks, by way of the video's size as the released model takes it.

    Where masks overlap, a pixel of the video belongs to the last of them.

    Args:
        scene: Of the video.
        masks: Zeros and ones over the model's square input, (B, 1, h, w).

    Returns:
        (B, 1, 4 G, 4 G).
    """
    in_video = square_to_video(masks, scene.preprocess, scene.size_hw) > 0.5
    later = in_video.flip(0).cumsum(0).flip(0) - in_video.to(torch.int64)
    logits = torch.where(in_video & (later == 0), _MASK_LOGIT, -_MASK_LOGIT)
    return video_to_square(logits, scene.preprocess, scene.size_hw, scene.low_res_size, -_MASK_LOGIT)


def square_to_video(masks: Tensor, preprocess: Preprocess, size_hw: tuple[int, int]) -> Tensor:
    """Resize masks over the model's square input to the video's frame, antialiased, dropping padding."""
    inner_hw = [round(masks.shape[-1] * side / preprocess.size_px) for side in preprocess.resized_hw(size_hw)]
    inner = masks[..., : max(1, inner_hw[0]), : max(1, inner_hw[1])]
    if inner.shape[-2:] == size_hw:
        return inner
    return F.interpolate(inner, size_hw, mode="bilinear", align_corners=False, antialias=True)


def encode_prompted_memory(
    tracker: Sam3Tracker, features: TrackerFeatures, low_res: Tensor, object_score_logits: Tensor
) -> Tensor:
    """Memory of a frame with a prompt: masks without overlap, as zeros and ones."""
    masks = apply_non_overlapping_constraints(tracker.high_res(low_res))
    return tracker.encode_memory(features, masks, object_score_logits, is_mask_from_points=True)


def encode_tracked_memory(tracker: Sam3Tracker, features: TrackerFeatures, low_res: Tensor) -> Tensor:
    """Memory of a tracked frame for all N objects of the video: as probabilities, and empty for objects that others
    cover.

    Args:
        tracker: Encodes.
        features: Of the frame.
        low_res: Logits, (N, 1, 4 G, 4 G).

    Returns:
        (N, Cm, G, G).
    """
    masks = suppress_object_pw_area_shrinkage(resize(low_res, tracker.memory_mask_size))
    present = (masks > 0).flatten(1).any(dim=1, keepdim=True)
    scores = torch.where(present, _PRESENT_SCORE, -_PRESENT_SCORE)
    return tracker.encode_memory(features, masks, scores, is_mask_from_points=False)


def resize(maps: Tensor, size: int) -> Tensor:
    """Bilinear, without corner alignment and antialiasing, to a square."""
    return F.interpolate(maps.to(torch.float32), (size, size), mode="bilinear", align_corners=False)
