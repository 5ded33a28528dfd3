"""Tokens and image features to mask candidates with their quality.

From Segment Anything 2 (https://arxiv.org/abs/2408.00714). One mask token answers an unambiguous prompt, three others
give candidates for an ambiguous one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sam3.config import SamHeadsConfig
from sam3.sam.layers import MLP, LayerNorm2d
from sam3.sam.transformer import TwoWayTransformer


class SamOutput(NamedTuple):
    """What the mask decoder says about each prompt. Index 0 of K is the single-mask token, the others candidates."""

    mask_logits: Tensor
    """Low-resolution mask logits, (P, K, 4 G, 4 G); K = 4 before, and 1 or 3 after `MaskDecoder.select`."""
    ious: Tensor
    """Predicted IoU of each mask with the truth, (P, K), in 0..1."""
    object_score_logits: Tensor
    """Whether the object is in the image at all, (P, 1), before the sigmoid."""
    mask_tokens: Tensor
    """The token of each mask, (P, K, C), from which a tracker makes its object pointer."""


class MaskDecoder(nn.Module):
    """Two-way transformer, upscaling with skip maps, and one small network per mask token."""

    def __init__(self, dim: int, config: SamHeadsConfig) -> None:
        super().__init__()
        self.config = config
        self.num_masks = config.num_multimask_outputs + 1
        self.transformer = TwoWayTransformer(
            dim,
            config.transformer_depth,
            config.transformer_num_heads,
            config.transformer_mlp_dim,
            config.attention_downsample_rate,
        )
        self.iou_token = nn.Embedding(1, dim)
        self.mask_tokens = nn.Embedding(self.num_masks, dim)
        self.obj_score_token = nn.Embedding(1, dim)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 4, 2, stride=2),
            LayerNorm2d(dim // 4),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 4, dim // 8, 2, stride=2),
            nn.GELU(),
        )
        self.conv_s0 = nn.Conv2d(dim, dim // 8, 1)
        self.conv_s1 = nn.Conv2d(dim, dim // 4, 1)
        self.output_hypernetworks_mlps = nn.ModuleList(MLP(dim, dim, dim // 8, 3) for _ in range(self.num_masks))
        self.iou_prediction_head = MLP(dim, config.head_hidden_dim, self.num_masks, config.head_depth)
        self.pred_obj_score_head = MLP(dim, config.head_hidden_dim, 1, config.head_depth)

    def forward(
        self,
        image_pchw: Tensor,
        image_pos_1chw: Tensor,
        sparse_pnc: Tensor,
        high_res: tuple[Tensor, Tensor],
    ) -> SamOutput:
        """All candidates of every prompt; differentiable.

        Args:
            image_pchw: Image embedding with the dense prompt added, (P, C, G, G).
            image_pos_1chw: Position code of the grid, (1, C, G, G).
            sparse_pnc: Prompt tokens, (P, N, C).
            high_res: Skip maps after ``conv_s0`` and ``conv_s1``, (P, C / 8, 4 G, 4 G) and (P, C / 4, 2 G, 2 G).
        """
        own = torch.cat([self.obj_score_token.weight, self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([own.expand(sparse_pnc.shape[0], -1, -1), sparse_pnc], dim=1)
        tokens, keys = self.transformer(image_pchw, image_pos_1chw, tokens)
        mask_tokens = tokens[:, 2 : 2 + self.num_masks]
        return SamOutput(
            mask_logits=self._masks(keys.transpose(1, 2).view_as(image_pchw), mask_tokens, high_res),
            ious=self.iou_prediction_head(tokens[:, 1]).sigmoid(),
            object_score_logits=self.pred_obj_score_head(tokens[:, 0]),
            mask_tokens=mask_tokens,
        )

    def _masks(self, image_pchw: Tensor, mask_tokens: Tensor, high_res: tuple[Tensor, Tensor]) -> Tensor:
        deconv1, norm, gelu1, deconv2, gelu2 = self.output_upscaling
        fine, middle = high_res
        upscaled = gelu1(norm(deconv1(image_pchw) + middle))
        upscaled = gelu2(deconv2(upscaled) + fine)
        kernels = torch.stack([mlp(mask_tokens[:, i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], dim=1)
        return (kernels @ upscaled.flatten(2)).unflatten(-1, upscaled.shape[-2:])

    def select(self, output: SamOutput, multimask_output: bool) -> SamOutput:
        """The masks to show: three candidates, or the single one.

        The single mask is the first token's. Outside training, where it is unstable (its area changes much with the
        threshold), the candidate with the highest predicted IoU takes its place; the token stays the first.
        """
        if multimask_output:
            return SamOutput(
                output.mask_logits[:, 1:], output.ious[:, 1:], output.object_score_logits, output.mask_tokens[:, 1:]
            )
        masks, ious = output.mask_logits[:, :1], output.ious[:, :1]
        if not self.training:
            unstable = self._stability(masks) < self.config.dynamic_multimask_stability_thresh
            best = 1 + output.ious[:, 1:].argmax(dim=1)
            rows = torch.arange(len(best), device=best.device)
            masks = torch.where(unstable[..., None, None], output.mask_logits[rows, best][:, None], masks)
            ious = torch.where(unstable, output.ious[rows, best][:, None], ious)
        return SamOutput(masks, ious, output.object_score_logits, output.mask_tokens[:, :1])

    def _stability(self, mask_logits: Tensor) -> Tensor:
        """IoU of the masks at two thresholds around 0, (P, 1); 1 for an empty mask."""
        delta = self.config.dynamic_multimask_stability_delta
        inner = (mask_logits > delta).sum(dim=(-2, -1)).to(torch.float32)
        outer = (mask_logits > -delta).sum(dim=(-2, -1)).to(torch.float32)
        return torch.where(outer > 0, inner / outer.clamp(min=1), 1.0)
