"""Attention and the transformer layer that geometry encoder and fusion encoder share.

Layouts are batch-first: tokens (B, N, C). Padding masks are (B, N) with True where a token is padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiheadAttention(nn.Module):
    """Multi-head attention with the parameter names of ``torch.nn.MultiheadAttention``, always fused, batch-first.

    The names are those that released checkpoints hold: ``in_proj_weight`` and ``in_proj_bias`` (queries, keys, values
    stacked) and ``out_proj``.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        """``dropout`` drops attention weights, in training only.

        Raises:
            ValueError: If the heads do not divide the width.
        """
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"attention: width {dim} is no multiple of {num_heads} heads")
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """
        Args:
            query: (B, N, C).
            key: (B, M, C); default: the query.
            value: (B, M, C); default: the key.
            key_padding_mask: bool, (B, M), True for keys that nobody reads. One key of each item must be readable.
            attn_bias: Added to the logits after their scaling by 1 / sqrt(C / heads); broadcasts to
                (B, heads, N, M). In any float dtype; gradients reach it.
            is_causal: Token i reads tokens 0..i alone. Not together with a mask or a bias.

        Returns:
            (B, N, C).
        """
        key = query if key is None else key
        value = key if value is None else value
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in self._project(query, key, value))
        mask = self._mask(key_padding_mask, attn_bias, q.dtype)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values; what reads the same tensor is one product."""
        dim = query.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if query is key and key is value:
            return F.linear(query, weight, bias).chunk(3, -1)
        if query is key:
            q, k = F.linear(query, weight[: 2 * dim], bias[: 2 * dim]).chunk(2, -1)
            return q, k, F.linear(value, weight[2 * dim :], bias[2 * dim :])
        q = F.linear(query, weight[:dim], bias[:dim])
        if key is value:
            return q, *F.linear(key, weight[dim:], bias[dim:]).chunk(2, -1)
        k = F.linear(key, weight[dim : 2 * dim], bias[dim : 2 * dim])
        return q, k, F.linear(value, weight[2 * dim :], bias[2 * dim :])

    @staticmethod
    def _mask(key_padding_mask: Tensor | None, attn_bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What ``scaled_dot_product_attention`` takes: True for keys that are read, or a bias with -inf elsewhere."""
        padded = None if key_padding_mask is None else key_padding_mask[:, None, None]
        if attn_bias is None:
            return None if padded is None else ~padded
        attn_bias = attn_bias.to(dtype)
        return attn_bias if padded is None else attn_bias.masked_fill(padded, float("-inf"))


class TransformerLayer(nn.Module):
    """Self-attention, cross-attention, MLP; a norm before each and a residual around each.

    The name ``cross_attn_image`` is the released one; in the fusion encoder that attention reads the prompt.
    """

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, dropout: float) -> None:
        """``dropout`` acts on attention weights, hidden units and residuals, in training only."""
        super().__init__()
        self.self_attn = MultiheadAttention(dim, num_heads, dropout)
        self.cross_attn_image = MultiheadAttention(dim, num_heads, dropout)
        self.linear1 = nn.Linear(dim, mlp_dim)
        self.linear2 = nn.Linear(mlp_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        pos: Tensor | None = None,
        context_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        context_key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            x: Tokens, (B, N, C).
            context: What they read, (B, M, C).
            pos: Position code of the tokens, for queries and keys of self-attention alone; broadcasts to (B, N, C).
            context_pos: Position code of the context, for its keys alone; broadcasts to (B, M, C).
            key_padding_mask: Tokens that are padding, bool, (B, N).
            context_key_padding_mask: Context that is padding, bool, (B, M).

        Returns:
            (B, N, C).
        """
        x = self.attend_self(x, pos, key_padding_mask)
        return self.attend_context(x, context, context_pos, context_key_padding_mask)

    def attend_self(self, x: Tensor, pos: Tensor | None = None, key_padding_mask: Tensor | None = None) -> Tensor:
        """The first third of `forward`, which does not depend on the context."""
        h = self.norm1(x)
        placed = h if pos is None else h + pos
        return x + self.dropout(self.self_attn(placed, placed, h, key_padding_mask))

    def attend_context(
        self,
        x: Tensor,
        context: Tensor,
        context_pos: Tensor | None = None,
        context_key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """The rest of `forward`, from what `attend_self` returned."""
        keys = context if context_pos is None else context + context_pos
        x = x + self.dropout(self.cross_attn_image(self.norm2(x), keys, context, context_key_padding_mask))
        hidden = self.dropout(F.relu(self.linear1(self.norm3(x))))
        return x + self.dropout(self.linear2(hidden))
