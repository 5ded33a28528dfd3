"""RepViT m0.9, m1.1 and m2.3 from timm.

Wang et al., "RepViT: Revisiting Mobile CNN From ViT Perspective", 2023, https://arxiv.org/abs/2307.09283. timm's
networks equal those of the released students bit for bit once the classifier is gone.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sam3.backbones.folding import fold_conv_norm, sum_depthwise_branches
from sam3.backbones.strip_blocks import repvit_blocks
from sam3.backbones.timm_network import build_timm, register_timm_family


def _build(timm_name: str) -> nn.Module:
    network = build_timm(timm_name)
    network.head = nn.Identity()
    network.head_drop = nn.Identity()
    return network


def _fold_branches(network: nn.Module) -> None:
    """Replace each token mixer (3x3 + 1x1 + identity, then BatchNorm; all depthwise) by one 3x3 convolution."""
    from timm.models.repvit import RepVggDw

    for parent in list(network.modules()):
        for name, mixer in list(parent.named_children()):
            if isinstance(mixer, RepVggDw):
                setattr(parent, name, _fold_mixer(mixer))


def _fold_mixer(mixer: Any) -> nn.Conv2d:
    kernel_3x3 = fold_conv_norm(mixer.conv.c, mixer.conv.bn)
    return fold_conv_norm(sum_depthwise_branches(kernel_3x3, mixer.conv1), mixer.bn)


register_timm_family(
    "repvit",
    (
        ("repvit_m0_9", "es_rv_s", (192, 384)),
        ("repvit_m1_1", "es_rv_m", (256, 512)),
        ("repvit_m2_3", "es_rv_l", (320, 640)),
    ),
    _build,
    marker="features.",
    classifier_prefixes=("head.", "classifier."),
    activation_pairs={"RepVitMlp": (("conv1", "act"),), "RepVitStem": (("conv1", "act1"),)},
    strip_blocks=repvit_blocks,
    fold=_fold_branches,
)
