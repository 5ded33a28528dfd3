"""Constant tables of the tracker's feature grid, computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sam3.model.position_encoding import PositionEmbeddingSine
from sam3.model.vitdet import rotary_table


class _GridTable(nn.Module):
    """A float32 table of the model's own grid; other grids are computed when they are asked for.

    The table is a buffer that no file holds. It is made on the CPU even for a model on the meta device, and keeps
    float32 in a model of another dtype.
    """

    table: Tensor

    def __init__(self, grid_size: int) -> None:
        super().__init__()
        self.size_hw = (grid_size, grid_size)
        self.register_buffer("table", self.compute(self.size_hw, torch.device("cpu")), persistent=False)

    def compute(self, size_hw: tuple[int, int], device: torch.device) -> Tensor:
        """The table of a grid of (H, W) cells."""
        raise NotImplementedError

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
        before = self.table
        super()._apply(fn, recurse)
        if self.table.dtype != before.dtype:
            self.table = before.to(self.table.device)
        return self

    def forward(self, size_hw: tuple[int, int]) -> Tensor:
        """The table of a grid, on the module's device."""
        return self.table if size_hw == self.size_hw else self.compute(size_hw, self.table.device)


class SineTable(_GridTable):
    """`PositionEmbeddingSine` of a grid, tokens row-major: (H * W, num_channels)."""

    def __init__(self, num_channels: int, grid_size: int) -> None:
        self._num_channels = num_channels
        super().__init__(grid_size)

    def compute(self, size_hw: tuple[int, int], device: torch.device) -> Tensor:
        return PositionEmbeddingSine(self._num_channels).encode_map(size_hw, device)[0].flatten(1).T.contiguous()


class RotaryTable(_GridTable):
    """Axial rotary positions of a grid, unscaled: (H * W, head_dim / 2, 2) of cosines and sines."""

    def __init__(self, head_dim: int, theta: float, grid_size: int) -> None:
        self._head_dim, self._theta = head_dim, theta
        super().__init__(grid_size)

    def compute(self, size_hw: tuple[int, int], device: torch.device) -> Tensor:
        return torch.view_as_real(rotary_table(self._head_dim, size_hw, 1.0, self._theta, device)).contiguous()
