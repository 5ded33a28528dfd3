"""Prompts to tokens: clicks and box corners become sparse tokens, a mask becomes a dense map.

From Segment Anything (https://arxiv.org/abs/2304.02643). Labels: -1 padding, 0 negative click, 1 positive click,
2 top-left and 3 bottom-right corner of a box.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sam3.sam.layers import LayerNorm2d

NUM_POINT_KINDS = 4


class PositionEmbeddingRandom(nn.Module):
    """Random Fourier features of positions in [0, 1]; fixed, and float32 whatever the model's dtype.

    The features are angles of many turns, which a low-precision matrix would blur, so casts leave the matrix alone.
    """

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, num_pos_feats: int) -> None:
        """``num_pos_feats``: frequencies, half of the output's channels."""
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, num_pos_feats))

    def _apply(self, fn, recurse=True):
        before = self.positional_encoding_gaussian_matrix
        super()._apply(fn, recurse)
        after = self.positional_encoding_gaussian_matrix
        if after.dtype != before.dtype:
            self.positional_encoding_gaussian_matrix = before.to(after.device)
        return self

    def forward(self, coords_xy_norm: Tensor) -> Tensor:
        """(..., 2) positions in [0, 1] -> (..., 2 * num_pos_feats), float32."""
        matrix = self.positional_encoding_gaussian_matrix.to(torch.float32)
        # A matrix product may run in bf16 under autocast; two multiply-adds cannot.
        coords = 2 * coords_xy_norm.to(torch.float32) - 1
        angles = 2 * math.pi * (coords[..., :1] * matrix[0] + coords[..., 1:] * matrix[1])
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def encode_grid(self, size_hw: tuple[int, int]) -> Tensor:
        """Features of the cell centres of a grid: float32, (1, C, H, W)."""
        height, width = size_hw
        device = self.positional_encoding_gaussian_matrix.device
        rows = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
        columns = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
        centres = torch.stack([columns.expand(height, -1), rows[:, None].expand(-1, width)], dim=-1)
        return self(centres).permute(2, 0, 1)[None]


class PromptEncoder(nn.Module):
    """Encodes points, box corners and mask prompts."""

    def __init__(self, embed_dim: int, mask_in_channels: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.pe_layer = PositionEmbeddingRandom(embed_dim // 2)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, embed_dim) for _ in range(NUM_POINT_KINDS))
        self.not_a_point_embed = nn.Embedding(1, embed_dim)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, mask_in_channels // 4, 2, stride=2),
            LayerNorm2d(mask_in_channels // 4),
            nn.GELU(),
            nn.Conv2d(mask_in_channels // 4, mask_in_channels, 2, stride=2),
            LayerNorm2d(mask_in_channels),
            nn.GELU(),
            nn.Conv2d(mask_in_channels, embed_dim, 1),
        )
        self.no_mask_embed = nn.Embedding(1, embed_dim)
        self._dense_pe: tuple[tuple[object, ...], Tensor, Tensor] | None = None

    def get_dense_pe(self, grid_size: int) -> Tensor:
        """Position code of the feature grid, (1, C, G, G), in the weights' dtype; the last one is kept."""
        matrix, dtype = self.pe_layer.positional_encoding_gaussian_matrix, self.no_mask_embed.weight.dtype
        if matrix.is_inference() or torch.compiler.is_compiling():  # its changes cannot be seen
            return self.pe_layer.encode_grid((grid_size, grid_size)).to(dtype)
        key = (grid_size, dtype, matrix._version)
        kept = self._dense_pe
        if kept is None or kept[0] != key or kept[1] is not matrix:
            with torch.inference_mode(False), torch.no_grad():  # for training too, whoever asks first
                code = self.pe_layer.encode_grid((grid_size, grid_size)).to(dtype)
            self._dense_pe = kept = (key, matrix, code)
        return kept[2]

    def embed_points(self, coords_xy_px: Tensor, labels: Tensor, image_size_px: int) -> Tensor:
        """Sparse tokens of clicks and box corners.

        Args:
            coords_xy_px: x, y in pixels of the model input, (P, K, 2).
            labels: (P, K); see the module's docstring.
            image_size_px: Side of the model input.

        Returns:
            (P, K + 1, C): one padding point is always appended.
        """
        batch = coords_xy_px.shape[0]
        coords = torch.cat([coords_xy_px.to(torch.float32), coords_xy_px.new_zeros(batch, 1, 2)], dim=1)
        labels = torch.cat([labels, labels.new_full((batch, 1), -1)], dim=1)[..., None]
        code = self.pe_layer((coords + 0.5) / image_size_px)  # + 0.5: a click names the centre of its pixel
        for kind, embedding in enumerate(self.point_embeddings):
            code = torch.where(labels == kind, code + embedding.weight, code)
        tokens = torch.where(labels == -1, self.not_a_point_embed.weight, code)
        return tokens.to(self.no_mask_embed.weight.dtype)

    def embed_masks(self, mask_logits: Tensor) -> Tensor:
        """Dense map of mask prompts: (P, 1, 4 G, 4 G) -> (P, C, G, G)."""
        return self.mask_downscaling(mask_logits.to(self.no_mask_embed.weight.dtype))

    def embed_no_mask(self, grid_size: int) -> Tensor:
        """Dense map that says there is no mask prompt, (1, C, G, G)."""
        return self.no_mask_embed.weight[..., None, None].expand(-1, -1, grid_size, grid_size)
