"""Pictures of results: masks, boxes and labels over the image, and masks as an index image."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

RGB = tuple[int, int, int]
_TINT = 0.5
_GOLDEN_RATIO = 0.6180339887498949
MAX_INDEXED_MASKS = 255
"""Objects that an index image can hold beside the background."""


def object_color(index: int) -> RGB:
    """A bright colour for the index-th object; neighbours in the order differ strongly."""
    hue = (0.58 + index * _GOLDEN_RATIO) % 1.0
    value = (1.0, 0.82)[index // 5 % 2]
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_overlay(
    image: np.ndarray,
    masks: Sequence[np.ndarray],
    boxes_xyxy_px: Sequence[Sequence[float]],
    labels: Sequence[str],
    color_indices: Sequence[int] | None = None,
) -> Image.Image:
    """The image with each object tinted and outlined, in its box, with its label.

    Args:
        image: uint8, (H, W, 3).
        masks: One bool (H, W) for each object, or an empty list for boxes alone.
        boxes_xyxy_px: One box for each object, which may reach over the edge, or an empty list for masks alone.
        labels: One short text for each object; may be empty.
        color_indices: Which `object_color` each object has; None counts from 0.
    """
    count = max(len(masks), len(boxes_xyxy_px))
    colors = [object_color(index) for index in (range(count) if color_indices is None else color_indices)]
    height, width = image.shape[:2]
    line = max(1, round(min(height, width) / 300))
    pixels = image.copy()
    for i, mask in enumerate(masks):
        _tint(pixels, mask, colors[i], line)
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(max(10.0, min(height, width) / 32))
    for i, (box, label) in enumerate(zip(boxes_xyxy_px, labels, strict=True)):
        x0, x1 = (min(max(float(x), 0.0), width - 1.0) for x in (box[0], box[2]))
        y0, y1 = (min(max(float(y), 0.0), height - 1.0) for y in (box[1], box[3]))
        draw.rectangle((x0, y0, x1, y1), outline=colors[i], width=line)
        if label:
            _write(draw, label, (x0, y0), font, colors[i], (width, height))
    return picture


def index_image(
    masks: Sequence[np.ndarray], size_hw: tuple[int, int], values: Sequence[int] | None = None
) -> Image.Image:
    """Masks as one palette image: 0 where there is nothing, i + 1 on the i-th mask, in the overlay's colours.

    Where masks overlap, the first of them is seen.

    Args:
        masks: bool, (H, W) each.
        size_hw: Height and width.
        values: Other values for the masks, from 1 to 255; the value k has the colour ``object_color(k - 1)``.

    Raises:
        ValueError: If there are more masks, or higher values, than an index image can hold.
    """
    values = range(1, len(masks) + 1) if values is None else values
    if not all(1 <= value <= MAX_INDEXED_MASKS for value in values):
        raise ValueError(
            f"{len(masks)} masks with values up to {max(values)} do not fit into an image of at most "
            f"{MAX_INDEXED_MASKS} colours"
        )
    indices = np.zeros(size_hw, dtype=np.uint8)
    for i in reversed(range(len(masks))):
        indices[masks[i]] = values[i]
    picture = Image.fromarray(indices)
    picture.putpalette([0, 0, 0, *(channel for i in range(MAX_INDEXED_MASKS) for channel in object_color(i))])
    return picture


def _tint(pixels: np.ndarray, mask: np.ndarray, color: RGB, line: int) -> None:
    """Blend the colour into the mask and draw its outline, in place; only the mask's surroundings are touched."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    inside, part = mask[window], pixels[window]
    part[inside] = (part[inside] * (1 - _TINT) + np.array(color) * _TINT).astype(np.uint8)
    core = inside
    for _ in range(line):
        core = _eroded(core)
    part[inside & ~core] = color


def _eroded(mask: np.ndarray) -> np.ndarray:
    """Without the pixels that touch the outside, or the edge of the array, on one of four sides."""
    padded = np.pad(mask, 1)
    return mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def _write(
    draw: ImageDraw.ImageDraw,
    label: str,
    corner_xy: tuple[float, float],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    color: RGB,
    size_wh: tuple[int, int],
) -> None:
    """The label on a patch of the colour: above the corner, or below it where there is no room."""
    if not isinstance(font, ImageFont.FreeTypeFont):
        label = label.encode("latin-1", "replace").decode("latin-1")  # all that Pillow's bitmap font can draw
    left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
    text_width, text_height = right - left + 4, bottom - top + 4
    x = min(corner_xy[0], max(0.0, size_wh[0] - text_width))
    y = corner_xy[1] - text_height if corner_xy[1] >= text_height else corner_xy[1]
    draw.rectangle((x, y, x + text_width, y + text_height), fill=color)
    is_light = sum(weight * channel for weight, channel in zip((0.299, 0.587, 0.114), color, strict=True)) > 140
    draw.text((x + 2 - left, y + 2 - top), label, fill=(0, 0, 0) if is_light else (255, 255, 255), font=font)
