"""EfficientViT B0, B1 and B2 (MIT's, with multi-scale linear attention) from timm.

Cai et al., "EfficientViT: Multi-Scale Linear Attention for High-Resolution Dense Prediction", 2022,
https://arxiv.org/abs/2205.14756. What we change in timm's network: the attention's eps is 1e-15 as in the released
students (timm: 1e-5), which makes it equal to theirs bit for bit.
"""

from __future__ import annotations

from torch import nn

from sam3.backbones.strip_blocks import efficientvit_blocks
from sam3.backbones.timm_network import build_timm, register_timm_family

ATTENTION_EPS = 1e-15


def _build(timm_name: str) -> nn.Module:
    from timm.models.efficientvit_mit import LiteMLA

    network = build_timm(timm_name)
    network.head = nn.Identity()
    for module in network.modules():
        if isinstance(module, LiteMLA):
            module.eps = ATTENTION_EPS
    return network


register_timm_family(
    "efficientvit",
    (
        ("efficientvit_b0", "es_ev_s", (64, 128)),
        ("efficientvit_b1", "es_ev_m", (128, 256)),
        ("efficientvit_b2", "es_ev_l", (192, 384)),
    ),
    _build,
    marker="input_stem.",
    classifier_prefixes=("head.",),
    activation_pairs={"ConvNormAct": (("conv", "act"),)},
    strip_blocks=efficientvit_blocks,
)
