"""What a video file holds, read with PyAV without decoding: how many frames, their times, whether it is whole."""

from __future__ import annotations

import io
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sam3.video.frame_source import VideoInputError

_TAGS_WITH_HEADERS = ("avc1", "hvc1")
"""Kinds of streams in mp4 and mov files that keep sizes in the file's header; some writers repeat or change them."""
_SPS_TESTS: dict[str, Callable[[int], bool]] = {
    "h264": lambda first_byte: first_byte & 0x1F == 7,
    "hevc": lambda first_byte: first_byte >> 1 & 0x3F == 33,
}
"""By codec: whether a unit that starts with this byte is a sequence parameter set, which holds a size."""


@dataclass(frozen=True)
class VideoIndex:
    """What is known of a video file before decoding it."""

    name: str
    size_hw: tuple[int, int]
    """As shown: a phone's rotation is applied."""
    times: Sequence[int]
    """When each frame is shown, in units of ``time_base``, in order: 8 bytes for each."""
    time_base: Fraction
    num_frames: int
    """As the file announces it; more than there are times if the file is cut off."""
    frames_per_second: float | None
    stream_index: int
    has_exact_times: bool
    """False for streams without time stamps, such as raw H.264: frames are then found by counting."""
    has_fixed_size: bool
    """The size stands in the file's header for all frames; otherwise it may change on the way."""
    fault: str | None
    """Why frames are missing at the end."""


class VideoHeader(NamedTuple):
    """What a video file says about itself."""

    size_hw: tuple[int, int]
    """As stored: a phone's rotation is not applied."""
    num_frames: int
    """0 where the header does not say."""


def read_header(file: str | Path) -> VideoHeader:
    """Read a video file's header alone, which is quick for files of any length.

    Raises:
        VideoInputError: If the file is missing or no video.
    """
    name = str(file)
    with _opened(file, name) as container:
        stream = _find_stream(container, name)
        context = stream.codec_context
        return VideoHeader((context.height, context.width), stream.frames)


def index_video(file: str | Path | bytes) -> VideoIndex:
    """Read a video file's structure and its first frame.

    Raises:
        VideoInputError: If the file is missing, no video, or has no frame that can be decoded.
    """
    import av

    name = "the video's bytes" if isinstance(file, bytes) else str(file)
    with _opened(file, name) as container:
        stream = _find_stream(container, name)
        scan = _scan(container, stream)
        times, is_exact, fault = scan.times, scan.is_exact, scan.fault
        # Only here does the header count the frames; elsewhere the number is a guess from the duration, or none.
        num_announced = stream.frames - scan.num_hidden if "mp4" in container.format.name else 0
        if fault is None and len(times) < num_announced:
            fault = "the file is cut off"
        num_frames = max(len(times), num_announced)
        if not times:
            raise VideoInputError(f"{name}: the video has no frames")
        time_base = stream.time_base or Fraction(1, 1)
        stream_index = stream.index
        duration = float((times[-1] - times[0]) * time_base)
        fps = (len(times) - 1) / duration if is_exact and duration > 0 else _stated_rate(stream)
    try:
        with av.open(as_input(file)) as container:
            first = next(container.decode(container.streams[stream_index]), None)
    except av.FFmpegError as error:
        raise VideoInputError(f"{name}: no frame can be decoded ({describe_error(error)})") from None
    if first is None:
        raise VideoInputError(f"{name}: no frame can be decoded, although the file announces some")
    size_hw = (first.height, first.width) if first.rotation % 180 == 0 else (first.width, first.height)
    return VideoIndex(
        name, size_hw, times, time_base, num_frames, fps, stream_index, is_exact, scan.has_fixed_size, fault
    )


def _opened(file: str | Path | bytes, name: str) -> Any:
    import av

    if not isinstance(file, bytes) and not Path(file).is_file():
        raise VideoInputError(f"{name}: no such file or folder")
    try:
        return av.open(as_input(file))
    except av.FFmpegError as error:
        raise VideoInputError(f"{name}: not a video that can be read, or cut off ({describe_error(error)})") from None


def _find_stream(container: Any, name: str) -> Any:
    from av.stream import Disposition

    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        held = " and ".join(sorted({s.type for s in container.streams}))
        raise VideoInputError(f"{name}: holds no video" + (f", only {held}" if held else " and nothing else"))
    return streams[0]


class _Scan(NamedTuple):
    times: Sequence[int]
    """Of all frames, in the order of showing."""
    is_exact: bool
    num_hidden: int
    """Frames that are not shown: they lie before the start that the file's edit list sets."""
    has_fixed_size: bool
    fault: str | None


def _scan(container: Any, stream: Any) -> _Scan:
    """Read all packets, without decoding them."""
    import av

    context = stream.codec_context
    sps_of_nal = _SPS_TESTS.get(context.name) if str(context.codec_tag) in _TAGS_WITH_HEADERS else None
    times, num_timeless = array("q"), 0
    num_hidden, has_fixed_size, fault = 0, sps_of_nal is not None, None
    try:
        for packet in container.demux(stream):
            if packet.size and packet.is_discard:
                num_hidden += 1
            elif packet.size:
                num_timeless += packet.pts is None
                times.append(packet.pts or 0)
            if sps_of_nal is not None and packet.is_keyframe and has_fixed_size:
                has_fixed_size = not _holds_header(bytes(packet), sps_of_nal)
    except av.FFmpegError as error:
        fault = describe_error(error)
    sorted_times = np.sort(np.array(times, dtype=np.int64))
    is_exact = num_timeless == 0 and bool((np.diff(sorted_times) > 0).all())
    shown = array("q", sorted_times.tobytes()) if is_exact else range(len(times))
    return _Scan(shown, is_exact, num_hidden, has_fixed_size, fault)


def _holds_header(packet: bytes, is_sps: Callable[[int], bool]) -> bool:
    """Whether a packet of units, each after its length in four bytes, brings a header with a size of its own."""
    start = 0
    while start + 4 < len(packet):
        if is_sps(packet[start + 4]):
            return True
        start += 4 + int.from_bytes(packet[start : start + 4], "big")
    return start != len(packet)  # not such units: who knows


def _stated_rate(stream: Any) -> float | None:
    rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate else None


def as_input(file: str | Path | bytes) -> Any:
    """What PyAV and decord open."""
    return io.BytesIO(file) if isinstance(file, bytes) else str(file)


def describe_error(error: Exception) -> str:
    """What FFmpeg says, without its number and file name."""
    return str(getattr(error, "strerror", None) or error)
