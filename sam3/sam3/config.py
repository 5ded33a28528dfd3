"""One model description: frozen dataclasses that hold every size the modules need.

Two presets exist. ``sam3`` is the released model (numbers from Meta's SAM 3 package 0.1.4); ``tiny`` has the same
topology at a size that trains on two CPU cores. A student is described by ``Sam3Config.student``: it replaces the trunk
and nothing else, so ``Sam3Config.trunk`` then still describes the teacher whose features the student imitates.

A description travels inside every checkpoint as plain types: ``Sam3Config.to_dict`` and ``Sam3Config.from_dict``.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from typing import Any

from sam3.efficient_memory_config import EfficientMemoryConfig, efficient_memory_preset
from sam3.tracker_config import MemoryAttentionConfig, MemoryEncoderConfig, TrackerConfig


@dataclass(frozen=True)
class TrunkConfig:
    """The ViT image trunk (windowed and global blocks, rotary positions)."""

    patch_size_px: int = 14
    """Side of a patch, which is also the stride of the feature grid."""
    pretrain_img_size_px: int = 336
    """Image side the absolute position grid was made for; the grid is tiled, never interpolated."""
    embed_dim: int = 1024
    """Channels of the trunk's output, and of a teacher embedding."""
    depth: int = 32
    num_heads: int = 16
    mlp_ratio: float = 4.625
    window_size: int = 24
    """Side of an attention window in tokens; also the side that global rotary positions are compressed into."""
    global_blocks: tuple[int, ...] = (7, 15, 23, 31)
    """Indices of the blocks that attend over the whole grid; the last block is one of them."""
    rope_theta: float = 10000.0
    drop_path_rate: float = 0.1
    """Stochastic depth at the last block, rising linearly from 0 at the first; training only."""

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads or (self.embed_dim // self.num_heads) % 4:
            raise ValueError(
                f"trunk: embed_dim {self.embed_dim} over num_heads {self.num_heads} must give a head size divisible "
                "by 4 (rotary positions use pairs of channels for x and for y)"
            )
        if self.pretrain_img_size_px % self.patch_size_px:
            raise ValueError(
                f"trunk: pretrain_img_size_px {self.pretrain_img_size_px} is not a multiple of "
                f"patch_size_px {self.patch_size_px}"
            )
        if not self.global_blocks or max(self.global_blocks) != self.depth - 1 or min(self.global_blocks) < 0:
            raise ValueError(
                f"trunk: global_blocks {self.global_blocks} must lie in 0..{self.depth - 1} and hold the last block, "
                "whose output is the embedding"
            )

    @property
    def mlp_dim(self) -> int:
        """Hidden width of a block's MLP."""
        return int(self.embed_dim * self.mlp_ratio)


@dataclass(frozen=True)
class NeckConfig:
    """The simple feature pyramid, built twice: ``convs`` for the detector, ``sam2_convs`` for SAM heads and tracker."""

    scales: tuple[float, ...] = (4.0, 2.0, 1.0, 0.5)
    """Resolution of each level relative to the trunk's grid."""
    scalp: int = 1
    """Coarsest levels that are dropped before anything reads them."""


@dataclass(frozen=True)
class SamHeadsConfig:
    """Prompt encoder and mask decoder (the part that SAM 3 inherits from SAM 2)."""

    mask_in_channels: int = 16
    """Channels inside the mask prompt's downscaling."""
    transformer_depth: int = 2
    transformer_num_heads: int = 8
    transformer_mlp_dim: int = 2048
    attention_downsample_rate: int = 2
    """Factor by which cross-attention narrows its inner width."""
    num_multimask_outputs: int = 3
    """Candidates for an ambiguous prompt, beside the single-mask token."""
    head_depth: int = 3
    head_hidden_dim: int = 256
    """Hidden width of the IoU and object-score heads."""
    dynamic_multimask_stability_delta: float = 0.05
    dynamic_multimask_stability_thresh: float = 0.98


@dataclass(frozen=True)
class TextConfig:
    """The causal text transformer, and the linear map to ``hidden_dim`` behind it."""

    vocab_size: int = 49408
    context_length: int = 32
    """Tokens of one text, start and end included; longer texts are cut."""
    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_ratio: float = 4.0
    projection_dim: int = 512
    """Columns of ``text_projection``, which files hold and nothing reads."""


@dataclass(frozen=True)
class GeometryEncoderConfig:
    """The encoder of box and point prompts."""

    num_layers: int = 3
    num_heads: int = 8
    mlp_dim: int = 2048
    roi_size: int = 7
    """Side in bins of what is pooled out of a box."""
    dropout: float = 0.1


@dataclass(frozen=True)
class FusionEncoderConfig:
    """The encoder in which image tokens read the prompt."""

    num_layers: int = 6
    num_heads: int = 8
    mlp_dim: int = 2048
    dropout: float = 0.1


@dataclass(frozen=True)
class DecoderConfig:
    """The DETR decoder: object queries, a presence token, boxes refined layer by layer."""

    num_layers: int = 6
    num_queries: int = 200
    num_heads: int = 8
    mlp_dim: int = 2048
    dropout: float = 0.1


@dataclass(frozen=True)
class ScoringConfig:
    """Class scores: dot products of queries with the pooled prompt."""

    mlp_dim: int = 2048
    max_logit: float = 12.0
    """Scores are clamped to plus and minus this."""
    dropout: float = 0.1


@dataclass(frozen=True)
class SegmentationHeadConfig:
    """Pixel decoder, instance masks and the semantic mask of the detector."""

    num_heads: int = 8
    norm_groups: int = 8
    """Groups of the pixel decoder's GroupNorm."""
    mask_embed_depth: int = 3


@dataclass(frozen=True)
class StudentConfig:
    """A light backbone with a projection head in place of the trunk."""

    backbone: str
    """A name registered in ``sam3.backbones``, e.g. ``repvit_m1_1``."""
    fuse_stride16: bool = False
    """Fuse the last two stages at stride 16 instead of reading the last (stride 32) alone."""
    fused: bool = False
    """BatchNorm and parallel branches are folded into convolutions: for deployment, cannot be trained further."""


@dataclass(frozen=True)
class Sam3Config:
    """Sizes of a whole model. ``image_size_px`` and ``hidden_dim`` are shared by all components."""

    name: str = "sam3"
    image_size_px: int = 1008
    """Side of the square input."""
    hidden_dim: int = 256
    """Channels of neck, prompt tokens and decoders."""
    trunk: TrunkConfig = field(default_factory=TrunkConfig)
    neck: NeckConfig = field(default_factory=NeckConfig)
    sam_heads: SamHeadsConfig = field(default_factory=SamHeadsConfig)
    text: TextConfig = field(default_factory=TextConfig)
    geometry_encoder: GeometryEncoderConfig = field(default_factory=GeometryEncoderConfig)
    fusion_encoder: FusionEncoderConfig = field(default_factory=FusionEncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    segmentation_head: SegmentationHeadConfig = field(default_factory=SegmentationHeadConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    student: StudentConfig | None = None
    efficient_memory: EfficientMemoryConfig | None = None
    """The compressed memory, in place of the released memory attention; None: the released one."""

    def __post_init__(self) -> None:
        if self.image_size_px % self.trunk.patch_size_px:
            raise ValueError(
                f"image_size_px {self.image_size_px} is not a multiple of patch_size_px {self.trunk.patch_size_px}"
            )
        if self.hidden_dim % self.tracker.mem_dim:
            raise ValueError(
                f"hidden_dim {self.hidden_dim} is not a multiple of the tracker's mem_dim {self.tracker.mem_dim}: an "
                "object pointer is cut into tokens of that width"
            )

    @property
    def grid_size(self) -> int:
        """Side of the trunk's feature grid: 72 for ``sam3``."""
        return self.image_size_px // self.trunk.patch_size_px

    @property
    def embedding_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one teacher embedding: (1024, 72, 72) for ``sam3``."""
        return (self.trunk.embed_dim, self.grid_size, self.grid_size)

    @property
    def low_res_mask_size(self) -> int:
        """Side of the mask decoder's logits: 288 for ``sam3``."""
        return self.grid_size * int(max(self.neck.scales))

    def replace(self, **changes: Any) -> Sam3Config:
        """A copy with some fields changed (``dataclasses.replace``)."""
        return dataclasses.replace(self, **changes)

    def with_efficient_memory(
        self, memory: EfficientMemoryConfig | None = None, compat: str | None = None
    ) -> Sam3Config:
        """A copy with a compressed memory: the given one, else the preset that fits (see `efficient_memory_preset`)."""
        return self.replace(efficient_memory=memory or efficient_memory_preset(self.name, compat))

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars, so that it can be stored in JSON and in a weights-only checkpoint."""
        return _to_plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Sam3Config:
        """Inverse of `to_dict`.

        A record from a version that knew fewer components lacks their fields: they come from the preset that the
        record is named after, and only for another name from ``sam3``.

        Raises:
            ValueError: If a field is unknown; the message names it and the known ones.
        """
        preset = PRESETS.get(str(data.get("name")))
        if preset is not None:
            data = _with_defaults(data, preset.to_dict())
        return _from_plain(cls, data, "model description")

    @classmethod
    def preset(cls, name: str) -> Sam3Config:
        """The preset called ``name``.

        Raises:
            ValueError: If there is no such preset.
        """
        try:
            return PRESETS[name]
        except KeyError:
            raise ValueError(f"unknown model preset {name!r}: choose one of {sorted(PRESETS)}") from None


def _with_defaults(data: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """``data`` with what it lacks taken from ``defaults``, at every level."""
    filled = {**defaults, **data}
    for key, value in data.items():
        if isinstance(value, dict) and isinstance(defaults.get(key), dict):
            filled[key] = _with_defaults(value, defaults[key])
    return filled


def _to_plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_plain(item) for item in value]
    return value


def _from_plain(cls: Any, data: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; known are {sorted(hints)}")
    values: dict[str, Any] = {}
    for name, value in data.items():
        nested = [t for t in (hints[name], *typing.get_args(hints[name])) if dataclasses.is_dataclass(t)]
        if nested and isinstance(value, dict):
            values[name] = _from_plain(nested[0], value, f"{where}.{name}")
        elif isinstance(value, list):
            values[name] = tuple(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where}.{name}: {value} is not finite")
        else:
            values[name] = value
    return cls(**values)


PRESETS: dict[str, Sam3Config] = {
    "sam3": Sam3Config(),
    "tiny": Sam3Config(
        name="tiny",
        image_size_px=252,
        hidden_dim=64,
        trunk=TrunkConfig(
            pretrain_img_size_px=84,
            embed_dim=128,
            depth=6,
            num_heads=4,
            mlp_ratio=3.0,
            window_size=6,
            global_blocks=(2, 5),
            drop_path_rate=0.0,
        ),
        sam_heads=SamHeadsConfig(transformer_num_heads=4, transformer_mlp_dim=256, head_hidden_dim=64),
        text=TextConfig(width=16, depth=2, num_heads=2, projection_dim=16),
        geometry_encoder=GeometryEncoderConfig(num_layers=2, num_heads=4, mlp_dim=128, roi_size=5, dropout=0.0),
        fusion_encoder=FusionEncoderConfig(num_layers=3, num_heads=4, mlp_dim=128, dropout=0.0),
        decoder=DecoderConfig(num_layers=3, num_queries=24, num_heads=4, mlp_dim=128, dropout=0.0),
        scoring=ScoringConfig(mlp_dim=128, dropout=0.0),
        segmentation_head=SegmentationHeadConfig(num_heads=4),
        tracker=TrackerConfig(
            mem_dim=16,
            memory_encoder=MemoryEncoderConfig(mask_channels=(4, 8, 16, 32)),
            memory_attention=MemoryAttentionConfig(num_layers=2, mlp_dim=128, dropout=0.0),
        ),
    ),
}
