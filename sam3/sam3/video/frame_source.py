"""What a user may call a video: a source of RGB frames that all have one size.

`open_frames` takes a video file, a folder of pictures, a list, an array or anything that yields frames, and gives a
`FrameSource`. A source holds few frames at a time, however long the video is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from sam3.image_input import IMAGE_SUFFIXES, ImageInputError, open_image, to_rgb_uint8
from sam3.video.kept_frames import KeptFrames

_Source = TypeVar("_Source", bound="FrameSource")
_KINDS = "a video file, a folder of pictures, a list or array of frames, or something that yields frames"


class VideoInputError(ValueError):
    """A video that cannot be used; the message names it and says what is wrong."""


class FrameRangeError(VideoInputError, IndexError):
    """A frame that the video does not have, or no longer has."""


class FrameGoneError(FrameRangeError):
    """A frame that was there, of a source that can be read only once and keeps its last ones."""


class VideoDecodeError(VideoInputError):
    """A frame that cannot be had, although there are good ones before it."""

    def __init__(self, message: str, frame_idx: int) -> None:
        super().__init__(message)
        self.frame_idx = frame_idx
        """The first frame that is lost."""


class FrameSource(ABC):
    """Frames of one size, counted from 0.

    A source is a context manager; `close` gives back what it holds. One thread at a time may use it.
    """

    def __init__(
        self,
        name: str,
        size_hw: tuple[int, int],
        num_frames: int | None,
        *,
        frames_per_second: float | None = None,
        is_sequential: bool = False,
    ) -> None:
        self.name = name
        """How messages call it."""
        self.size_hw = size_hw
        """Height and width of every frame, in pixels."""
        self.num_frames = num_frames
        """None while nobody knows: a live source."""
        self.frames_per_second = frames_per_second
        """The average; None if the frames have no times."""
        self.is_sequential = is_sequential
        """True if frames must be asked for in order (the last ones may be asked for again; see `keep_frames`)."""
        self._is_closed = False

    @abstractmethod
    def _read(self, index: int) -> np.ndarray:
        """A frame whose index is in range; its size is checked by `frame`."""

    def frame(self, index: int) -> np.ndarray:
        """One frame.

        Returns:
            uint8 RGB, (H, W, 3).

        Raises:
            FrameRangeError: If there is no such frame.
            VideoDecodeError: If it cannot be decoded, or has another size than the others.
        """
        if self._is_closed:
            raise VideoInputError(f"{self.name}: is closed")
        if not self.has_frame(index):
            raise FrameRangeError(f"{self.name}: has no frame {index}; it has {describe_count(self.num_frames)}")
        pixels = self._read(index)
        if pixels.shape[:2] != self.size_hw:
            raise VideoDecodeError(
                f"{self.name}: frame {index} has {describe_size(pixels.shape[:2])}, the first frame "
                f"{describe_size(self.size_hw)}: all frames of a video must have one size",
                index,
            )
        return pixels

    def has_frame(self, index: int) -> bool:
        """Whether the video has this frame; a live source waits for it, or for its end.

        A frame may turn out to be damaged nevertheless.
        """
        return index >= 0 and (self.num_frames is None or index < self.num_frames)

    def is_at_hand(self, index: int) -> bool:
        """Whether a frame that was not asked for yet can be had without losing older ones, or there is none."""
        return not self.is_sequential or (self.num_frames is not None and index >= self.num_frames)

    def keep_frames(self, num_frames: int | None) -> None:
        """Keep the last frames, beside the newest one, for being asked for again; to be said before any is asked for.

        Sources whose frames can be read at any time, and those that only their maker can tell, do nothing.

        Args:
            num_frames: How many; None: all, compressed without loss, so that memory grows with the video.
        """
        if num_frames is not None and num_frames < 1:
            raise ValueError(f"{self.name}: cannot keep {num_frames} frames: give 1 or more, or None for all")

    def time_s(self, index: int) -> float | None:
        """When the frame is shown, in seconds from the first one; None if the frames have no times."""
        return None

    def close(self) -> None:
        """Give back files, threads and memory; may be called twice."""
        self._is_closed = True

    def __enter__(self: _Source) -> _Source:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class ListFrames(FrameSource):
    """Frames that are in memory already: a list of pictures, an array (T, H, W, 3) or a tensor (T, 3, H, W)."""

    def __init__(self, frames: Sequence[Any] | np.ndarray | Tensor, name: str = "the list of frames") -> None:
        if len(frames) == 0:
            raise VideoInputError(f"{name}: holds no frame")
        self._frames = frames
        first = _to_pixels(frames[0], name, 0)
        super().__init__(name, (first.shape[0], first.shape[1]), len(frames))

    def _read(self, index: int) -> np.ndarray:
        return _to_pixels(self._frames[index], self.name, index)


class FolderFrames(FrameSource):
    """The pictures of a folder, by number if all names are numbers, else in the order of the names."""

    def __init__(self, folder: Path) -> None:
        self._paths = list_pictures(folder)
        first = _open_pixels(self._paths[0], 0)
        super().__init__(str(folder), (first.shape[0], first.shape[1]), len(self._paths))

    def _read(self, index: int) -> np.ndarray:
        return _open_pixels(self._paths[index], index)


class IteratorFrames(FrameSource):
    """Frames from something that yields them, such as a camera: in order, and only once.

    The first frame is taken at once, for its size. The newest frame and the one before it can be asked for again.
    """

    def __init__(self, frames: Iterable[Any], name: str = "the live source") -> None:
        self._iterator = iter(frames)
        self._kept = KeptFrames(2)
        self._fault: VideoDecodeError | None = None
        super().__init__(name, (0, 0), None, is_sequential=True)
        if not self._advance():
            raise VideoInputError(f"{name}: ended before its first frame")
        if self._fault is not None:
            raise VideoInputError(str(self._fault))
        self.size_hw = (self._kept[0].shape[0], self._kept[0].shape[1])

    def has_frame(self, index: int) -> bool:
        """See `FrameSource`; takes frames from the source up to this one."""
        while index >= self._kept.num_seen and self._fault is None and self.num_frames is None:
            self._advance()
        return index >= 0 and (self.num_frames is None or index < self.num_frames)

    def keep_frames(self, num_frames: int | None) -> None:
        """See `FrameSource`."""
        super().keep_frames(num_frames)
        self._kept.num_kept = None if num_frames is None else num_frames + 1

    def _advance(self) -> bool:
        """Take one frame, or note that the source ended or failed; False at its end."""
        try:
            frame = next(self._iterator)
            self._kept.append(_to_pixels(frame, self.name, self._kept.num_seen))
        except StopIteration:
            self.num_frames = self._kept.num_seen
            return False
        except VideoDecodeError as error:
            self._fault = error
        except Exception as error:  # whatever a camera's or a network's library raises; it is raised again below
            message = f"{self.name}: failed at frame {self._kept.num_seen} ({type(error).__name__}: {error})"
            self._fault = VideoDecodeError(message, self._kept.num_seen)
            self._fault.__cause__ = error
        return True

    def _read(self, index: int) -> np.ndarray:
        if index >= self._kept.num_seen and self._fault is not None:
            raise self._fault
        if index < self._kept.oldest:
            raise FrameGoneError(f"{self.name}: frame {index} is gone; a live source keeps its last {len(self._kept)}")
        return self._kept[index]

    def close(self) -> None:
        """See `FrameSource`."""
        super().close()
        self._kept.clear()


def open_frames(source: Any, *, decoder: str | None = None, prefetch: int = 0) -> FrameSource:
    """Open a video of any kind.

    Args:
        source: The path of a video file or of a folder of pictures; a video file's bytes; a list of pictures (each see
            `sam3.image_input.to_rgb_uint8`), an array (T, H, W, 3) or a tensor (T, 3, H, W); an iterator over pictures;
            or a `FrameSource`, which is returned as it is.
        decoder: For video files: "av", or "decord" (None: where it is installed) for those that it can be relied on.
        prefetch: Decode up to this many frames ahead in a thread, 0 for none.

    Raises:
        VideoInputError: If it is none of these, or there is no frame in it.
    """
    frames = _open_plainly(source, decoder)
    if prefetch and not isinstance(source, FrameSource):
        from sam3.video.prefetch import PrefetchedFrames

        return PrefetchedFrames(frames, prefetch)
    return frames


def _open_plainly(source: Any, decoder: str | None) -> FrameSource:
    if isinstance(source, FrameSource):
        return source
    if isinstance(source, (str, Path)):
        path = Path(source)
        if source == "":
            raise VideoInputError("the video's name is empty")
        if path.is_dir():
            return FolderFrames(path)
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and path.suffix.lower() != ".gif":
            raise VideoInputError(f"{path}: is a picture; give a video file, or a folder of pictures")
    if isinstance(source, (str, Path, bytes)):
        from sam3.video.video_file import VideoFileFrames

        return VideoFileFrames(source, decoder)
    if isinstance(source, (np.ndarray, Tensor)):
        if source.ndim != 4:
            raise VideoInputError(
                f"an array of frames must be (T, H, W, 3) and a tensor (T, 3, H, W), got {tuple(source.shape)}"
            )
        return ListFrames(source, "the array of frames")
    if isinstance(source, Sequence):
        return ListFrames(source)
    if isinstance(source, (Iterator, Iterable)):
        return IteratorFrames(source)
    raise VideoInputError(f"a video must be {_KINDS}, got {type(source).__name__}")


def list_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder in the order of frames.

    Raises:
        VideoInputError: If there is none, or two have the same number.
    """
    paths = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    ]
    if not paths:
        raise VideoInputError(f"{folder}: the folder holds no picture ({', '.join(IMAGE_SUFFIXES)})")
    if not all(path.stem.isascii() and path.stem.isdigit() for path in paths):
        return paths
    by_number: dict[int, Path] = {}
    for path in paths:
        same = by_number.setdefault(int(path.stem), path)
        if same is not path:
            raise VideoInputError(f"{folder}: {same.name} and {path.name} are both frame {int(path.stem)}")
    return [by_number[number] for number in sorted(by_number)]


def describe_count(num_frames: int | None) -> str:
    """``40 frames (0 to 39)``."""
    if num_frames is None:
        return "an unknown number of frames"
    return "1 frame (0)" if num_frames == 1 else f"{num_frames} frames (0 to {num_frames - 1})"


def describe_size(size_hw: Sequence[int]) -> str:
    """``640 x 480 pixels``, the width first as everywhere in messages."""
    return f"{size_hw[1]} x {size_hw[0]} pixels"


def _to_pixels(image: Any, name: str, index: int) -> np.ndarray:
    try:
        pixels = to_rgb_uint8(image)
    except ImageInputError as error:
        raise VideoDecodeError(f"{name}: frame {index}: {error}", index) from error
    return np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy())


def _open_pixels(path: Path, index: int) -> np.ndarray:
    try:
        image = open_image(path)
    except ImageInputError as error:  # names the file
        raise VideoDecodeError(f"frame {index}: {error}", index) from error
    return _to_pixels(image, str(path), index)
