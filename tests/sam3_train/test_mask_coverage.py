"""Coverage of cells equals the area integral, wherever the mask lies and however the image is fitted."""

from __future__ import annotations

import numpy as np
import pytest

from sam3.preprocess import Preprocess
from sam3_train.data.mask_coverage import bounding_box, coverage_on_model

STRETCH, LETTERBOX = Preprocess(size_px=56), Preprocess.letterbox_imagenet(56)


def coverage(mask: np.ndarray, preprocess: Preprocess, side: int) -> np.ndarray:
    box = bounding_box(mask)
    assert box is not None
    y0, y1, x0, x1 = box
    return coverage_on_model(mask[y0:y1, x0:x1], y0, x0, mask.shape, preprocess, side).on_grid(side)


def test_whole_blocks_of_pixels_are_averaged() -> None:
    mask = np.random.default_rng(0).random((48, 64)) < 0.4
    expected = mask.reshape(16, 3, 16, 4).mean(axis=(1, 3))
    np.testing.assert_allclose(coverage(mask, STRETCH, 16), expected, atol=1e-5)


@pytest.mark.parametrize("hw", [(37, 53), (120, 31), (5, 9)])
@pytest.mark.parametrize("preprocess", [STRETCH, LETTERBOX], ids=["stretch", "letterbox"])
def test_the_area_is_kept_and_stays_inside_the_image(hw: tuple[int, int], preprocess: Preprocess) -> None:
    mask = np.random.default_rng(1).random(hw) < 0.3
    grid = coverage(mask, preprocess, 16)
    height, width = preprocess.resized_hw(hw)
    cells = height * width / preprocess.size_px**2 * 16**2
    assert grid.sum() == pytest.approx(mask.mean() * cells, rel=1e-4)
    assert grid.min() >= 0 and grid.max() <= 1 + 1e-5
    outside = int(np.ceil(height / preprocess.size_px * 16)), int(np.ceil(width / preprocess.size_px * 16))
    assert not grid[outside[0] :].any() and not grid[:, outside[1] :].any()


@pytest.mark.parametrize(("side_px", "top", "height"), [(102, 0, 85), (240, 6, 194), (464, 41, 191), (268, 60, 141)])
def test_a_border_next_to_the_end_of_a_mask_is_no_error(side_px: int, top: int, height: int) -> None:
    """Rounding puts these borders within 1e-13 of the mask's end, which stopped a training run in its data loader."""
    preprocess, mask = Preprocess(252), np.zeros((side_px, side_px), bool)
    mask[top : top + height] = True
    grid = coverage(mask, preprocess, 72)
    assert grid.sum() == pytest.approx(height / side_px * 72**2, rel=1e-4)


def test_a_pixel_in_the_corner_stays_there() -> None:
    mask = np.zeros((480, 848), bool)
    assert bounding_box(mask) is None
    mask[-1, -1] = True
    grid = coverage(mask, STRETCH, 16)
    assert grid[-1, -1] == pytest.approx(16 * 16 / mask.size, rel=1e-4)
    assert np.count_nonzero(grid) == 1


def test_the_mirror_image_has_the_mirrored_coverage() -> None:
    mask = np.zeros((40, 70), bool)
    mask[3:17, 5:33] = True
    np.testing.assert_allclose(coverage(mask[:, ::-1], STRETCH, 14), coverage(mask, STRETCH, 14)[:, ::-1], atol=1e-5)
