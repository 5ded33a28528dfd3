"""Everything a user may call an image becomes the same RGB pixels, whatever library it came from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sam3.image_input import ImageInputError, open_image, to_rgb_uint8
from sam3.preprocess import Preprocess
from sam3_train.errors import user_error_types


def photo(height: int = 6, width: int = 9) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


ARRAY = photo()
RGB = torch.from_numpy(ARRAY).permute(2, 0, 1)
ALPHA = np.full((6, 9, 1), 7, np.uint8)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(ARRAY),
        Image.fromarray(np.concatenate([ARRAY, ALPHA], -1)),
        ARRAY,
        np.concatenate([ARRAY, ALPHA], -1),
        ARRAY.astype(np.float32) / 255,
        ARRAY.astype(">f8") / 255,
        ARRAY[::-1][::-1],
        np.broadcast_to(ARRAY, ARRAY.shape),
        RGB,
        RGB.half() / 255,
        RGB.to(torch.float64) / 255,
        torch.cat([RGB, torch.zeros(1, 6, 9, dtype=torch.uint8)]),
    ],
    ids=lambda x: f"{type(x).__name__}-{x.mode if isinstance(x, Image.Image) else x.dtype}",
)
def test_every_kind_of_image_is_the_same_image(image: object) -> None:
    assert torch.equal(to_rgb_uint8(image), RGB)


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P", "PA", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_every_mode_of_pillow_is_seen_as_pillow_shows_it(mode: str) -> None:
    image = Image.fromarray(ARRAY).convert(mode)
    expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(to_rgb_uint8(image), expected)


def test_a_palette_with_a_transparent_colour_keeps_its_colours() -> None:
    image = Image.fromarray(ARRAY).quantize(8)
    image.info["transparency"] = 3
    assert torch.equal(to_rgb_uint8(image), torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_are_scaled_and_not_clipped(mode: str, tmp_path) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype={"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode])
    image = Image.frombuffer(mode, (4, 1), values.tobytes(), "raw", mode, 0, 1)
    assert to_rgb_uint8(image)[0].tolist() == [[0, 1, 128, 255]]
    if mode == "I;16":
        image.save(tmp_path / "deep.png")
        assert to_rgb_uint8(open_image(tmp_path / "deep.png"))[2].tolist() == [[0, 1, 128, 255]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation: int, tmp_path) -> None:
    image = Image.fromarray(ARRAY)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    turned = to_rgb_uint8(open_image(tmp_path / "turned.png"))
    assert tuple(turned.shape[1:]) == ((6, 9) if orientation < 5 else (9, 6))
    assert torch.equal(turned, RGB) == (orientation == 1)


def test_the_smallest_image_becomes_an_input() -> None:
    assert Preprocess(28)(np.full((1, 1, 3), 255, np.uint8)).unique().tolist() == [1.0]


def test_a_huge_array_is_taken_because_it_is_in_memory_already() -> None:
    grey = np.broadcast_to(np.uint8(51), (20_000, 20_000))
    assert Preprocess(28)(grey).unique().tolist() == pytest.approx([51 / 127.5 - 1])


def test_bad_images_are_a_mistake_of_the_user_for_every_command() -> None:
    assert ImageInputError in user_error_types()
