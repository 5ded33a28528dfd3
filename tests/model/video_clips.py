"""Small video files for tests: what is on a frame says which one it is."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

FPS = 24
_TICKS = 5
"""Units of time for each frame at a constant rate."""


def frame_pixels(index: int, size_hw: tuple[int, int] = (48, 64)) -> np.ndarray:
    """A grey frame as bright as its number says (up to 60 of them), with a white square that walks to the right."""
    pixels = np.full((*size_hw, 3), 4 * index, dtype=np.uint8)
    pixels[8:16, index % 40 : index % 40 + 8] = 255
    return pixels


def frame_number(pixels: np.ndarray) -> int:
    """Which frame this is, by its brightness in the lower half."""
    return round(float(pixels[pixels.shape[0] // 2 :].mean()) / 4)


def write_video(
    path: Path,
    num_frames: int = 20,
    size_hw: tuple[int, int] = (48, 64),
    *,
    codec: str = "libx264",
    ticks: Sequence[int] | None = None,
    keyframe_every: int = 10,
    container_options: dict[str, str] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Encode `frame_pixels`, each frame one fifth of a tick list's units at 24 frames a second, or at its own times.

    Args:
        path: Its suffix decides the container.
        num_frames: May be 0.
        size_hw: Even sides.
        codec: An encoder of FFmpeg.
        ticks: When each frame is shown, in 1 / 120 s; None for 24 frames a second.
        keyframe_every: The most frames between key frames.
        container_options: Such as ``{"movflags": "faststart"}``.
        options: Of the encoder, besides its quality.
    """
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.width, stream.height, stream.pix_fmt = size_hw[1], size_hw[0], "yuv420p"
        stream.options = {"g": str(keyframe_every), "crf": "4"} | (options or {})
        if codec != "libx264":
            stream.bit_rate = 8_000_000
        stream.codec_context.time_base = Fraction(1, FPS * _TICKS)
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(frame_pixels(i, size_hw), format="rgb24")
            frame.pts, frame.time_base = ticks[i] if ticks else i * _TICKS, Fraction(1, FPS * _TICKS)
            container.mux(stream.encode(frame))
        if num_frames:
            container.mux(stream.encode())
        else:
            container.start_encoding()
    return path


def write_audio(path: Path) -> Path:
    """A file that holds a second of silence and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def rotate_in_header(path: Path) -> Path:
    """Let the mp4's header say that it is shown turned by 90 degrees, as a phone's are."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version 0: version and flags, times, ids, layer, volume
    for i, value in enumerate((0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)):
        data[at + 4 * i : at + 4 * i + 4] = (value & 0xFFFFFFFF).to_bytes(4, "big")
    path.write_bytes(data)
    return path
