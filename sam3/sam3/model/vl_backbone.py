"""The backbone of the image model: vision and language side by side, without any fusion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sam3.model.necks import Sam3DualViTDetNeck
from sam3.model.text_cache import TextFeatureCache
from sam3.model.text_encoder import VETextEncoder
from sam3.model.tokenizer import PADDING_ID


class SAM3VLBackbone(nn.Module):
    """Wraps both backbones and names what they return.

    Attributes:
        vision_backbone: Trunk and necks.
        language_backbone: The text encoder, or None in a model without text prompts.
        text_cache: Features of recent texts, used where no gradients are recorded.
    """

    def __init__(self, vision_backbone: Sam3DualViTDetNeck, language_backbone: VETextEncoder | None = None) -> None:
        super().__init__()
        self.vision_backbone = vision_backbone
        self.language_backbone = language_backbone
        self.text_cache = TextFeatureCache()

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

    def forward_text(
        self,
        captions: Sequence[str],
        additional_text: Sequence[str] | None = None,
        device: torch.device | str | None = None,
    ) -> dict[str, Tensor]:
        """Prompt tokens of texts.

        Features that were computed elsewhere are not passed through here: put them into the backbone's dict under
        ``language_features`` and ``language_mask``.

        Args:
            captions: One or more texts. Empty ones are legal.
            additional_text: More texts, encoded in the same batch and returned apart.
            device: Where the results go; default: where the weights are.

        Returns:
            ``language_features``, (L, n, C); ``language_mask``, bool (n, L), True for padding; ``language_embeds``,
            token embeddings without positions, (L, n, width); for additional texts ``additional_text_features`` and
            ``additional_text_mask``.

        Raises:
            ValueError: If the model has no text encoder, or there is no text.
            TypeError: If something is not a string.
        """
        encoder = self.language_backbone
        if encoder is None:
            raise ValueError(
                "this model has no text encoder: build it with enable_text_encoder=True, or put language_features and "
                "language_mask into the backbone's output"
            )
        captions = [captions] if isinstance(captions, str) else list(captions)
        if not captions:
            raise ValueError("captions is empty: give at least one text ('' is one)")
        ids = encoder.tokenize([*captions, *(additional_text or ())])
        embeds = encoder.embed(ids)
        memory = self.text_cache.memory(encoder, ids, embeds).to(device=device)
        mask, embeds, n = (ids == PADDING_ID).to(memory.device), embeds.to(device=device), len(captions)
        out = {"language_features": memory[:, :n], "language_mask": mask[:n], "language_embeds": embeds[:, :n]}
        if additional_text:
            out |= {"additional_text_features": memory[:, n:], "additional_text_mask": mask[n:]}
        return out

    def forward(
        self, samples: Tensor, captions: Sequence[str], additional_text: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """`forward_image` and `forward_text` in one dict."""
        return self.forward_image(samples) | self.forward_text(captions, additional_text)

    def _apply(self, fn, recurse=True):
        self.text_cache.clear()  # what it holds would keep memory on the old device
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> SAM3VLBackbone:
        """Training mode forgets the text features."""
        if mode:
            self.text_cache.clear()
        return super().train(mode)

    @staticmethod
    def _named(maps: list[Tensor] | None, positions: Sequence[Tensor] | None) -> dict[str, Any]:
        return {"vision_features": maps[-1] if maps else None, "vision_pos_enc": positions, "backbone_fpn": maps}
