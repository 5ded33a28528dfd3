"""The loop of the text-prompted video model: detect, propagate, associate, remember, for one frame at a time.

Behaviour of Meta's SAM 3 package 0.1.4, restated from its public behaviour; no code is shared.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from sam3.model.mask_rules import BACKGROUND_LOGIT, fill_holes_in_mask_scores
from sam3.model.prompt import Prompt
from sam3.model.sam3_image import Sam3Image
from sam3.model.sam3_tracker import Sam3Tracker
from sam3.model.video_association import (
    Association,
    associate,
    detections_to_recondition,
    limit_new_objects,
    suppress_recently_occluded,
)
from sam3.model.video_config import VideoConfig
from sam3.model.video_detection import Detections, EncodedFrame, detect, encode_frame, require_finite
from sam3.model.video_groups import encode_tracked_memory, new_group
from sam3.model.video_outputs import FrameResult
from sam3.model.video_state import VideoState
from sam3.tracker_config import TrackerConfig


@dataclass
class _Tracks:
    """All objects of a frame before its detections are looked at."""

    obj_ids: list[int]
    masks: Tensor
    """Logits, (N, 1, 4 G, 4 G)."""
    logits: dict[int, float]
    """Object id -> the tracker's object score."""


class Sam3VideoBase:
    """Detector and tracker of one model, joined by the rules of `VideoConfig`.

    It holds no weights of its own and no video: any number of sessions can run on one model.

    Attributes:
        model: Detector, text encoder and tracker.
        config: Constants of the rules.
        tracker: The model's tracker with the settings that videos are tracked with; the same weights.
    """

    def __init__(
        self,
        model: Sam3Image,
        config: VideoConfig | None = None,
        *,
        tracker_settings: TrackerConfig | None = None,
        memory_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """
        Args:
            model: In eval mode.
            config: Default: the released constants.
            tracker_settings: Default: the model's own with memory selection, as released.
            memory_dtype: Spatial memories are stored in it; bfloat16 as released.

        Raises:
            ValueError: If the model lacks the tracker, the detector or its mask head.
        """
        if not model.has_detector or model.segmentation_head is None:
            raise ValueError(
                "a text-prompted video needs the detector and its mask head: build the model with "
                "enable_detector=True and enable_segmentation=True, or load a checkpoint that holds both"
            )
        self.model = model
        self.config = config or VideoConfig()
        settings = tracker_settings or model.tracker.settings.replace(use_memory_selection=True)
        self.tracker = _with_settings(model.tracker, settings, memory_dtype)

    @torch.inference_mode()
    def process_frame(self, state: VideoState, frame_idx: int, reverse: bool = False) -> FrameResult:
        """Detect and track on one frame, and update what the session remembers.

        Raises:
            RuntimeError: If the model is in training mode.
            ValueError: If its scores are not finite.
        """
        self._require_eval_mode()
        encoded = self.encode(state, frame_idx, need_detector=self._applies(state, frame_idx, reverse))
        detections = self._detections(state, encoded, reverse)
        tracks = self._propagate(state, encoded, reverse)
        is_inside = tracks.masks[:, 0] > 0
        association = associate(detections.masks > 0, detections.scores, is_inside, tracks.obj_ids, self.config)
        removed, hidden = state.hotstart.update(association, frame_idx, reverse)
        state.require_discardable(removed)
        self._recondition(state, encoded, association, detections, tracks)
        masks = self._suppress(state, tracks, is_inside, removed, frame_idx, reverse)
        self._remember(state, encoded, masks)
        new, num_dropped = self._add_new_objects(state, encoded, association, detections)
        state.discard_objects(removed)
        low_res = dict(zip(tracks.obj_ids, masks[:, 0], strict=True)) | new
        priorities = {i: _sigmoid(logit) for i, logit in tracks.logits.items()} | {i: state.scores[i] for i in new}
        stats = {"num_obj_tracked": len(state.scores), "num_obj_dropped": num_dropped}
        return FrameResult(frame_idx, low_res, priorities, hidden, stats)

    @torch.inference_mode()
    def propagate_groups(
        self, state: VideoState, frame_idx: int, touched: set[int], reverse: bool = False
    ) -> FrameResult:
        """Track only the groups of some objects, without the detector and its rules, as after a click."""
        self._require_eval_mode()
        encoded = self.encode(state, frame_idx, need_detector=False)
        groups = [group for group in state.groups if not touched.isdisjoint(group.obj_ids)]
        low_res: dict[int, Tensor] = {}
        priorities: dict[int, float] = {}
        for group in groups:
            record = group.propagate(state.scene, encoded.tracker, frame_idx, reverse, run_mem_encoder=True)
            assert record.pred_masks is not None
            masks = fill_holes_in_mask_scores(record.pred_masks, self.config.fill_hole_area)
            low_res |= dict(zip(group.obj_ids, masks[:, 0], strict=True))
            logits = record.object_score_logits[:, 0]
            require_finite(logits, self.tracker.no_mem_embed.dtype)
            priorities |= dict(zip(group.obj_ids, map(_sigmoid, logits.tolist()), strict=True))
        return FrameResult(frame_idx, low_res, priorities)

    def encode(self, state: VideoState, frame_idx: int, need_detector: bool) -> EncodedFrame:
        """Features of a frame; those of the last one are at hand."""
        known = state.encoded
        if known is not None and known.frame_idx == frame_idx and (known.backbone_out is not None or not need_detector):
            return known
        pixels = state.frames.frame(frame_idx)
        state.encoded = encode_frame(self.model, pixels, frame_idx, need_detector, self.config)
        return state.encoded

    # --- detection ----------------------------------------------------------------------------------------------------

    def _boxes(self, state: VideoState, frame_idx: int, reverse: bool) -> Prompt | None:
        before = frame_idx + 1 if reverse else frame_idx - 1
        inherited = state.boxes.get(before) if self.config.box_reaches_next_frame else None
        return state.boxes.get(frame_idx, inherited)

    def _applies(self, state: VideoState, frame_idx: int, reverse: bool) -> bool:
        """Whether there is anything to look for on a frame."""
        if state.prompt is None:
            return False
        return state.prompt.text is not None or self._boxes(state, frame_idx, reverse) is not None

    def _detections(self, state: VideoState, encoded: EncodedFrame, reverse: bool) -> Detections:
        if not self._applies(state, encoded.frame_idx, reverse):
            side = state.scene.low_res_size
            return Detections([], encoded.tracker.fine.new_zeros(0, side, side))
        assert state.prompt is not None and encoded.backbone_out is not None
        known = encoded.detections.get(state.prompt.number)
        if known is None:
            boxes = self._boxes(state, encoded.frame_idx, reverse)
            known = detect(self.model, encoded.backbone_out, state.prompt.features, boxes, self.config)
            encoded.detections = {state.prompt.number: known}
        return known

    # --- tracking -----------------------------------------------------------------------------------------------------

    def _propagate(self, state: VideoState, encoded: EncodedFrame, reverse: bool) -> _Tracks:
        side = state.scene.low_res_size
        obj_ids: list[int] = []
        masks = [encoded.tracker.fine.new_zeros(0, 1, side, side, dtype=torch.float32)]
        scores = [masks[0].new_zeros(0)]
        for group in state.groups:
            record = group.propagate(state.scene, encoded.tracker, encoded.frame_idx, reverse, run_mem_encoder=False)
            assert record.pred_masks is not None
            obj_ids += group.obj_ids
            masks.append(record.pred_masks)
            scores.append(record.object_score_logits[:, 0])
        logits = torch.cat(scores)
        require_finite(logits, self.tracker.no_mem_embed.dtype)
        filled = fill_holes_in_mask_scores(torch.cat(masks), self.config.fill_hole_area)
        return _Tracks(obj_ids, filled, dict(zip(obj_ids, logits.tolist(), strict=True)))

    def _recondition(
        self,
        state: VideoState,
        encoded: EncodedFrame,
        association: Association,
        detections: Detections,
        tracks: _Tracks,
    ) -> None:
        renewed = detections_to_recondition(association, tracks.logits, encoded.frame_idx, self.config)
        for group in state.groups:
            masks = {obj_id: detections.masks[renewed[obj_id]] for obj_id in group.obj_ids if obj_id in renewed}
            if masks:
                group.recondition(state.scene, encoded.tracker, encoded.frame_idx, masks)

    def _suppress(
        self,
        state: VideoState,
        tracks: _Tracks,
        is_inside: Tensor,
        removed: set[int],
        frame_idx: int,
        reverse: bool,
    ) -> Tensor:
        """The masks, with those of objects emptied that cover another after an occlusion."""
        threshold = self.config.suppress_overlapping_based_on_recent_occlusion_threshold
        suppressed, state.last_occluded = suppress_recently_occluded(
            is_inside, tracks.obj_ids, state.last_occluded, frame_idx, threshold, removed, reverse
        )
        flags = torch.tensor(suppressed, dtype=torch.bool, device=tracks.masks.device)
        return torch.where(flags[:, None, None, None], BACKGROUND_LOGIT, tracks.masks)

    def _remember(self, state: VideoState, encoded: EncodedFrame, masks: Tensor) -> None:
        if not len(masks):
            return
        memory = encode_tracked_memory(self.tracker, encoded.tracker, masks)
        sizes = [len(group.obj_ids) for group in state.groups]
        for group, part in zip(state.groups, memory.split(sizes), strict=True):
            group.put_memory(encoded.frame_idx, part.clone())

    def _add_new_objects(
        self, state: VideoState, encoded: EncodedFrame, association: Association, detections: Detections
    ) -> tuple[dict[int, Tensor], int]:
        """Start a group of the new objects. Returns their masks as shown, and how many did not fit."""
        new = limit_new_objects(association.new_detections, detections.scores, len(state.scores), self.config)
        num_dropped = len(association.new_detections) - len(new)
        if not new:
            return {}, num_dropped
        obj_ids = list(range(state.next_obj_id, state.next_obj_id + len(new)))
        masks = detections.masks[new][:, None]
        state.groups.append(new_group(state.scene, encoded.tracker, encoded.frame_idx, obj_ids, masks))
        state.add_objects(obj_ids, [detections.scores[d] for d in new], encoded.frame_idx)
        shown = fill_holes_in_mask_scores(masks, self.config.fill_hole_area)
        return dict(zip(obj_ids, shown[:, 0], strict=True)), num_dropped

    def _require_eval_mode(self) -> None:
        if self.model.training:
            raise RuntimeError(
                "the model is in training mode, in which its results are not those to predict: model.eval()"
            )


def _with_settings(tracker: Sam3Tracker, settings: TrackerConfig, memory_dtype: torch.dtype) -> Sam3Tracker:
    """The same tracker, weights included, under other settings; the original keeps its own."""
    view = copy.copy(tracker)
    view.settings = settings
    view.memory_dtype = memory_dtype
    view.training = False  # the flag alone: the layers are shared, and their mode is the model's
    return view


def _sigmoid(logit: float) -> float:
    return float(torch.tensor(logit).sigmoid())
