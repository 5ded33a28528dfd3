"""Making modules whose weights come from a file: on the meta device, without the work of initialising them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FILLS = frozenset(
    ("uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_", "constant_", "fill_", "zero_")
    + ("clamp_", "mul_", "add_", "erfinv_")
)
"""What initialisers call on a tensor."""


class _WithoutFilling(TorchFunctionMode):
    """Leaves meta tensors alone that would be filled, and makes random ones empty.

    They hold no numbers in any case; but torch computes shapes of these calls in Python, and the first one imports its
    compiler, which takes seconds: longer than loading a large file.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _FILLS:
            target = args[0] if args else kwargs.get("tensor")
            if isinstance(target, Tensor) and target.is_meta:
                return target
        if name in ("randn", "rand") and torch.device(kwargs.get("device") or "cpu").type == "meta":
            return torch.empty(*args, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def building_on(device: torch.device) -> Iterator[None]:
    """Tensors are made on ``device``; on the meta device they are not initialised."""
    if device.type != "meta":
        with device:
            yield
        return
    with _WithoutFilling(), device:
        yield
