"""The two-way transformer of the mask decoder: tokens read the image, and the image reads the tokens.

From Segment Anything (https://arxiv.org/abs/2304.02643); layouts are batch-first, tokens (B, N, C), keys (B, H * W, C).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention whose inner width may be narrower than the model's."""

    def __init__(self, dim: int, num_heads: int, downsample_rate: int = 1) -> None:
        super().__init__()
        inner = dim // downsample_rate
        if inner % num_heads:
            raise ValueError(f"inner width {inner} ({dim} / {downsample_rate}) is no multiple of {num_heads} heads")
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, inner)
        self.k_proj = nn.Linear(dim, inner)
        self.v_proj = nn.Linear(dim, inner)
        self.out_proj = nn.Linear(inner, dim)

    def _heads(self, x_bnc: Tensor) -> Tensor:
        return x_bnc.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, N, C) queries, (B, M, C) keys and values -> (B, N, C)."""
        q, k, v = self._heads(self.q_proj(q)), self._heads(self.k_proj(k)), self._heads(self.v_proj(v))
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class TwoWayMlp(nn.Module):
    """Two linear maps around a ReLU, under the released names."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(dim, hidden_dim)
        self.lin2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.relu(self.lin1(x)))


class TwoWayAttentionBlock(nn.Module):
    """Self-attention of the tokens, tokens to image, MLP, image to tokens; each followed by its norm."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, downsample_rate: int, is_first: bool) -> None:
        """``is_first``: self-attention replaces the tokens, without residual and without their position code."""
        super().__init__()
        self.is_first = is_first
        self.self_attn = Attention(dim, num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn_token_to_image = Attention(dim, num_heads, downsample_rate)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = TwoWayMlp(dim, mlp_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.norm4 = nn.LayerNorm(dim)
        self.cross_attn_image_to_token = Attention(dim, num_heads, downsample_rate)

    def forward(self, tokens: Tensor, keys: Tensor, token_pos: Tensor, key_pos: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, C) and keys (B, H * W, C) after one exchange."""
        if self.is_first:
            tokens = self.norm1(self.self_attn(tokens, tokens, tokens))
        else:
            q = tokens + token_pos
            tokens = self.norm1(tokens + self.self_attn(q, q, tokens))
        placed_keys = keys + key_pos
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + token_pos, placed_keys, keys))
        tokens = self.norm3(tokens + self.mlp(tokens))
        keys = self.norm4(keys + self.cross_attn_image_to_token(placed_keys, tokens + token_pos, tokens))
        return tokens, keys


class TwoWayTransformer(nn.Module):
    """Blocks, then a last look of the tokens at the image."""

    def __init__(self, dim: int, depth: int, num_heads: int, mlp_dim: int, downsample_rate: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TwoWayAttentionBlock(dim, num_heads, mlp_dim, downsample_rate, is_first=i == 0) for i in range(depth)
        )
        self.final_attn_token_to_image = Attention(dim, num_heads, downsample_rate)
        self.norm_final_attn = nn.LayerNorm(dim)

    def forward(self, image_bchw: Tensor, image_pos_bchw: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            image_bchw: Image embedding with the dense prompt added, (B, C, H, W).
            image_pos_bchw: Position code of the cells, (1, C, H, W).
            tokens: Output and prompt tokens, (B, N, C); they are their own position code.

        Returns:
            Tokens (B, N, C) and keys (B, H * W, C).
        """
        keys = image_bchw.flatten(2).transpose(1, 2)
        key_pos = image_pos_bchw.flatten(2).transpose(1, 2)
        token_pos = tokens
        for layer in self.layers:
            tokens, keys = layer(tokens, keys, token_pos, key_pos)
        attended = self.final_attn_token_to_image(tokens + token_pos, keys + key_pos, keys)
        return self.norm_final_attn(tokens + attended), keys
