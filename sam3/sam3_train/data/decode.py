"""Reading one photo, all of it or not at all."""

from __future__ import annotations

import io
import struct
from typing import BinaryIO

from PIL import Image, ImageFile

from sam3_train.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


# What Pillow's decoders and its EXIF reader raise on damaged files.
_DECODER_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    KeyError,
    IndexError,
    TypeError,
    Image.DecompressionBombError,
)


class UnreadableImageError(UserError):
    """A photo that cannot be decoded completely."""


def decode_image(source: bytes | BinaryIO, where: str) -> Image.Image:
    """Decode an image strictly: a truncated file is an error, not a photo with a grey lower half.

    Args:
        source: The file's bytes, or the open file.
        where: What the message calls it: a path, or a tar and a member.

    Returns:
        The decoded image in the file's own mode; EXIF orientation is not applied yet.

    Raises:
        UnreadableImageError: If the bytes are no image, or not a whole one.
    """
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    # A global switch of Pillow that some libraries turn on when they are imported.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        image = Image.open(stream)
        image.load()
        image.getexif()  # read on demand, and preprocessing will ask for the orientation
    except _DECODER_ERRORS as error:
        reason = str(error).replace("\n", " ") or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "not an image that Pillow can identify"
        raise UnreadableImageError(f"{where}: unreadable image: {reason}") from error
    return image
