"""Sizes and rules of the tracker's memory: part of `sam3.config.Sam3Config`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class MemoryEncoderConfig:
    """The encoder of a frame and its mask into a memory."""

    mask_channels: tuple[int, ...] = (4, 16, 64, 256)
    """Channels behind each convolution of stride 2 on the mask; their number sets the mask's size, 2^n cells."""
    fuser_layers: int = 2
    fuser_expansion: int = 4
    """Width of a fuser block's inner layer in multiples of ``hidden_dim``."""


@dataclass(frozen=True)
class MemoryAttentionConfig:
    """The layers in which the current frame reads itself and the memory."""

    num_layers: int = 4
    num_heads: int = 1
    mlp_dim: int = 2048
    rope_theta: float = 10000.0
    dropout: float = 0.1
    position_scale: float = 0.1
    """Weight of the position code that is added to the features at the input."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "mlp_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"memory attention: {name} {getattr(self, name)} must be at least 1")


MEMORY_FRAMES_PRESETS = (8, 12, 16)
"""Larger memories than the released 6 recent frames, for `TrackerConfig.memory_frames`."""


@dataclass(frozen=True)
class TrackerConfig:
    """The memory of the tracker: what is stored of a frame, and which frames are read again.

    The last four fields are options that the released tracker does not have; they need no other weights.
    """

    mem_dim: int = 64
    """Channels of a spatial memory; an object pointer is cut into tokens of this width."""
    num_maskmem: int = 7
    """Rows of the temporal table in the weights: one for prompted frames and one per recent frame. 0: no memory."""
    max_cond_frames_in_attn: int = 4
    """Prompted frames that are read at most."""
    keep_first_cond_frame: bool = False
    """The earliest prompted frame is always among them."""
    max_obj_ptrs_in_encoder: int = 16
    multimask_min_pt_num: int = 0
    multimask_max_pt_num: int = 1
    """Three candidates are made for frames with this many points, the single mask for others."""
    memory_temporal_stride: int = 1
    """Distance of recent frames in the memory, but for the adjacent one, which is always read."""
    sigmoid_scale_for_mem_enc: float = 20.0
    sigmoid_bias_for_mem_enc: float = -10.0
    """A mask enters the memory as scale * probability + bias."""
    hugging_face_rules: bool = False
    """Do what Hugging Face's implementation does where it differs from the released tracker, for comparisons: masks are
    brought to the memory encoder's size before they are squashed, mask prompts have the size of the model input, and
    their pointer is that of the best of three candidates."""
    use_memory_selection: bool = False
    """Read recent frames by their predicted quality, not by their distance alone."""
    mf_threshold: float = 0.01
    """Effective IoU above which a frame is good enough for that."""
    shared_iou_score: bool = True
    """The quality of a frame is one number for all objects that are tracked together, as released; otherwise each
    object selects its own frames, and results do not depend on which other objects are tracked."""
    memory_encoder: MemoryEncoderConfig = field(default_factory=MemoryEncoderConfig)
    memory_attention: MemoryAttentionConfig = field(default_factory=MemoryAttentionConfig)
    memory_frames: int | None = None
    """Recent frames that are read; None: the released number, ``num_maskmem`` - 1. Larger ones (presets 8, 12, 16)
    give frames beyond the temporal table its last recent row. Cost at the ``sam3`` preset: each frame more is 0.66 MB
    of bfloat16 memory per object, and 5,184 keys more in the cross-attention, whose time grows in proportion."""
    memory_decay: float = 0.0
    """lambda of a bias -lambda * age on the attention logits of recent memories, age in frames; prompted frames and
    object pointers do not age. Cost: the attention takes a bias, which rules out the fastest kernels of CUDA."""
    top_k_memories: int | None = None
    """Read only this many of the recent memories: those which the current frame attends to most, by an estimate in the
    first layer on a coarse grid, for each object. Prompted frames are always read. Cost: the estimate, below 1% of the
    attention; saves the attention to the frames left out."""

    def __post_init__(self) -> None:
        if self.num_maskmem < 0 or self.num_maskmem == 1:
            raise ValueError(f"tracker: num_maskmem {self.num_maskmem} must be 0 (no memory) or at least 2")
        for name in ("max_cond_frames_in_attn", "max_obj_ptrs_in_encoder", "memory_temporal_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"tracker: {name} {getattr(self, name)} must be at least 1")
        for name in ("memory_frames", "top_k_memories"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"tracker: {name} {value} must be a whole number of at least 1, or None")
        if not 0 <= self.memory_decay < math.inf:
            raise ValueError(f"tracker: memory_decay {self.memory_decay} must be finite and not negative")
        for name in ("memory_frames", "memory_decay", "top_k_memories"):
            value = getattr(self, name)
            if self.num_maskmem == 0 and value:
                raise ValueError(f"tracker: {name} {value} has no effect with num_maskmem 0, which is no memory")

    @property
    def num_recent_frames(self) -> int:
        """Recent frames that are read: 6 as released."""
        return max(self.num_maskmem - 1, 0) if self.memory_frames is None else self.memory_frames

    def temporal_index(self, rel: int) -> int:
        """Row of the temporal table for the ``rel``-th recent frame (1: the adjacent one)."""
        return min(rel - 1, self.num_maskmem - 2)

    def replace(self, **changes: Any) -> TrackerConfig:
        """A copy with some fields changed (``dataclasses.replace``)."""
        return dataclasses.replace(self, **changes)
