"""Sizes and rules of the compressed memory that stage 2 trains: part of `sam3.config.Sam3Config`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

ATTENTIONS = ("softmax", "linear")
INITIAL_FRAMES = ("no_mem_embed", "zero_token")
COMPATIBILITIES = ("published",)


@dataclass(frozen=True)
class EfficientMemoryConfig:
    """A resampler that turns a frame's dense memory into a few tokens, and the light attention that reads them.

    The defaults are those of this project; `published` gives what the published training code really builds.
    """

    num_latents: int = 64
    """Tokens of a frame that may each read all of its memory; ``sam3`` has 5,184 dense ones, 81 times as many."""
    num_latents_2d: int = 0
    """Tokens that each read one window of a square grid of windows; a square number, 0 for none."""
    perceiver_depth: int = 2
    perceiver_heads: int = 1
    perceiver_head_dim: int = 64
    perceiver_expansion: int = 4
    """Width of the resampler's inner layers in multiples of ``mem_dim``."""
    hidden_dropout: float = 0.0
    """Of what the resampler's attention returns; in training only, as the next."""
    attention_dropout: float = 0.0
    position_on_keys: bool = True
    """Add position codes to what the resampler reads, keys and values, so that its tokens know where things are."""
    position_on_latents_2d: bool = True
    """Give the windows' tokens the position codes of their windows."""
    num_layers: int = 2
    num_heads: int = 8
    mlp_dim: int = 1024
    dropout: float = 0.0
    position_scale: float = 0.1
    """Weight of the position code that is added to the features at the input."""
    attention: str = "softmax"
    """One of `ATTENTIONS`: ``linear`` replaces both attentions by a feature map whose cost grows with the number of
    tokens and not with its square."""
    pool_size: int = 1
    """Side of the blocks whose keys and values are averaged in a dense memory; 1: none. For uncompressed memory alone,
    whose tokens lie on a grid."""
    initial_frames: str = "no_mem_embed"
    """What a frame without memory shows to the decoder, one of `INITIAL_FRAMES`: the features plus the embedding that
    the decoder knows, or (as published) the attention's answer to one token of zeros."""

    def __post_init__(self) -> None:
        for name in ("perceiver_depth", "perceiver_heads", "perceiver_head_dim", "perceiver_expansion"):
            self._require(name, 1)
        for name in ("num_layers", "num_heads", "mlp_dim", "pool_size"):
            self._require(name, 1)
        for name in ("num_latents", "num_latents_2d"):
            self._require(name, 0)
        if math.isqrt(self.num_latents_2d) ** 2 != self.num_latents_2d:
            raise ValueError(
                f"efficient memory: num_latents_2d {self.num_latents_2d} must be a square number (1, 4, 16, 64, 256): "
                "its windows form a square"
            )
        for name, known in (("attention", ATTENTIONS), ("initial_frames", INITIAL_FRAMES)):
            if getattr(self, name) not in known:
                raise ValueError(f"efficient memory: {name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        for name in ("hidden_dropout", "attention_dropout", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"efficient memory: {name} {getattr(self, name)} must be in 0..1, without 1")
        if self.pool_size > 1 and self.is_compressed:
            raise ValueError(
                f"efficient memory: pool_size {self.pool_size} averages neighbours on a grid, and {self.num_tokens} "
                "compressed tokens lie on none: set num_latents and num_latents_2d to 0, or pool_size to 1"
            )

    def _require(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            raise ValueError(f"efficient memory: {name} {getattr(self, name)} must be at least {least}")

    @property
    def num_tokens(self) -> int:
        """Tokens that are stored of a frame; 0: as many as the grid has cells, uncompressed."""
        return self.num_latents + self.num_latents_2d

    @property
    def is_compressed(self) -> bool:
        """Whether there is a resampler."""
        return self.num_tokens > 0

    @property
    def window_grid(self) -> int:
        """Windows along one side."""
        return math.isqrt(self.num_latents_2d)

    def replace(self, **changes: Any) -> EfficientMemoryConfig:
        """A copy with some fields changed (``dataclasses.replace``)."""
        return dataclasses.replace(self, **changes)

    def published(self) -> EfficientMemoryConfig:
        """The same widths with the rules of the published code, whose checkpoints then load: 320 tokens of a frame and
        not 64, no positions in the resampler or on its tokens, dropout, one token of zeros on frames without memory.
        """
        return self.replace(
            num_latents=64,
            num_latents_2d=256,
            hidden_dropout=0.1,
            attention_dropout=0.05,
            position_on_keys=False,
            position_on_latents_2d=False,
            initial_frames="zero_token",
        )


EFFICIENT_MEMORY_PRESETS = {
    "sam3": EfficientMemoryConfig(),
    "tiny": EfficientMemoryConfig(perceiver_head_dim=16, num_heads=4, mlp_dim=128),
}
"""By the name of the model description."""


def efficient_memory_preset(model: str, compat: str | None = None) -> EfficientMemoryConfig:
    """The compressed memory that fits a model.

    Args:
        model: Name of a model description; those without a preset of their own get that of ``sam3``.
        compat: ``published`` for the published code's rules; None for this project's.

    Raises:
        ValueError: If ``compat`` is unknown.
    """
    memory = EFFICIENT_MEMORY_PRESETS.get(model, EFFICIENT_MEMORY_PRESETS["sam3"])
    if compat is None:
        return memory
    if compat not in COMPATIBILITIES:
        raise ValueError(f"compat {compat!r} is not one of {', '.join(COMPATIBILITIES)}, or None")
    return memory.published()
