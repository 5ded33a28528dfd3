"""One object's mask in one view of its photo: cut to its bounding box, because most objects are small.

Places are continuous pixel coordinates of the view, x before y: (0, 0) is the corner of the top-left pixel, and the
middle of pixel i lies at i + 0.5.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sam3.preprocess import Preprocess
from sam3_train.data.augmentation import View
from sam3_train.data.mask_coverage import coverage_on_model

_DEPTH_SIDE = 128
"""Depths are measured on every n-th pixel of a mask whose sides are longer than this."""


class ObjectMask(NamedTuple):
    """The visible part of an object."""

    inside: np.ndarray
    """bool (h, w): the bounding box; each of its edges touches the mask."""
    top: int
    left: int
    view_hw: tuple[int, int]

    @property
    def area_px(self) -> int:
        """Pixels of the mask."""
        return int(np.count_nonzero(self.inside))

    @property
    def box_xyxy_px(self) -> tuple[float, float, float, float]:
        """The outer edges of the bounding box."""
        height, width = self.inside.shape
        return float(self.left), float(self.top), float(self.left + width), float(self.top + height)

    def contains(self, x_px: float, y_px: float) -> bool:
        """Whether a place lies on a pixel of the mask."""
        row, column = int(np.floor(y_px)) - self.top, int(np.floor(x_px)) - self.left
        height, width = self.inside.shape
        return 0 <= row < height and 0 <= column < width and bool(self.inside[row, column])


def mask_in_view(mask_hw: np.ndarray, view: View) -> ObjectMask | None:
    """What a view shows of a mask.

    Args:
        mask_hw: bool (H, W), of the whole photo.
        view: Crop and flip.

    Returns:
        None if nothing is visible.
    """
    top, left, height, width = view.window((mask_hw.shape[0], mask_hw.shape[1]))
    shown = mask_hw[top : top + height, left : left + width]
    columns = np.flatnonzero(shown.any(axis=0))
    if not len(columns):
        return None
    first, last = int(columns[0]), int(columns[-1]) + 1
    rows = np.flatnonzero(shown[:, first:last].any(axis=1))
    low, high = int(rows[0]), int(rows[-1]) + 1
    inside = shown[low:high, first:last]
    if view.is_flipped:
        inside, first = inside[:, ::-1], width - last
    return ObjectMask(np.ascontiguousarray(inside), low, first, (height, width))


def mask_on_model(mask: ObjectMask, preprocess: Preprocess, side: int) -> np.ndarray:
    """A mask on a grid over the model's input: cells that it covers by half or more.

    An object that covers no cell by half is where it covers at least half as much as anywhere, so none disappears.

    Args:
        mask: In the view that the preprocessing is shown.
        preprocess: Where the view lies in the model's input.
        side: M.

    Returns:
        bool (M, M), never empty.
    """
    covered = coverage_on_model(mask.inside, mask.top, mask.left, mask.view_hw, preprocess, side)
    most = float(covered.shares.max())
    return covered.on_grid(side) >= (0.5 if most >= 0.5 else most / 2)


def depth_map(mask: ObjectMask) -> tuple[np.ndarray, int]:
    """How far inside the pixels of a mask lie.

    Returns:
        float (h, w), distance in pixels to the nearest pixel outside, beyond the view's border being outside as well,
        and 0 outside; of every n-th row and column of ``inside``, beginning at n // 2. And n, which is 1 for masks of
        usual size; some pixel always has a depth above 0.
    """
    from scipy.ndimage import distance_transform_edt

    step = -(-max(mask.inside.shape) // _DEPTH_SIDE)
    while not (thinned := mask.inside[step // 2 :: step, step // 2 :: step]).any():
        step = step // 2  # a mask of hairs: fewer steps miss less, and step 1 misses nothing
    return distance_transform_edt(np.pad(thinned, 1))[1:-1, 1:-1] * step, step
