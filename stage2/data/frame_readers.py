"""Frames of one video by their numbers, from a video file or a folder of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from sam3.image_input import ImageInputError, open_image, to_rgb_uint8
from sam3.video.frame_source import VideoInputError, list_pictures
from sam3.video.video_file import VideoFileFrames
from stage2.data.video_entry import BadVideoError


class FrameReader(Protocol):
    """Frames are asked for in ascending order."""

    def frame(self, number: int) -> np.ndarray:
        """uint8 RGB, (H, W, 3).

        Raises:
            BadVideoError: If there is no such frame, or it cannot be decoded.
        """

    def close(self) -> None:
        """Give files back."""


class VideoFileReader:
    """Frames of a video file (decord where it can be relied on, see `sam3.video.video_file`)."""

    def __init__(self, path: Path) -> None:
        try:
            self._frames = VideoFileFrames(path)
        except VideoInputError as error:
            raise BadVideoError(str(error)) from None

    def frame(self, number: int) -> np.ndarray:
        """See `FrameReader`."""
        try:
            return self._frames.frame(number)
        except VideoInputError as error:
            raise BadVideoError(str(error)) from None

    def close(self) -> None:
        """See `FrameReader`."""
        self._frames.close()


class PictureReader:
    """Frames of a folder whose pictures are named after their numbers, with any number of digits."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._paths = numbered_pictures(folder)

    def frame(self, number: int) -> np.ndarray:
        """See `FrameReader`."""
        path = self._paths.get(number)
        if path is None:
            raise BadVideoError(f"{self._folder}: frame {number} is missing")
        try:
            pixels = to_rgb_uint8(open_image(path))
        except ImageInputError as error:
            raise BadVideoError(str(error)) from None
        return pixels.permute(1, 2, 0).numpy()

    def close(self) -> None:
        """See `FrameReader`."""


def numbered_pictures(folder: Path) -> dict[int, Path]:
    """The pictures of a folder by the numbers that name them: ``00012.jpg`` and ``00000012.jpg`` are frame 12.

    Raises:
        BadVideoError: If there is none, two have the same number, or one has none.
    """
    if not folder.is_dir():
        raise BadVideoError(f"{folder}: no such folder of frames")
    try:
        paths = list_pictures(folder)
    except VideoInputError as error:
        raise BadVideoError(str(error)) from None
    unnumbered = next((path for path in paths if not (path.stem.isascii() and path.stem.isdigit())), None)
    if unnumbered is not None:
        raise BadVideoError(f"{unnumbered}: frames are named after their numbers, such as 00012.jpg")
    return {int(path.stem): path for path in paths}


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width of a picture, without decoding it.

    Raises:
        BadVideoError: If it is none.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, ValueError, SyntaxError) as error:
        raise BadVideoError(f"{path}: not an image that can be read ({error})") from None
