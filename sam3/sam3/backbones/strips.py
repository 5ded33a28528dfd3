"""Run a chain of layers strip by strip, so that what lies between them stays in the processor's cache.

A map of 252x252 with 256 channels takes 65 MB: layer by layer it goes to memory and back, and each new one costs the
system 16,000 page faults. Blocks that widen their input (stems, inverted bottlenecks, MLPs) therefore run all their
layers on some rows at a time. The results are those of the whole map: the rows beyond a strip's border that its
convolutions read are computed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_BYTES_PER_THREAD = 2 << 20  # of the widest map in a strip: a core's second-level cache and its part of the third
_MAX_BYTES = 24 << 20  # the C library takes larger blocks from the system each time, with all their page faults


def strip_ranges(rows: int, bytes_per_row: int, step: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges of rows, [first, last), of about equal size that fit the cache.

    Args:
        rows: Rows in all.
        bytes_per_row: What a row takes in the widest map.
        step: Strips begin at multiples of it.
    """
    budget = min(_MAX_BYTES, _BYTES_PER_THREAD * torch.get_num_threads())
    strips = max(1, round(rows * bytes_per_row / budget))
    height = math.ceil(rows / strips / step) * step
    for first in range(0, rows, height):
        yield first, min(first + height, rows)


def can_run_in_strips(layer: Any) -> bool:
    """Whether a layer is a convolution with an odd kernel that is padded by half of it."""
    return (
        isinstance(layer, nn.Conv2d)
        and not isinstance(layer.padding, str)
        and layer.padding_mode == "zeros"
        and all(side % 2 for side in layer.kernel_size)
        and layer.padding == tuple(side // 2 for side in layer.kernel_size)
        and layer.dilation == (1, 1)
    )


def run_in_strips(
    x_bchw: Tensor,
    layers: Sequence[nn.Conv2d],
    residual: bool = False,
    activation_: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``activation(layers(x) + x)``.

    Args:
        x_bchw: (B, C, H, W).
        layers: A chain of which every layer can run in strips (`can_run_in_strips`).
        residual: Add the input.
        activation_: In-place activation of the sum.

    Returns:
        (B, C', H', W') in channels-last order.
    """
    heights, row_bytes = _heights(layers, x_bchw)
    width = x_bchw.shape[3]
    for layer in layers:
        width = _out_side(width, layer, 1)
    shape = (len(x_bchw), layers[-1].out_channels, heights[-1], width)
    output = torch.empty(shape, dtype=x_bchw.dtype, device=x_bchw.device, memory_format=torch.channels_last)
    for image in range(len(x_bchw)):
        x_1chw = x_bchw[image : image + 1]
        for first, last in strip_ranges(heights[-1], row_bytes):
            y = _rows(x_1chw, layers, heights, first, last)
            target = output[image : image + 1, :, first:last]
            if residual:
                torch.add(y, x_1chw[:, :, first:last], out=target)
            else:
                target.copy_(y)
            if activation_ is not None:
                activation_(target)
    return output


def mix_channels_in_strips(
    x_bchw: Tensor,
    mlp: Callable[[Tensor], Tensor],
    hidden_channels: int,
    depthwise: nn.Conv2d | None = None,
    gate_bc11: Tensor | None = None,
) -> Tensor:
    """``y + mlp(y)`` for ``y = gate * depthwise(x)``, of which either factor may be left out.

    Args:
        x_bchw: (B, C, H, W).
        mlp: Pointwise layers that keep the number of channels.
        hidden_channels: Channels inside ``mlp``.
        depthwise: Convolution of stride 1 that can run in strips.
        gate_bc11: Factor per channel, (B, C, 1, 1).

    Returns:
        (B, C, H, W) in channels-last order.
    """
    batch, _, height, width = x_bchw.shape
    layers = [] if depthwise is None else [depthwise]
    output = torch.empty_like(x_bchw, memory_format=torch.channels_last)
    for image in range(batch):
        x_1chw = x_bchw[image : image + 1]
        for first, last in strip_ranges(height, width * hidden_channels * x_bchw.element_size()):
            y = _rows(x_1chw, layers, [height, height], first, last)
            if gate_bc11 is not None:
                y = y * gate_bc11[image]
            torch.add(y, mlp(y), out=output[image : image + 1, :, first:last])
    return output


def _rows(x_1chw: Tensor, layers: Sequence[nn.Conv2d], heights: Sequence[int], first: int, last: int) -> Tensor:
    """Rows [first, last) of what the layers make of ``x``; ``heights`` are those of its map and of each result."""
    if not layers:
        return x_1chw[:, :, first:last]
    layer = layers[-1]
    stride, padding = layer.stride[0], layer.kernel_size[0] // 2
    # A strip begins where the layer has a row of results, so that its own padding is only read for rows thrown away.
    top = max(first - math.ceil(padding / stride), 0)
    bottom = min((last - 1) * stride + padding + 1, heights[len(layers) - 1])
    y = layer(_rows(x_1chw, layers[:-1], heights, top * stride, bottom))
    return y[:, :, first - top : last - top]


def _heights(layers: Sequence[nn.Conv2d], x_bchw: Tensor) -> tuple[list[int], int]:
    """Height of the input and of each layer's result, and the bytes of the widest map per row of the last one."""
    height, width = x_bchw.shape[2:]
    heights, sizes = [height], []
    for layer in layers:
        height, width = _out_side(height, layer, 0), _out_side(width, layer, 1)
        heights.append(height)
        sizes.append(height * width * layer.out_channels * x_bchw.element_size())
    return heights, max(sizes) // height


def _out_side(side: int, layer: nn.Conv2d, axis: int) -> int:
    return (side - 1) // layer.stride[axis] + 1
