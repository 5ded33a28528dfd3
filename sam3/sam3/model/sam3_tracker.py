"""The tracker's network: the SAM heads plus the memory that carries objects from frame to frame.

From Segment Anything 2 (https://arxiv.org/abs/2408.00714), as SAM 3 uses it. B objects of one video are the batch; the
features of a frame are computed once and shared by them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sam3.model.mask_rules import NO_OBJECT_LOGIT
from sam3.model.memory_bank import FrameRecord, MemoryBank, effective_iou
from sam3.model.tracker_memory import TrackerFeatures, TrackerMemory, resize, temporal_code
from sam3.sam.heads import SamFeatures
from sam3.sam.mask_decoder import SamOutput

__all__ = ["NO_OBJECT_LOGIT", "PointInputs", "Sam3Tracker", "TrackOutput", "TrackerFeatures", "temporal_code"]

_MASK_PROMPT_SCALE, _MASK_PROMPT_BIAS = 20.0, -10.0

PointInputs = tuple[Tensor, Tensor]
"""Points in pixels of the model input, (B, P, 2), and their labels, (B, P); see `SamHeads.forward_prompts`."""


class TrackOutput(NamedTuple):
    """Masks of B objects on a frame, and what training wants besides."""

    pred_masks: Tensor
    """Low-resolution logits of the best candidate, float32, (B, 1, 4 G, 4 G); -1024 for absent objects."""
    obj_ptr: Tensor
    """(B, C)."""
    object_score_logits: Tensor
    """float32, (B, 1)."""
    iou_score: Tensor
    """Highest predicted IoU of the candidates, float32, (B,)."""
    sam: SamOutput | None = None
    """The candidates (K = 3, or 1) as decoded, absent objects included; None for a mask prompt."""


class Sam3Tracker(TrackerMemory):
    """SAM heads, memory encoder and memory attention (``tracker.*`` in a released file).

    A frame at inference::

        features = model.tracker_features(image)
        record = tracker.track_step(3, features, bank, is_init_cond_frame=False, num_objects=2, num_frames=100)
        bank.non_cond[3] = record

    Nothing is kept between calls, so any number of videos can share the weights.
    """

    # --- one frame ----------------------------------------------------------------------------------------------------

    def track_step(
        self,
        frame_idx: int,
        features: TrackerFeatures,
        bank: MemoryBank,
        *,
        is_init_cond_frame: bool,
        num_frames: int,
        point_inputs: PointInputs | None = None,
        mask_inputs: Tensor | None = None,
        num_objects: int | None = None,
        track_in_reverse: bool = False,
        run_mem_encoder: bool = True,
        prev_sam_mask_logits: Tensor | None = None,
        use_prev_mem_frame: bool = True,
    ) -> FrameRecord:
        """Segment B objects on one frame. The bank is read, not written.

        Args:
            frame_idx: Of this frame.
            features: From `frame_features`.
            bank: Records of other frames.
            is_init_cond_frame: The frame has a prompt and was not tracked before: no memory is read.
            num_frames: Of the whole video; for an unknown length any number above every index and not below 16.
            point_inputs: Points and labels of each object.
            mask_inputs: Masks in 0..1, (B, 1, h, w), which then are the result; `mask_prompt_size` is the side that
                the released tracker uses. Not together with points.
            num_objects: B, where no prompt says it; default: as many as the bank's records have.
            track_in_reverse: Tracking runs towards smaller indices.
            run_mem_encoder: Make the record's memory.
            prev_sam_mask_logits: Earlier low-resolution logits of this frame, (B, 1, 4 G, 4 G); with points alone.
            use_prev_mem_frame: Read the memory at all.

        Raises:
            ValueError: If the prompts do not fit together, or there is no memory to read.
        """
        output = self.track_step_full(
            frame_idx,
            features,
            bank,
            is_init_cond_frame=is_init_cond_frame,
            num_frames=num_frames,
            point_inputs=point_inputs,
            mask_inputs=mask_inputs,
            num_objects=num_objects,
            track_in_reverse=track_in_reverse,
            prev_sam_mask_logits=prev_sam_mask_logits,
            use_prev_mem_frame=use_prev_mem_frame,
        )
        return self.make_record(features, output, mask_inputs, point_inputs is not None, run_mem_encoder)

    def track_step_full(
        self,
        frame_idx: int,
        features: TrackerFeatures,
        bank: MemoryBank,
        *,
        is_init_cond_frame: bool,
        num_frames: int,
        point_inputs: PointInputs | None = None,
        mask_inputs: Tensor | None = None,
        num_objects: int | None = None,
        track_in_reverse: bool = False,
        prev_sam_mask_logits: Tensor | None = None,
        use_prev_mem_frame: bool = True,
    ) -> TrackOutput:
        """`track_step` without the memory encoder, and with all candidates; `make_record` makes the rest of it."""
        _check_prompts(point_inputs, mask_inputs, prev_sam_mask_logits)
        if mask_inputs is not None:
            return self.use_mask_as_output(features, mask_inputs)
        num_objects = _count_objects(point_inputs, num_objects, bank)
        if is_init_cond_frame or not use_prev_mem_frame:
            conditioned = self.without_memory(features)
        else:
            conditioned = self.condition(frame_idx, features, bank, num_frames, track_in_reverse)
        multimask = self.use_multimask(0 if point_inputs is None else point_inputs[1].shape[1])
        return self.decode(features, conditioned, num_objects, point_inputs, prev_sam_mask_logits, multimask)

    def make_record(
        self,
        features: TrackerFeatures,
        output: TrackOutput,
        mask_inputs: Tensor | None = None,
        is_from_points: bool = False,
        run_mem_encoder: bool = True,
    ) -> FrameRecord:
        """The record of a frame from what `track_step_full` gave, with its memory if wanted.

        Args:
            features: Of the frame.
            output: From `track_step_full`, `decode` or `use_mask_as_output`.
            mask_inputs: The mask prompt, if there was one.
            is_from_points: The frame has clicks or a box: its mask is stored as zeros and ones.
            run_mem_encoder: Encode the memory.
        """
        memory = None
        if run_mem_encoder:
            logits = self.high_res(output.pred_masks) if mask_inputs is None else _mask_prompt_logits(mask_inputs)
            memory = self.encode_memory(features, logits, output.object_score_logits, is_from_points)
        score = None
        if self.settings.use_memory_selection:
            score = effective_iou(output.object_score_logits, output.iou_score, self.settings.shared_iou_score)
        return FrameRecord(
            pred_masks=output.pred_masks,
            obj_ptr=output.obj_ptr,
            object_score_logits=output.object_score_logits,
            maskmem_features=memory,
            iou_score=output.iou_score,
            eff_iou_score=score,
            is_from_points=is_from_points,
        )

    # --- masks --------------------------------------------------------------------------------------------------------

    @property
    def mask_prompt_size(self) -> int:
        """Side that mask prompts should have: that of the memory encoder's masks, 1152 for ``sam3``."""
        return self.config.image_size_px if self.settings.hugging_face_rules else self.memory_mask_size

    def use_multimask(self, num_points: int) -> bool:
        """Whether a frame with this many points gets three candidates."""
        return self.settings.multimask_min_pt_num <= num_points <= self.settings.multimask_max_pt_num

    def decode(
        self,
        features: TrackerFeatures,
        conditioned: Tensor,
        num_objects: int,
        point_inputs: PointInputs | None = None,
        mask_logits: Tensor | None = None,
        multimask_output: bool = False,
    ) -> TrackOutput:
        """Masks and pointers of B objects.

        Args:
            features: Of the frame.
            conditioned: From `condition` or `without_memory`, (B, C, G, G) or (1, C, G, G).
            num_objects: B.
            point_inputs: Points and labels; None for none.
            mask_logits: Mask prompts, (B, 1, h, w); resized to 4 G unless they have that size.
            multimask_output: Three candidates, of which the one with the highest predicted IoU is taken.
        """
        coords, labels = point_inputs or self._padding_points(num_objects)
        side = features.fine.shape[-1]
        if mask_logits is not None and mask_logits.shape[-2:] != (side, side):
            mask_logits = resize(mask_logits.to(torch.float32), side, antialias=True)
        maps = SamFeatures(conditioned, features.fine, features.middle)
        sam = self.select(self.forward_prompts(maps, coords, labels, mask_logits), multimask_output)
        best = sam.ious.argmax(dim=1)
        rows = torch.arange(len(best), device=best.device)
        present = sam.object_score_logits > 0
        masks = sam.mask_logits[rows, best][:, None].to(torch.float32)
        masks = torch.where(present[..., None, None], masks, NO_OBJECT_LOGIT)
        pointers = self.blend_pointers(self.obj_ptr_proj(sam.mask_tokens[rows, best]), present)
        scores = sam.object_score_logits.to(torch.float32)
        return TrackOutput(masks, pointers, scores, sam.ious.amax(dim=1).to(torch.float32), sam)

    def _padding_points(self, num_objects: int) -> PointInputs:
        """A frame without points still sends one, marked as padding."""
        device = self.no_mem_embed.device
        return torch.zeros(num_objects, 1, 2, device=device), -torch.ones(num_objects, 1, device=device)

    def blend_pointers(self, pointers: Tensor, present: Tensor) -> Tensor:
        """Pointers (B, C), and ``no_obj_ptr`` where ``present`` (B, 1) is False."""
        share = present.to(pointers.dtype)
        return share * pointers + (1 - share) * self.no_obj_ptr

    def use_mask_as_output(self, features: TrackerFeatures, masks: Tensor) -> TrackOutput:
        """Take mask prompts for the result; the decoder makes their pointers alone.

        Args:
            features: Of the frame.
            masks: In 0..1, (B, 1, h, w).

        Raises:
            ValueError: If a mask is smaller than a patch of the trunk.
        """
        masks = masks.to(torch.float32)
        height, width = (s // self.stride_px * 4 for s in masks.shape[-2:])
        if not height or not width:
            size = f"{masks.shape[-2]} x {masks.shape[-1]}"
            raise ValueError(f"mask_inputs are {size} pixels: resize them to {self.mask_prompt_size}, mask_prompt_size")
        low_res = resize(_mask_prompt_logits(masks), (height, width), antialias=True)
        prompt = self.mask_downsample(masks.to(self.no_mem_embed.dtype))
        multimask = self.settings.hugging_face_rules
        decoded = self.decode(features, features.coarse, len(masks), mask_logits=prompt, multimask_output=multimask)
        present = (masks > 0).flatten(1).any(dim=1, keepdim=True)
        scores = _MASK_PROMPT_SCALE * present.to(torch.float32) + _MASK_PROMPT_BIAS
        return TrackOutput(low_res, self.blend_pointers(decoded.obj_ptr, present), scores, scores.new_ones(len(masks)))

    def high_res(self, pred_masks: Tensor) -> Tensor:
        """Low-resolution logits at the size of the model input, (B, 1, S, S)."""
        return resize(pred_masks, pred_masks.shape[-1] // 4 * self.stride_px)


def _mask_prompt_logits(masks: Tensor) -> Tensor:
    return masks.to(torch.float32) * _MASK_PROMPT_SCALE + _MASK_PROMPT_BIAS


def _check_prompts(points: PointInputs | None, masks: Tensor | None, previous: Tensor | None) -> None:
    if masks is not None and points is not None:
        raise ValueError("a frame takes points or masks, not both")
    if previous is not None and points is None:
        raise ValueError("prev_sam_mask_logits are corrected by points, and there are none")
    if masks is not None and (masks.ndim != 4 or masks.shape[1] != 1):
        raise ValueError(f"mask_inputs has shape {tuple(masks.shape)}, expected (B, 1, h, w)")


def _count_objects(points: PointInputs | None, num_objects: int | None, bank: MemoryBank) -> int:
    if points is not None:
        return len(points[1])
    num_objects = bank.num_objects if num_objects is None else num_objects
    if not num_objects:
        raise ValueError("num_objects is needed where there are neither prompts nor records")
    return num_objects
