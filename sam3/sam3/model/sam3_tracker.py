"""The tracker's network: the SAM heads plus the memory that carries objects from frame to frame.

From Segment Anything 2 (https://arxiv.org/abs/2408.00714), as SAM 3 uses it. B objects of one video are the batch; the
features of a frame are computed once and shared by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3.config import Sam3Config
from sam3.model.grid_tables import SineTable
from sam3.model.mask_rules import NO_OBJECT_LOGIT
from sam3.model.memory import SimpleMaskEncoder
from sam3.model.memory_attention import MemoryAttention, MemoryTokens
from sam3.model.memory_bank import (
    AttendedMemory,
    AttendedPointer,
    FrameRecord,
    MemoryBank,
    attended_memories,
    attended_pointers,
    effective_iou,
    max_object_pointers,
)
from sam3.sam.heads import SamFeatures, SamHeads
from sam3.sam.layers import MLP
from sam3.sam.mask_decoder import SamOutput

_MASK_PROMPT_SCALE, _MASK_PROMPT_BIAS = 20.0, -10.0

PointInputs = tuple[Tensor, Tensor]
"""Points in pixels of the model input, (B, P, 2), and their labels, (B, P); see `SamHeads.forward_prompts`."""


class TrackerFeatures(NamedTuple):
    """What the tracker reads of a frame, before any memory."""

    fine: Tensor
    """Skip map at 4 G, (1, C / 8, 4 G, 4 G)."""
    middle: Tensor
    """Skip map at 2 G, (1, C / 4, 2 G, 2 G)."""
    coarse: Tensor
    """Coarse map without ``no_mem_embed``, (1, C, G, G)."""


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


class _TransformerWrapper(nn.Module):
    """Gives the memory attention its released name, ``transformer.encoder``."""

    def __init__(self, encoder: MemoryAttention) -> None:
        super().__init__()
        self.encoder = encoder


class Sam3Tracker(SamHeads):
    """SAM heads, memory encoder and memory attention (``tracker.*`` in a released file).

    A frame at inference::

        features = model.tracker_features(image)
        record = tracker.track_step(3, features, bank, is_init_cond_frame=False, num_objects=2, num_frames=100)
        bank.non_cond[3] = record

    Nothing is kept between calls, so any number of videos can share the weights.

    Attributes:
        config: The whole model's description; ``config.tracker`` holds the memory's.
        settings: ``config.tracker``; may be replaced by settings that fit the same weights.
        memory_dtype: Spatial memories are stored in it; the released tracker always uses bfloat16.
    """

    def __init__(self, config: Sam3Config, memory_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(config)
        dim, self.settings = config.hidden_dim, config.tracker
        mem_dim = self.settings.mem_dim
        self.config = config
        self.memory_dtype = memory_dtype
        self.transformer = _TransformerWrapper(MemoryAttention(config))
        self.maskmem_backbone = SimpleMaskEncoder(config)
        self.mask_downsample = nn.Conv2d(1, 1, 4, stride=4)
        self.obj_ptr_proj = MLP(dim, dim, dim, 3)
        self.obj_ptr_tpos_proj = nn.Linear(dim, mem_dim)
        self.maskmem_tpos_enc = nn.Parameter(torch.zeros(self.settings.num_maskmem, 1, 1, mem_dim))
        self.no_mem_pos_enc = nn.Parameter(torch.zeros(1, 1, dim))
        """Read by nothing; released files hold it."""
        self.no_obj_ptr = nn.Parameter(torch.zeros(1, dim))
        self.no_obj_embed_spatial = nn.Parameter(torch.zeros(1, mem_dim))
        for table in (self.maskmem_tpos_enc, self.no_mem_pos_enc, self.no_obj_ptr, self.no_obj_embed_spatial):
            nn.init.trunc_normal_(table, std=0.02)
        self.memory_code = SineTable(mem_dim, config.grid_size)

    # --- one frame ----------------------------------------------------------------------------------------------------

    def frame_features(self, sam2_backbone_out: dict[str, Any]) -> TrackerFeatures:
        """Narrow the second neck's maps, once per frame.

        Args:
            sam2_backbone_out: From ``backbone.forward_image``: ``backbone_fpn`` holds three maps, finest first.
        """
        fine, middle, coarse = sam2_backbone_out["backbone_fpn"]
        return TrackerFeatures(self.sam_mask_decoder.conv_s0(fine), self.sam_mask_decoder.conv_s1(middle), coarse)

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
        """Side of mask prompts and of the memory encoder's masks: 1152 for ``sam3``."""
        return self.config.grid_size * self.maskmem_backbone.mask_stride

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
            mask_logits = _resize(mask_logits.to(torch.float32), side, antialias=True)
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
        """
        masks = masks.to(torch.float32)
        height, width = (s // self.stride_px * 4 for s in masks.shape[-2:])
        low_res = _resize(_mask_prompt_logits(masks), (height, width), antialias=True)
        prompt = self.mask_downsample(masks.to(self.no_mem_embed.dtype))
        decoded = self.decode(features, features.coarse, len(masks), mask_logits=prompt)
        present = (masks > 0).flatten(1).any(dim=1, keepdim=True)
        scores = _MASK_PROMPT_SCALE * present.to(torch.float32) + _MASK_PROMPT_BIAS
        return TrackOutput(low_res, self.blend_pointers(decoded.obj_ptr, present), scores, scores.new_ones(len(masks)))

    def high_res(self, pred_masks: Tensor) -> Tensor:
        """Low-resolution logits at the size of the model input, (B, 1, S, S)."""
        return _resize(pred_masks, pred_masks.shape[-1] // 4 * self.stride_px)

    # --- memory -------------------------------------------------------------------------------------------------------

    def encode_memory(
        self,
        features: TrackerFeatures,
        mask_logits: Tensor,
        object_score_logits: Tensor,
        is_mask_from_points: bool,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The spatial memory of B objects on a frame, (B, Cm, G, G).

        Args:
            features: Of the frame.
            mask_logits: (B, 1, h, w): squashed first, then resized to the encoder's size. The released tracker gives
                `high_res` masks; its text-prompted model gives logits already resized to `mask_prompt_size`.
            object_score_logits: (B, 1).
            is_mask_from_points: Outside training, store zeros and ones in place of probabilities.
            dtype: Of the result; None: ``memory_dtype``.
        """
        logits = mask_logits.to(torch.float32)
        is_hard = is_mask_from_points and not self.training
        masks = (logits > 0).to(torch.float32) if is_hard else logits.sigmoid()
        masks = masks * self.settings.sigmoid_scale_for_mem_enc + self.settings.sigmoid_bias_for_mem_enc
        side = features.coarse.shape[-1] * self.maskmem_backbone.mask_stride
        if masks.shape[-2:] != (side, side):
            masks = _resize(masks, side, antialias=True)
        memory = self.maskmem_backbone(features.coarse, masks.to(features.coarse.dtype))
        absent = (object_score_logits <= 0).to(memory.dtype)
        memory = memory + (absent * self.no_obj_embed_spatial)[..., None, None]
        return memory.to(self.memory_dtype if dtype is None else dtype)

    def without_memory(self, features: TrackerFeatures) -> Tensor:
        """What a frame without memory shows to the decoder, (1, C, G, G)."""
        if self.settings.num_maskmem == 0:
            return features.coarse
        return features.coarse + self.no_mem_embed.transpose(1, 2)[..., None]

    def condition(
        self, frame_idx: int, features: TrackerFeatures, bank: MemoryBank, num_frames: int, reverse: bool = False
    ) -> Tensor:
        """The frame as B objects see it through what the bank remembers of them, (B, C, G, G).

        Raises:
            ValueError: If the bank has nothing for this frame to read.
        """
        if self.settings.num_maskmem == 0:
            return features.coarse
        settings, with_future = self.settings, self.training
        memories = attended_memories(bank, frame_idx, settings, num_frames, reverse)
        pointers = attended_pointers(bank, frame_idx, settings, num_frames, reverse, with_future=with_future)
        if not memories and not pointers:
            raise ValueError(f"frame {frame_idx}: no memory to read; give a prompt on some frame first")
        return self.condition_on_memory(features, memories, pointers, num_frames)

    def condition_on_memory(
        self,
        features: TrackerFeatures,
        memories: Sequence[AttendedMemory],
        pointers: Sequence[AttendedPointer],
        num_frames: int,
    ) -> Tensor:
        """Memory attention to given records, (B, C, G, G).

        Args:
            features: Of the current frame.
            memories: From `attended_memories`.
            pointers: From `attended_pointers`.
            num_frames: Of the whole video.

        Raises:
            ValueError: If a record's memory was dropped or never made.
        """
        return self.transformer.encoder(features.coarse, self.memory_tokens(features, memories, pointers, num_frames))

    def memory_tokens(
        self,
        features: TrackerFeatures,
        memories: Sequence[AttendedMemory],
        pointers: Sequence[AttendedPointer],
        num_frames: int,
    ) -> MemoryTokens:
        """The tokens that `condition_on_memory` attends to."""
        weight = self.maskmem_tpos_enc
        grid_hw = (features.coarse.shape[-2], features.coarse.shape[-1])
        num_objects = (memories[0] if memories else pointers[0]).record.num_objects
        maps = []
        for frame_idx, record, _ in memories:
            if record.maskmem_features is None:
                raise ValueError(f"the memory of frame {frame_idx} was dropped or never made, and is needed now")
            maps.append(record.maskmem_features.to(weight.device, weight.dtype).flatten(2).transpose(1, 2))
        empty = weight.new_zeros(num_objects, 0, grid_hw[0] * grid_hw[1], weight.shape[-1])
        spatial = torch.stack(maps, dim=1) if maps else empty
        rows = self.maskmem_tpos_enc[[memory.temporal_index for memory in memories], 0]
        codes = self.memory_code(grid_hw).to(weight.dtype) + rows
        return MemoryTokens(spatial, codes, *self._pointer_tokens(pointers, num_objects, num_frames))

    def _pointer_tokens(
        self, pointers: Sequence[AttendedPointer], num_objects: int, num_frames: int
    ) -> tuple[Tensor, Tensor]:
        """Pointers cut into tokens, (B, n, Cm), and the codes of their positions in time, (n, Cm)."""
        weight = self.maskmem_tpos_enc
        mem_dim = weight.shape[-1]
        if not pointers:
            return weight.new_zeros(num_objects, 0, mem_dim), weight.new_zeros(0, mem_dim)
        stacked = torch.stack([p.record.obj_ptr.to(weight.device, weight.dtype) for p in pointers], dim=1)
        tokens = stacked.unflatten(-1, (-1, mem_dim)).flatten(1, 2)
        limit = max(max_object_pointers(self.settings, num_frames) - 1, 1)
        positions = torch.tensor([p.position / limit for p in pointers], device=weight.device)
        codes = self.obj_ptr_tpos_proj(temporal_code(positions, self.config.hidden_dim).to(weight.dtype))
        return tokens, codes.repeat_interleave(self.config.hidden_dim // mem_dim, dim=0)


def temporal_code(positions: Tensor, num_channels: int) -> Tensor:
    """Sines, then cosines, of positions in time at falling frequencies: (n,) -> float32 (n, num_channels)."""
    half = num_channels // 2
    exponents = torch.arange(half, device=positions.device, dtype=torch.float32) // 2 * 2 / half
    angles = positions.to(torch.float32)[:, None] / 10000.0**exponents
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _resize(maps: Tensor, size: int | tuple[int, int], antialias: bool = False) -> Tensor:
    size = (size, size) if isinstance(size, int) else size
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False, antialias=antialias)


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
    records = [*bank.cond.values(), *bank.non_cond.values()]
    if num_objects is None and not records:
        raise ValueError("num_objects is needed where there are neither prompts nor records")
    return records[0].num_objects if num_objects is None else num_objects
