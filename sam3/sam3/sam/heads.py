"""The SAM heads as one module: from the second neck's maps and prompts to masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sam3.config import Sam3Config
from sam3.sam.mask_decoder import MaskDecoder, SamOutput
from sam3.sam.prompt_encoder import PromptEncoder


class SamFeatures(NamedTuple):
    """What the heads read of a batch of N images."""

    embedding: Tensor
    """Coarse map with ``no_mem_embed`` added, (N, C, G, G)."""
    fine: Tensor
    """Skip map at 4 G, (N, C / 8, 4 G, 4 G)."""
    middle: Tensor
    """Skip map at 2 G, (N, C / 4, 2 G, 2 G)."""

    def select(self, image_index: Tensor | None) -> SamFeatures:
        """One row per prompt. Without an index, or with a single image, rows are views and cost nothing."""
        if image_index is None:
            return self
        if self.embedding.shape[0] == 1:
            return SamFeatures(*(m.expand(len(image_index), -1, -1, -1) for m in self))
        return SamFeatures(*(m[image_index] for m in self))


class SamHeads(nn.Module):
    """Prompt encoder and mask decoder (``tracker.sam_*`` in a released file).

    Training::

        features = heads.image_features(model.backbone.forward_image(images, need_detector=False)["sam2_backbone_out"])
        output = heads.forward_prompts(features, points_xy_px, labels, image_index=image_index)
        output.mask_logits, output.ious, output.object_score_logits    # (P, 4, 4G, 4G), (P, 4), (P, 1)

    Everything is differentiable. ``model.image_features(images)`` is the first line in short. Mask logits cover the
    model's square input; `select` picks what a user would see.
    """

    def __init__(self, config: Sam3Config) -> None:
        super().__init__()
        self.stride_px = config.trunk.patch_size_px
        self.sam_prompt_encoder = PromptEncoder(config.hidden_dim, config.sam_heads.mask_in_channels)
        self.sam_mask_decoder = MaskDecoder(config.hidden_dim, config.sam_heads)
        self.no_mem_embed = nn.Parameter(torch.zeros(1, 1, config.hidden_dim))
        nn.init.trunc_normal_(self.no_mem_embed, std=0.02)

    def image_features(self, sam2_backbone_out: dict[str, Sequence[Tensor]]) -> SamFeatures:
        """Prepare the second neck's maps once per batch of images, for any number of prompts.

        Args:
            sam2_backbone_out: From ``backbone.forward_image``: ``backbone_fpn`` holds three maps, finest first.
        """
        fine, middle, coarse = sam2_backbone_out["backbone_fpn"]
        return self.join_maps(self.sam_mask_decoder.conv_s0(fine), self.sam_mask_decoder.conv_s1(middle), coarse)

    def join_maps(self, fine: Tensor, middle: Tensor, coarse: Tensor) -> SamFeatures:
        """`image_features` from skip maps that the decoder's ``conv_s0`` and ``conv_s1`` have narrowed already."""
        return SamFeatures(coarse + self.no_mem_embed.transpose(1, 2)[..., None], fine, middle)

    def forward_prompts(
        self,
        features: SamFeatures,
        points_xy_px: Tensor | None = None,
        labels: Tensor | None = None,
        mask_logits: Tensor | None = None,
        image_index: Tensor | None = None,
    ) -> SamOutput:
        """All four mask candidates of P prompts on one or several images.

        Args:
            features: From `image_features`, N images.
            points_xy_px: Clicks and box corners in pixels of the model input, (P, K, 2). Prompts with fewer points
                are padded with label -1. None if there are only mask prompts.
            labels: (P, K): -1 padding, 0 negative, 1 positive, 2 and 3 top-left and bottom-right corner of a box.
            mask_logits: Mask prompts, e.g. an earlier low-resolution output, (P, 1, 4 G, 4 G).
            image_index: Which image each prompt belongs to, (P,) integers in 0..N-1. None: prompt i on image i, or
                all prompts on the only image.

        Returns:
            `SamOutput` with K = 4; see `select` for what a user would be shown.

        Raises:
            ValueError: If the shapes do not fit together.
        """
        num_prompts = self._count_prompts(features, points_xy_px, labels, mask_logits, image_index)
        if image_index is None and features.embedding.shape[0] == 1 and num_prompts > 1:
            image_index = torch.zeros(num_prompts, dtype=torch.long, device=features.embedding.device)
        selected = features.select(image_index)
        encoder, grid_size = self.sam_prompt_encoder, features.embedding.shape[-1]
        if points_xy_px is None or labels is None:
            sparse = selected.embedding.new_zeros(num_prompts, 0, encoder.embed_dim)
        else:
            sparse = encoder.embed_points(points_xy_px, labels, grid_size * self.stride_px)
        dense = encoder.embed_no_mask(grid_size) if mask_logits is None else encoder.embed_masks(mask_logits)
        return self.sam_mask_decoder(
            selected.embedding + dense, encoder.get_dense_pe(grid_size), sparse, (selected.fine, selected.middle)
        )

    def select(self, output: SamOutput, multimask_output: bool) -> SamOutput:
        """Three candidates or the single mask; see `MaskDecoder.select`."""
        return self.sam_mask_decoder.select(output, multimask_output)

    def _count_prompts(
        self,
        features: SamFeatures,
        points: Tensor | None,
        labels: Tensor | None,
        masks: Tensor | None,
        image_index: Tensor | None,
    ) -> int:
        if (points is None) != (labels is None):
            raise ValueError("points and labels belong together: one of them is missing")
        if points is None and masks is None:
            raise ValueError("a prompt needs points (or box corners) or a mask")
        if points is not None and labels is not None and points.shape != (*labels.shape, 2):
            raise ValueError(
                f"points {tuple(points.shape)} and labels {tuple(labels.shape)} do not fit: expected (P, K, 2), (P, K)"
            )
        side = features.fine.shape[-1]
        if masks is not None and (masks.ndim != 4 or masks.shape[1:] != (1, side, side)):
            raise ValueError(f"mask prompts have shape {tuple(masks.shape)}, expected (P, 1, {side}, {side})")
        counts = {len(x) for x in (points, masks, image_index) if x is not None}
        num_images = features.embedding.shape[0]
        if image_index is None and num_images > 1:
            counts.add(num_images)
        if len(counts) != 1:
            raise ValueError(
                f"numbers of prompts differ: {sorted(counts)} in points, masks, image_index"
                + (f" ({num_images} images without image_index)" if image_index is None else "")
            )
        return counts.pop()
