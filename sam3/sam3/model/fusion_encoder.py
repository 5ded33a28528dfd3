"""The fusion encoder: image tokens read each other and the prompt.

Restates the encoder of Meta's SAM 3 package 0.1.4. Its layer is `TransformerLayer`, in which ``cross_attn_image``
reads the prompt here, in spite of its name.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sam3.config import FusionEncoderConfig
from sam3.model.attention_layers import TransformerLayer
from sam3.model.weights_state import weights_state


class EncoderOutput(NamedTuple):
    """Image tokens after they have read the prompt, with what the decoder needs to know about them."""

    memory: Tensor
    """Fused image tokens, (L, B, C); L = H * W, row by row."""
    pos_embed: Tensor
    """Their position code, (L, B, C)."""
    padding_mask: None
    """Always None: every image token is valid."""
    level_start_index: Tensor
    """First token of each level: [0], as there is one level."""
    spatial_shapes: Tensor
    """(H, W) of each level, int64, (1, 2)."""
    valid_ratios: Tensor
    """Share of each level that is no padding: ones, (B, 1, 2)."""
    memory_text: Tensor
    """The prompt, unchanged, (T, B, C)."""
    size_hw: tuple[int, int]
    """``spatial_shapes`` as numbers, which cost no synchronisation with the device."""


class _Start(NamedTuple):
    """The first self-attention of one image, and what it was computed from."""

    tokens: Tensor
    pos: Tensor
    weights: tuple[int, ...]
    result: Tensor


class TransformerEncoderFusion(nn.Module):
    """Pre-norm layers without a final norm; ``layers.{i}``.

    The first self-attention comes before the image has read any prompt: for inference on the CPU, where it is a seventh
    of the time, it is computed once per image. That of the last two images is kept, 16 MB each at full size.

    Attributes:
        use_checkpointing: Recompute each layer in the backward pass instead of keeping its activations; acts in
            training alone and changes no result.
    """

    def __init__(self, config: FusionEncoderConfig, hidden_dim: int, use_checkpointing: bool = False) -> None:
        super().__init__()
        self.use_checkpointing = use_checkpointing
        self.layers = nn.ModuleList(
            TransformerLayer(hidden_dim, config.num_heads, config.mlp_dim, config.dropout)
            for _ in range(config.num_layers)
        )
        self._starts: deque[_Start] = deque(maxlen=2)  # of the last images

    def forward(
        self,
        src: Tensor,
        prompt: Tensor,
        src_pos: Tensor,
        prompt_key_padding_mask: Tensor | None,
        size_hw: tuple[int, int],
    ) -> EncoderOutput:
        """
        Args:
            src: Image tokens, one image for every prompt, (L, B, C).
            prompt: Text and geometry tokens, (T, B, C).
            src_pos: Position code of the image tokens, (L, B, C) or (L, 1, C).
            prompt_key_padding_mask: bool, (B, T), True for prompt tokens that are padding.
            size_hw: Height and width of the grid that the L tokens are the rows of.

        Raises:
            ValueError: If the grid has another number of tokens.
        """
        height, width = size_hw
        num_tokens, batch, _ = src.shape
        if num_tokens != height * width:
            raise ValueError(f"fusion encoder: {num_tokens} image tokens are no grid of {height} x {width}")
        tokens, context, pos = src.transpose(0, 1), prompt.transpose(0, 1), src_pos.transpose(0, 1)
        for i, layer in enumerate(self.layers):
            inputs = (tokens, context, pos, None, None, prompt_key_padding_mask)
            if i == 0 and self._reuses_images(tokens):
                assert isinstance(layer, TransformerLayer)
                tokens = layer.attend_context(self._start(layer, tokens, pos), context, None, prompt_key_padding_mask)
            elif self.training and self.use_checkpointing:
                tokens = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                tokens = layer(*inputs)
        return EncoderOutput(
            memory=tokens.transpose(0, 1),
            pos_embed=src_pos.expand_as(src),
            padding_mask=None,
            level_start_index=torch.zeros(1, dtype=torch.int64, device=src.device),
            spatial_shapes=torch.tensor([[height, width]], dtype=torch.int64, device=src.device),
            valid_ratios=src.new_ones(batch, 1, 2),
            memory_text=prompt,
            size_hw=size_hw,
        )

    def _reuses_images(self, tokens: Tensor) -> bool:
        return tokens.device.type == "cpu" and not (
            self.training
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
        )

    def _start(self, layer: TransformerLayer, tokens: Tensor, pos: Tensor) -> Tensor:
        """The first layer's self-attention, (B, L, C); prompts on the same image share it."""
        weights = weights_state(layer.norm1, layer.self_attn)
        results = []
        for item, item_pos in zip(tokens.split(1), pos.expand_as(tokens).split(1), strict=True):
            for start in tuple(self._starts):
                if start.weights == weights and torch.equal(start.tokens, item) and torch.equal(start.pos, item_pos):
                    break
            else:
                start = _Start(item.clone(), item_pos.clone(), weights, layer.attend_self(item, item_pos))
                self._starts.append(start)
            results.append(start.result)
        return torch.cat(results)

    def _apply(self, fn, recurse=True):
        self._starts.clear()  # they would keep memory on the old device
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> TransformerEncoderFusion:
        """Either mode begins without what was kept of images."""
        self._starts.clear()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_starts": deque(maxlen=self._starts.maxlen)}  # nothing of an image in a copy or a file
