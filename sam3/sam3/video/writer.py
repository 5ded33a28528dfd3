"""What tracking leaves behind: an overlay video, index masks in DAVIS's layout, and a list of run-length masks.

Writers get frames in the order of time. `BackgroundWriter` runs them in a thread, so that drawing and encoding take no
time of the model. However a run ends, `close` leaves whole files that hold what was done.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sam3.coco_rle import encode_mask
from sam3.drawing import MAX_INDEXED_MASKS, draw_overlay, index_image
from sam3.prediction import mask_box, write_whole

TRACKS_FILE = "tracks.json"
OVERLAY_FILE = "overlay.mp4"
MASK_FOLDER = "Annotations"
"""As in DAVIS: ``Annotations/VIDEO/00000.png``."""
DEFAULT_FPS = 24.0
_ENCODERS: tuple[tuple[str, dict[str, str]], ...] = (("libx264", {"crf": "20", "preset": "veryfast"}), ("mpeg4", {}))
"""The first one that this build of FFmpeg has."""
_TICKS_PER_SECOND = 90_000


@dataclass(frozen=True)
class TrackedFrame:
    """The objects on one frame."""

    frame_idx: int
    time_s: float | None
    """When it is shown; None if nobody knows."""
    pixels_hwc: np.ndarray
    """uint8 RGB."""
    obj_ids: Sequence[int]
    scores: Sequence[float]
    """0..1: how sure the model is that the object is there."""
    masks: np.ndarray
    """Bool, (n, H, W)."""


class FrameWriter(Protocol):
    """Something that keeps tracked frames."""

    def add(self, frame: TrackedFrame) -> None:
        """Keep one more frame, later than those before."""

    def close(self, stopped_by: str | None = None) -> None:
        """Finish the files; with the reason, if the run ended early."""


def results_in(output: Path, video: str) -> list[Path]:
    """What an earlier run left that a new one on the same video would mix with or replace.

    Masks of other videos are none of it: `MASK_FOLDER` may hold many.

    Args:
        output: Folder of the results.
        video: Name of the video's folder of masks.
    """
    masks = output / MASK_FOLDER / video
    numbered = [path for path in masks.glob("*.png") if path.stem.isdecimal()]
    return [path for path in (output / OVERLAY_FILE, output / TRACKS_FILE, *sorted(numbered)) if path.is_file()]


def mask_values(obj_ids: Sequence[int], first_id: int) -> list[int]:
    """Pixel values of objects in index masks: their ids, or one more where ids count from 0."""
    return [obj_id + 1 - min(first_id, 1) for obj_id in obj_ids]


class OverlayVideo:
    """An mp4 with the objects drawn over the frames, each shown at its own time."""

    def __init__(
        self, path: Path, size_hw: tuple[int, int], frames_per_second: float | None, first_id: int = 1
    ) -> None:
        """Prepare the file, which appears when it is closed.

        Args:
            path: Where it goes.
            size_hw: Height and width of the frames; an odd side gets one more row or column, as H.264 needs.
            frames_per_second: For frames without a time; None takes 24.
            first_id: The smallest object id there may be: 0 or 1.
        """
        import av
        from av.video.reformatter import VideoReformatter

        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.first_id = path, first_id
        self._aside = path.with_name(f".{path.name}.{os.getpid()}.part")
        self._fps = frames_per_second or DEFAULT_FPS
        encoder, options = next((name, opts) for name, opts in _ENCODERS if name in av.codecs_available)
        self._container = av.open(str(self._aside), "w", format="mp4")
        rate = Fraction(self._fps).limit_denominator(1001)
        stream: Any = self._container.add_stream(encoder, rate=rate, options=options)
        stream.height, stream.width = (side + side % 2 for side in size_hw)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, _TICKS_PER_SECOND)
        if encoder == "mpeg4":
            stream.bit_rate = round(0.2 * stream.height * stream.width * self._fps)
        self._stream = stream
        self._reformatter = VideoReformatter()
        self._first: tuple[int, float | None] | None = None
        self._last_tick = -1

    def add(self, frame: TrackedFrame) -> None:
        """See `FrameWriter`."""
        import av

        values = mask_values(frame.obj_ids, self.first_id)
        shown = [i for i in range(len(values)) if frame.masks[i].any()]
        picture = draw_overlay(
            frame.pixels_hwc,
            [frame.masks[i] for i in shown],
            [mask_box(frame.masks[i]).tolist() for i in shown],
            [f"{frame.obj_ids[i]}: {frame.scores[i]:.2f}" for i in shown],
            [values[i] - 1 for i in shown],
        )
        pixels = np.asarray(picture)
        pixels = np.pad(pixels, ((0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)), mode="edge")
        encoded = self._reformatter.reformat(
            av.VideoFrame.from_ndarray(pixels, format="rgb24"), format="yuv420p", threads=1
        )
        encoded.pts, encoded.time_base = self._tick(frame), Fraction(1, _TICKS_PER_SECOND)
        self._container.mux(self._stream.encode(encoded))

    def _tick(self, frame: TrackedFrame) -> int:
        if self._first is None:
            self._first = (frame.frame_idx, frame.time_s)
        first_idx, first_s = self._first
        if frame.time_s is None or first_s is None:
            seconds = (frame.frame_idx - first_idx) / self._fps
        else:
            seconds = frame.time_s - first_s
        self._last_tick = max(round(seconds * _TICKS_PER_SECOND), self._last_tick + 1)
        return self._last_tick

    def close(self, stopped_by: str | None = None) -> None:
        """See `FrameWriter`. Without a frame there is no file."""
        try:
            if self._first is not None:
                self._container.mux(self._stream.encode())
            self._container.close()
            if self._first is not None:
                os.replace(self._aside, self.path)
        finally:
            self._aside.unlink(missing_ok=True)


class MaskFolder:
    """One index PNG for each frame in DAVIS's layout: 0 is background, k the object with the id k."""

    def __init__(self, folder: Path, first_id: int = 1) -> None:
        self.folder, self.first_id = folder, first_id
        self.dropped_ids: set[int] = set()
        """Objects whose ids are beyond what a PNG with a palette can hold; `TrackList` has them."""

    def add(self, frame: TrackedFrame) -> None:
        """See `FrameWriter`."""
        values = mask_values(frame.obj_ids, self.first_id)
        kept = [i for i, value in enumerate(values) if value <= MAX_INDEXED_MASKS]
        self.dropped_ids |= set(frame.obj_ids) - {frame.obj_ids[i] for i in kept}
        picture = index_image([frame.masks[i] for i in kept], frame.pixels_hwc.shape[:2], [values[i] for i in kept])
        write_whole(self.folder / f"{frame.frame_idx:05d}.png", partial(picture.save, format="PNG"))

    def close(self, stopped_by: str | None = None) -> None:
        """See `FrameWriter`."""


class TrackList:
    """All masks as run lengths in one JSON file, a line for each frame; it is written as the frames come."""

    def __init__(self, path: Path, header: Mapping[str, Any], first_id: int = 1) -> None:
        """Start the file, which appears when it is closed.

        Args:
            path: Where it goes.
            header: What the file says first, such as the video's name and size.
            first_id: The smallest object id there may be: 0 or 1.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.first_id = path, first_id
        self.num_frames = 0
        self._lengths: dict[int, int] = {}
        self._aside = path.with_name(f".{path.name}.{os.getpid()}.part")
        self._file = self._aside.open("w", encoding="utf-8")
        self._file.write(json.dumps(dict(header))[:-1] + ',\n"frames": [')

    def add(self, frame: TrackedFrame) -> None:
        """See `FrameWriter`."""
        objects = []
        for obj_id, score, mask in zip(frame.obj_ids, frame.scores, frame.masks, strict=True):
            self._lengths.setdefault(obj_id, 0)
            if not mask.any():
                continue
            self._lengths[obj_id] += 1
            x0, y0, x1, y1 = mask_box(mask).tolist()
            objects.append(
                {"id": obj_id, "score": round(score, 6), "bbox": [x0, y0, x1 - x0, y1 - y0]}
                | {"segmentation": encode_mask(mask)}
            )
        line: dict[str, Any] = {"frame": frame.frame_idx}
        if frame.time_s is not None:
            line["time_s"] = round(frame.time_s, 6)
        self._file.write(("," if self.num_frames else "") + "\n" + json.dumps(line | {"objects": objects}))
        self.num_frames += 1

    def close(self, stopped_by: str | None = None) -> None:
        """See `FrameWriter`."""
        values = mask_values(list(self._lengths), self.first_id)
        objects = [
            {"id": obj_id, "mask_value": value, "num_frames": length}
            for (obj_id, length), value in zip(self._lengths.items(), values, strict=True)
        ]
        try:
            with self._file:
                end = {"objects": objects, "num_tracked": self.num_frames, "stopped_by": stopped_by}
                self._file.write("\n],\n" + json.dumps(end)[1:] + "\n")
            os.replace(self._aside, self.path)
        finally:
            self._aside.unlink(missing_ok=True)

    @property
    def num_objects(self) -> int:
        """Objects so far."""
        return len(self._lengths)


class BackgroundWriter:
    """Several writers in one thread behind a short queue."""

    def __init__(self, writers: Sequence[FrameWriter], num_waiting: int = 4) -> None:
        """Start the thread.

        Args:
            writers: They get every frame, in this order.
            num_waiting: Frames that may wait; with more, `add` waits too, so that memory stays bounded.
        """
        self._writers = list(writers)
        self._queue: queue.Queue[TrackedFrame | None] = queue.Queue(num_waiting)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def add(self, frame: TrackedFrame) -> None:
        """Hand over one frame.

        Raises:
            OSError: Or whatever a writer raised at an earlier frame.
        """
        self._raise_error()
        self._queue.put(frame)

    def close(self, stopped_by: str | None = None) -> None:
        """Write what waits and finish all files, also if one of the writers failed.

        Raises:
            OSError: Or whatever the first writer that failed raised.
        """
        self._queue.put(None)
        self._thread.join()
        for writer in self._writers:
            try:
                writer.close(stopped_by)
            except Exception as error:  # the other files must still be finished; it is raised below
                self._error = self._error or error
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        """The thread: after a failure it only empties the queue, so that nobody waits for it."""
        while (frame := self._queue.get()) is not None:
            if self._error is not None:
                continue
            try:
                for writer in self._writers:
                    writer.add(frame)
            except BaseException as error:  # raised again in the thread that adds and closes
                self._error = error
