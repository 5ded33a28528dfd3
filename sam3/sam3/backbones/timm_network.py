"""What the three timm families share: construction without weights, and the walk over stem and stages."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


def build_timm(timm_name: str) -> nn.Module:
    """timm's network with random weights; timm is imported here so that naming a student does not cost that import."""
    import timm

    return timm.create_model(timm_name, pretrained=False, num_classes=0)


def forward_stem_and_stages(stem: nn.Module, stages: Iterable[nn.Module], images_bchw: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of the last two stages.

    Args:
        stem: First layers of the network.
        stages: At least two stages, each from (B, C, H, W) to (B, C', H', W').
        images_bchw: Preprocessed images.

    Returns:
        The maps of the last stage but one and of the last stage.
    """
    maps = [stem(images_bchw)]
    for stage in stages:
        maps.append(stage(maps[-1]))
        del maps[:-2]
    return maps[0], maps[1]
