"""EfficientViT B0, B1 and B2 (MIT's, with multi-scale linear attention) from timm.

Cai et al., "EfficientViT: Multi-Scale Linear Attention for High-Resolution Dense Prediction", 2022,
https://arxiv.org/abs/2205.14756. What we change in timm's network: the attention's eps is 1e-15 as in the released
students (timm: 1e-5), which makes it equal to theirs bit for bit.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sam3.backbones.registry import BackboneSpec, register
from sam3.backbones.timm_network import build_timm, forward_stem_and_stages

ATTENTION_EPS = 1e-15


def _build(timm_name: str) -> nn.Module:
    from timm.models.efficientvit_mit import LiteMLA

    network = build_timm(timm_name)
    network.head = nn.Identity()
    for module in network.modules():
        if isinstance(module, LiteMLA):
            module.eps = ATTENTION_EPS
    return network


def _forward_taps(network: Any, images_bchw: Tensor) -> tuple[Tensor, Tensor]:
    return forward_stem_and_stages(network.stem, network.stages, images_bchw)


for _name, _student, _channels in (
    ("efficientvit_b0", "es_ev_s", (64, 128)),
    ("efficientvit_b1", "es_ev_m", (128, 256)),
    ("efficientvit_b2", "es_ev_l", (192, 384)),
):
    register(
        BackboneSpec(
            name=_name,
            build=lambda timm_name=_name: _build(timm_name),  # type: ignore[misc]
            forward_taps=_forward_taps,
            tap_channels=_channels,
            tap_strides_px=(16, 32),
            marker="input_stem.",
            student_name=_student,
            timm_name=_name,
            key_family="efficientvit",
            classifier_prefixes=("head.",),
        )
    )
