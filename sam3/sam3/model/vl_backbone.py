"""The backbone of the image model: vision now, language beside it once the detector is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from sam3.model.necks import Sam3DualViTDetNeck


class SAM3VLBackbone(nn.Module):
    """Wraps the vision backbone and names what it returns."""

    def __init__(self, vision_backbone: Sam3DualViTDetNeck) -> None:
        super().__init__()
        self.vision_backbone = vision_backbone

    def forward_image(self, samples: Tensor, need_detector: bool = True, need_sam2: bool = True) -> dict[str, Any]:
        """Features of a batch of images; differentiable.

        Args:
            samples: Preprocessed images, (B, 3, S, S).
            need_detector: Compute the detector's neck. An interactive session needs only the other one.
            need_sam2: Compute the neck of SAM heads and tracker, if the model has it.

        Returns:
            ``vision_features`` (the coarsest map), ``vision_pos_enc`` and ``backbone_fpn`` (sequences, finest first;
            for ``sam3`` (B, 256, 288, 288), (B, 256, 144, 144), (B, 256, 72, 72)), all None unless asked for; and
            ``sam2_backbone_out``, a dict with the same three keys, or None.
        """
        maps, positions, sam2_maps, sam2_positions = self.vision_backbone(samples, need_detector, need_sam2)
        return self._named(maps, positions) | {
            "sam2_backbone_out": None if sam2_maps is None else self._named(sam2_maps, sam2_positions)
        }

    @staticmethod
    def _named(maps: list[Tensor] | None, positions: Sequence[Tensor] | None) -> dict[str, Any]:
        return {"vision_features": maps[-1] if maps else None, "vision_pos_enc": positions, "backbone_fpn": maps}
