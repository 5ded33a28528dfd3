"""Pictures for the demo's report: an image with its prompt, and a mask laid over it."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

TEACHER_RGB = (32, 120, 210)
STUDENT_RGB = (225, 105, 25)
BOX_RGB = (255, 214, 0)
POSITIVE_RGB = (0, 200, 90)
NEGATIVE_RGB = (230, 40, 60)


def fit(image: Image.Image, max_side_px: int) -> tuple[Image.Image, float]:
    """The image in RGB, shrunk so that its longer side is at most ``max_side_px``, and the factor applied."""
    scale = min(1.0, max_side_px / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS), scale


def draw_prompt(
    image: Image.Image,
    box_xyxy_px: Sequence[float] | None = None,
    points_xy_px: Sequence[Sequence[float]] = (),
    labels: Sequence[int] = (),
    max_side_px: int = 360,
) -> Image.Image:
    """The image with a box, or with clicks: green inside the object, red outside.

    Args:
        image: The photo; coordinates are in its pixels.
        box_xyxy_px: Corners of the box, or None.
        points_xy_px: Clicks.
        labels: 1 or 0 for each click.
        max_side_px: Longer side of the picture.
    """
    picture, scale = fit(image, max_side_px)
    draw = ImageDraw.Draw(picture)
    if box_xyxy_px is not None:
        corners = [value * scale for value in box_xyxy_px]
        draw.rectangle([corners[0] - 1, corners[1] - 1, corners[2] + 1, corners[3] + 1], outline=(0, 0, 0), width=6)
        draw.rectangle(corners, outline=BOX_RGB, width=4)
    for (x, y), label in zip(points_xy_px, labels, strict=True):
        x, y, radius = x * scale, y * scale, 8
        color = POSITIVE_RGB if label else NEGATIVE_RGB
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=color, outline=(255, 255, 255), width=2)
    return picture


def draw_mask(
    image: Image.Image, mask_hw: np.ndarray, color_rgb: tuple[int, int, int], max_side_px: int = 360
) -> Image.Image:
    """The image, greyed outside the mask, tinted inside it and with the mask's outline.

    Args:
        image: The photo, (W, H).
        mask_hw: bool, (H, W).
        color_rgb: Colour of the tint.
        max_side_px: Longer side of the picture.

    Raises:
        ValueError: If mask and image differ in size.
    """
    if mask_hw.shape != (image.height, image.width):
        raise ValueError(f"a mask of shape {mask_hw.shape} does not fit an image of {image.height} x {image.width}")
    picture, _ = fit(image, max_side_px)
    mask = Image.fromarray(mask_hw.astype(np.uint8) * 255).resize(picture.size, Image.Resampling.BILINEAR)
    mask = mask.point(lambda value: 255 if value > 127 else 0)
    grey = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, (128, 128, 128)), 0.35)
    tinted = Image.blend(picture, Image.new("RGB", picture.size, color_rgb), 0.45)
    result = Image.composite(tinted, grey, mask)
    outline = np.asarray(mask.filter(ImageFilter.MaxFilter(3))) != np.asarray(mask)
    pixels = np.array(result)
    pixels[outline] = color_rgb
    return Image.fromarray(pixels)


def to_jpeg(image: Image.Image, quality: int = 88) -> bytes:
    """Encoded bytes, the same for the same pixels."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()
