"""Scenes where shapes stand in rows: up to nine objects that hide little of each other.

A trunk learns the kinds of shapes from them several times faster than from scenes of the demo world, for the same
number of pixels: there are more objects, and each shows its whole outline.
"""

from __future__ import annotations

import math

import numpy as np
from demo_backgrounds import random_background
from demo_scenes import SIZES_HW, PlacedShape, Scene, SceneStyle, all_visible, next_shape, place, scene_rng
from demo_shapes import Pose, paint

LINEUP_STYLE = SceneStyle((0.0, 0.0), 0.6, 0.006, alike_share=0.3)
"""The radii come from the rows and columns."""
PARADE_STYLE = SceneStyle((0.0, 0.0), 0.8, 0.006)
PARADE_HW = (252, 252)
MAX_SIDE = 3
PLAIN_SHARE = 0.3
"""How often the background is a single colour instead of a photo."""


def make_lineup(seed: int, split: str, index: int) -> Scene:
    """Build scene ``index`` of a split: two or three rows and columns in an image of any shape.

    The same arguments give the same pixels.
    """
    rng = scene_rng(seed, split, index)
    image_hw = SIZES_HW[rng.integers(len(SIZES_HW))]
    rows, columns = (int(side) for side in rng.integers(2, MAX_SIDE + 1, 2))
    return _draw(rng, split, image_hw, _poses(rng, image_hw, (rows, columns), 1 / 6), LINEUP_STYLE)


def make_parade(seed: int, split: str, index: int) -> Scene:
    """The easiest scenes: three rows of three in a square, so that nothing is stretched at the model's input."""
    rng = scene_rng(seed, split, index)
    return _draw(rng, split, PARADE_HW, _poses(rng, PARADE_HW, (MAX_SIDE, MAX_SIDE), 1 / 10), PARADE_STYLE)


def _draw(
    rng: np.random.Generator, split: str, image_hw: tuple[int, int], poses: list[Pose], style: SceneStyle
) -> Scene:
    image, background = random_background(rng, split, image_hw)
    if rng.random() < PLAIN_SHARE:
        image[:], background = rng.uniform(0, 255, 3), "plain"
    owner = np.full(image_hw, -1, dtype=np.int8)
    objects: list[PlacedShape] = []
    for pose in poses:
        placed = place(next_shape(rng, objects, style), pose, image_hw)
        if placed is None:
            continue
        tried = owner.copy()
        tried[placed.sprite.area][placed.sprite.mask] = len(objects)
        if all_visible(tried, [*objects, placed], style):
            owner = tried
            objects.append(placed)
    for item in objects:
        paint(image, item.shape, item.pose, item.sprite, rng.uniform(2.0, 6.0) if rng.random() < 0.25 else 0.0)
    image += rng.normal(0, rng.uniform(0, 4), image_hw).astype(np.float32)[..., None]
    masks = owner[None] == np.arange(len(objects), dtype=owner.dtype)[:, None, None]
    centres = [(int(xs.mean()), int(ys.mean())) for ys, xs in map(np.nonzero, masks)]
    pixels = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    return Scene(pixels, masks, objects, background, np.array(centres, dtype=np.int64))


def _poses(rng: np.random.Generator, image_hw: tuple[int, int], grid: tuple[int, int], max_shift: float) -> list[Pose]:
    """One pose for each cell of a grid of rows and columns, in random order, shifted by up to a part of the cell."""
    height, width = image_hw[0] / grid[0], image_hw[1] / grid[1]
    poses = []
    for cell in rng.permutation(grid[0] * grid[1]).tolist():
        x = (cell % grid[1] + 0.5 + rng.uniform(-max_shift, max_shift)) * width
        y = (cell // grid[1] + 0.5 + rng.uniform(-max_shift, max_shift)) * height
        radius = 0.5 * min(height, width) * math.exp(rng.uniform(math.log(0.6), math.log(1.15)))
        poses.append(Pose(x, y, radius, rng.uniform(0, 2 * math.pi)))
    return poses
