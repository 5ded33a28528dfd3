"""What a user may call an image: checked once at the edge and turned into RGB pixels.

Everything that takes an image - `sam3.preprocess.Preprocess`, `sam3.Sam3Processor`, the interactive predictor, the
commands and the training data - goes through `to_rgb_uint8`, so that an image means the same everywhere.

There is no smallest size (1 x 1 works), and arrays and tensors have no largest: they are in memory already. A *file*
may unpack to far more than its bytes, so `open_image` keeps Pillow's limit, twice ``PIL.Image.MAX_IMAGE_PIXELS``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_EXIF_ORIENTATION = 0x0112
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_KINDS = "a PIL image, a numpy array (H, W, 3) or a tensor (3, H, W)"


class ImageInputError(ValueError):
    """An image, or the file of one, that cannot be used; the message says what is wrong and what would do."""


class ImageTypeError(ImageInputError, TypeError):
    """Something that is no image at all, or whose numbers are of a kind that pixels are not."""


def open_image(path: str | Path) -> Image.Image:
    """Open and decode an image file.

    Returns:
        The decoded image as it is stored: `to_rgb_uint8` applies the EXIF orientation.

    Raises:
        ImageInputError: If the file is missing, no image, damaged or too large; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise ImageInputError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
    try:
        image = Image.open(path)
        image.load()
    except UnidentifiedImageError:
        raise ImageInputError(f"{path}: not an image that Pillow can read") from None
    except Image.DecompressionBombError as error:
        raise ImageInputError(
            f"{path}: too large for a file that nobody vouches for ({str(error).split(',')[0]}). Make the image "
            "smaller, or open it with a higher PIL.Image.MAX_IMAGE_PIXELS and pass the image itself"
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise for damaged files
        raise ImageInputError(f"{path}: cannot be decoded ({error})") from error
    return image


def to_rgb_uint8(image: Any) -> Tensor:
    """Convert an image of any common kind to an RGB tensor, or refuse it clearly.

    Transparency is dropped: the colours under it count, as SAM 3 was trained without it.

    Args:
        image: A PIL image of any mode (its EXIF orientation is applied; 16-bit grey is scaled to 8 bits), a numpy array
            (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or a tensor (1, H, W), (3, H, W) or (4, H, W). Arrays and tensors
            are uint8 in 0..255, or floating point in 0..1.

    Returns:
        uint8 tensor, (3, H, W), in the source's memory layout, on the tensor's own device (CPU for the other kinds).

    Raises:
        ImageTypeError: If the kind or the dtype is none of these (a `TypeError` and a `ValueError`).
        ImageInputError: If the shape is wrong, a side is zero, or a float value is not finite or outside 0..1 (a
            `ValueError`).
    """
    if isinstance(image, Image.Image):
        return _from_pil(image)
    if isinstance(image, np.ndarray):
        tensor = _channels_first(image)
    elif isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] not in (1, 3, 4):
            raise ImageInputError(_wrong_tensor_shape(tuple(image.shape)))
        tensor = image[:3]
    else:
        raise ImageTypeError(
            f"an image must be {_KINDS}, got {type(image).__name__}"
            + (": open the file first, e.g. with PIL.Image.open" if isinstance(image, (str, Path)) else "")
        )
    if 0 in tensor.shape:
        raise ImageInputError(f"the image is empty: shape {tuple(image.shape)}")
    if tensor.dtype.is_floating_point:
        tensor = _quantise(tensor)
    elif tensor.dtype != torch.uint8:
        raise ImageTypeError(_wrong_dtype(tensor))
    return tensor.expand(3, -1, -1).contiguous()


def require_image_list(images: Any) -> Sequence[Any]:
    """The same list or tuple of images, if it is one.

    Raises:
        ImageInputError: If it is something else, such as an array of several images, or empty.
    """
    if not isinstance(images, (list, tuple)):
        raise ImageInputError(f"several images come as a list, got {type(images).__name__}")
    if not images:
        raise ImageInputError("at least one image is needed, got an empty list")
    return images


def _from_pil(image: Image.Image) -> Tensor:
    if 0 in image.size:
        raise ImageInputError(f"the image is empty: {image.width} x {image.height} pixels")
    # Each of these copies the whole image, so only where there is something to do.
    if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        return to_rgb_uint8(np.asarray(image))
    if image.mode in _SIXTEEN_BIT_MODES:
        return _from_sixteen_bits(image)
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def _from_sixteen_bits(image: Image.Image) -> Tensor:
    """Pillow's own conversion of these modes clips at 255, which leaves nearly all of a photo white."""
    values = np.asarray(image).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageInputError(
            f"an image of mode {image.mode!r} is read as 16-bit grey, but holds values from {low} to {high}: "
            "convert it to uint8 first"
        )
    grey = torch.from_numpy(((values + 128) // 257).astype(np.uint8))
    return grey.expand(3, -1, -1).contiguous()


def _channels_first(array: np.ndarray) -> Tensor:
    """(H, W) or (H, W, C) -> (C, H, W) without the alpha channel, as a tensor."""
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3, 4)):
        remedy = ""
        if array.ndim == 3 and array.shape[0] in (1, 3, 4):
            remedy = "; channels come last in an array: transpose(1, 2, 0)"
        elif array.ndim == 4:
            remedy = "; give one image at a time, or a list of them"
        raise ImageInputError(
            f"an array image must be (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {array.shape}{remedy}"
        )
    if array.dtype.kind not in "biuf":
        raise ImageTypeError(f"an image must be uint8 or floating point, got {array.dtype}")
    # torch knows neither foreign byte order nor extended precision, and warns of arrays that cannot be written.
    native = np.dtype(np.float64) if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
    fits = array.flags.writeable and array.flags.c_contiguous and array.dtype == native
    tensor = torch.from_numpy(array if fits else np.array(array, dtype=native, order="C"))
    return (tensor[..., None] if tensor.ndim == 2 else tensor[..., :3]).permute(2, 0, 1)


def _quantise(tensor: Tensor) -> Tensor:
    """Floats in 0..1 to uint8, as torchvision's ``to_dtype(scale=True)`` does for the released processor."""
    low, high = float(tensor.min()), float(tensor.max())
    if not (low >= 0.0 and high <= 1.0):
        is_byte_range = low >= 0.0 and 1.0 < high <= 255.0
        remedy = ": divide it by 255, or convert it to uint8" if is_byte_range else ""
        raise ImageInputError(f"a floating-point image must lie in 0..1, got values from {low} to {high}{remedy}")
    return (tensor.to(torch.float32) * 255.999).to(torch.uint8)


def _wrong_dtype(tensor: Tensor) -> str:
    message = f"an image must be uint8 (0..255) or floating point (0..1), got {tensor.dtype}".replace("torch.", "")
    if tensor.dtype == torch.bool:
        return f"{message}: multiply a mask by 255 first"
    values = tensor.to(torch.int64)
    low, high = int(values.min()), int(values.max())
    inside = low >= 0 and high <= 255
    return f"{message} with values from {low} to {high}: " + (
        "convert it to uint8" if inside else "scale it to 0..255 and convert it to uint8"
    )


def _wrong_tensor_shape(shape: tuple[int, ...]) -> str:
    message = f"a tensor image must be (1, H, W), (3, H, W) or (4, H, W), got {shape}"
    if len(shape) == 3 and shape[-1] in (1, 3, 4):
        return f"{message}; channels come first in a tensor: permute(2, 0, 1)"
    if len(shape) == 4:
        return f"{message}; give one image at a time, or a list of them"
    return message
