"""Masks of the detector: one per object query, and one semantic mask for the prompt.

Restates the segmentation head of Meta's SAM 3 package 0.1.4 (a pixel decoder without lateral convolutions, and masks
as dot products after MaskFormer, https://arxiv.org/abs/2107.06278).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sam3.config import SegmentationHeadConfig
from sam3.model.attention_layers import MultiheadAttention
from sam3.model.pixel_decoder import PixelDecoder
from sam3.sam.layers import MLP


class MaskPredictor(nn.Module):
    """Masks are dot products of embedded queries with pixels."""

    def __init__(self, hidden_dim: int, depth: int) -> None:
        super().__init__()
        self.mask_embed = MLP(hidden_dim, hidden_dim, hidden_dim, depth)

    def forward(self, queries: Tensor, pixels: Tensor, projection: nn.Conv2d) -> Tensor:
        """
        Args:
            queries: (B, N, C).
            pixels: (B, C, h, w), before their projection.
            projection: The 1x1 convolution of the pixels. It is applied to the queries instead, which is the same dot
                product for a small part of the work: N queries stand against h * w pixels.

        Returns:
            Logits, (B, N, h, w).
        """
        embedded = self.mask_embed(queries)
        assert projection.bias is not None
        kernels, offsets = embedded @ projection.weight.flatten(1), embedded @ projection.bias[:, None]
        return torch.baddbmm(offsets, kernels, pixels.flatten(2)).unflatten(-1, pixels.shape[-2:])


class UniversalSegmentationHead(nn.Module):
    """Image tokens read the prompt once more, become pixels, and pixels become masks."""

    def __init__(self, config: SegmentationHeadConfig, hidden_dim: int) -> None:
        super().__init__()
        self.pixel_decoder = PixelDecoder(hidden_dim, config.norm_groups)
        self.mask_predictor = MaskPredictor(hidden_dim, config.mask_embed_depth)
        self.cross_attend_prompt = MultiheadAttention(hidden_dim, config.num_heads)
        self.cross_attn_norm = nn.LayerNorm(hidden_dim)
        self.instance_seg_head = nn.Conv2d(hidden_dim, hidden_dim, 1)
        self.semantic_seg_head = nn.Conv2d(hidden_dim, 1, 1)

    def forward(
        self,
        backbone_feats: Sequence[Tensor],
        queries: Tensor,
        image_ids: Tensor,
        encoder_hidden_states: Tensor,
        prompt: Tensor,
        prompt_mask: Tensor | None,
    ) -> dict[str, Tensor | None]:
        """
        Args:
            backbone_feats: The detector's maps of each image, finest first, (I, C, h, w). The list is not changed.
            queries: Normed queries of the decoder's last layer, (B, N, C).
            image_ids: Image of each prompt, int64, (B,): rows of ``backbone_feats``.
            encoder_hidden_states: Fused image tokens, (L, B, C), rows of the coarsest map.
            prompt: Text and geometry tokens, (T, B, C).
            prompt_mask: bool, (B, T), True for padding.

        Returns:
            ``pred_masks`` (B, N, h, w) and ``semantic_seg`` (B, 1, h, w), both logits at the size of the finest map;
            ``presence_logit`` None, as presence comes from the decoder.
        """
        fused = self._fused_map(encoder_hidden_states, prompt, prompt_mask, backbone_feats[-1].shape[-2:])
        finer = backbone_feats[:-1]
        if self.pixel_decoder.reuses_images(fused, finer):
            pred_masks, semantic_seg = self._masks_one_by_one(queries, fused, finer, image_ids)
        else:
            pred_masks, semantic_seg = self._masks(queries, self.pixel_decoder(fused, finer, image_ids))
        return {"pred_masks": pred_masks, "semantic_seg": semantic_seg, "presence_logit": None}

    def _masks_one_by_one(
        self, queries: Tensor, fused: Tensor, finer: Sequence[Tensor], image_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The embedding of all pixels, the largest tensor here, then exists for one prompt at a time."""
        ids = image_ids.tolist() if len(finer[0]) > 1 else [0] * len(fused)
        if len(ids) == 1:
            return self._masks(queries, self.pixel_decoder.decode_one(fused, finer, ids[0]))
        pred_masks = queries.new_empty(*queries.shape[:2], *finer[0].shape[-2:])
        semantic_seg = pred_masks.new_empty(len(ids), 1, *pred_masks.shape[-2:])
        for i, image_id in enumerate(ids):
            pixels = self.pixel_decoder.decode_one(fused[i : i + 1], finer, image_id)
            pred_masks[i], semantic_seg[i] = (masks[0] for masks in self._masks(queries[i : i + 1], pixels))
        return pred_masks, semantic_seg

    def _masks(self, queries: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.mask_predictor(queries, pixels, self.instance_seg_head), self.semantic_seg_head(pixels)

    def _fused_map(
        self, encoder_hidden_states: Tensor, prompt: Tensor, prompt_mask: Tensor | None, size_hw: Sequence[int]
    ) -> Tensor:
        """Fused tokens after they have read the prompt once more, as a map (B, C, H, W)."""
        tokens, context = encoder_hidden_states.transpose(0, 1), prompt.transpose(0, 1)
        attended = self.cross_attend_prompt(self.cross_attn_norm(tokens), context, context, prompt_mask)
        return (tokens + attended).transpose(1, 2).unflatten(-1, tuple(size_hw))
