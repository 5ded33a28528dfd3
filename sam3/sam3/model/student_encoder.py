"""The only adapter: any backbone -> features with the teacher's shape.

    images (B, 3, S, S) -> backbone, last stage (B, C', S/32, S/32) -> head -> resized to the teacher's grid (B, C, G,
    G)

The head is the released students': 1x1 convolution, BatchNorm, GELU, 3x3 convolution. With ``fuse_stride16`` the last
two stages are first added at stride 16, each through a 1x1 convolution (the neck of EdgeSAM,
https://arxiv.org/abs/2312.06660), so that fine masks do not have to come out of a 32x32 map.
"""

from __future__ import annotations

import copy
import dataclasses

import torch.nn.functional as F
from torch import Tensor, nn

from sam3.backbones import backbone_spec
from sam3.backbones.folding import fold_conv_norms
from sam3.config import Sam3Config, StudentConfig


class StudentBackbone(nn.Module):
    """A registered network under the name ``model``, read at its last two stages."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.spec = backbone_spec(name)
        self.model = self.spec.build()

    def forward(self, images_bchw: Tensor) -> tuple[Tensor, Tensor]:
        """Maps of the last two stages, (B, C, H, W) each, the finer one first."""
        return self.spec.forward_taps(self.model, images_bchw)


class Stride16Fusion(nn.Module):
    """Adds the last two stages at the resolution of the finer one, each through a 1x1 convolution."""

    def __init__(self, fine_channels: int, coarse_channels: int) -> None:
        super().__init__()
        self.lateral_fine = nn.Conv2d(fine_channels, coarse_channels, 1, bias=False)
        self.lateral_coarse = nn.Conv2d(coarse_channels, coarse_channels, 1, bias=False)

    def forward(self, fine_bchw: Tensor, coarse_bchw: Tensor) -> Tensor:
        """(B, C_fine, H, W) and (B, C_coarse, ~H/2, ~W/2) -> (B, C_coarse, H, W)."""
        coarse = self.lateral_coarse(coarse_bchw)
        coarse = F.interpolate(coarse, size=fine_bchw.shape[-2:], mode="bilinear", align_corners=False)
        return self.lateral_fine(fine_bchw) + coarse


class StudentEncoder(nn.Module):
    """Backbone, projection head and resize: the module that is distilled and that later replaces the trunk.

    Attributes:
        student: Its description. `fuse_for_inference` changes ``fused`` in it.
    """

    def __init__(self, student: StudentConfig, image_size_px: int, embed_dim: int, grid_size: int) -> None:
        """
        Args:
            student: Backbone and options.
            image_size_px: Side of the square input that ``grid_size`` belongs to. Other sizes work too.
            embed_dim: Channels of the teacher's embedding: 1024 for ``sam3``.
            grid_size: Side of the teacher's grid at ``image_size_px``: 72 for ``sam3``.

        Raises:
            UnknownBackboneError: If the backbone is not registered.
        """
        super().__init__()
        self.student = student
        self.image_size_px = image_size_px
        self.embed_dim = embed_dim
        self.grid_size = grid_size
        self.backbone = StudentBackbone(student.backbone)
        fine_channels, channels = self.backbone.spec.tap_channels
        self.fusion = Stride16Fusion(fine_channels, channels) if student.fuse_stride16 else None
        self.head = nn.Sequential(
            nn.Conv2d(channels, embed_dim, 1, bias=False),
            nn.BatchNorm2d(embed_dim),
            nn.GELU(),
            nn.Conv2d(embed_dim, embed_dim, 3, padding=1),
        )
        if student.fused:
            _fold(self)

    def forward(self, images_bchw: Tensor) -> Tensor:
        """Student features.

        Args:
            images_bchw: Preprocessed images, (B, 3, S, S).

        Returns:
            (B, embed_dim, G, G). G is ``grid_size`` at ``image_size_px`` and in proportion at another S.
        """
        fine, coarse = self.backbone(images_bchw)
        features = self.head(coarse if self.fusion is None else self.fusion(fine, coarse))
        size_hw = [max(1, round(side * self.grid_size / self.image_size_px)) for side in images_bchw.shape[-2:]]
        if list(features.shape[-2:]) == size_hw:
            return features
        return F.interpolate(features, size=size_hw, mode="bilinear", align_corners=False)


class StudentTrunk(nn.Module):
    """A student in the trunk's place: called like the ViT, so it returns a list of one map."""

    def __init__(self, model: StudentEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_bchw: Tensor) -> list[Tensor]:
        """(B, 3, S, S) -> [(B, C, G, G)]."""
        return [self.model(images_bchw)]


def build_student(config: Sam3Config) -> StudentEncoder:
    """The student that a model description names, with random weights, in training mode.

    Folded descriptions (``student.fused``) are built in folded form and in eval mode. Also runs under
    ``torch.device("meta")``.

    Raises:
        ValueError: If the description names no student.
    """
    if config.student is None:
        raise ValueError(f"model description {config.name!r} names no student: set student=StudentConfig(backbone=...)")
    student = StudentEncoder(config.student, config.image_size_px, config.trunk.embed_dim, config.grid_size)
    return student.eval() if config.student.fused else student


def fuse_for_inference(student: StudentEncoder) -> StudentEncoder:
    """A copy for deployment: parallel branches and BatchNorm folded into convolutions.

    Args:
        student: A trained student; it is left as it is.

    Returns:
        A student in eval mode whose ``student.fused`` is True, so that its state dict can be loaded into what
        `build_student` makes from that description. A folded student is returned unchanged.
    """
    if student.student.fused:
        return student
    folded = copy.deepcopy(student).eval()
    _fold(folded)
    folded.student = dataclasses.replace(student.student, fused=True)
    return folded


def _fold(student: StudentEncoder) -> None:
    student.eval()
    fold_branches = student.backbone.spec.fold
    if fold_branches is not None:
        fold_branches(student.backbone.model)
    fold_conv_norms(student)
    student.requires_grad_(False)
