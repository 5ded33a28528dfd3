"""What runs on devices without float64 (MPS): nothing there is computed in it, and the numbers stay those of the CPU.

The other device is a pretended one: `FakeTensorMode` follows devices, dtypes and shapes through every operation of
PyTorch without computing, so these tests need no accelerator.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sam3.backbones.folding import fold_conv_norm, sum_depthwise_branches
from sam3.model.prompt_sampling import correction_clicks
from sam3.model.winograd import WinogradConv2d

ACCELERATOR = torch.device("cuda", 0)


class _RefuseFloat64(TorchDispatchMode):
    """Fails as MPS does, at the first float64 tensor outside the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in _pytree.tree_leaves(result):
            if isinstance(value, Tensor) and value.dtype == torch.float64 and value.device.type != "cpu":
                raise TypeError(f"{func}: {value.device} has no float64")
        return result


@contextmanager
def device_without_float64() -> Iterator[torch.device]:
    with FakeTensorMode(), _RefuseFloat64(), torch.no_grad(), ACCELERATOR:
        yield ACCELERATOR


def test_the_pretended_device_refuses_float64() -> None:
    with device_without_float64() as device:
        assert torch.ones(3).cpu().double().device.type == "cpu"
        with pytest.raises(TypeError, match="has no float64"):
            torch.ones(3, device=device).double()


@pytest.mark.parametrize("seed", [None, 0])
def test_clicks_are_drawn_there(seed: int | None) -> None:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    with device_without_float64() as device:
        truth = torch.zeros(2, 8, 8) > 0
        clicks = correction_clicks(truth, ~truth, generator=generator)
        assert {clicks.points_xy_px.device, clicks.labels.device} == {device}


@pytest.mark.parametrize("has_bias", [False, True])
def test_norms_and_branches_are_folded_there(has_bias: bool) -> None:
    with device_without_float64() as device:
        narrow, wide = (nn.Conv2d(4, 4, k, padding=k // 2, groups=4, bias=has_bias) for k in (1, 3))
        norm = nn.BatchNorm2d(4).eval()
        for folded in (fold_conv_norm(wide, norm), sum_depthwise_branches(wide, narrow)):
            assert {p.device for p in folded.parameters()} == {device}
            assert {p.dtype for p in folded.parameters()} == {torch.float32}
            assert folded(torch.zeros(1, 4, 8, 8)).device == device


def test_winograds_weights_are_transformed_there() -> None:
    with device_without_float64() as device:
        conv = WinogradConv2d(nn.Conv2d(4, 4, 3, padding=1))
        transformed = conv._transform(conv.weight)  # a pretended tensor has no address, which the forward asks for
        assert (transformed.device, transformed.dtype) == (device, torch.float32)
