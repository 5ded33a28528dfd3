"""The resampler that turns a frame's dense memory into a few tokens.

After Perceiver (https://arxiv.org/abs/2103.03206); the windows are those of EdgeTAM's 2-D spatial perceiver
(https://arxiv.org/abs/2501.07256). Names and formulas are those of the published EfficientSAM3 stage-2 checkpoints.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3.efficient_memory_config import EfficientMemoryConfig
from sam3.model.grid_tables import SineTable


class LatentAttention(nn.Module):
    """Latents read tokens; queries, keys and values have no bias."""

    def __init__(self, dim: int, config: EfficientMemoryConfig) -> None:
        super().__init__()
        inner = config.perceiver_heads * config.perceiver_head_dim
        self.num_heads = config.perceiver_heads
        self.attention_dropout = config.attention_dropout
        self.norm_x = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)
        has_positions = config.position_on_keys and inner != dim
        self.to_pos = nn.Linear(dim, inner, bias=False) if has_positions else nn.Identity()
        """Brings position codes to the width of keys; nothing where they have it."""
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, latents_bnc: Tensor, x_blc: Tensor, codes: Tensor | None) -> Tensor:
        """
        Args:
            latents_bnc: (B, N, C).
            x_blc: What they read, (B, L, C).
            codes: Position codes added to keys and values, (L, C) or (B, L, C); None for none.

        Returns:
            What is added to the latents, (B, N, C).
        """
        q = self.to_q(self.norm_latents(latents_bnc))
        k, v = self.to_kv(self.norm_x(x_blc)).chunk(2, dim=-1)
        if codes is not None:
            placed = self.to_pos(codes.to(k.dtype))
            k, v = k + placed, v + placed
        return self.dropout(_attend(self, q, k, v))


class LatentSelfAttention(nn.Module):
    """Latents read each other."""

    def __init__(self, dim: int, config: EfficientMemoryConfig) -> None:
        super().__init__()
        inner = config.perceiver_heads * config.perceiver_head_dim
        self.num_heads = config.perceiver_heads
        self.attention_dropout = config.attention_dropout
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, latents_bnc: Tensor) -> Tensor:
        """What is added to the latents, (B, N, C)."""
        normed = self.norm(latents_bnc)
        k, v = self.to_kv(normed).chunk(2, dim=-1)
        return self.dropout(_attend(self, self.to_q(normed), k, v))


def _attend(layer: LatentAttention | LatentSelfAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    dropout = layer.attention_dropout if layer.training else 0.0
    attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    return layer.to_out(attended.transpose(1, 2).flatten(2))


def _feed_forward(dim: int, expansion: int) -> nn.Sequential:
    wide = expansion * dim
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, wide, bias=False), nn.GELU(), nn.Linear(wide, dim, bias=False)
    )


class PerceiverLayer(nn.Module):
    """Latents read the memory, then each other; an MLP after each."""

    def __init__(self, dim: int, config: EfficientMemoryConfig) -> None:
        super().__init__()
        self.attn = LatentAttention(dim, config)
        self.ff = _feed_forward(dim, config.perceiver_expansion)
        self.self_attn = LatentSelfAttention(dim, config)
        self.self_ff = _feed_forward(dim, config.perceiver_expansion)

    def forward(self, latents_bnc: Tensor, x_blc: Tensor, codes: Tensor | None) -> Tensor:
        latents_bnc = latents_bnc + self.attn(latents_bnc, x_blc, codes)
        latents_bnc = latents_bnc + self.ff(latents_bnc)
        latents_bnc = latents_bnc + self.self_attn(latents_bnc)
        return latents_bnc + self.self_ff(latents_bnc)


class PerceiverResampler(nn.Module):
    """A dense memory to ``num_latents`` tokens that read all of it and ``num_latents_2d`` that read a window each.

    A window's token knows its place by its window. Of the others, nothing but the position codes on keys and values
    says where what they hold was seen.

    Attributes:
        config: Sizes and rules.
    """

    latents: nn.Parameter | None
    latents_2d: nn.Parameter | None

    def __init__(self, dim: int, grid_size: int, config: EfficientMemoryConfig) -> None:
        """
        Args:
            dim: Channels of the memory and of its tokens.
            grid_size: Side of the memory of the model's own images; others work too.
            config: With latents of at least one kind.

        Raises:
            ValueError: If there are no latents.
        """
        super().__init__()
        if not config.is_compressed:
            raise ValueError("a resampler needs latents: num_latents and num_latents_2d are both 0")
        self.config = config
        self.latents = nn.Parameter(torch.empty(config.num_latents, dim)) if config.num_latents else None
        self.latents_2d = nn.Parameter(torch.empty(config.num_latents_2d, dim)) if config.num_latents_2d else None
        for latents in (self.latents, self.latents_2d):
            if latents is not None:
                nn.init.normal_(latents)
        self.layers = nn.ModuleList(PerceiverLayer(dim, config) for _ in range(config.perceiver_depth))
        self.norm = nn.LayerNorm(dim)
        self.position_code = SineTable(dim, grid_size)
        self.window_code = SineTable(dim, max(config.window_grid, 1))

    def forward(self, memory_bchw: Tensor) -> Tensor:
        """Tokens of B memories, the global ones first: (B, C, H, W) -> (B, N, C)."""
        parts = []
        if self.latents is not None:
            parts.append(self._read_everything(self.latents, memory_bchw))
        if self.latents_2d is not None:
            parts.append(self._read_windows(self.latents_2d, memory_bchw))
        return torch.cat(parts, dim=1)

    def latent_codes(self) -> Tensor:
        """Position codes of the tokens, (N, C): those of their windows; zeros for tokens that have no place."""
        config, grid = self.config, self.config.window_grid
        table = self.window_code((grid, grid)) if config.num_latents_2d else self.window_code.table[:0]
        if not config.position_on_latents_2d:
            table = torch.zeros_like(table)
        return torch.cat([table.new_zeros(config.num_latents, table.shape[-1]), table])

    def _read_everything(self, latents: Tensor, memory_bchw: Tensor) -> Tensor:
        size_hw = (memory_bchw.shape[-2], memory_bchw.shape[-1])
        codes = self.position_code(size_hw) if self.config.position_on_keys else None
        x = memory_bchw.flatten(2).transpose(1, 2)
        return self._resample(latents.expand(len(x), -1, -1), x, codes)

    def _read_windows(self, latents: Tensor, memory_bchw: Tensor) -> Tensor:
        """Each latent reads its own window; the map is first resized to a multiple of their grid, if it is none."""
        grid, batch = self.config.window_grid, len(memory_bchw)
        height, width = (max(side // grid, 1) * grid for side in memory_bchw.shape[-2:])
        if memory_bchw.shape[-2:] != (height, width):
            memory_bchw = F.interpolate(memory_bchw, (height, width), mode="bilinear", align_corners=False)
        codes = None
        if self.config.position_on_keys:
            table = self.position_code((height, width)).T.unflatten(1, (height, width))[None]
            codes = _windows(table, grid).repeat(batch, 1, 1)
        own = latents.expand(batch, -1, -1).flatten(0, 1)[:, None]
        return self._resample(own, _windows(memory_bchw, grid), codes).view(batch, grid * grid, -1)

    def _resample(self, latents_bnc: Tensor, x_blc: Tensor, codes: Tensor | None) -> Tensor:
        for layer in self.layers:
            latents_bnc = cast(PerceiverLayer, layer)(latents_bnc, x_blc, codes)
        return self.norm(latents_bnc)


def _windows(maps_bchw: Tensor, grid: int) -> Tensor:
    """(B, C, H, W) -> (B * grid^2, H W / grid^2, C): the windows of a grid, row-major, and so are their cells."""
    cells = maps_bchw.unflatten(2, (grid, -1)).unflatten(4, (grid, -1))  # B C gy y gx x
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)
