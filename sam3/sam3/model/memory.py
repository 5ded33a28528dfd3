"""The memory encoder: a frame's features and an object's mask become a small map that later frames read.

From Segment Anything 2 (https://arxiv.org/abs/2408.00714); the fuser's blocks are those of ConvNeXt
(https://arxiv.org/abs/2201.03545).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3.config import Sam3Config
from sam3.sam.layers import LayerNorm2d


class MaskDownsampler(nn.Module):
    """Convolutions of stride 2 from one channel to many, then a 1x1 convolution."""

    def __init__(self, dim: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for narrow, wide in pairwise((1, *channels)):
            layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), LayerNorm2d(wide), nn.GELU()]
        self.encoder = nn.Sequential(*layers, nn.Conv2d(channels[-1], dim, 1))

    def forward(self, masks: Tensor) -> Tensor:
        """(B, 1, 2^n G, 2^n G) -> (B, C, G, G)."""
        return self.encoder(masks)


class FuserBlock(nn.Module):
    """Depthwise 7x7 convolution, norm and a two-layer MLP on each cell, added at a learned scale."""

    def __init__(self, dim: int, expansion: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = LayerNorm2d(dim)
        self.pwconv1 = nn.Linear(dim, expansion * dim)
        self.pwconv2 = nn.Linear(expansion * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))

    def forward(self, x_bchw: Tensor) -> Tensor:
        cells = self.norm(self.dwconv(x_bchw)).permute(0, 2, 3, 1)
        cells = self.pwconv2(F.gelu(self.pwconv1(cells)))
        return x_bchw + (self.gamma * cells).permute(0, 3, 1, 2)


class Fuser(nn.Module):
    """Several fuser blocks, under the released names."""

    def __init__(self, dim: int, num_layers: int, expansion: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FuserBlock(dim, expansion) for _ in range(num_layers))

    def forward(self, x_bchw: Tensor) -> Tensor:
        for layer in self.layers:
            x_bchw = layer(x_bchw)
        return x_bchw


class SimpleMaskEncoder(nn.Module):
    """Features of a frame and masks of B objects on it to B memories."""

    def __init__(self, config: Sam3Config) -> None:
        super().__init__()
        dim, sizes = config.hidden_dim, config.tracker.memory_encoder
        self.mask_stride = 2 ** len(sizes.mask_channels)
        """Cells of a mask per cell of the features, along one side."""
        self.mask_downsampler = MaskDownsampler(dim, sizes.mask_channels)
        self.pix_feat_proj = nn.Conv2d(dim, dim, 1)
        self.fuser = Fuser(dim, sizes.fuser_layers, sizes.fuser_expansion)
        self.out_proj = nn.Conv2d(dim, config.tracker.mem_dim, 1)

    def forward(self, features_bchw: Tensor, masks: Tensor) -> Tensor:
        """
        Args:
            features_bchw: (1, C, G, G) of the frame that all masks are on, or (B, C, G, G).
            masks: Scaled mask probabilities, (B, 1, S, S) with S = ``mask_stride`` * G.

        Returns:
            (B, Cm, G, G).
        """
        return self.out_proj(self.fuser(self.pix_feat_proj(features_bchw) + self.mask_downsampler(masks)))
