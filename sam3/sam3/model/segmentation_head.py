"""Masks of the detector: one per object query, and one semantic mask for the prompt.

Restates the segmentation head of Meta's SAM 3 package 0.1.4 (a pixel decoder without lateral convolutions, and masks
as dot products after MaskFormer, https://arxiv.org/abs/2107.06278).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3.config import SegmentationHeadConfig
from sam3.model.attention_layers import MultiheadAttention
from sam3.sam.layers import MLP

NUM_STAGES = 3
"""Stages that files hold. With three levels two of them run; the weights of the last are never read."""


class PixelDecoder(nn.Module):
    """From the coarse map to the finest: upsample, add the finer map, 3x3 convolution, GroupNorm, ReLU."""

    def __init__(self, hidden_dim: int, norm_groups: int) -> None:
        super().__init__()
        self.conv_layers = nn.ModuleList(nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1) for _ in range(NUM_STAGES))
        self.norms = nn.ModuleList(nn.GroupNorm(norm_groups, hidden_dim) for _ in range(NUM_STAGES))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """
        Args:
            maps: Finest first, at most four. The coarsest is (B, C, H, W), the others (B, C, h, w) or (1, C, h, w).

        Returns:
            (B, C, h, w) at the size of the finest map.
        """
        pixels = maps[-1]
        for finer, conv, norm in zip(reversed(maps[:-1]), self.conv_layers, self.norms, strict=False):
            pixels = F.interpolate(pixels, size=finer.shape[-2:], mode="nearest")
            pixels = F.relu(norm(conv(finer + pixels)))
        return pixels


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
        pixels = self.pixels(backbone_feats, image_ids, encoder_hidden_states, prompt, prompt_mask)
        return {
            "pred_masks": self.mask_predictor(queries, pixels, self.instance_seg_head),
            "semantic_seg": self.semantic_seg_head(pixels),
            "presence_logit": None,
        }

    def pixels(
        self,
        backbone_feats: Sequence[Tensor],
        image_ids: Tensor,
        encoder_hidden_states: Tensor,
        prompt: Tensor,
        prompt_mask: Tensor | None,
    ) -> Tensor:
        """Embedding of every pixel for every prompt, (B, C, h, w); arguments as in `forward`."""
        tokens, context = encoder_hidden_states.transpose(0, 1), prompt.transpose(0, 1)
        attended = self.cross_attend_prompt(self.cross_attn_norm(tokens), context, context, prompt_mask)
        fused = (tokens + attended).transpose(1, 2).unflatten(-1, backbone_feats[-1].shape[-2:])
        num_images = len(backbone_feats[0])
        finer = [m if num_images == 1 else m[image_ids] for m in backbone_feats[:-1]]
        return self.pixel_decoder([*finer, fused])
