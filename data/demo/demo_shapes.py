"""Shapes of the demo world: outlines, named colours, textures, and their antialiased drawing.

An outline is a list of polygons in units of the shape's radius, centred on the origin: the first one is filled, the
others are holes. A shape keeps the colour that its name promises under every texture, so that "red circle" is a true
description, which later stages use as a text prompt.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SUPERSAMPLING = 4
"""Drawn samples per pixel and axis; the coverage of a pixel is their mean."""

Outline = list[np.ndarray]

# hue in degrees (mean, spread), saturation range, value range
COLOURS: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((0, 7), (0.75, 0.95), (0.65, 0.95)),
    "orange": ((28, 6), (0.8, 0.95), (0.85, 1.0)),
    "yellow": ((54, 5), (0.7, 0.95), (0.85, 1.0)),
    "green": ((122, 18), (0.55, 0.9), (0.4, 0.8)),
    "cyan": ((182, 7), (0.55, 0.9), (0.75, 0.98)),
    "blue": ((226, 10), (0.65, 0.95), (0.55, 0.95)),
    "purple": ((278, 9), (0.55, 0.85), (0.45, 0.8)),
    "pink": ((332, 9), (0.4, 0.65), (0.88, 1.0)),
    "brown": ((24, 5), (0.55, 0.75), (0.32, 0.5)),
    "white": ((0, 180), (0.0, 0.05), (0.9, 1.0)),
    "gray": ((0, 180), (0.0, 0.08), (0.4, 0.62)),
    "black": ((0, 180), (0.0, 0.25), (0.03, 0.14)),
}
TEXTURES = ("plain", "gradient", "stripes", "checks", "dots", "clouds", "grain")


def _polygon(num_corners: int, turn: float = -math.pi / 2) -> np.ndarray:
    angles = turn + np.arange(num_corners) * (2 * math.pi / num_corners)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _circle(rng: np.random.Generator) -> Outline:
    return [_polygon(72)]


def _ellipse(rng: np.random.Generator) -> Outline:
    return [_polygon(72) * [1.15, rng.uniform(0.5, 0.7)]]


def _square(rng: np.random.Generator) -> Outline:
    return [_polygon(4, math.pi / 4) * 1.1]


def _rectangle(rng: np.random.Generator) -> Outline:
    half_width, half_height = 1.1, rng.uniform(0.42, 0.62)
    return [np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [half_width, half_height]]


def _triangle(rng: np.random.Generator) -> Outline:
    return [_polygon(3) * 1.15]


def _pentagon(rng: np.random.Generator) -> Outline:
    return [_polygon(5)]


def _hexagon(rng: np.random.Generator) -> Outline:
    return [_polygon(6)]


def _star(rng: np.random.Generator) -> Outline:
    points = _polygon(10) * 1.15
    points[1::2] *= rng.uniform(0.42, 0.55)
    return [points]


def _cross(rng: np.random.Generator) -> Outline:
    a = rng.uniform(0.3, 0.42)
    corners = [
        (-a, -1),
        (a, -1),
        (a, -a),
        (1, -a),
        (1, a),
        (a, a),
        (a, 1),
        (-a, 1),
        (-a, a),
        (-1, a),
        (-1, -a),
        (-a, -a),
    ]
    return [np.array(corners)]


def _ring(rng: np.random.Generator) -> Outline:
    return [_polygon(72), _polygon(72) * rng.uniform(0.4, 0.6)]


def _heart(rng: np.random.Generator) -> Outline:
    t = np.linspace(0, 2 * math.pi, 72, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return [np.stack([x, y - 2], axis=1) / 15.5]


def _arrow(rng: np.random.Generator) -> Outline:
    a, neck = rng.uniform(0.24, 0.34), rng.uniform(0.0, 0.2)
    corners = [(-1.1, -a), (neck, -a), (neck, -0.75), (1.1, 0), (neck, 0.75), (neck, a), (-1.1, a)]
    return [np.array(corners)]


def _blob(rng: np.random.Generator) -> Outline:
    points = _polygon(90)
    t = np.arange(90) * (2 * math.pi / 90)
    radius = np.ones(90)
    for wave in (2, 3, 4, 5):
        radius += rng.normal(0, 0.28 / wave) * np.cos(wave * t + rng.uniform(0, 2 * math.pi))
    return [points * np.clip(radius, 0.4, 1.5)[:, None]]


SHAPES: dict[str, Callable[[np.random.Generator], Outline]] = {
    "circle": _circle,
    "ellipse": _ellipse,
    "square": _square,
    "rectangle": _rectangle,
    "triangle": _triangle,
    "pentagon": _pentagon,
    "hexagon": _hexagon,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
    "arrow": _arrow,
    "blob": _blob,
}


@dataclass(frozen=True)
class Shape:
    """One shape instance: everything about it but its place."""

    kind: str
    colour: str
    texture: str
    outline: Outline
    rgb: tuple[np.ndarray, np.ndarray]
    """The two tones of its texture, float32 RGB in 0..255."""
    texture_seed: int

    @property
    def category(self) -> str:
        """What one would call it: "red circle"."""
        return f"{self.colour} {self.kind}"

    @property
    def instance_id(self) -> str:
        """Hash of the outline, the tones and the texture: equal for the same instance only."""
        digest = hashlib.sha256(f"{self.kind} {self.colour} {self.texture} {self.texture_seed}".encode())
        for part in (*self.outline, *self.rgb):
            digest.update(np.round(np.asarray(part, dtype=np.float64), 6).tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Pose:
    """Where a shape is: centre and radius in pixels, rotation in radians."""

    x_px: float
    y_px: float
    radius_px: float
    angle: float


@dataclass(frozen=True)
class Sprite:
    """The drawn coverage of a shape, cut to the image."""

    top: int
    left: int
    alpha: np.ndarray
    """Coverage, uint8 0..255, (h, w)."""

    @property
    def area(self) -> tuple[slice, slice]:
        """Where the coverage lies in the image."""
        return slice(self.top, self.top + self.alpha.shape[0]), slice(self.left, self.left + self.alpha.shape[1])

    @property
    def mask(self) -> np.ndarray:
        """Pixels that are covered by half or more, bool (h, w)."""
        return self.alpha >= 128


def hsv_to_rgb(hue_deg: float, saturation: float, value: float) -> np.ndarray:
    """float32 RGB in 0..255 of a colour with hue in degrees, saturation and value in 0..1."""
    sector = np.array([5.0, 3.0, 1.0]) + (hue_deg % 360) / 60.0
    weight = np.clip(np.minimum(sector % 6, 4 - sector % 6), 0, 1)
    return (255.0 * (value - value * saturation * weight)).astype(np.float32)


def sample_shape(
    rng: np.random.Generator, textures: Sequence[str] = TEXTURES, kind: str | None = None, colour: str | None = None
) -> Shape:
    """Draw a random shape instance, of a given kind or colour if one is named."""
    kind = kind or list(SHAPES)[rng.integers(len(SHAPES))]
    colour = colour or list(COLOURS)[rng.integers(len(COLOURS))]
    (hue, spread), saturation, value = COLOURS[colour]
    hue = rng.uniform(hue - spread, hue + spread)
    first = hsv_to_rgb(hue, rng.uniform(*saturation), rng.uniform(*value))
    second = (
        first * np.float32(rng.uniform(0.55, 0.8)) if rng.random() < 0.6 else first + (255 - first) * np.float32(0.3)
    )
    if colour in ("white", "black", "gray"):
        second = first + np.float32((first.mean() < 128) * 2 - 1) * np.float32(rng.uniform(22, 45))
    texture = textures[int(rng.integers(len(textures)))]
    outline = SHAPES[kind](rng)
    return Shape(kind, colour, texture, outline, (first, second.astype(np.float32)), int(rng.integers(2**31)))


def draw_sprite(shape: Shape, pose: Pose, image_hw: tuple[int, int]) -> Sprite | None:
    """Draw the coverage of a shape at a pose.

    Returns:
        The part inside the image, or None if the shape lies outside it.
    """
    cos, sin = math.cos(pose.angle) * pose.radius_px, math.sin(pose.angle) * pose.radius_px
    turn = np.array([[cos, sin], [-sin, cos]])
    polygons = [points @ turn + [pose.x_px, pose.y_px] for points in shape.outline]
    low, high = polygons[0].min(axis=0), polygons[0].max(axis=0)
    left, top = max(0, math.floor(low[0])), max(0, math.floor(low[1]))
    right, bottom = min(image_hw[1], math.ceil(high[0]) + 1), min(image_hw[0], math.ceil(high[1]) + 1)
    if right <= left or bottom <= top:
        return None
    canvas = Image.new("L", ((right - left) * SUPERSAMPLING, (bottom - top) * SUPERSAMPLING))
    pen = ImageDraw.Draw(canvas)
    for index, points in enumerate(polygons):
        corners = (points - [left, top]) * SUPERSAMPLING - 0.5
        pen.polygon([tuple(corner) for corner in corners.tolist()], fill=0 if index else 255)
    return Sprite(top, left, np.asarray(canvas.reduce(SUPERSAMPLING)))


def paint(image: np.ndarray, shape: Shape, pose: Pose, sprite: Sprite, shadow_px: float = 0.0) -> None:
    """Blend a shape into an image in place.

    Args:
        image: float32 RGB in 0..255, (H, W, 3).
        shape: What to draw.
        pose: Where; the texture turns and scales with it.
        sprite: Its coverage at that pose.
        shadow_px: Offset of a soft shadow below it; 0 for none.
    """
    if shadow_px:
        _cast_shadow(image, sprite, shadow_px)
    rows, columns = sprite.area
    y, x = np.meshgrid(
        np.arange(rows.start, rows.stop, dtype=np.float32) - np.float32(pose.y_px),
        np.arange(columns.start, columns.stop, dtype=np.float32) - np.float32(pose.x_px),
        indexing="ij",
    )
    cos, sin = np.float32(math.cos(pose.angle)), np.float32(math.sin(pose.angle))
    u, v = (x * cos + y * sin) / np.float32(pose.radius_px), (y * cos - x * sin) / np.float32(pose.radius_px)
    mix = _texture(shape, u, v)[..., None]
    colours = shape.rgb[0] * (1 - mix) + shape.rgb[1] * mix
    alpha = (sprite.alpha.astype(np.float32) / 255.0)[..., None]
    region = image[sprite.area]
    region += (np.clip(colours, 0, 255) - region) * alpha


def _cast_shadow(image: np.ndarray, sprite: Sprite, offset_px: float) -> None:
    pad = math.ceil(offset_px) * 2
    height, width = sprite.alpha.shape
    soft = Image.new("L", (width + 2 * pad, height + 2 * pad))
    soft.paste(Image.fromarray(sprite.alpha), (pad, pad))
    soft_alpha = np.asarray(soft.filter(ImageFilter.BoxBlur(offset_px * 0.6)), dtype=np.float32)
    top, left = sprite.top - pad + int(offset_px), sprite.left - pad + int(offset_px)
    rows = slice(max(0, top), min(image.shape[0], top + soft_alpha.shape[0]))
    columns = slice(max(0, left), min(image.shape[1], left + soft_alpha.shape[1]))
    cut = soft_alpha[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    image[rows, columns] *= (1 - cut / 255.0 * 0.45)[..., None]


def _texture(shape: Shape, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Share of the second tone at each point of the shape's own frame, float32 0..1."""
    rng = np.random.default_rng(shape.texture_seed)
    frequency = np.float32(rng.uniform(2.0, 5.0))
    phase = np.float32(rng.uniform(0, 2 * math.pi))
    if shape.texture == "gradient":
        return np.clip(u * 0.5 + 0.5, 0, 1)
    if shape.texture == "stripes":
        return (np.sin(u * frequency * 2 + phase) > 0).astype(np.float32)
    if shape.texture == "checks":
        return ((np.floor(u * frequency) + np.floor(v * frequency)) % 2).astype(np.float32)
    if shape.texture == "dots":
        du, dv = (u * frequency * 0.7) % 1 - 0.5, (v * frequency * 0.7) % 1 - 0.5
        return (du * du + dv * dv < 0.1).astype(np.float32)
    if shape.texture == "clouds":
        waves = [np.sin(u * a + v * b + c) for a, b, c in rng.uniform(-6, 6, (4, 3)).astype(np.float32)]
        return np.clip(0.5 + sum(waves) * np.float32(0.22), 0, 1)
    if shape.texture == "grain":
        return np.clip(rng.normal(0.4, 0.28, u.shape), 0, 1).astype(np.float32)
    return np.zeros_like(u)
