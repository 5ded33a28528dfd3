"""Frames of video files, through decord where it can be relied on and PyAV everywhere else.

A file is indexed with PyAV first, without decoding: how many frames there are, when each is shown, and whether the file
is whole. decord decodes with several threads, but it refuses a file that is cut off, and where a stream changes its
size it stretches frames or repeats old ones without an error; so it gets whole files that cannot, and what it stumbles
over is left to PyAV. Both give the same pixels.
"""

from __future__ import annotations

import bisect
import contextlib
import importlib.util
import itertools
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sam3.video.frame_source import FrameSource, VideoDecodeError, VideoInputError, describe_count
from sam3.video.video_index import VideoIndex, as_input, describe_error, index_video

DECODERS = ("decord", "av")
_CACHE_BYTES = 64 * 2**20
_MAX_CACHED_FRAMES = 32
_MIN_CACHED_FRAMES = 4


class VideoFileFrames(FrameSource):
    """A video file: any frame may be asked for, and walking backwards costs little more than forwards."""

    def __init__(self, file: str | Path | bytes, decoder: str | None = None) -> None:
        """Index the file and decode its first frame.

        Args:
            file: A path, or the bytes of a video file.
            decoder: "av", or "decord" for files that it can be relied on; None takes decord where it is installed.

        Raises:
            VideoInputError: If the file is missing, no video, or has no frame that can be decoded; if decord is asked
                for and not installed.
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
        self._decoder: _Decoder = _AvDecoder(file, index)
        is_installed = importlib.util.find_spec("decord") is not None
        if decoder == "decord" and not is_installed:
            raise VideoInputError('decoder "decord" has no wheel for every machine and is not installed: use "av"')
        if decoder != "av" and is_installed and not isinstance(file, bytes):
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
        fault, gap = self._fault, index - self._next
        is_beyond = fault is not None and index >= fault.frame_idx
        is_far = gap < 0 or (gap > _MAX_CACHED_FRAMES and self._index.has_exact_times)
        if self._container is None or is_far or is_beyond:
            self._start(index)
        if fault is not None and is_beyond and self._next < fault.frame_idx:
            raise fault  # there is no key frame from the damage on
        for found, frame in self._frames:
            self._next = found + 1
            if found == index:
                return self._to_rgb(frame)
            if found > index:
                raise VideoDecodeError(f"{self._index.name}: frame {index} is damaged and cannot be decoded", index)
        lost = self._lost(index)
        if index >= lost.frame_idx > (fault.frame_idx if fault is not None and is_beyond else -1):
            return self.frame(index)  # perhaps from a later key frame
        raise lost

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
        self._container = av.open(as_input(self._file))
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
                self._reason, frames = describe_error(error), self._drain(stream)
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
        with contextlib.suppress(Exception):  # decord has classes of its own, RuntimeError and IndexError
            return self._reader[index].asnumpy()
        # Not raised from decord's exception: that holds the reader, and aborts the process if it is what frees it, in
        # another thread.
        raise _DecordError

    def close(self) -> None:
        """See `_Decoder`."""
        self._reader = None


def _open_decord(path: str | Path, index: VideoIndex) -> _Decoder | None:
    """decord, if the file is one that it can be relied on, and it sees the same frames as the index."""
    if index.fault is not None or not index.has_exact_times or not index.has_fixed_size:
        return None
    import decord

    try:
        decord.logging.set_level(decord.logging.QUIET)
        reader = decord.VideoReader(str(path))
        # It decodes ahead, so that damage further on shows here already. Turned videos get four channels.
        is_same = len(reader) == index.num_frames and reader[0].shape == (*index.size_hw, 3)
        reader.seek(0)
    except ImportError:
        raise VideoInputError(
            'decoder "decord" is not installed (it has no wheel for every machine): use "av"'
        ) from None
    except Exception:  # decord has classes of its own and RuntimeError; PyAV opened the file, and says what is wrong
        return None
    return _DecordDecoder(reader, index) if is_same else None
