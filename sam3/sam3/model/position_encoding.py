"""Sine position encodings: of feature maps, of the points and boxes of prompts, of the decoder's reference boxes.

The order of coordinates differs from use to use, and so do their scales; each function says its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor, nn


def sine_waves(angles: Tensor, num_channels: int, temperature: float = 10000.0) -> Tensor:
    """Sines (even channels) and cosines (odd ones) of angles at falling frequencies, float32.

    Args:
        angles: In radians at the highest frequency, any shape (...).
        num_channels: Channels of each angle, an even number.
        temperature: The ratio of the highest frequency to the one that would follow the lowest.

    Returns:
        (..., num_channels).
    """
    exponents = torch.arange(0, num_channels, 2, device=angles.device, dtype=torch.float32) / num_channels
    phases = angles.to(torch.float32)[..., None] / temperature**exponents
    return torch.stack((phases.sin(), phases.cos()), dim=-1).flatten(-2)


def box_sine_embedding(boxes: Tensor, dim: int) -> Tensor:
    """Encoding of the decoder's reference boxes: ``dim`` / 2 channels for each of **y, x, w, h**, in this order.

    Args:
        boxes: Normalised (cx, cy, w, h), (..., 4).
        dim: Width of the model.

    Returns:
        float32, (..., 2 * dim).
    """
    x, y, w, h = boxes.to(torch.float32).unbind(-1)
    return sine_waves(torch.stack((y, x, w, h), dim=-1) * (2 * math.pi), dim // 2).flatten(-2)


class PositionEmbeddingSine(nn.Module):
    """Sines and cosines of normalised rows and columns; no weights, no cache.

    From DETR (https://arxiv.org/abs/2005.12872) with normalised coordinates in (0, 2 pi].
    """

    def __init__(self, num_pos_feats: int = 256, temperature: float = 10000.0) -> None:
        """``num_pos_feats`` is the number of output channels: half for rows, half for columns."""
        super().__init__()
        if num_pos_feats % 4:
            raise ValueError(f"num_pos_feats must be a multiple of 4, got {num_pos_feats}")
        self.num_pos_feats = num_pos_feats
        self.temperature = temperature

    def _waves(self, angles: Tensor) -> Tensor:
        return sine_waves(angles, self.num_pos_feats // 2, self.temperature)

    def encode_map(self, size_hw: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
        """Encoding of an (H, W) map: float32, (1, num_pos_feats, H, W), rows first."""
        height, width = size_hw
        rows = torch.arange(1, height + 1, device=device, dtype=torch.float32) / (height + 1e-6) * (2 * math.pi)
        columns = torch.arange(1, width + 1, device=device, dtype=torch.float32) / (width + 1e-6) * (2 * math.pi)
        pos_y = self._waves(rows).T[:, :, None].expand(-1, -1, width)
        pos_x = self._waves(columns).T[:, None].expand(-1, height, -1)
        return torch.cat([pos_y, pos_x])[None]

    def encode_xy(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Encodings of normalised coordinates, any shape (...): two float32 (..., num_pos_feats / 2), of x and of y."""
        x, y = x.to(torch.float32), y.to(torch.float32)
        return self._waves(x * (2 * math.pi)), self._waves(y * (2 * math.pi))

    def encode_boxes(self, x: Tensor, y: Tensor, w: Tensor, h: Tensor) -> Tensor:
        """Encoding of normalised boxes for a prompt: centre **y, x**, then the raw **h, w**.

        Args:
            x: Centres, any shape (...); ``y``, ``w`` and ``h`` likewise.

        Returns:
            float32, (..., num_pos_feats + 2).
        """
        pos_x, pos_y = self.encode_xy(x, y)
        return torch.cat((pos_y, pos_x, h[..., None], w[..., None]), dim=-1)

    def forward(self, features_bchw: Tensor) -> Tensor:
        """Encoding for a feature map, in its dtype and on its device: (B, num_pos_feats, H, W)."""
        encoding = self.encode_map((features_bchw.shape[-2], features_bchw.shape[-1]), features_bchw.device)
        return encoding.to(features_bchw.dtype).expand(features_bchw.shape[0], -1, -1, -1)


class LazyPositionEncodings(Sequence[Tensor]):
    """The position encodings of several maps, each computed when it is read.

    At 1008 px the encodings of the two fine levels would take 106 MB, and nothing reads them.
    """

    def __init__(self, encoding: PositionEmbeddingSine, maps: Sequence[Tensor]) -> None:
        self._encoding = encoding
        self._like = [m.new_empty((m.shape[0], 0, *m.shape[-2:])) for m in maps]

    def __len__(self) -> int:
        return len(self._like)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self._encoding(like) for like in self._like[index]]
        return self._encoding(self._like[index])
