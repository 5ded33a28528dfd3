"""The dual neck: the trunk's single map becomes a small pyramid, once for the detector and once for the SAM heads."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sam3.config import Sam3Config
from sam3.model.deployed_trunk import DeployedTrunk
from sam3.model.position_encoding import LazyPositionEncodings, PositionEmbeddingSine


def build_neck_branch(scale: float, in_dim: int, out_dim: int) -> nn.Sequential:
    """One level: resampling by ``scale``, then a 1x1 and a 3x3 convolution. The names are the released ones."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    dim = in_dim
    if scale == 4.0:
        layers["dconv_2x2_0"] = nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)
        layers["gelu"] = nn.GELU()
        layers["dconv_2x2_1"] = nn.ConvTranspose2d(dim // 2, dim // 4, 2, stride=2)
        dim //= 4
    elif scale == 2.0:
        layers["dconv_2x2"] = nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)
        dim //= 2
    elif scale == 0.5:
        layers["maxpool_2x2"] = nn.MaxPool2d(2)
    elif scale != 1.0:
        raise ValueError(f"neck scale {scale} is not one of 4.0, 2.0, 1.0, 0.5")
    layers["conv_1x1"] = nn.Conv2d(dim, out_dim, 1)
    layers["conv_3x3"] = nn.Conv2d(out_dim, out_dim, 3, padding=1)
    return nn.Sequential(layers)


def init_neck(neck: nn.Module) -> None:
    """Keep the variance through the neck, which has no norms: weights N(0, 1 / inputs per output), zero biases."""
    for module in neck.modules():
        if isinstance(module, nn.ConvTranspose2d):  # kernel = stride: every output pixel sees one tap
            nn.init.normal_(module.weight, std=module.in_channels**-0.5)
        elif isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=(module.in_channels * math.prod(module.kernel_size)) ** -0.5)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Sam3DualViTDetNeck(nn.Module):
    """Trunk and the two necks that read it.

    Attributes:
        trunk: ViT or student: images -> list with one map.
        convs: Branches for the detector.
        sam2_convs: The same again with its own weights for SAM heads and tracker; absent if they are not built.
        num_levels: Levels that are computed. The coarsest, whose weights exist in the released file, is never read.
    """

    def __init__(self, trunk: nn.Module, config: Sam3Config, add_sam2_neck: bool = True) -> None:
        super().__init__()
        self.trunk = trunk
        self.position_encoding = PositionEmbeddingSine(config.hidden_dim)
        self.num_levels = len(config.neck.scales) - config.neck.scalp
        self.deployed_trunk = DeployedTrunk()

        def build() -> nn.ModuleList:
            dims = (config.trunk.embed_dim, config.hidden_dim)
            return nn.ModuleList(build_neck_branch(scale, *dims) for scale in config.neck.scales)

        self.convs = build()
        self.sam2_convs = build() if add_sam2_neck else None
        init_neck(self.convs)
        if self.sam2_convs is not None:
            init_neck(self.sam2_convs)

    def forward(
        self, images: Tensor, need_detector: bool = True, need_sam2: bool = True
    ) -> tuple[list[Tensor] | None, Sequence[Tensor] | None, list[Tensor] | None, Sequence[Tensor] | None]:
        """Run the trunk once and the necks that are asked for.

        Without gradients a student runs in its fastest form (`DeployedTrunk`): equal within 1e-3 where outputs are of
        order 1.

        Returns:
            Maps, finest first, and their position encodings, for the detector and for the SAM heads; None for a neck
            that was not asked for or does not exist.
        """
        trunk = self.trunk if torch.is_grad_enabled() else self.deployed_trunk.of(self.trunk)
        return self.neck(trunk(images)[-1], need_detector, need_sam2)

    def neck(
        self, features_bchw: Tensor, need_detector: bool = True, need_sam2: bool = True
    ) -> tuple[list[Tensor] | None, Sequence[Tensor] | None, list[Tensor] | None, Sequence[Tensor] | None]:
        """`forward` from the trunk's output, e.g. from a stored teacher embedding."""
        detector = self._pyramid(self.convs if need_detector else None, features_bchw)
        sam2 = self._pyramid(self.sam2_convs if need_sam2 else None, features_bchw)
        return *detector, *sam2

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
        self.deployed_trunk.reset()  # its copy would stay on the old device and in the old dtype
        return super()._apply(fn, recurse)

    def _pyramid(
        self, branches: nn.ModuleList | None, features_bchw: Tensor
    ) -> tuple[list[Tensor] | None, Sequence[Tensor] | None]:
        if branches is None:
            return None, None
        maps = [branch(features_bchw) for branch in branches[: self.num_levels]]
        return maps, LazyPositionEncodings(self.position_encoding, maps)
