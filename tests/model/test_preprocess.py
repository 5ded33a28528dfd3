"""The preprocessing contract: pixels in, coordinates and masks back, mismatches refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import resize

from sam3.image_input import to_rgb_uint8
from sam3.preprocess import Preprocess, PreprocessMismatchError


def photo(height: int = 30, width: int = 50) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_default_is_what_the_deployed_sam3_processor_does() -> None:
    """Stretch on uint8 with antialiased bilinear, /255, (x - 0.5) / 0.5 (sam3-detector 2.1)."""
    array = photo()
    expected = resize(torch.from_numpy(array).permute(2, 0, 1), [1008, 1008], antialias=True).float() / 255
    assert torch.equal(Preprocess()(array), (expected - 0.5) / 0.5)


def test_every_kind_of_image_gives_the_same_input() -> None:
    array = photo()
    preprocess = Preprocess(56)
    expected = preprocess(array)
    alpha = np.concatenate([array, np.full((30, 50, 1), 7, np.uint8)], axis=-1)
    as_tensor = torch.from_numpy(array).permute(2, 0, 1)
    for image in (Image.fromarray(array), alpha, as_tensor, as_tensor.float() / 255, array.astype(np.float32) / 255):
        assert torch.equal(preprocess(image), expected)


def test_grey_and_exif_are_converted() -> None:
    grey = photo()[..., 0]
    assert torch.equal(to_rgb_uint8(grey), to_rgb_uint8(Image.fromarray(grey)))
    image = Image.fromarray(photo())
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    image.info["exif"] = exif.tobytes()
    assert to_rgb_uint8(image).shape == (3, 50, 30)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((3, 4, 5), np.uint8), ValueError, r"\(3, 4, 5\)"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "empty"),
        (np.zeros((4, 4, 3), np.int32), TypeError, "int32"),
        (np.full((4, 4, 3), 2.0), ValueError, "0..1, got values from 2.0"),
        (np.full((4, 4, 3), np.nan), ValueError, "0..1, got values from nan"),
        ("photo.jpg", TypeError, "got str"),
    ],
)
def test_what_is_not_an_image_is_refused(image: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        to_rgb_uint8(image)


def test_letterbox_keeps_the_aspect_and_pads_with_zeros() -> None:
    preprocess = Preprocess.letterbox_imagenet(60)
    tensor = preprocess(photo(30, 50))
    assert tensor.shape == (3, 60, 60)
    assert torch.count_nonzero(tensor[:, 36:]) == 0 and torch.count_nonzero(tensor[:, :36]) > 0
    assert preprocess.build_valid_mask((30, 50), 10).sum() == 60
    assert Preprocess(60).build_valid_mask((30, 50), 10).sum() == 100


@pytest.mark.parametrize("mode", ["stretch", "letterbox"])
def test_a_mask_lands_where_its_box_was(mode: str) -> None:
    preprocess = Preprocess(252, mode)
    mask = torch.zeros(1, 1, 90, 160)
    mask[..., 60:90, 120:160] = 1
    left, top, right, bottom = (
        preprocess.boxes_to_model(torch.tensor([120.0, 60.0, 160.0, 90.0]), (90, 160)).round().int()
    )
    logits = torch.full((1, 1, 252, 252), -10.0)
    logits[..., top:bottom, left:right] = 10.0
    back = preprocess.masks_to_image(logits, (90, 160)) > 0
    overlap = (back & (mask > 0)).sum() / (back | (mask > 0)).sum()
    assert overlap > 0.97


@pytest.mark.parametrize("mode", ["stretch", "letterbox"])
def test_corner_coordinates_land_on_the_corner(mode: str) -> None:
    preprocess = Preprocess(200, mode)
    corner = preprocess.coords_to_model(torch.tensor([[160.0, 90.0]]), (90, 160))[0].tolist()
    assert corner == pytest.approx([200.0, 200.0 if mode == "stretch" else 113.0])
    box = preprocess.boxes_to_model(torch.tensor([0.0, 0.0, 160.0, 90.0]), (90, 160)).tolist()
    assert box == pytest.approx([0.0, 0.0, *corner])


def test_a_mismatch_prints_both_sides() -> None:
    """D-01"""
    ours, theirs = Preprocess(), Preprocess.letterbox_imagenet()
    with pytest.raises(PreprocessMismatchError) as error:
        ours.require_equal(theirs, "the config", "the store")
    assert "'mode': 'stretch'" in str(error.value) and "'mode': 'letterbox'" in str(error.value)
    ours.require_equal(Preprocess.from_dict(ours.to_dict()), "the config", "the store")


def test_unknown_and_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="'crop' is not one of"):
        Preprocess(mode="crop")
    with pytest.raises(ValueError, match="unknown field 'size'"):
        Preprocess.from_dict({"size": 3})
    with pytest.raises(ValueError, match="std must be positive"):
        Preprocess(std=(0.5, 0.0, 0.5))
