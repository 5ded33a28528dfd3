"""The geometry encoder: points and boxes become prompt tokens that have read the image.

Parameter names are those of Meta's SAM 3 release (https://github.com/facebookresearch/sam3, commit 99d02f2). What
differs: nothing is pooled for prompts without points or boxes, and pooling is never done in half precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3.config import Sam3Config
from sam3.model.attention_layers import TransformerLayer
from sam3.model.position_encoding import PositionEmbeddingSine
from sam3.model.prompt import Prompt, concat_padded_sequences


def sample_points(features_bchw: Tensor, points_xy: Tensor) -> Tensor:
    """Features at points, bilinear between cell centres, zero outside.

    Args:
        features_bchw: At least float32, (B, C, H, W).
        points_xy: Normalised, (n, B, 2).

    Returns:
        (n, B, C).
    """
    grid = (2 * points_xy.to(features_bchw.dtype) - 1).transpose(0, 1)[:, :, None]
    sampled = F.grid_sample(features_bchw, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return sampled.squeeze(-1).permute(2, 0, 1)


def pool_boxes(features_bchw: Tensor, boxes_cxcywh: Tensor, size: int) -> Tensor:
    """Features inside boxes, averaged in ``size`` x ``size`` bins (ROI-align as Detectron first had it: no half pixel).

    torchvision has kernels for CPU, CUDA and MPS; the one for MPS has no float64.

    Args:
        features_bchw: At least float32, (B, C, H, W).
        boxes_cxcywh: Normalised, (n, B, 4), n at least 1.
        size: Bins along a side.

    Returns:
        (n * B, C, size, size), n outermost.
    """
    from torchvision.ops import roi_align

    num, batch = boxes_cxcywh.shape[:2]
    height, width = features_bchw.shape[-2:]
    centre, half = boxes_cxcywh.to(features_bchw.dtype).split(2, dim=-1)
    half = half / 2
    cells = torch.cat((centre - half, centre + half), dim=-1) * features_bchw.new_tensor([width, height] * 2)
    image = torch.arange(batch, device=cells.device, dtype=cells.dtype).expand(num, -1)
    rois = torch.cat((image[..., None], cells), dim=-1).flatten(0, 1)
    return roi_align(features_bchw, rois, size, spatial_scale=1.0, sampling_ratio=-1, aligned=False)


class SequenceGeometryEncoder(nn.Module):
    """Each point or box is the sum of a projection of its coordinates, of their sine code, of the features under it and
    of a label's embedding. A class token closes the sequence; three layers then read the image."""

    def __init__(self, config: Sam3Config) -> None:
        super().__init__()
        dim, geometry = config.hidden_dim, config.geometry_encoder
        self.roi_size = geometry.roi_size
        self.position_encoding = PositionEmbeddingSine(dim)
        self.label_embed = nn.Embedding(2, dim)
        self.cls_embed = nn.Embedding(1, dim)
        self.points_direct_project = nn.Linear(2, dim)
        self.points_pool_project = nn.Linear(dim, dim)
        self.points_pos_enc_project = nn.Linear(dim, dim)
        self.boxes_direct_project = nn.Linear(4, dim)
        self.boxes_pool_project = nn.Conv2d(dim, dim, geometry.roi_size)
        self.boxes_pos_enc_project = nn.Linear(dim + 2, dim)
        self.final_proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.img_pre_norm = nn.LayerNorm(dim)
        self.encode = nn.ModuleList(
            TransformerLayer(dim, geometry.num_heads, geometry.mlp_dim, geometry.dropout)
            for _ in range(geometry.num_layers)
        )
        self.encode_norm = nn.LayerNorm(dim)

    def forward(
        self,
        geo_prompt: Prompt,
        img_feats: Sequence[Tensor],
        img_sizes: Sequence[tuple[int, int]],
        img_pos_embeds: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            geo_prompt: Points and boxes of B queries, on the features' device.
            img_feats: Levels, of which the last is read: one image per query, (H * W, B, C).
            img_sizes: (H, W) of each level.
            img_pos_embeds: Position codes of each level, broadcastable to (H * W, B, C).

        Returns:
            Tokens, (T, B, C), with T = points + boxes + 1; their padding mask, bool (B, T). Each query has at least one
            token that is not padding.

        Raises:
            ValueError: If the prompt is null.
        """
        points, point_mask, boxes, box_mask = (
            geo_prompt.point_embeddings,
            geo_prompt.point_mask,
            geo_prompt.box_embeddings,
            geo_prompt.box_mask,
        )
        if points is None or point_mask is None or boxes is None or box_mask is None:
            raise ValueError("the geometric prompt is null: give it zero boxes, box_embeddings of shape (0, B, 4)")
        image = img_feats[-1]
        maps = self._normalised_map(image, img_sizes[-1]) if len(points) or len(boxes) else None
        tokens, mask = concat_padded_sequences(
            self._embed_points(points, geo_prompt.point_labels, maps),
            point_mask,
            self._embed_boxes(boxes, geo_prompt.box_labels, maps),
            box_mask,
        )
        cls = self.cls_embed.weight[:, None].expand(-1, image.shape[1], -1)
        cls_mask = mask.new_zeros((image.shape[1], 1))
        tokens, mask = concat_padded_sequences(tokens, mask, cls, cls_mask)
        context = image.transpose(0, 1).contiguous()
        pos = None if img_pos_embeds is None else img_pos_embeds[-1].transpose(0, 1)
        x = self.norm(self.final_proj(tokens)).transpose(0, 1)
        for layer in self.encode:
            x = layer(x, context, context_pos=pos, key_padding_mask=mask)
        return self.encode_norm(x).transpose(0, 1), mask

    def _normalised_map(self, image: Tensor, size_hw: tuple[int, int]) -> Tensor:
        """(H * W, B, C) -> (B, C, H, W). Only pooling reads it; the layers read the features as they are.

        At least float32: not every device pools half precision.
        """
        maps = self.img_pre_norm(image).permute(1, 2, 0).unflatten(-1, size_hw)
        return maps.to(torch.promote_types(maps.dtype, torch.float32))

    def _embed_points(self, points: Tensor, labels: Tensor | None, maps: Tensor | None) -> Tensor:
        """(n, B, 2) -> (n, B, C)."""
        if maps is None or not len(points):
            return self.cls_embed.weight.new_zeros((*points.shape[:2], self.cls_embed.embedding_dim))
        dtype = self.cls_embed.weight.dtype
        code = torch.cat(self.position_encoding.encode_xy(points[..., 0], points[..., 1]), dim=-1)
        return (
            self.points_direct_project(points.to(dtype))
            + self.points_pool_project(sample_points(maps, points).to(dtype))
            + self.points_pos_enc_project(code.to(dtype))
            + self.label_embed(labels)
        )

    def _embed_boxes(self, boxes: Tensor, labels: Tensor | None, maps: Tensor | None) -> Tensor:
        """(n, B, 4) -> (n, B, C)."""
        if maps is None or not len(boxes):
            return self.cls_embed.weight.new_zeros((*boxes.shape[:2], self.cls_embed.embedding_dim))
        dtype = self.cls_embed.weight.dtype
        pooled = self.boxes_pool_project(pool_boxes(maps, boxes, self.roi_size).to(dtype))
        return (
            self.boxes_direct_project(boxes.to(dtype))
            + pooled.flatten(1).unflatten(0, boxes.shape[:2])
            + self.boxes_pos_enc_project(self.position_encoding.encode_boxes(*boxes.unbind(-1)).to(dtype))
            + self.label_embed(labels)
        )
