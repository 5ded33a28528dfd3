"""Frames of video files, through decord where it can be relied on and PyAV everywhere else.

A file is indexed with PyAV first, without decoding: how many frames there are, when each is shown, and whether the file
is whole. decord decodes with several threads, but it refuses a file that is cut off, and where a stream changes its
size it repeats old frames without an error; so it gets whole files of the kinds that cannot, and what it stumbles over
is left to PyAV. Both give the same pixels.
"""

from __future__ import annotations

import bisect
import importlib.util
import io
import itertools
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sam3.video.frame_source import FrameSource, VideoDecodeError, VideoInputError, describe_count

DECODERS = ("decord", "av")
_CACHE_BYTES = 64 * 2**20
_MAX_CACHED_FRAMES = 32
_MIN_CACHED_FRAMES = 4
_DECORD_TAGS = ("avc1", "hvc1")
"""Kinds of streams in mp4 and mov files whose size stands in the file's header, for all frames."""


@dataclass(frozen=True)
class VideoIndex:
    """What is known of a video file before decoding it."""

    name: str
    size_hw: tuple[int, int]
    """As shown: a phone's rotation is applied."""
    times: list[int]
    """When each frame is shown, in units of ``time_base``, in order."""
    time_base: Fraction
    num_frames: int
    """As the file announces it; more than there are times if the file is cut off."""
    frames_per_second: float | None
    stream_index: int
    tag: str
    has_exact_times: bool
    """False for streams without time stamps, such as raw H.264: frames are then found by counting."""
    fault: str | None
    """Why frames are missing at the end."""


class VideoFileFrames(FrameSource):
    """A video file: any frame may be asked for, and walking backwards costs little more than forwards."""

    def __init__(self, file: str | Path | bytes, decoder: str | None = None) -> None:
        """Index the file and decode its first frame.

        Args:
            file: A path, or the bytes of a video file.
            decoder: "decord" or "av"; None chooses.

        Raises:
            VideoInputError: If the file is missing, no video, or has no frame that can be decoded.
        """
        if decoder is not None and decoder not in DECODERS:
            raise ValueError(f"decoder {decoder!r} is not one of {DECODERS}")
        self._file = file
        self.index = index_video(file)
        index = self.index
        super().__init__(index.name, index.size_hw, index.num_frames, frames_per_second=index.frames_per_second)
        frame_bytes = 3 * index.size_hw[0] * index.size_hw[1]
        self._num_cached = min(max(_CACHE_BYTES // frame_bytes, _MIN_CACHED_FRAMES), _MAX_CACHED_FRAMES)
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self._highest = -1
        self._decoder: _Decoder = _AvDecoder(file, index)
        if decoder == "decord" or (decoder is None and _suits_decord(file, index)):
            self._decoder = _open_decord(file, index) or self._decoder

    @property
    def decoder(self) -> str:
        """What decodes the next frame: "decord" or "av"."""
        return self._decoder.name

    def time_s(self, index: int) -> float | None:
        """See `FrameSource`."""
        times = self.index.times
        if not self.index.has_exact_times or not 0 <= index < len(times):
            return None
        return float((times[index] - times[0]) * self.index.time_base)

    def _read(self, index: int) -> np.ndarray:
        if index not in self._cache:
            # A step back means that more will follow: decoding starts at a key frame, so a whole stretch is kept.
            is_step_back = bool(self._cache) and index < min(self._cache)
            first = max(0, index - self._num_cached + 1) if is_step_back else index
            try:
                self._decode(first, index + 1)
            except _DecordError:
                self._decoder.close()
                self._decoder = _AvDecoder(self._file, self.index)
                self._decode(first, index + 1)
        return self._cache[index]

    def _decode(self, first: int, stop: int) -> None:
        for index in range(first, stop):
            try:
                self._cache[index] = self._decoder.frame(index)
            except VideoDecodeError:
                if index == stop - 1:
                    raise
                continue  # a damaged frame that nobody asked for
            self._cache.move_to_end(index)
            while len(self._cache) > self._num_cached:
                self._cache.popitem(last=False)

    def close(self) -> None:
        """See `FrameSource`."""
        super().close()
        self._decoder.close()
        self._cache.clear()


def index_video(file: str | Path | bytes) -> VideoIndex:
    """Read a video file's structure and its first frame.

    Raises:
        VideoInputError: If the file is missing, no video, or has no frame that can be decoded.
    """
    import av

    name = "the video's bytes" if isinstance(file, bytes) else str(file)
    if not isinstance(file, bytes) and not Path(file).is_file():
        raise VideoInputError(f"{name}: no such file or folder")
    try:
        container = av.open(_as_input(file))
    except av.FFmpegError as error:
        raise VideoInputError(f"{name}: not a video that can be read, or cut off ({_reason(error)})") from None
    with container:
        stream = _find_stream(container, name)
        times, is_exact, num_hidden, fault = _scan(container, stream)
        # Only here does the header count the frames; elsewhere the number is a guess from the duration, or none.
        num_announced = stream.frames - num_hidden if "mp4" in container.format.name else 0
        if fault is None and len(times) < num_announced:
            fault = "the file is cut off"
        num_frames = max(len(times), num_announced)
        if not times:
            raise VideoInputError(f"{name}: the video has no frames")
        time_base = stream.time_base or Fraction(1, 1)
        tag, stream_index = str(stream.codec_context.codec_tag), stream.index
        duration = float((times[-1] - times[0]) * time_base)
        fps = (len(times) - 1) / duration if is_exact and duration > 0 else _stated_rate(stream)
    try:
        with av.open(_as_input(file)) as container:
            first = next(container.decode(container.streams[stream_index]), None)
    except av.FFmpegError as error:
        raise VideoInputError(f"{name}: no frame can be decoded ({_reason(error)})") from None
    if first is None:
        raise VideoInputError(f"{name}: no frame can be decoded, although the file announces some")
    size_hw = (first.height, first.width) if first.rotation % 180 == 0 else (first.width, first.height)
    return VideoIndex(name, size_hw, times, time_base, num_frames, fps, stream_index, tag, is_exact, fault)


def _find_stream(container: Any, name: str) -> Any:
    from av.stream import Disposition

    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        held = " and ".join(sorted({s.type for s in container.streams}))
        raise VideoInputError(f"{name}: holds no video" + (f", only {held}" if held else " and nothing else"))
    return streams[0]


def _scan(container: Any, stream: Any) -> tuple[list[int], bool, int, str | None]:
    """Times of all frames in the order of showing, whether they are exact, frames that are not shown, and a fault."""
    import av

    times: list[int | None] = []
    num_hidden, fault = 0, None
    try:
        for packet in container.demux(stream):
            if packet.size and packet.is_discard:  # before the start that the file's edit list sets
                num_hidden += 1
            elif packet.size:
                times.append(packet.pts)
    except av.FFmpegError as error:
        fault = _reason(error)
    exact = [time for time in times if time is not None]
    is_exact = len(exact) == len(times) == len(set(exact))
    return (sorted(exact) if is_exact else list(range(len(times)))), is_exact, num_hidden, fault


def _stated_rate(stream: Any) -> float | None:
    rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate else None


def _as_input(file: str | Path | bytes) -> Any:
    return io.BytesIO(file) if isinstance(file, bytes) else str(file)


def _reason(error: Exception) -> str:
    """What FFmpeg says, without its number and file name."""
    return str(getattr(error, "strerror", None) or error)


class _Decoder(Protocol):
    name: str

    def frame(self, index: int) -> np.ndarray:
        """uint8 RGB (H, W, 3)."""

    def close(self) -> None:
        """Give the file back."""


class _DecordError(Exception):
    """decord cannot go on; PyAV may."""


class _AvDecoder:
    """Decodes with PyAV from the last key frame before what is asked for."""

    name = "av"

    def __init__(self, file: str | Path | bytes, index: VideoIndex) -> None:
        from av.video.reformatter import VideoReformatter

        self._file, self._index = file, index
        self._reformatter = VideoReformatter()
        self._container: Any = None
        self._frames: Iterator[tuple[int, Any]] = iter(())
        self._next = -1
        self._reason: str | None = None
        self._fault: VideoDecodeError | None = None

    def frame(self, index: int) -> np.ndarray:
        """See `_Decoder`."""
        if self._fault is not None and index >= self._fault.frame_idx:
            raise self._fault
        gap = index - self._next
        if self._container is None or gap < 0 or (gap > _MAX_CACHED_FRAMES and self._index.has_exact_times):
            self._start(index)
        for found, frame in self._frames:
            self._next = found + 1
            if found == index:
                return self._to_rgb(frame)
            if found > index:
                raise VideoDecodeError(f"{self._index.name}: frame {index} is damaged and cannot be decoded", index)
        raise self._lost(index)

    def _start(self, index: int) -> None:
        """Open the file and stand at the key frame before a frame, or at the start where that is not possible."""
        times = self._index.times
        if self._index.has_exact_times and 0 < index < len(times):
            stream = self._open()
            self._container.seek(times[index], stream=stream)
            frames = self._decode(stream)
            first = next(frames, None)
            if first is not None and first[0] <= index:
                self._frames, self._next = itertools.chain([first], frames), first[0]
                return
        self._frames, self._next = self._decode(self._open()), 0

    def _open(self) -> Any:
        import av

        self.close()
        self._container = av.open(_as_input(self._file))
        stream = self._container.streams[self._index.stream_index]
        stream.thread_type = "AUTO"
        return stream

    def _decode(self, stream: Any) -> Iterator[tuple[int, Any]]:
        """Frames with their indices, from wherever the file stands; ends at the first fault, which is kept."""
        import av

        packets, count = self._container.demux(stream), 0
        self._reason = None
        while self._reason is None:
            try:
                packet = next(packets, None)
                if packet is None:
                    return
                frames = packet.decode()
            except av.FFmpegError as error:
                self._reason, frames = _reason(error), self._drain(stream)
            for frame in frames:
                yield self._number(frame, count), frame
                count += 1

    def _drain(self, stream: Any) -> list[Any]:
        """Good frames that the decoder still held back, for their order, when it failed."""
        import av

        try:
            return list(stream.codec_context.decode(None))
        except av.FFmpegError:
            return []

    def _number(self, frame: Any, count: int) -> int:
        if not self._index.has_exact_times or frame.pts is None:
            return count
        return bisect.bisect_left(self._index.times, frame.pts)

    def _lost(self, index: int) -> VideoDecodeError:
        """The fault at the end of what can be decoded."""
        first = self._next
        reason = self._reason or self._index.fault or "there are fewer frames than announced"
        of = describe_count(self._index.num_frames)
        message = f"{self._index.name}: decoding ends before frame {first} of {of}: {reason}"
        self._fault = VideoDecodeError(message, min(first, index))
        return self._fault

    def _to_rgb(self, frame: Any) -> np.ndarray:
        # One reformatter for all frames with one thread: setting it up takes longer than small frames themselves.
        pixels = self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        return np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90)) if frame.rotation else pixels

    def close(self) -> None:
        """See `_Decoder`."""
        if self._container is not None:
            self._container.close()
        self._container, self._frames = None, iter(())


class _DecordDecoder:
    """Decodes with decord, which looks for key frames itself."""

    name = "decord"

    def __init__(self, reader: Any, index: VideoIndex) -> None:
        self._reader, self._index = reader, index

    def frame(self, index: int) -> np.ndarray:
        """See `_Decoder`."""
        try:
            return self._reader[index].asnumpy()
        except Exception as error:  # decord has classes of its own, RuntimeError and IndexError
            raise _DecordError from error

    def close(self) -> None:
        """See `_Decoder`."""
        self._reader = None


def _suits_decord(file: str | Path | bytes, index: VideoIndex) -> bool:
    is_whole = index.fault is None and index.has_exact_times
    is_installed = importlib.util.find_spec("decord") is not None
    return is_installed and is_whole and index.tag in _DECORD_TAGS and not isinstance(file, bytes)


def _open_decord(file: str | Path | bytes, index: VideoIndex) -> _Decoder | None:
    """decord, if it sees the same frames as the index."""
    try:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        reader = decord.VideoReader(_as_input(file))
    except ImportError:
        raise VideoInputError(
            'decoder "decord" is not installed (it has no wheel for every machine): use "av"'
        ) from None
    except Exception:  # decord has classes of its own and RuntimeError; PyAV opened the file, and says what is wrong
        return None
    if len(reader) != index.num_frames or reader[0].shape != (*index.size_hw, 3):  # turned videos get four channels
        return None
    reader.seek(0)
    return _DecordDecoder(reader, index)
