"""The pixel decoder: fused image tokens become an embedding of every pixel of the finest map.

Without gradients in float32 on the CPU, one prompt is decoded at a time, and in a form that reuses what is known of the
image. A 3x3 convolution is linear, so that of ``map + upsampled`` is a sum of two. The first does not depend on the
prompt: it is kept while the image is in use, so that each further prompt on it costs less. The second sees blocks of
2x2 equal pixels: four 2x2 kernels on the smaller map compute it with 4/9 of the multiplications.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3.model.weights_state import weights_state

NUM_STAGES = 3
"""Stages that files hold. With three levels two of them run; the weights of the last are never read."""


class _Lateral(NamedTuple):
    """The convolution of one image's map, and what it was computed from."""

    source: weakref.ref
    stamp: tuple[Any, ...]
    value: Tensor


class PixelDecoder(nn.Module):
    """From the coarse map to the finest: upsample, add the finer map, 3x3 convolution, GroupNorm, ReLU."""

    def __init__(self, hidden_dim: int, norm_groups: int) -> None:
        super().__init__()
        self.conv_layers = nn.ModuleList(nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1) for _ in range(NUM_STAGES))
        self.norms = nn.ModuleList(nn.GroupNorm(norm_groups, hidden_dim) for _ in range(NUM_STAGES))
        self._laterals: dict[int, _Lateral] = {}  # stage -> that of the last image

    def forward(self, fused: Tensor, finer: Sequence[Tensor], image_ids: Tensor) -> Tensor:
        """
        Args:
            fused: What takes the place of the coarsest map, (B, C, H, W).
            finer: The other maps of every image, finest first, at most three, (I, C, h, w).
            image_ids: Image of each prompt, int64, (B,). Not read if there is only one image.

        Returns:
            (B, C, h, w) at the size of the finest map.
        """
        pixels = fused
        for features, conv, norm in zip(reversed(finer), self.conv_layers, self.norms, strict=False):
            features = features if len(features) == 1 else features[image_ids]
            pixels = features + F.interpolate(pixels, size=features.shape[-2:], mode="nearest")
            pixels = F.relu_(norm(conv(pixels)))
        return pixels

    def decode_one(self, fused: Tensor, finer: Sequence[Tensor], image_id: int) -> Tensor:
        """`forward` for a single prompt, (1, C, H, W), where `reuses_images` allows it; equal within 1e-5."""
        pixels = fused
        for stage, features in enumerate(reversed(finer)):
            lateral, (weight, _) = self._lateral(stage, features, image_id), self.conv_layers[stage].parameters()
            pixels = F.relu_(self.norms[stage](_add_upsampled(lateral, pixels, weight)))
        return pixels

    def reuses_images(self, fused: Tensor, finer: Sequence[Tensor]) -> bool:
        """Whether `decode_one` can compute these, and is the faster way."""
        weight = self.conv_layers[0].weight
        sides = [tuple(m.shape[-2:]) for m in (*finer, fused)]
        return (
            fused.device.type == "cpu"
            and fused.dtype == weight.dtype == torch.float32
            and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
            and all(large == (2 * h, 2 * w) for large, (h, w) in pairwise(sides))
        )

    def _lateral(self, stage: int, features: Tensor, image_id: int) -> Tensor:
        """Convolution of one image's map, (1, C, h, w), channels last; that of the last image is kept."""
        conv, kept = self.conv_layers[stage], self._laterals.get(stage)
        features_1chw = features[image_id : image_id + 1]
        # A tensor of inference mode does not count its changes: its sum stands for its content.
        change = features_1chw.sum().item() if features.is_inference() else features._version
        stamp = (image_id, features.data_ptr(), change, *weights_state(conv))
        if kept is not None and kept.source() is features and kept.stamp == stamp:
            return kept.value
        value = conv(features_1chw.contiguous(memory_format=torch.channels_last))
        laterals = self._laterals

        def forget(source: weakref.ref) -> None:
            if stage in laterals and laterals[stage].source is source:
                del laterals[stage]

        laterals[stage] = _Lateral(weakref.ref(features, forget), stamp, value)
        return value

    def _apply(self, fn, recurse=True):
        self._laterals.clear()  # they would keep memory on the old device
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_laterals": {}}  # a copy or a file begins without them


def _add_upsampled(lateral: Tensor, small: Tensor, weight: Tensor) -> Tensor:
    """``lateral`` plus the 3x3 convolution, without bias, of ``small`` after nearest upsampling by 2.

    Output pixels of the same parity of row and column see the same pattern of equal inputs, so that taps which fall on
    one small pixel are added up beforehand: an even row reads the small rows i - 1 (one tap) and i (two), an odd row i
    (two) and i + 1 (one); columns likewise.

    Args:
        lateral: (1, C, 2 H, 2 W).
        small: (1, C, H, W).
        weight: (C, C, 3, 3).

    Returns:
        A new tensor like ``lateral``.
    """
    height, width = small.shape[-2:]
    padded = F.pad(small, (1, 1, 1, 1)).contiguous(memory_format=torch.channels_last)
    out = lateral.clone()
    for row in (0, 1):
        for column in (0, 1):
            kernel = _merge_taps(_merge_taps(weight, 2, row), 3, column).contiguous(memory_format=torch.channels_last)
            window = padded[:, :, row : row + height + 1, column : column + width + 1]
            out[:, :, row::2, column::2] += F.conv2d(window, kernel)
    return out


def _merge_taps(weight: Tensor, dim: int, parity: int) -> Tensor:
    before, centre, after = weight.unbind(dim)
    return torch.stack([before, centre + after] if parity == 0 else [before + centre, after], dim)
