"""What the three timm families share: construction without weights, and the walk over stem and stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from sam3.backbones.registry import BackboneSpec, KeyFamily, register


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


def register_timm_family(
    key_family: KeyFamily,
    sizes: Iterable[tuple[str, str, tuple[int, int]]],
    build: Callable[[str], nn.Module],
    *,
    stem: str = "stem",
    timm_suffix: str = "",
    **shared: Any,
) -> None:
    """Register the sizes of one architecture.

    Args:
        key_family: Rule for published names.
        sizes: Of each its name, the released student's name, and the channels of the two tapped maps.
        build: timm name -> network without classifier.
        stem: Attribute of timm's network that holds its first layers; the stages are in ``stages``.
        timm_suffix: What timm's names have behind ours.
        shared: Further fields of `BackboneSpec`, the same for all sizes.
    """

    def forward_taps(network: Any, images_bchw: Tensor) -> tuple[Tensor, Tensor]:
        return forward_stem_and_stages(getattr(network, stem), network.stages, images_bchw)

    for name, student_name, tap_channels in sizes:
        timm_name = name + timm_suffix
        spec = BackboneSpec(
            name=name,
            build=partial(build, timm_name),
            forward_taps=forward_taps,
            tap_channels=tap_channels,
            tap_strides_px=(16, 32),
            student_name=student_name,
            timm_name=timm_name,
            key_family=key_family,
            **shared,
        )
        register(spec)
