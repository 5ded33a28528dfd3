"""TinyViT 5M, 11M and 21M from timm, in the window sizes of the 224 px models.

Wu et al., "TinyViT: Fast Pretraining Distillation for Small Vision Transformers", 2022,
https://arxiv.org/abs/2207.10666. Windows stay 7 / 14 / 7 at any input size, so the bias tables never change. What we
change in timm's network: the expanded attention bias is not cached between forwards. timm keeps it in eval mode until
the next ``train()`` or ``eval()``, so weights that change in place (an EMA, a checkpoint loaded into a model in eval
mode) would be used with an old bias.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sam3.backbones.strip_blocks import tiny_vit_blocks
from sam3.backbones.timm_network import build_timm, register_timm_family


def _build(timm_name: str) -> nn.Module:
    from timm.models.tiny_vit import Attention

    network = build_timm(timm_name)
    network.head = nn.Identity()
    for module in network.modules():
        if isinstance(module, Attention):
            module.__class__ = _uncached_attention_class()  # type: ignore[assignment]
            # Not in any checkpoint: it must be real also in a model that is built on the meta device.
            module.attention_bias_idxs = bias_table_index(*module.resolution)
    return network


@cache
def _uncached_attention_class() -> type[nn.Module]:
    """A subclass, made on first use so that importing this module does not import timm."""
    from timm.models.tiny_vit import Attention

    class UncachedAttention(Attention):
        """timm's window attention that expands its bias table in each forward (under 1% of the time).

        The bias gets a batch dimension: PyTorch's fused CPU attention takes only masks with two or four dimensions.
        """

        def get_attention_biases(self, device: torch.device) -> Tensor:
            index: Any = self.attention_bias_idxs
            return self.attention_biases[None, :, index.to(device)]

    return UncachedAttention


def bias_table_index(height: int, width: int) -> Tensor:
    """Which entry of a (heads, height * width) bias table belongs to each pair of positions in a window.

    Entries are numbered by |dy|, |dx| in the order in which a scan over all pairs first meets them, which for a
    window is row by row: |dy| * width + |dx|.

    Returns:
        (N, N) int64 on the CPU, N = height * width.
    """
    y = torch.arange(height, device="cpu").repeat_interleave(width)
    x = torch.arange(width, device="cpu").repeat(height)
    return (y[:, None] - y).abs() * width + (x[:, None] - x).abs()


register_timm_family(
    "tiny_vit",
    (
        ("tiny_vit_5m", "es_tv_s", (160, 320)),
        ("tiny_vit_11m", "es_tv_m", (256, 448)),
        ("tiny_vit_21m", "es_tv_l", (384, 576)),
    ),
    _build,
    stem="patch_embed",
    timm_suffix="_224",
    marker="layers.",
    classifier_prefixes=("head.", "norm_head."),
    activation_pairs={
        "PatchEmbed": (("conv1", "act"),),
        "MBConv": (("conv1", "act1"), ("conv2", "act2")),
        "PatchMerging": (("conv1", "act1"), ("conv2", "act2")),
        "NormMlp": (("fc1", "act"),),
    },
    strip_blocks=tiny_vit_blocks,
)
