"""Exponential moving average of a module's weights and float buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sam3_train.task import trainable_modules


class Ema:
    """The average, kept beside the live weights.

    Args:
        module: Its trainable parameters and its float buffers are averaged (frozen modules left out).
        decay: Weight of the past in (0, 1). It is approached from below, (1 + n) / (10 + n) after n updates, so that
            the random start is forgotten quickly.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._live = list(_averaged_tensors(module))
        self._shadow = [tensor.detach().clone() for tensor in self._live]

    @torch.no_grad()
    def update(self, num_updates: int, is_bad: Tensor | None = None) -> None:
        """Move the average towards the live weights by one step.

        Args:
            num_updates: Updates of the weights so far, this one included.
            is_bad: 0-dim float tensor; 1 leaves the average as it is, without the host having to know.
        """
        weight = 1.0 - min(self.decay, (1 + num_updates) / (10 + num_updates))
        change = torch._foreach_sub([tensor.detach() for tensor in self._live], self._shadow)
        torch._foreach_mul_(change, weight if is_bad is None else weight * (1.0 - is_bad))
        torch._foreach_add_(self._shadow, change)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the module holds the averaged weights, and the live ones again after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def reset_to_live(self) -> None:
        """Take the live weights as the average (used when weights are loaded)."""
        torch._foreach_copy_(self._shadow, [tensor.detach() for tensor in self._live])

    @torch.no_grad()
    def _swap(self) -> None:
        live = [tensor.detach() for tensor in self._live]
        kept = [tensor.clone() for tensor in live]
        torch._foreach_copy_(live, self._shadow)
        torch._foreach_copy_(self._shadow, kept)


def _averaged_tensors(module: nn.Module) -> Iterator[Tensor]:
    seen: set[int] = set()
    for part in trainable_modules(module):
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            if tensor.is_floating_point() and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor
