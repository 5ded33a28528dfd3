"""Computes what a tracking session asks for: features, answers to prompts, conditioning frames, tracked frames.

`sam3.model.sam3_tracking_predictor.Sam3TrackerPredictor` is what users call; this is the part that runs the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sam3.model.mask_rules import (
    NO_OBJECT_LOGIT,
    apply_non_overlapping_constraints,
    fill_holes_in_mask_scores,
    video_to_square,
)
from sam3.model.memory_bank import FrameRecord, MemoryBank, attended_memories, attended_pointers
from sam3.model.memory_policy import EditRefusedError
from sam3.model.sam3_image import Sam3Image
from sam3.model.sam3_tracker import TrackerFeatures, TrackOutput
from sam3.model.tracker_consolidation import consolidate, display_masks, previous_logits
from sam3.model.tracker_state import ObjectGroup, PendingOutput, PointPrompt, TrackerState, require_state
from sam3.sam.prompts import PromptError
from sam3.video.frame_source import FrameGoneError, FrameSource

_PREVIOUS_LOGIT_LIMIT = 32.0
_ABSENT_SCORE = -10.0


class TrackedFrame(NamedTuple):
    """All objects on one frame."""

    frame_idx: int
    obj_ids: list[int]
    low_res_masks: Tensor
    """float32 logits, (B, 1, 4 G, 4 G); they cover the model's square input."""
    object_score_logits: Tensor
    """float32, (B, 1): above 0 where the object is in the frame."""


class TrackerEngine:
    """The model and the settings of all sessions that run on it; see `Sam3TrackerPredictor` for what they mean."""

    def __init__(
        self,
        model: Sam3Image,
        *,
        memory_dtype: torch.dtype,
        clear_non_cond_mem_around_input: bool,
        non_overlap_masks_for_output: bool,
        fill_hole_area: float,
        resize_before_squashing: bool,
    ) -> None:
        self.model = model
        self.tracker = model.tracker
        self.memory_dtype = memory_dtype
        self.clear_non_cond_mem_around_input = clear_non_cond_mem_around_input
        self.non_overlap_masks_for_output = non_overlap_masks_for_output
        self.fill_hole_area = fill_hole_area
        self.resize_before_squashing = resize_before_squashing

    # --- features -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def frame_features(self, state: TrackerState, frame_idx: int) -> TrackerFeatures:
        """What the tracker reads of a frame: handed in, kept from before, or computed.

        Raises:
            PromptError: If there is neither a video nor features of this frame.
            EditRefusedError: If the video can be read only once, and the frame is gone.
            RuntimeError: If the model is in training mode.
            VideoDecodeError: If the frame cannot be decoded.
        """
        if self.model.training or self.tracker.training:
            raise RuntimeError("the model is in training mode, in which its results are other ones: model.eval()")
        state.touch(frame_idx)
        weight = self.tracker.no_mem_embed
        if frame_idx in state.cached_features:
            return _to_features(state.cached_features[frame_idx], weight)
        features = state.features.get(frame_idx)
        if features is None:
            if state.source is None:
                raise PromptError(
                    f"frame {frame_idx} has no cached_features, and there is no video to compute them from"
                )
            image = self.model.preprocess(_read_frame(state.source, frame_idx))[None]
            features = self.model.tracker_features(image.to(weight.device, weight.dtype))
        state.cache_features(frame_idx, features)
        return features

    # --- prompts ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def answer_points(
        self,
        state: TrackerState,
        group: ObjectGroup | None,
        frame_idx: int,
        obj_id: int,
        prompt: PointPrompt,
        use_prev_mem_frame: bool,
    ) -> PendingOutput:
        """One object's mask from points, and from the mask that they correct; the state is not changed."""
        tracker, features = self.tracker, self.frame_features(state, frame_idx)
        previous = None if group is None else previous_logits(group, frame_idx, obj_id)
        if previous is not None:
            previous = previous.to(state.device).clamp(-_PREVIOUS_LOGIT_LIMIT, _PREVIOUS_LOGIT_LIMIT)
        conditioned = tracker.without_memory(features)
        if use_prev_mem_frame and group is not None and frame_idx in group.tracked and obj_id in group.obj_ids:
            conditioned = self._remember(state, group, frame_idx, obj_id, features)
        points = (prompt.coords_px.to(state.device), prompt.labels.to(state.device))
        multimask = tracker.use_multimask(prompt.labels.shape[1])
        output = tracker.decode(features, conditioned, 1, points, previous, multimask)
        return PendingOutput(self._without_memory(state, output))

    @torch.no_grad()
    def answer_mask(self, state: TrackerState, frame_idx: int, mask_11hw: Tensor) -> PendingOutput:
        """One object's pointer and score from its mask in 0..1; the state is not changed."""
        features, video_hw = self.frame_features(state, frame_idx), state.size_hw
        mask = mask_11hw.to(state.device)
        prompt = video_to_square(mask, self.model.preprocess, video_hw, self.tracker.mask_prompt_size, padding=0.0)
        record = self._without_memory(state, self.tracker.use_mask_as_output(features, prompt))
        if mask.shape[-2:] != video_hw:
            mask = F.interpolate(mask, video_hw, mode="bilinear", align_corners=False, antialias=True)
        return PendingOutput(replace(record, pred_masks=None), (mask[0, 0] > 0.5).to(state.storage_device))

    def _without_memory(self, state: TrackerState, output: TrackOutput) -> FrameRecord:
        record = FrameRecord(
            output.pred_masks,
            output.obj_ptr,
            output.object_score_logits,
            iou_score=output.iou_score,
            is_from_points=True,
        )
        return record.to(state.storage_device)

    def _remember(
        self, state: TrackerState, group: ObjectGroup, frame_idx: int, obj_id: int, features: TrackerFeatures
    ) -> Tensor:
        """The frame as one object's memory shows it, (1, C, G, G)."""
        row, num_frames = group.obj_ids.index(obj_id), state.assumed_num_frames
        where = (group.bank, frame_idx, self.tracker.settings, num_frames, bool(group.tracked.direction(frame_idx)))
        memories = [m._replace(record=m.record.select([row])) for m in attended_memories(*where, object_index=row)]
        pointers = [p._replace(record=p.record.select([row])) for p in attended_pointers(*where, object_index=row)]
        return self.tracker.condition_on_memory(features, memories, pointers, num_frames)

    # --- tracking -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def propagate_in_video_preflight(self, inference_state: TrackerState, run_mem_encoder: bool = True) -> None:
        """Turn the prompts that wait into conditioning frames. `propagate_in_video` does it by itself.

        Raises:
            RuntimeError: If there is no prompt at all.
        """
        state = require_state(inference_state)
        state.require_trackable()
        for frame_idx in sorted({t for group in state.groups for t in group.pending}):
            features = self.frame_features(state, frame_idx)
            for group in state.groups:
                if frame_idx in group.pending:
                    record = consolidate(self.tracker, group, frame_idx, features, self.model.preprocess)
                    if run_mem_encoder:
                        record = self._with_memory(features, record)
                    group.condition_on(frame_idx, record.to(state.storage_device))
                    self._clear_around(group, frame_idx)

    @torch.no_grad()
    def track_frame(
        self, inference_state: TrackerState, frame_idx: int, reverse: bool = False, run_mem_encoder: bool = True
    ) -> TrackedFrame:
        """All objects on one frame, from the records of the frames tracked so far: one step of `propagate_in_video`.

        Args:
            inference_state: From `init_state`.
            frame_idx: A frame that the video has.
            reverse: Tracking runs towards smaller indices.
            run_mem_encoder: Store the frame's memory.

        Raises:
            RuntimeError: If there is no prompt at all, or the policy dropped what the frame needs.
            VideoDecodeError: If the frame cannot be decoded.
        """
        state = require_state(inference_state)
        if state.policy is not None:
            state.policy.require_startable(state, frame_idx, reverse)
        if state.has_pending_prompts or not state.is_trackable:
            self.propagate_in_video_preflight(state, run_mem_encoder)
        state.touch(frame_idx, is_tracked=True)
        if state.policy is not None:
            state.policy.before_frame(state, frame_idx, reverse)
        records = [self._track_group(state, group, frame_idx, reverse, run_mem_encoder) for group in state.groups]
        masks = []
        for record in records:
            if record.pred_masks is None:
                raise RuntimeError(
                    f"the masks of frame {frame_idx} were dropped: the memory policy keeps no such frame"
                )
            masks.append(record.pred_masks.to(state.device))
        scores = [record.object_score_logits.to(state.device) for record in records]
        if state.policy is not None:
            state.policy.after_frame(state, frame_idx, reverse)
        return TrackedFrame(frame_idx, state.obj_ids, _join(masks), _join(scores))

    def _track_group(
        self, state: TrackerState, group: ObjectGroup, frame_idx: int, reverse: bool, run_mem_encoder: bool
    ) -> FrameRecord:
        """The record of a frame: of a prompted one as it is stored, of any other computed and stored."""
        stored = group.bank.cond.get(frame_idx)
        if stored is not None:
            group.tracked.add(frame_idx, reverse)
            self._clear_around(group, frame_idx)
            return stored
        if not group.bank.cond:  # all prompts of its objects were taken back
            return self._absent_record(state, len(group.obj_ids))
        record = self.compute_record(state, group, group.bank, frame_idx, reverse, run_mem_encoder)
        group.bank.non_cond[frame_idx] = record
        group.unread.discard(frame_idx)
        group.tracked.add(frame_idx, reverse)
        return record

    @torch.no_grad()
    def compute_record(
        self,
        state: TrackerState,
        group: ObjectGroup,
        bank: MemoryBank,
        frame_idx: int,
        reverse: bool,
        run_mem_encoder: bool = True,
    ) -> FrameRecord:
        """The record of a frame without a prompt, for the objects of a group, from any bank; nothing is stored."""
        tracker, features = self.tracker, self.frame_features(state, frame_idx)
        output = tracker.track_step_full(
            frame_idx,
            features,
            bank,
            is_init_cond_frame=False,
            num_objects=len(group.obj_ids),
            num_frames=state.assumed_num_frames,
            track_in_reverse=reverse,
        )
        record = tracker.make_record(features, output, run_mem_encoder=False)
        if run_mem_encoder:
            record = self._with_memory(features, record)
        return record.to(state.storage_device)

    def _with_memory(self, features: TrackerFeatures, record: FrameRecord) -> FrameRecord:
        """The record with its spatial memory, which on a prompted frame holds zeros and ones."""
        tracker = self.tracker
        assert record.pred_masks is not None
        logits = tracker.high_res(record.pred_masks)
        if record.is_from_points:
            logits = apply_non_overlapping_constraints(logits)
        if self.resize_before_squashing:
            side = tracker.memory_mask_size
            logits = F.interpolate(logits, (side, side), mode="bilinear", align_corners=False)
        scores = record.object_score_logits
        memory = tracker.encode_memory(features, logits, scores, record.is_from_points, dtype=self.memory_dtype)
        return replace(record, maskmem_features=memory)

    def _clear_around(self, group: ObjectGroup, frame_idx: int) -> None:
        """After a prompt on an object that is tracked alone, masks nearby are no longer what clicks start from."""
        if self.clear_non_cond_mem_around_input and len(group.obj_ids) == 1:
            settings = self.tracker.settings
            reach = settings.memory_temporal_stride * settings.num_maskmem
            nearby = set(range(frame_idx - reach, frame_idx + reach + 1)) - group.bank.cond.keys()
            # Also frames whose records the policy has dropped and may bring back.
            group.unread.update(t for t in nearby if t in group.tracked or t in group.bank.non_cond)

    def _absent_record(self, state: TrackerState, num_objects: int) -> FrameRecord:
        side, weight = self.model.config.low_res_mask_size, self.tracker.no_obj_ptr.detach()
        masks = torch.full((num_objects, 1, side, side), NO_OBJECT_LOGIT, device=state.device)
        scores = torch.full((num_objects, 1), _ABSENT_SCORE, device=state.device)
        return FrameRecord(masks, weight.expand(num_objects, -1), scores)

    # --- results ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def masks_at_video_size(self, state: TrackerState, low_res_masks: Tensor) -> Tensor:
        """Low-resolution logits (B, 1, 4 G, 4 G) as float32 logits at the video's size, (B, 1, H, W)."""
        return self._finish(self.model.preprocess.masks_to_image(low_res_masks, state.size_hw))

    @torch.no_grad()
    def known_masks(self, state: TrackerState, frame_idx: int) -> Tensor:
        """What prompts and tracking say of all objects on a frame so far, float32 logits (B, 1, H, W).

        Objects without anything on this frame are -1024 everywhere.
        """
        side, preprocess = self.model.config.low_res_mask_size, self.model.preprocess
        parts = [display_masks(group, frame_idx, side, preprocess, state.size_hw) for group in state.groups]
        if not parts:
            return torch.zeros(0, 1, *state.size_hw, device=state.device)
        return self._finish(_join([part.to(state.device) for part in parts]))

    def _finish(self, masks: Tensor) -> Tensor:
        if self.non_overlap_masks_for_output:
            masks = apply_non_overlapping_constraints(masks)
        return fill_holes_in_mask_scores(masks, self.fill_hole_area)


def _read_frame(source: FrameSource, frame_idx: int) -> np.ndarray:
    try:
        return source.frame(frame_idx)
    except FrameGoneError as error:
        raise EditRefusedError(
            f"{error}: a larger window (RecentEdits) or SnapshotReplay, which keeps all frames, serves older ones"
        ) from error


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _to_features(value: Any, weight: Tensor) -> TrackerFeatures:
    """Features that were handed in, where and as the weights are.

    Raises:
        PromptError: If they have not the shapes that `TrackerFeatures` says.
    """
    if isinstance(value, TrackerFeatures):
        maps: Sequence[Tensor] = value
    else:
        _, backbone_out = value
        maps = backbone_out.get("tracker_backbone_out", backbone_out)["backbone_fpn"]
    fine, middle, coarse = (m.to(weight.device, weight.dtype) for m in maps[:3])
    dim, height, width = weight.shape[-1], coarse.shape[-2], coarse.shape[-1]
    expected = [(1, dim // share, s * height, s * width) for share, s in ((8, 4), (4, 2), (1, 1))]
    shapes = [tuple(m.shape) for m in (fine, middle, coarse)]
    if shapes != expected:
        raise PromptError(f"cached_features has maps {shapes}, expected {expected}: take model.tracker_features(image)")
    return TrackerFeatures(fine, middle, coarse)
