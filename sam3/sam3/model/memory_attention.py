"""Memory attention: the tokens of the current frame read each other, stored memories and object pointers.

From Segment Anything 2 (https://arxiv.org/abs/2408.00714). Layouts are batch-first. The frame's tokens are the same
for all objects until the first layer reads their memories: up to there everything is computed once.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3.config import Sam3Config
from sam3.model.grid_tables import RotaryTable, SineTable
from sam3.tracker_config import MemoryAttentionConfig

_QUERIES_AT_ONCE = 256
"""Queries whose attention logits are held at a time, where no fused kernel does without."""
_SAMPLED_SIDE = 18
"""Tokens along one side of the grid from which the most similar memories are estimated."""


class MemoryTokens(NamedTuple):
    """What B objects' memories offer to the current frame."""

    spatial: Tensor
    """Memories of F frames, (B, F, L, Cm); L = H * W tokens each, row-major. F may be 0."""
    spatial_codes: Tensor
    """Their position codes, (F, L, Cm): added to keys, not to values."""
    pointers: Tensor
    """Tokens of object pointers, (B, n, Cm); n may be 0. They are not turned by rotary positions."""
    pointer_codes: Tensor
    """(n, Cm)."""
    frame_bias: Tensor | None = None
    """Added to the attention logits of each frame's tokens, (F,)."""
    num_fixed: int = 0
    """The first frames, which are read in any case."""
    top_k: int | None = None
    """How many of the others are read; None: all."""


def turn(x_bhnd: Tensor, table: Tensor) -> Tensor:
    """Turn adjacent channel pairs by the positions' angles, in float32.

    Args:
        x_bhnd: Queries or keys, (B, heads, N, D); N is a multiple of the table's length, which repeats. Overwritten if
            it is float32 and needs no gradient.
        table: Cosines and sines, (L, D / 2, 2).

    Returns:
        The same shape and dtype.
    """
    pairs = x_bhnd.to(torch.float32).unflatten(-1, (-1, 2)).unflatten(2, (-1, table.shape[0]))
    if torch.compiler.is_compiling():  # inductor has no complex arithmetic but fuses this into the neighbours
        (real, imag), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        turned = torch.stack((real * cos - imag * sin, real * sin + imag * cos), -1)
    elif torch.is_grad_enabled() and x_bhnd.requires_grad:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs).mul_(torch.view_as_complex(table)))
    return turned.flatten(-2).flatten(2, 3).to(x_bhnd.dtype)


class RotaryAttention(nn.Module):
    """Attention with rotary positions on queries and keys, under the released names."""

    def __init__(self, dim: int, num_heads: int, kv_dim: int, dropout: float) -> None:
        """``kv_dim`` is the width of what keys and values are made from; ``dropout`` drops attention weights."""
        super().__init__()
        if dim % num_heads or (dim // num_heads) % 4:
            raise ValueError(
                f"memory attention: width {dim} over {num_heads} heads must give a head size divisible by 4"
            )
        self.num_heads = num_heads
        self.dropout = dropout
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(kv_dim, dim)
        self.v_proj = nn.Linear(kv_dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def heads(self, x_bnc: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N, D)."""
        return x_bnc.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def queries(self, x_bnc: Tensor, table: Tensor) -> Tensor:
        """Turned queries, (B, heads, N, D)."""
        return turn(self.heads(self.q_proj(x_bnc)), table)

    def keys(self, x_bnc: Tensor, table: Tensor, num_unturned: int = 0) -> Tensor:
        """Keys, (B, heads, N, D), turned but for the last ones."""
        keys = self.heads(self.k_proj(x_bnc))
        if not num_unturned:
            return turn(keys, table)
        split = keys.shape[2] - num_unturned
        return torch.cat([turn(keys[:, :, :split], table), keys[:, :, split:]], dim=2)

    def attend(self, q: Tensor, k: Tensor, values_bnc: Tensor, bias: Tensor | None = None) -> Tensor:
        """Weighted sums of the projected values: (B, N, C). ``q`` may have a batch of 1 that all keys share.

        On the CPU at inference the sums are taken before the projection, which is narrower and gives the same, since
        weights sum to 1: a third less work than the fused kernel, which wants values as wide as keys.
        """
        is_plain = not torch.is_grad_enabled() and not self.training and self.num_heads == 1
        if is_plain and values_bnc.shape[-1] < q.shape[-1] and q.device.type == "cpu" and q.dtype == torch.float32:
            return self.out_proj(self.v_proj(_sums_of_narrow_values(q[:, 0], k[:, 0], values_bnc, bias)))
        v = self.heads(self.v_proj(values_bnc))
        q = q.expand(k.shape[0], -1, -1, -1)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


def _sums_of_narrow_values(q_bld: Tensor, k_bnd: Tensor, values_bnc: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax attention with values of another width than keys: (B, L, C).

    One object and a few queries at a time, so that their logits stay in the processor's caches.
    """
    batch = len(k_bnd)
    queries = (q_bld * q_bld.shape[-1] ** -0.5).expand(batch, -1, -1)
    sums = values_bnc.new_empty(*queries.shape[:2], values_bnc.shape[-1])
    for i, (keys, values) in enumerate(zip(k_bnd.transpose(-1, -2), values_bnc, strict=True)):
        for part, result in zip(queries[i].split(_QUERIES_AT_ONCE), sums[i].split(_QUERIES_AT_ONCE), strict=True):
            logits = part @ keys
            if bias is not None:
                logits += bias[i % len(bias), 0]
            torch.mm(logits.softmax(-1), values, out=result)
    return sums


class MemoryAttentionLayer(nn.Module):
    """Self-attention, attention to the memory, MLP; the norm is before each."""

    def __init__(self, dim: int, mem_dim: int, config: MemoryAttentionConfig) -> None:
        super().__init__()
        self.self_attn = RotaryAttention(dim, config.num_heads, dim, config.dropout)
        self.cross_attn_image = RotaryAttention(dim, config.num_heads, mem_dim, config.dropout)
        self.linear1 = nn.Linear(dim, config.mlp_dim)
        self.linear2 = nn.Linear(config.mlp_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, table: Tensor, keys: Tensor, values: Tensor, num_pointers: int, bias: Tensor | None
    ) -> Tensor:
        """`read_frame`, then `read_memory`."""
        return self.read_memory(self.read_frame(x, table), table, keys, values, num_pointers, bias)

    def read_frame(self, x: Tensor, table: Tensor) -> Tensor:
        """Tokens after self-attention, (B, L, C)."""
        y = self.norm1(x)
        attention = self.self_attn
        return x + self.dropout(attention.attend(attention.queries(y, table), attention.keys(y, table), y))

    def read_memory(
        self, x: Tensor, table: Tensor, keys: Tensor, values: Tensor, num_pointers: int, bias: Tensor | None
    ) -> Tensor:
        """Tokens after attention to the memory and the MLP, (B, L, C); ``x`` may have a batch of 1."""
        attention = self.cross_attn_image
        q, k = attention.queries(self.norm2(x), table), attention.keys(keys, table, num_pointers)
        x = x + self.dropout(attention.attend(q, k, values, bias))
        return x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(self.norm3(x))))))


class MemoryAttention(nn.Module):
    """The layers, and the norm behind the last."""

    def __init__(self, config: Sam3Config) -> None:
        super().__init__()
        dim, sizes = config.hidden_dim, config.tracker.memory_attention
        self.position_scale = sizes.position_scale
        self.layers = nn.ModuleList(
            MemoryAttentionLayer(dim, config.tracker.mem_dim, sizes) for _ in range(sizes.num_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.position_code = SineTable(dim, config.grid_size)
        self.rotary = RotaryTable(dim // sizes.num_heads, sizes.rope_theta, config.grid_size)

    def forward(self, features_bchw: Tensor, memory: MemoryTokens) -> Tensor:
        """
        Args:
            features_bchw: The current frame, (1, C, H, W), or (B, C, H, W).
            memory: What B objects remember.

        Returns:
            The features as each object sees them, (B, C, H, W).
        """
        size_hw = (features_bchw.shape[-2], features_bchw.shape[-1])
        table = self.rotary(size_hw)
        x = features_bchw.flatten(2).transpose(1, 2)
        x = x + self.position_scale * self.position_code(size_hw).to(x.dtype)
        first, *others = (cast(MemoryAttentionLayer, layer) for layer in self.layers)
        x = first.read_frame(x, table)
        if memory.top_k is not None and memory.spatial.shape[1] > memory.num_fixed + memory.top_k:
            keys, values, bias = join_memories(memory, self._most_attended(first, x, memory, size_hw))
        else:
            keys, values, bias = join_memories(memory)
        num_pointers = memory.pointers.shape[1]
        x = first.read_memory(x, table, keys, values, num_pointers, bias)
        for layer in others:
            x = layer(x, table, keys, values, num_pointers, bias)
        return self.norm(x).transpose(1, 2).unflatten(-1, size_hw)

    @torch.no_grad()
    def _most_attended(
        self, layer: MemoryAttentionLayer, x: Tensor, memory: MemoryTokens, size_hw: tuple[int, int]
    ) -> Tensor:
        """Frames that each object reads, (B, num_fixed + top_k), in their order.

        The others are ranked by the share of the first layer's attention that they get, between every n-th token of
        the current frame and of the memories in each direction.
        """
        cells = sampled_cells(size_hw, x.device)
        table = self.rotary(size_hw)[cells]
        keys = memory.spatial[:, :, cells] + memory.spatial_codes[:, cells]
        attention = layer.cross_attn_image
        q = attention.queries(layer.norm2(x[:, cells]), table)
        k = attention.keys(keys.flatten(1, 2), table)
        return most_attended_frames(q, k, memory)


def sampled_cells(size_hw: tuple[int, int], device: torch.device) -> Tensor:
    """Every n-th cell of a grid in each direction, as indices of its tokens, (n,)."""
    height, width = size_hw
    step = max(1, -(-max(size_hw) // _SAMPLED_SIDE))
    cells = torch.arange(height * width, device=device).unflatten(0, size_hw)
    return cells[step // 2 :: step, step // 2 :: step].flatten()


def most_attended_frames(q: Tensor, k: Tensor, memory: MemoryTokens) -> Tensor:
    """Frames that each object reads, (B, num_fixed + top_k), in their order.

    Args:
        q: Queries of some of the current frame's tokens, (B or 1, heads, n, D).
        k: Keys of the same number of tokens of each memory, (B, heads, F m, D).
        memory: Says which frames are read in any case, and how many of the others.
    """
    assert memory.top_k is not None
    batch, num_frames = memory.spatial.shape[:2]
    logits = (q @ k.transpose(-1, -2)).to(torch.float32) * q.shape[-1] ** -0.5
    mass = logits.unflatten(-1, (num_frames, -1)).logsumexp(-1)
    if memory.frame_bias is not None:
        mass = mass + memory.frame_bias
    shares = mass.softmax(-1).mean(dim=(1, 2))[:, memory.num_fixed :]
    chosen = memory.num_fixed + shares.topk(memory.top_k, dim=1).indices.sort(dim=1).values
    fixed = torch.arange(memory.num_fixed, device=q.device).expand(batch, -1)
    return torch.cat([fixed, chosen], dim=1)


def join_memories(memory: MemoryTokens, frames: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values, (B, N, Cm), and the bias of each key, (B or 1, 1, 1, N), of the frames (B, K) or of all."""
    values, codes, bias = memory.spatial, memory.spatial_codes, memory.frame_bias
    keys = values + codes
    if frames is not None:
        rows = torch.arange(len(frames), device=frames.device)[:, None]
        keys, values = keys[rows, frames], values[rows, frames]
        bias = None if bias is None else bias[frames]
    if bias is not None:
        bias = F.pad(bias.repeat_interleave(values.shape[2], dim=-1), (0, memory.pointers.shape[1]))
        bias = bias.to(values.dtype).view(-1, 1, 1, bias.shape[-1])
    keys = torch.cat([keys.flatten(1, 2), memory.pointers + memory.pointer_codes], dim=1)
    return keys, torch.cat([values.flatten(1, 2), memory.pointers], dim=1), bias
