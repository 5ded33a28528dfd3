"""Fold BatchNorm and parallel branches into convolutions, for a network that is no longer trained.

All arithmetic is in float64, so that the folded network differs from the trained one by float32 rounding alone. It is
done on the CPU, because not every device has float64 (MPS), and its results are moved back.
"""

from __future__ import annotations

import itertools
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def fold_conv_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """One convolution with bias that equals ``norm(conv(x))`` in eval mode.

    Args:
        conv: Convolution, with or without bias.
        norm: BatchNorm over its output channels.

    Returns:
        A new convolution on the same device (meta included) and in the same dtype and mode.

    Raises:
        ValueError: If the norm's channels are not the convolution's, or it keeps no running statistics.
    """
    if norm.num_features != conv.out_channels or norm.running_mean is None or norm.running_var is None:
        raise ValueError(
            f"cannot fold a BatchNorm over {norm.num_features} channels (running statistics: "
            f"{norm.track_running_stats}) into a convolution with {conv.out_channels} output channels"
        )
    scale = 1.0 / torch.sqrt(_exact(norm.running_var) + norm.eps)
    if norm.affine:
        scale = scale * _exact(norm.weight)
    bias = -_exact(norm.running_mean) if conv.bias is None else _exact(conv.bias) - _exact(norm.running_mean)
    bias = bias * scale
    if norm.affine:
        bias = bias + _exact(norm.bias)
    return _like(conv, _exact(conv.weight) * scale[:, None, None, None], bias)


@torch.no_grad()
def sum_depthwise_branches(kernel_3x3: nn.Conv2d, kernel_1x1: nn.Conv2d) -> nn.Conv2d:
    """One depthwise 3x3 convolution that equals ``kernel_3x3(x) + kernel_1x1(x) + x``."""
    weight = _exact(kernel_3x3.weight) + F.pad(_exact(kernel_1x1.weight) + 1.0, [1, 1, 1, 1])
    bias = torch.zeros_like(weight[:, 0, 0, 0])
    for conv in (kernel_3x3, kernel_1x1):
        if conv.bias is not None:
            bias = bias + _exact(conv.bias)
    return _like(kernel_3x3, weight, bias)


def fold_conv_norms(root: nn.Module) -> None:
    """Fold, in place, each convolution with the BatchNorm that follows it.

    Seen are sequential modules, whose children run in order, and timm's ``conv, norm, act`` blocks (EfficientViT).
    A sequential that held nothing but the pair is replaced by the convolution, as timm's own ``fuse()`` does;
    elsewhere an identity takes the place of the BatchNorm. So names of what remains do not change.
    """
    for name, child in list(root.named_children()):
        if _is_pair(child):
            setattr(root, name, fold_conv_norm(child[0], child[1]))
            continue
        if isinstance(child, nn.Sequential):
            _fold_adjacent(child)
        elif _is_conv_norm_act(child):
            child.conv = fold_conv_norm(child.conv, child.norm)
            child.norm = nn.Identity()
        fold_conv_norms(child)


def _is_pair(module: nn.Module) -> TypeGuard[Any]:
    if not isinstance(module, nn.Sequential) or len(module) != 2:
        return False
    return isinstance(module[0], nn.Conv2d) and isinstance(module[1], nn.BatchNorm2d)


def _is_conv_norm_act(module: nn.Module) -> TypeGuard[Any]:
    names = [name for name, _ in module.named_children()]
    return (
        names[-3:] == ["conv", "norm", "act"]
        and isinstance(module.conv, nn.Conv2d)
        and isinstance(module.norm, nn.BatchNorm2d)
    )


def _fold_adjacent(sequence: nn.Sequential) -> None:
    names = list(sequence._modules)
    for first, second in itertools.pairwise(names):
        conv, norm = sequence._modules[first], sequence._modules[second]
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(sequence, first, fold_conv_norm(conv, norm))
            setattr(sequence, second, nn.Identity())


def _exact(tensor: Tensor) -> Tensor:
    """In float64, on the CPU; on the meta device, which holds no numbers, it stays there."""
    return (tensor if tensor.is_meta else tensor.cpu()).double()


def _like(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """A convolution with the geometry of ``conv`` and the given weights."""
    folded = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        stride=conv.stride,  # type: ignore[arg-type]
        padding=conv.padding,  # type: ignore[arg-type]
        dilation=conv.dilation,  # type: ignore[arg-type]
        groups=conv.groups,
        bias=True,
        padding_mode=conv.padding_mode,
        device="meta",
    )
    folded.weight = nn.Parameter(weight.to(conv.weight.dtype).to(conv.weight.device), requires_grad=False)
    folded.bias = nn.Parameter(bias.to(conv.weight.dtype).to(conv.weight.device), requires_grad=False)
    return folded.train(conv.training)
