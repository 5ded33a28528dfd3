"""The light memory attention: fewer layers than the released one, sine codes in place of rotary positions.

Names and formulas are those of the published EfficientSAM3 stage-2 checkpoints; the pooled keys follow EfficientTAM
(https://arxiv.org/abs/2411.18933). Layouts are batch-first. As in the released attention, the frame's tokens are the
same for all objects until the first layer reads their memories.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3.config import Sam3Config
from sam3.devices import without_autocast
from sam3.efficient_memory_config import EfficientMemoryConfig
from sam3.model.attention_layers import MultiheadAttention
from sam3.model.grid_tables import SineTable
from sam3.model.memory_attention import MemoryTokens, join_memories, most_attended_frames, sampled_cells


def linear_attention(q: Tensor, k: Tensor, v: Tensor, log_weights: Tensor | None = None) -> Tensor:
    """Attention whose cost grows with the number of tokens alone, computed in float32.

    From Linear Transformers (https://arxiv.org/abs/2006.16236): exp(q k) becomes f(q) f(k) with f = elu + 1.

    Args:
        q: (B, heads, N, D).
        k: (B, heads, M, D).
        v: (B, heads, M, D).
        log_weights: What softmax attention would add to the logits of each key, broadcasting to (B, heads, 1, M).

    Returns:
        (B, heads, N, D), in the dtype of ``v``.
    """
    with without_autocast(q.device.type):  # a training's would take the products in half precision
        q32, k32 = F.elu(q.to(torch.float32)) + 1, F.elu(k.to(torch.float32)) + 1
        if log_weights is not None:
            k32 = k32 * log_weights.to(torch.float32).exp().transpose(-1, -2)
        sums = q32 @ (k32.transpose(-1, -2) @ v.to(torch.float32))
        total = q32 @ k32.sum(dim=-2)[..., None]
        return (sums / total).to(v.dtype)


class FrameAttention(MultiheadAttention):
    """Self-attention of the frame's tokens, by softmax or linear."""

    def __init__(self, dim: int, config: EfficientMemoryConfig) -> None:
        super().__init__(dim, config.num_heads, config.dropout)
        self.is_linear = config.attention == "linear"

    def read(self, x_bnc: Tensor, position_nc: Tensor) -> Tensor:
        """Tokens (B, N, C), with position codes in queries and keys -> (B, N, C)."""
        placed = x_bnc + position_nc
        if not self.is_linear:
            return self(placed, placed, x_bnc)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in self._project(placed, placed, x_bnc))
        return self.out_proj(linear_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """The frame's tokens read memories; four projections under the published names."""

    def __init__(self, dim: int, config: EfficientMemoryConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.is_linear = config.attention == "linear"
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def heads(self, x_bnc: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N, D)."""
        return x_bnc.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """
        Args:
            query: (B, N, C), or (1, N, C) for all.
            keys: (B, M, C).
            values: (B, M, C).
            bias: Added to the logits of keys, (B or 1, 1, 1, M).

        Returns:
            (B, N, C).
        """
        k, v = self.heads(self.k_proj(keys)), self.heads(self.v_proj(values))
        q = self.heads(self.q_proj(query)).expand(len(k), -1, -1, -1)
        if self.is_linear:
            attended = linear_attention(q, k, v, bias)
        else:
            dropout = self.dropout if self.training else 0.0
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class EfficientMemoryAttentionLayer(nn.Module):
    """Self-attention, attention to the memory, MLP; the norm is before each."""

    def __init__(self, dim: int, config: EfficientMemoryConfig) -> None:
        super().__init__()
        self.self_attn = FrameAttention(dim, config)
        self.cross_attn = CrossAttention(dim, config)
        self.linear1 = nn.Linear(dim, config.mlp_dim)
        self.linear2 = nn.Linear(config.mlp_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(config.dropout)

    def read_frame(self, x: Tensor, position: Tensor) -> Tensor:
        """Tokens after self-attention, (B, L, C)."""
        return x + self.dropout(self.self_attn.read(self.norm1(x), position))

    def read_memory(self, x: Tensor, position: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """Tokens after attention to the memory and the MLP, (B, L, C); ``x`` may have a batch of 1."""
        x = x + self.dropout(self.cross_attn(self.norm2(x) + position, keys, values, bias))
        return x + self.dropout(self.linear2(self.dropout(F.gelu(self.linear1(self.norm3(x))))))


class EfficientMemoryAttention(nn.Module):
    """The layers, and the norm behind the last.

    Attributes:
        pool_size: Side of the blocks whose keys and values are averaged; 1: none.
    """

    def __init__(self, config: Sam3Config, memory: EfficientMemoryConfig) -> None:
        """
        Args:
            config: Of the whole model: width and grid.
            memory: Sizes and rules of the attention.

        Raises:
            ValueError: If the heads do not divide the width.
        """
        super().__init__()
        dim = config.hidden_dim
        self.position_scale = memory.position_scale
        self.pool_size = memory.pool_size
        self.layers = nn.ModuleList(EfficientMemoryAttentionLayer(dim, memory) for _ in range(memory.num_layers))
        self.norm = nn.LayerNorm(dim)
        self.position_code = SineTable(dim, config.grid_size)

    def forward(self, features_bchw: Tensor, memory: MemoryTokens) -> Tensor:
        """
        Args:
            features_bchw: The current frame, (1, C, H, W), or (B, C, H, W).
            memory: What B objects remember, as wide as the features. With a ``pool_size`` above 1, its spatial tokens
                are those of grids of H x W cells.

        Returns:
            The features as each object sees them, (B, C, H, W).

        Raises:
            ValueError: If tokens that lie on no such grid should be pooled.
        """
        size_hw = (features_bchw.shape[-2], features_bchw.shape[-1])
        x = features_bchw.flatten(2).transpose(1, 2)
        position = self.position_code(size_hw).to(x.dtype)
        x = x + self.position_scale * position
        first, *others = (cast(EfficientMemoryAttentionLayer, layer) for layer in self.layers)
        x = first.read_frame(x, position)
        log_counts = None
        if self.pool_size > 1:
            memory, log_counts = pool_memories(memory, size_hw, self.pool_size)
        frames = None
        if memory.top_k is not None and memory.spatial.shape[1] > memory.num_fixed + memory.top_k:
            frames = self._most_attended(first, x, position, memory, size_hw)
        keys, values, bias = join_memories(memory, frames)
        bias = _with_log_counts(bias, log_counts, values, memory.pointers.shape[1])
        x = first.read_memory(x, position, keys, values, bias)
        for layer in others:
            x = layer.read_memory(layer.read_frame(x, position), position, keys, values, bias)
        return self.norm(x).transpose(1, 2).unflatten(-1, size_hw)

    @torch.no_grad()
    def _most_attended(
        self,
        layer: EfficientMemoryAttentionLayer,
        x: Tensor,
        position: Tensor,
        memory: MemoryTokens,
        size_hw: tuple[int, int],
    ) -> Tensor:
        """Frames that each object reads, by the share of the first layer's softmax attention that they would get."""
        cells, attention = sampled_cells(size_hw, x.device), layer.cross_attn
        q = attention.heads(attention.q_proj(layer.norm2(x[:, cells]) + position[cells]))
        k = attention.heads(attention.k_proj((memory.spatial + memory.spatial_codes).flatten(1, 2)))
        return most_attended_frames(q, k, memory)


def pool_memories(memory: MemoryTokens, size_hw: tuple[int, int], pool_size: int) -> tuple[MemoryTokens, Tensor]:
    """Average dense memories and their codes over square blocks; pointers stay.

    Args:
        memory: Spatial tokens of grids of H x W cells.
        size_hw: (H, W).
        pool_size: Side of a block. Blocks at the right and lower edge are smaller where it does not divide the grid.

    Returns:
        The memory with one token for each block, and the logarithm of each block's number of cells, (L',): added to
        the logits of softmax attention, it gives a block the weight of its cells.

    Raises:
        ValueError: If the tokens lie on no such grid.
    """
    height, width = size_hw
    if memory.spatial.shape[2] != height * width:
        raise ValueError(
            f"memories of {memory.spatial.shape[2]} tokens can't be pooled on a grid of {height} x {width} cells"
        )

    def pool(tokens: Tensor) -> Tensor:
        maps = tokens.flatten(0, -3).transpose(1, 2).unflatten(-1, size_hw)
        pooled = F.avg_pool2d(maps, pool_size, ceil_mode=True, count_include_pad=False)
        return pooled.flatten(2).transpose(1, 2).unflatten(0, tokens.shape[:-2])

    rows, columns = (
        (side - torch.arange(0, side, pool_size)).clamp(max=pool_size) for side in size_hw
    )  # cells of each block
    log_counts = (rows[:, None] * columns).flatten().to(memory.spatial.device, torch.float32).log()
    return memory._replace(spatial=pool(memory.spatial), spatial_codes=pool(memory.spatial_codes)), log_counts


def _with_log_counts(
    bias: Tensor | None, log_counts: Tensor | None, values: Tensor, num_pointers: int
) -> Tensor | None:
    """The bias of all keys with the blocks' weights added, (B or 1, 1, 1, N)."""
    if log_counts is None:
        return bias
    num_frames = (values.shape[1] - num_pointers) // len(log_counts)
    blocks = F.pad(log_counts.repeat(num_frames), (0, num_pointers)).to(values.dtype)[None, None, None]
    return blocks if bias is None else bias + blocks
