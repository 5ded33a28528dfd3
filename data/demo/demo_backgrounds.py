"""Real photos bundled with scikit-image, divided between the splits, and random views of them.

Only files that lie in the installed package are used: nothing is downloaded. A photo belongs to one split for good, so
no scene of val or test shows a background that training has seen; the two halves of the stereo pair stay together.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

SPLITS = ("train", "val", "test")
PHOTOS: dict[str, tuple[str, ...]] = {
    "train": (
        "astronaut.png",
        "brick.png",
        "camera.png",
        "cell.png",
        "clock_motion.png",
        "coins.png",
        "grass.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "moon.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "page.png",
    ),
    "val": ("gravel.png", "rocket.jpg", "text.png"),
    "test": ("chelsea.png", "coffee.png", "retina.jpg"),
}
MAX_PHOTO_SIDE_PX = 760


class MissingPhotosError(RuntimeError):
    """scikit-image, or a photo that it bundles, is not installed."""


def photo_folder() -> Path:
    """Where the installed scikit-image keeps its bundled photos; the package itself is not imported.

    Raises:
        MissingPhotosError: If it is not installed or lacks one of the photos.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise MissingPhotosError("the demo world takes its photos from scikit-image: pip install 'efficientsam3[demo]'")
    folder = Path(spec.origin).parent / "data"
    missing = [name for names in PHOTOS.values() for name in names if not (folder / name).is_file()]
    if missing:
        raise MissingPhotosError(
            f"{folder} lacks {', '.join(missing)}: install a scikit-image that constraints.txt names"
        )
    return folder


@functools.lru_cache(maxsize=32)
def load_photo(name: str) -> Image.Image:
    """A bundled photo as RGB, its longer side at most ``MAX_PHOTO_SIDE_PX``."""
    with Image.open(photo_folder() / name) as photo:
        rgb = photo.convert("RGB")
    rgb.thumbnail((MAX_PHOTO_SIDE_PX, MAX_PHOTO_SIDE_PX), Image.Resampling.BICUBIC)
    return rgb


def random_background(rng: np.random.Generator, split: str, image_hw: tuple[int, int]) -> tuple[np.ndarray, str]:
    """A random view of one of the split's photos.

    Args:
        rng: Source of all randomness.
        split: "train", "val" or "test".
        image_hw: Size of the view.

    Returns:
        float32 RGB in 0..255, (H, W, 3), and the photo's file name.
    """
    names = PHOTOS[split]
    name = names[rng.integers(len(names))]
    photo = load_photo(name)
    height, width = image_hw
    fit = min(photo.width / width, photo.height / height) * rng.uniform(0.45, 1.0)
    crop_w, crop_h = width * fit, height * fit
    left, top = rng.uniform(0, photo.width - crop_w), rng.uniform(0, photo.height - crop_h)
    box = (left, top, left + crop_w, top + crop_h)
    view = photo.resize((width, height), Image.Resampling.BILINEAR, box=box)
    if rng.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.15:
        view = view.filter(ImageFilter.BoxBlur(rng.uniform(0.7, 2.0)))
    pixels = np.asarray(view, dtype=np.float32)
    contrast, brightness = rng.uniform(0.65, 1.15), rng.uniform(-30, 30)
    tint = rng.uniform(0.85, 1.15, 3)
    gain = (contrast * tint).astype(np.float32)
    pixels = pixels * gain + (128 * (1 - contrast) * tint + brightness).astype(np.float32)
    return np.clip(pixels, 0, 255), name
