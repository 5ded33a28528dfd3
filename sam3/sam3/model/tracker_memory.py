"""The tracker's memory: what is stored of a frame, and how the next frame reads it.

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
from sam3.model.memory import SimpleMaskEncoder
from sam3.model.memory_attention import MemoryAttention, MemoryTokens
from sam3.model.memory_bank import (
    AttendedMemory,
    AttendedPointer,
    MemoryBank,
    attended_memories,
    attended_pointers,
    good_frames,
    max_object_pointers,
)
from sam3.sam.heads import SamHeads
from sam3.sam.layers import MLP
from sam3.tracker_config import TrackerConfig


class TrackerFeatures(NamedTuple):
    """What the tracker reads of a frame, before any memory."""

    fine: Tensor
    """Skip map at 4 G, (1, C / 8, 4 G, 4 G)."""
    middle: Tensor
    """Skip map at 2 G, (1, C / 4, 2 G, 2 G)."""
    coarse: Tensor
    """Coarse map without ``no_mem_embed``, (1, C, G, G)."""


class _TransformerWrapper(nn.Module):
    """Gives the memory attention its released name, ``transformer.encoder``."""

    def __init__(self, encoder: MemoryAttention) -> None:
        super().__init__()
        self.encoder = encoder


class TrackerMemory(SamHeads):
    """SAM heads, memory encoder and memory attention; `sam3.model.sam3_tracker.Sam3Tracker` makes masks with them.

    Attributes:
        config: The whole model's description; ``config.tracker`` holds the memory's.
        memory_dtype: Spatial memories are stored in it; the released tracker always uses bfloat16.
    """

    def __init__(self, config: Sam3Config, memory_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(config)
        dim, mem_dim = config.hidden_dim, config.tracker.mem_dim
        self.config = config
        self.settings = config.tracker
        self.memory_dtype = memory_dtype
        self._build_memory_attention(config)
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

    @property
    def settings(self) -> TrackerConfig:
        """``config.tracker``, or what took its place.

        Raises:
            ValueError: On setting rules that need more rows than the weights' temporal table has, or other widths.
        """
        return self._settings

    @settings.setter
    def settings(self, settings: TrackerConfig) -> None:
        own = self.config.tracker
        if settings.num_maskmem > own.num_maskmem:
            raise ValueError(
                f"tracker: num_maskmem {settings.num_maskmem} needs as many rows of the temporal table, of which the "
                f"weights hold {own.num_maskmem}: for a larger memory set memory_frames"
            )
        if settings.mem_dim != own.mem_dim:
            raise ValueError(f"tracker: mem_dim {settings.mem_dim} does not fit the weights, which have {own.mem_dim}")
        self._settings = settings

    def _build_memory_attention(self, config: Sam3Config) -> None:
        """What `attend` works with."""
        self.transformer = _TransformerWrapper(MemoryAttention(config))

    def frame_features(self, sam2_backbone_out: dict[str, Any]) -> TrackerFeatures:
        """Narrow the second neck's maps, once per frame.

        Args:
            sam2_backbone_out: From ``backbone.forward_image``: ``backbone_fpn`` holds three maps, finest first.
        """
        fine, middle, coarse = sam2_backbone_out["backbone_fpn"]
        return TrackerFeatures(self.sam_mask_decoder.conv_s0(fine), self.sam_mask_decoder.conv_s1(middle), coarse)

    @property
    def memory_mask_size(self) -> int:
        """Side of the masks that the memory encoder reads: 1152 for ``sam3``."""
        return self.config.grid_size * self.maskmem_backbone.mask_stride

    def encode_memory(
        self,
        features: TrackerFeatures,
        mask_logits: Tensor,
        object_score_logits: Tensor,
        is_mask_from_points: bool,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The spatial memory of B objects on a frame, as `compress` leaves it.

        Args:
            features: Of the frame.
            mask_logits: (B, 1, h, w): squashed first, then resized to the encoder's size. The released tracker gives
                `high_res` masks; its text-prompted model gives logits already resized to `memory_mask_size`.
            object_score_logits: (B, 1).
            is_mask_from_points: Outside training, store zeros and ones in place of probabilities.
            dtype: Of the result; None: ``memory_dtype``.
        """
        logits = mask_logits.to(torch.float32)
        side = features.coarse.shape[-1] * self.maskmem_backbone.mask_stride
        if self.settings.hugging_face_rules:
            logits = resize(logits, side, antialias=True)
        is_hard = is_mask_from_points and not self.training
        masks = (logits > 0).to(torch.float32) if is_hard else logits.sigmoid()
        masks = masks * self.settings.sigmoid_scale_for_mem_enc + self.settings.sigmoid_bias_for_mem_enc
        if masks.shape[-2:] != (side, side):
            masks = resize(masks, side, antialias=True)
        memory = self.maskmem_backbone(features.coarse, masks.to(features.coarse.dtype))
        absent = (object_score_logits <= 0).to(memory.dtype)
        memory = memory + (absent * self.no_obj_embed_spatial)[..., None, None]
        return self.compress(memory).to(self.memory_dtype if dtype is None else dtype)

    def compress(self, memory_bchw: Tensor) -> Tensor:
        """What is stored of memories (B, Cm, G, G): the maps themselves."""
        return memory_bchw

    def stored_tokens(self, stored: Tensor) -> Tensor:
        """The tokens of what `compress` returned, (B, L, Cm)."""
        return stored.flatten(2).transpose(1, 2)

    def token_codes(self, grid_hw: tuple[int, int]) -> Tensor:
        """Position codes of the tokens of a frame with that grid, (L, Cm)."""
        return self.memory_code(grid_hw)

    def attend(self, features: TrackerFeatures, memory: MemoryTokens) -> Tensor:
        """The frame as B objects see it through their memories, (B, C, G, G)."""
        return self.transformer.encoder(features.coarse, memory)

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
        settings = self.settings
        if not settings.use_memory_selection or settings.shared_iou_score:
            return self._condition_objects(None, frame_idx, features, bank, num_frames, reverse)
        groups: dict[tuple[int, ...], list[int]] = {}
        for row in range(bank.num_objects):
            good = good_frames(bank, frame_idx, settings, num_frames, reverse, row)
            groups.setdefault(tuple(good), []).append(row)
        order = [row for rows in groups.values() for row in rows]
        parts = [
            self._condition_objects(rows, frame_idx, features, bank, num_frames, reverse)
            for rows in groups.values() or [None]
        ]
        return torch.cat(parts)[torch.tensor(order, device=features.coarse.device).argsort()]

    def _condition_objects(
        self,
        rows: list[int] | None,
        frame_idx: int,
        features: TrackerFeatures,
        bank: MemoryBank,
        num_frames: int,
        reverse: bool,
    ) -> Tensor:
        """`condition` of the objects in some rows, or of all, which read the same frames."""
        where = (bank, frame_idx, self.settings, num_frames, reverse, 0 if rows is None else rows[0])
        memories, pointers = attended_memories(*where), attended_pointers(*where, with_future=self.training)
        if not memories and not pointers:
            raise ValueError(f"frame {frame_idx}: no memory to read; give a prompt on some frame first")
        if rows is not None:
            memories = [memory._replace(record=memory.record.select(rows)) for memory in memories]
            pointers = [pointer._replace(record=pointer.record.select(rows)) for pointer in pointers]
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
        return self.attend(features, self.memory_tokens(features, memories, pointers, num_frames))

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
        for frame_idx, record, *_ in memories:
            if record.maskmem_features is None:
                raise ValueError(f"the memory of frame {frame_idx} was dropped or never made, and is needed now")
            maps.append(self.stored_tokens(record.maskmem_features.to(weight.device, weight.dtype)))
        places = self.token_codes(grid_hw).to(weight.dtype)
        spatial = torch.stack(maps, dim=1) if maps else weight.new_zeros(num_objects, 0, *places.shape)
        rows = self.maskmem_tpos_enc[[memory.temporal_index for memory in memories], 0]
        codes = places + rows
        bias = None
        if self.settings.memory_decay:
            bias = -self.settings.memory_decay * torch.tensor([float(m.age) for m in memories], device=weight.device)
        return MemoryTokens(
            spatial,
            codes,
            *self._pointer_tokens(pointers, num_objects, num_frames),
            frame_bias=bias,
            num_fixed=sum(memory.age == 0 for memory in memories),
            top_k=self.settings.top_k_memories,
        )

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


def resize(maps: Tensor, size: int | tuple[int, int], antialias: bool = False) -> Tensor:
    """Bilinear, without corner alignment, to a square or to (H, W)."""
    size = (size, size) if isinstance(size, int) else size
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False, antialias=antialias)
