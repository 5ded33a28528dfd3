"""Blocks of the students' networks as deployed on the CPU: same children, layers run strip by strip.

A block becomes an instance of a subclass with another forward, so that names in its state dict stay. timm is imported
on first use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sam3.backbones.packed import runs_packed
from sam3.backbones.strips import can_run_in_strips, mix_channels_in_strips, run_in_strips, strip_ranges


def use_subclasses(root: nn.Module, subclasses: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    """Turn, in place, every block below ``root`` of exactly one of these classes into the subclass."""
    for module in root.modules():
        subclass = subclasses.get(type(module))
        if subclass is not None:
            module.__class__ = subclass


@cache
def repvit_blocks() -> dict[type[nn.Module], type[nn.Module]]:
    """RepViT's blocks, with folded branches."""
    from timm.models.repvit import RepViTBlock, RepVitDownsample, RepVitStem

    class StripBlock(RepViTBlock):
        """Depthwise convolution, squeeze-and-excite (which needs the whole map), channel mixer."""

        def forward(self, x: Tensor) -> Tensor:
            if not runs_packed(x):
                return super().forward(x)
            mixer: Any = self.channel_mixer
            if isinstance(self.se, nn.Identity) and can_run_in_strips(self.token_mixer):
                (depthwise,) = _folded(self.token_mixer)
                return mix_channels_in_strips(x, mixer, mixer.conv1.out_channels, depthwise)
            x = self.token_mixer(x)
            gate = None if isinstance(self.se, nn.Identity) else _gate(self.se, x)
            return mix_channels_in_strips(x, mixer, mixer.conv1.out_channels, gate_bc11=gate)

    class StripDownsample(RepVitDownsample):
        """A block, two convolutions that halve the map, and an MLP."""

        def forward(self, x: Tensor) -> Tensor:
            if not runs_packed(x):
                return super().forward(x)
            x = self.channel_downsample(self.spatial_downsample(self.pre_block(x)))
            (expand,) = _folded(self.ffn.conv1)
            return mix_channels_in_strips(x, self.ffn, expand.out_channels)

    class StripStem(RepVitStem):
        """Two convolutions that halve the map."""

        def forward(self, x: Tensor) -> Tensor:
            if not runs_packed(x):
                return super().forward(x)
            return run_in_strips(x, _folded(self.conv1, self.conv2))

    return {RepViTBlock: StripBlock, RepVitDownsample: StripDownsample, RepVitStem: StripStem}


def _gate(squeeze_excite: Any, x_bchw: Tensor) -> Tensor:
    """The factor per channel, (B, C, 1, 1), by which a squeeze-and-excite module multiplies."""
    squeezed = squeeze_excite.act(squeeze_excite.bn(squeeze_excite.fc1(x_bchw.mean((2, 3), keepdim=True))))
    return squeeze_excite.gate(squeeze_excite.fc2(squeezed))


@cache
def efficientvit_blocks() -> dict[type[nn.Module], type[nn.Module]]:
    """EfficientViT's residual blocks, whose ``main`` is a chain of convolutions, and its linear attention."""
    from timm.models.efficientvit_mit import DSConv, LiteMLA, MBConv, ResidualBlock

    class StripResidualBlock(ResidualBlock):
        def forward(self, x: Tensor) -> Tensor:
            main = self.main
            if (
                not runs_packed(x)
                or not isinstance(main, DSConv | MBConv)
                or not can_run_in_strips(main.depth_conv.conv)
            ):
                return super().forward(x)
            if not isinstance(self.pre_norm, nn.Identity) or not isinstance(self.shortcut, nn.Identity | None):
                return super().forward(x)
            expand = [main.inverted_conv.conv] if isinstance(main, MBConv) else []
            # Packed convolutions compute their activation too: the blocks around them have only identities left.
            layers = [*expand, main.depth_conv.conv, main.point_conv.conv]
            return run_in_strips(x, layers, residual=self.shortcut is not None)

    class TokenMajorAttention(LiteMLA):
        def forward(self, x: Tensor) -> Tensor:
            return linear_attention(x, self) if runs_packed(x) and _is_relu(self.kernel_func) else super().forward(x)

    return {ResidualBlock: StripResidualBlock, LiteMLA: TokenMajorAttention}


def _is_plain(block: Any) -> bool:
    """Whether a residual block of EfficientViT is its convolutions and nothing else."""
    return (
        isinstance(block.pre_norm, nn.Identity)
        and isinstance(block.shortcut, nn.Identity | None)
        and can_run_in_strips(block.main.depth_conv.conv)
    )


def _is_relu(module: Any) -> bool:
    return isinstance(module, nn.ReLU)


def linear_attention(x_bchw: Tensor, attention: Any) -> Tensor:
    """EfficientViT's multi-scale attention on channels-last maps, whose order is that of the matrix products.

    Each scale is a map of queries, keys and values with their heads. Without a softmax the keys and values of all
    places are one small matrix: ``relu(q) (relu(k)^T [v, 1])``, of which the last column is the denominator.

    Args:
        x_bchw: (B, C, H, W).
        attention: timm's module; its kernel function is ReLU.

    Returns:
        (B, C', H, W).
    """
    batch, _, height, width = x_bchw.shape
    qkv = attention.qkv(x_bchw)
    scales = [qkv, *(aggregate(qkv) for aggregate in attention.aggreg)]
    heads, dim = qkv.shape[1] // (3 * attention.dim), attention.dim
    mixed = x_bchw.new_empty(batch, height * width, len(scales), heads, dim)
    for image in range(batch):
        for scale, maps in enumerate(scales):
            tokens = maps[image].permute(1, 2, 0).reshape(height * width, heads, 3, dim)
            torch.relu_(tokens[:, :, :2])
            q, k, v = tokens.permute(2, 1, 0, 3)  # each (heads, tokens, dim)
            weights = k.transpose(1, 2)
            memory = torch.cat([weights @ v, k.sum(1)[..., None]], dim=-1)
            y = q @ memory
            target = mixed[image, :, scale].permute(1, 0, 2)
            torch.div(y[..., :-1], y[..., -1:].add_(attention.eps), out=target)
    return attention.proj(mixed.view(batch, height, width, -1).permute(0, 3, 1, 2))


@cache
def tiny_vit_blocks() -> dict[type[nn.Module], type[nn.Module]]:
    """TinyViT's convolution blocks, patch merging and window attention blocks."""
    from timm.models.tiny_vit import MBConv, PatchEmbed, PatchMerging, TinyVitBlock

    class StripMBConv(MBConv):
        def forward(self, x: Tensor) -> Tensor:
            if not runs_packed(x) or not can_run_in_strips(self.conv2):
                return super().forward(x)
            return run_in_strips(x, _folded(self.conv1, self.conv2, self.conv3), True, torch.ops.aten.gelu_)

    class StripPatchMerging(PatchMerging):
        def forward(self, x: Tensor) -> Tensor:
            if not runs_packed(x) or not can_run_in_strips(self.conv2):
                return super().forward(x)
            return run_in_strips(x, _folded(self.conv1, self.conv2, self.conv3))

    class StripPatchEmbed(PatchEmbed):
        def forward(self, x: Tensor) -> Tensor:
            if not runs_packed(x):
                return super().forward(x)
            return run_in_strips(x, _folded(self.conv1, self.conv2))

    class StripAttentionBlock(TinyVitBlock):
        """Attention by rows of windows, then a depthwise convolution with the MLP in strips."""

        def forward(self, x: Tensor) -> Tensor:
            if not runs_packed(x) or not can_run_in_strips(self.local_conv):
                return super().forward(x)
            x = window_attention(x, self.attn, self.window_size)
            (depthwise,) = _folded(self.local_conv)

            def mlp(x_bchw: Tensor) -> Tensor:
                return self.mlp(x_bchw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

            x = x.permute(0, 3, 1, 2)
            x = mix_channels_in_strips(x, mlp, self.mlp.fc1.out_features, depthwise)
            return x.permute(0, 2, 3, 1)

    return {
        PatchEmbed: StripPatchEmbed,
        MBConv: StripMBConv,
        PatchMerging: StripPatchMerging,
        TinyVitBlock: StripAttentionBlock,
    }


def _folded(*layers: Any) -> list[nn.Conv2d]:
    """What timm's annotations know as a convolution with its BatchNorm: folding left the convolution alone."""
    return list(layers)


def window_attention(x_bhwc: Tensor, attention: Any, window: int) -> Tensor:
    """``x + attention(x)`` in windows of a fixed size, some rows of windows at a time.

    Windows at the border are filled up with zeros before the norm, as timm does; so there the keys and values are the
    same constant at every such place, and only real places are normalised and projected.

    Args:
        x_bhwc: (B, H, W, C).
        attention: timm's TinyViT attention.
        window: Side of a window.

    Returns:
        (B, H, W, C).
    """
    batch, height, width, _ = x_bhwc.shape
    heads, head_dim = attention.num_heads, attention.key_dim
    bias_1hnn = attention.get_attention_biases(x_bhwc.device)
    columns = math.ceil(width / window)
    filler = attention.qkv(attention.norm.bias[None])
    output = torch.empty_like(x_bhwc)
    widest = columns * heads * max(window**3, window * 3 * head_dim)  # attention weights, or keys, queries and values
    for image in range(batch):
        for first, last in strip_ranges(height, widest * x_bhwc.element_size(), window):
            x_hwc = x_bhwc[image, first:last]
            rows = math.ceil((last - first) / window)
            qkv = attention.qkv(attention.norm(x_hwc))
            if (rows * window, columns * window) != qkv.shape[:2]:
                padded = filler.expand(rows * window, columns * window, -1).contiguous()
                padded[: last - first, :width] = qkv
                qkv = padded
            qkv = qkv.view(rows, window, columns, window, heads, 3, head_dim).permute(5, 0, 2, 4, 1, 3, 6)
            q, k, v = qkv.reshape(3, rows * columns, heads, window * window, head_dim)
            # Faster than PyTorch's fused attention, which is made for longer sequences.
            weights = (q.mul_(attention.scale) @ k.transpose(-1, -2)).add_(bias_1hnn)
            y = torch.softmax(weights, dim=-1, out=weights) @ v
            y = y.view(rows, columns, heads, window, window, head_dim).permute(0, 3, 1, 4, 2, 5)
            y = y.reshape(rows * window, columns * window, heads * head_dim)[: last - first, :width]
            torch.add(x_hwc, attention.proj(y.contiguous()), out=output[image, first:last])
    return output
