"""Still scenes of the demo world: shapes that overlap on a view of a photo, each with its exact visible mask."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from demo_backgrounds import SPLITS, random_background
from demo_shapes import Pose, Shape, Sprite, draw_sprite, paint, sample_shape

SIZES_HW = ((288, 384), (384, 288), (360, 480), (320, 480), (480, 360), (336, 336), (270, 480), (300, 400))
MAX_TRIES = 12


@dataclass(frozen=True)
class SceneStyle:
    """How small and how hidden the objects of a scene may be."""

    radius_range: tuple[float, float]
    """Of the image's shorter side, drawn log-uniformly."""
    min_visible_share: float
    """Of a shape's own area: what must stay visible of it, whatever lies over it or beyond the border."""
    min_visible_area: float
    """Of the image's area."""
    alike_share: float = 0.0
    """How often a shape takes the kind, the colour or both of one that is there already."""


WORLD_STYLE = SceneStyle((0.15, 0.34), 0.7, 0.02)
TRAINING_STYLE = SceneStyle((0.11, 0.3), 0.4, 0.008)
"""What the tiny teacher is trained on: smaller and more hidden objects than the world shows."""
ALIKE_STYLE = SceneStyle((0.12, 0.3), 0.5, 0.01, alike_share=0.5)
"""What the tiny teacher's detector is trained on: often several objects answer a phrase, or others nearly do."""


@dataclass
class PlacedShape:
    """A shape in a scene, back to front in drawing order."""

    shape: Shape
    pose: Pose
    sprite: Sprite
    full_area_px: int
    """Pixels that it would cover alone on an unbounded image."""


@dataclass
class Scene:
    """One image with the masks of its objects."""

    image: np.ndarray
    """uint8 RGB, (H, W, 3)."""
    masks: np.ndarray
    """Visible pixels per object, bool (N, H, W); they never overlap."""
    objects: list[PlacedShape]
    background: str
    """File name of the photo behind."""
    point_coords: np.ndarray
    """A pixel inside each mask, int64 x, y, (N, 2)."""


def scene_rng(seed: int, split: str, index: int) -> np.random.Generator:
    """The generator of one scene: no two of (seed, split, index) share a stream."""
    return np.random.default_rng([seed, SPLITS.index(split), index])


def make_scene(
    seed: int, split: str, index: int, num_objects: tuple[int, int] = (2, 5), style: SceneStyle = WORLD_STYLE
) -> Scene:
    """Build scene ``index`` of a split; the same arguments give the same pixels.

    Args:
        seed: Seed of the world.
        split: "train", "val" or "test": which photos may lie behind.
        index: Number of the scene in its split.
        num_objects: Fewest and most shapes to place; a crowded scene may end with fewer.
        style: Sizes and overlap.

    Returns:
        The scene; it has at least one object.
    """
    rng = scene_rng(seed, split, index)
    image_hw = SIZES_HW[rng.integers(len(SIZES_HW))]
    image, background = random_background(rng, split, image_hw)
    objects, owner = _place_shapes(rng, image_hw, int(rng.integers(num_objects[0], num_objects[1] + 1)), style)
    for item in objects:
        shadow_px = rng.uniform(2.0, 6.0) if rng.random() < 0.25 else 0.0
        paint(image, item.shape, item.pose, item.sprite, shadow_px)
    image += rng.normal(0, rng.uniform(0, 4), image_hw).astype(np.float32)[..., None]
    masks = owner[None] == np.arange(len(objects), dtype=owner.dtype)[:, None, None]
    points = []
    for mask in masks:
        inside = np.flatnonzero(mask)
        y, x = divmod(int(inside[rng.integers(len(inside))]), image_hw[1])
        points.append((x, y))
    pixels = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    return Scene(pixels, masks, objects, background, np.array(points, dtype=np.int64))


def _place_shapes(
    rng: np.random.Generator, image_hw: tuple[int, int], count: int, style: SceneStyle
) -> tuple[list[PlacedShape], np.ndarray]:
    """Place up to ``count`` shapes back to front; a shape that would hide another one too much is drawn again."""
    height, width = image_hw
    owner = np.full(image_hw, -1, dtype=np.int8)
    objects: list[PlacedShape] = []
    for _ in range(count * MAX_TRIES):
        if len(objects) == count:
            break
        low, high = (math.log(share * min(image_hw)) for share in style.radius_range)
        pose = Pose(
            rng.uniform(0, width), rng.uniform(0, height), math.exp(rng.uniform(low, high)), rng.uniform(0, 2 * math.pi)
        )
        placed = place(next_shape(rng, objects, style), pose, image_hw)
        if placed is None:
            continue
        tried = owner.copy()
        tried[placed.sprite.area][placed.sprite.mask] = len(objects)
        if all_visible(tried, [*objects, placed], style):
            owner = tried
            objects.append(placed)
    return objects, owner


def next_shape(rng: np.random.Generator, objects: list[PlacedShape], style: SceneStyle) -> Shape:
    """A random shape, or one that is like another of the scene as often as the style says."""
    if not style.alike_share or not objects or rng.random() >= style.alike_share:
        return sample_shape(rng)
    model, what = objects[rng.integers(len(objects))].shape, rng.random()
    kind = model.kind if what < 0.75 else None
    return sample_shape(rng, kind=kind, colour=model.colour if what > 0.25 else None)


def place(shape: Shape, pose: Pose, image_hw: tuple[int, int]) -> PlacedShape | None:
    """A shape at a pose, or None if it lies outside the image."""
    sprite = draw_sprite(shape, pose, image_hw)
    if sprite is None or not sprite.mask.any():
        return None
    return PlacedShape(shape, pose, sprite, outline_area_px(shape, pose))


def outline_area_px(shape: Shape, pose: Pose) -> int:
    """Area inside an outline in pixels, by the shoelace formula."""
    areas = []
    for points in shape.outline:
        x, y = points[:, 0], points[:, 1]
        areas.append(abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2)
    return round((areas[0] - sum(areas[1:])) * pose.radius_px**2)


def all_visible(owner: np.ndarray, objects: list[PlacedShape], style: SceneStyle) -> bool:
    """Whether enough remains visible of each object; ``owner`` holds the front object's number per pixel, or -1."""
    visible = np.bincount(owner.ravel() + 1, minlength=len(objects) + 1)[1:]
    least = [max(style.min_visible_share * item.full_area_px, style.min_visible_area * owner.size) for item in objects]
    return bool((visible >= np.array(least)).all())


def describe_object(item: PlacedShape) -> dict[str, Any]:
    """The fields that an annotation adds to SA-1B's: what the object is, for text prompts and for checks."""
    return {
        "category": item.shape.category,
        "shape": item.shape.kind,
        "colour": item.shape.colour,
        "texture": item.shape.texture,
        "instance_id": item.shape.instance_id,
    }
