"""Decoding ahead: a thread reads the next frames while the model works on the present one."""

from __future__ import annotations

import threading
import weakref

import numpy as np

from sam3.video.frame_source import FrameSource, VideoInputError

_SECONDS_TO_STOP = 1.0
"""How long closing waits for a frame that is being read."""


class PrefetchedFrames(FrameSource):
    """A source around another, whose thread keeps the next frames ready, forwards or backwards.

    All reading is done by the thread, so the source inside need not be safe for several. A frame that fails ahead of
    time raises when it is asked for, not before.
    """

    def __init__(self, source: FrameSource, num_ahead: int = 4) -> None:
        """Start the thread.

        Args:
            source: What to read from; this object closes it.
            num_ahead: Frames to hold ready; with the present one, the memory that this takes.
        """
        if num_ahead < 1:
            raise ValueError(f"prefetching needs at least one frame, got {num_ahead}")
        super().__init__(
            source.name,
            source.size_hw,
            source.num_frames,
            frames_per_second=source.frames_per_second,
            is_sequential=source.is_sequential,
        )
        self._shared = _Shared(source, num_ahead)
        self._source = source
        # Neither the thread nor its target knows this object, so that forgetting it ends the thread.
        self._thread = threading.Thread(target=self._shared.run, name=f"frames of {source.name}", daemon=True)
        weakref.finalize(self, self._shared.stop)
        self._thread.start()

    def has_frame(self, index: int) -> bool:
        """See `FrameSource`."""
        if self.num_frames is None and index >= 0:
            is_there = self._shared.has_frame(index)
            self.num_frames = self._source.num_frames
            return is_there
        return super().has_frame(index)

    def time_s(self, index: int) -> float | None:
        """See `FrameSource`."""
        return self._source.time_s(index)

    def keep_frames(self, num_frames: int | None) -> None:
        """See `FrameSource`; the source inside is ahead by the frames that are ready."""
        self._source.keep_frames(None if num_frames is None else num_frames + self._shared.num_ahead)

    def _read(self, index: int) -> np.ndarray:
        result = self._shared.get(index)
        if isinstance(result, BaseException):
            raise result.with_traceback(None)
        return result

    def close(self) -> None:
        """See `FrameSource`. A thread that waits for a camera is left behind; it ends with its next frame."""
        super().close()
        self._shared.stop()
        if threading.current_thread() is not self._thread:
            self._thread.join(_SECONDS_TO_STOP)


class _Shared:
    """What the thread and its user share, under one lock."""

    def __init__(self, source: FrameSource, num_ahead: int) -> None:
        self.source = source
        self.num_ahead = num_ahead
        self.changed = threading.Condition()
        self.ready: dict[int, np.ndarray | BaseException | None] = {}
        """Frames by index, or why there is none; None after the end of a live source."""
        self.head: int | None = None
        """The frame asked for last; nothing is read before the first."""
        self.step = 1
        self.is_stopped = False

    def has_frame(self, index: int) -> bool:
        """For sources of unknown length: read up to the frame."""
        return self._wait_for(index) is not None

    def get(self, index: int) -> np.ndarray | BaseException:
        """The frame, or what reading it raised."""
        result = self._wait_for(index)
        return VideoInputError(f"{self.source.name}: has no frame {index}") if result is None else result

    def stop(self) -> None:
        """Let the thread end after the frame that it is reading."""
        with self.changed:
            self.is_stopped = True
            self.changed.notify_all()

    def run(self) -> None:
        """The thread: the frame that is waited for first, then those ahead of it."""
        try:
            while (index := self._next_index()) is not None:
                result = self._read(index)
                with self.changed:
                    self.ready[index] = result
                    self.changed.notify_all()
        finally:
            self.source.close()

    def _read(self, index: int) -> np.ndarray | BaseException | None:
        try:
            return self.source.frame(index) if self.source.has_frame(index) else None
        except Exception as error:  # raised in the thread of whoever asks for the frame
            return error

    def _next_index(self) -> int | None:
        with self.changed:
            while not self.is_stopped:
                for index in self._wanted():
                    if index not in self.ready and (index >= 0 or index == self.head):
                        return index
                self.changed.wait()
            return None

    def _wanted(self) -> list[int]:
        """The present frame and those ahead, up to the first one that failed or is beyond the end."""
        wanted: list[int] = []
        if self.head is None:
            return wanted
        for index in range(self.head, self.head + self.step * (self.num_ahead + 1), self.step):
            wanted.append(index)
            result = self.ready.get(index, index)
            if result is None or isinstance(result, BaseException):
                break
            if self.source.num_frames is not None and not 0 <= index + self.step < self.source.num_frames:
                break
        return wanted

    def _wait_for(self, index: int) -> np.ndarray | BaseException | None:
        with self.changed:
            if self.head is not None and abs(index - self.head) == 1 and not self.source.is_sequential:
                self.step = index - self.head
            self.head = index
            kept = {*self._wanted(), index - self.step}
            self.ready = {key: value for key, value in self.ready.items() if key in kept}
            self.changed.notify_all()
            while index not in self.ready and not self.is_stopped:
                self.changed.wait()
            if self.is_stopped and index not in self.ready:
                return VideoInputError(f"{self.source.name}: is closed")
            return self.ready[index]
