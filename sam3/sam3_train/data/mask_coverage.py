"""How much of each cell of a grid over the model's input a mask covers: exact, for any size and both ways to fit."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sam3.preprocess import Preprocess


class Coverage(NamedTuple):
    """The cells that a mask's bounding box meets; it covers nothing of the others."""

    shares: np.ndarray
    """float32 (h, w), 0..1."""
    top: int
    left: int

    def on_grid(self, side: int) -> np.ndarray:
        """The shares of all cells, float32 (side, side)."""
        grid = np.zeros((side, side), np.float32)
        height, width = self.shares.shape
        grid[self.top : self.top + height, self.left : self.left + width] = self.shares
        return grid


def coverage_on_model(
    inside: np.ndarray, top: int, left: int, image_hw: tuple[int, int], preprocess: Preprocess, side: int
) -> Coverage:
    """Integrate a mask over the cells of a grid on the model's square input.

    Args:
        inside: bool (h, w), a part of the image that holds all of the mask; of at least one pixel.
        top: Row of the part's first pixel in the image.
        left: Its column.
        image_hw: Size of the image that the preprocessing is shown.
        preprocess: Where the image lies in the model's input.
        side: Cells along each side of the grid.
    """
    scale_y, scale_x = preprocess.valid_hw(image_hw)
    cell = preprocess.size_px / side
    (first_row, borders_y), (first_column, borders_x) = (
        _borders(start, length, cell / scale, side)
        for start, length, scale in zip((top, left), inside.shape, (scale_y, scale_x), strict=True)
    )
    covered = _between(_between(inside, borders_y).T, borders_x).T
    return Coverage(covered / np.float32(cell / scale_y * cell / scale_x), first_row, first_column)


def bounding_box(mask_hw: np.ndarray) -> tuple[int, int, int, int] | None:
    """First and end row, first and end column of a mask; None if it is empty."""
    rows = np.flatnonzero(mask_hw.any(axis=1))
    if not len(rows):
        return None
    first, end = int(rows[0]), int(rows[-1]) + 1
    columns = np.flatnonzero(mask_hw[first:end].any(axis=0))
    return first, end, int(columns[0]), int(columns[-1]) + 1


def _borders(start: int, length: int, cell_px: float, side: int) -> tuple[int, np.ndarray]:
    """The cells that an extent of pixels meets: the first, and their borders counted from the extent's start."""
    first = min(int(start / cell_px), side - 1)
    end = min(max(int(np.ceil((start + length) / cell_px)), first + 1), side)
    return first, np.clip(np.arange(first, end + 1) * cell_px - start, 0.0, float(length))


def _between(values: np.ndarray, borders: np.ndarray) -> np.ndarray:
    """Integrals of rows between consecutive borders: (n, w) and (m + 1,) give (m, w).

    A sparse product, which reads every value once: ten times as fast as the difference of running sums.
    """
    from scipy.sparse import csr_matrix

    cuts = np.union1d(np.arange(len(values) + 1), borders)
    middles, lengths = (cuts[1:] + cuts[:-1]) / 2, np.diff(cuts).astype(np.float32)
    cells = np.searchsorted(borders, middles) - 1
    # A border that rounding put a hair before the last pixel's end leaves a piece whose middle rounds to that end.
    rows = np.minimum(middles.astype(np.intp), len(values) - 1)
    inside = (cells >= 0) & (cells < len(borders) - 1)
    overlap = csr_matrix((lengths[inside], (cells[inside], rows[inside])), shape=(len(borders) - 1, len(values)))
    return overlap @ values.astype(np.float32)
