"""What ``python -m sam3.track`` does with a video: objects are followed, and frames written as they are done."""

from __future__ import annotations

import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from sam3.coco_rle import decode_mask, encode_mask
from sam3.sam.prompts import PromptError
from sam3.video.frame_source import FrameSource, VideoDecodeError
from sam3.video.prompts import ObjectPrompt, clip_box
from sam3.video.spool import open_spool
from sam3.video.writer import FrameWriter, TrackedFrame

if TYPE_CHECKING:
    from sam3.model.sam3_tracking_predictor import Sam3TrackerPredictor
    from sam3.model.sam3_video_inference import Sam3VideoInference

DIRECTIONS = ("both", "forward", "backward")
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
"""Frames per second also where it is less than one."""


class Tracked(NamedTuple):
    """The objects on one frame, without its pixels."""

    frame_idx: int
    obj_ids: list[int]
    scores: list[float]
    masks: np.ndarray
    """Bool, (n, H, W)."""


class RecentFrames(FrameSource):
    """A source around another that remembers the last frames read, for whoever draws on them later.

    Attributes:
        is_stopped: New frames are refused with `KeyboardInterrupt`; those to draw on are not.
    """

    def __init__(self, source: FrameSource, num_frames: int) -> None:
        super().__init__(
            source.name,
            source.size_hw,
            source.num_frames,
            frames_per_second=source.frames_per_second,
            is_sequential=source.is_sequential,
        )
        self._source = source
        self._num_frames = num_frames
        self._recent: OrderedDict[int, np.ndarray] = OrderedDict()
        self.is_stopped = False

    def has_frame(self, index: int) -> bool:
        """See `FrameSource`."""
        is_there = self._source.has_frame(index)
        self.num_frames = self._source.num_frames
        return is_there

    def keep_frames(self, num_frames: int | None) -> None:
        """See `FrameSource`."""
        self._source.keep_frames(num_frames)

    def time_s(self, index: int) -> float | None:
        """See `FrameSource`."""
        return self._source.time_s(index)

    def _read(self, index: int) -> np.ndarray:
        if self.is_stopped and index not in self._recent:
            raise KeyboardInterrupt
        return self.to_draw_on(index)

    def to_draw_on(self, index: int) -> np.ndarray:
        """A frame that was tracked, uint8 RGB (H, W, 3)."""
        if index not in self._recent:
            self._recent[index] = self._source.frame(index)
        self._recent.move_to_end(index)
        while len(self._recent) > self._num_frames:
            self._recent.popitem(last=False)
        return self._recent[index]

    def close(self) -> None:
        """See `FrameSource`."""
        super().close()
        self._recent.clear()
        self._source.close()


def passes(start: int, num_frames: int, direction: str, max_frames: int | None) -> list[range]:
    """Frames of each pass from the first prompted one, backward before forward.

    Args:
        start: The first prompted frame.
        num_frames: Of the video.
        direction: One of `DIRECTIONS`.
        max_frames: The most frames beyond the start, each way.
    """
    reach = num_frames if max_frames is None else max_frames
    backward = range(start, max(start - reach, 0) - 1, -1)
    forward = range(start, min(start + reach, num_frames - 1) + 1)
    if direction == "both":
        return [backward, forward] if len(backward) > 1 else [forward]
    return [forward if direction == "forward" else backward]


class PromptedTracker:
    """Follows the objects of prompts, in the order of frames.

    Backward tracking is a session of its own and comes first; its masks wait in a file as run lengths. So the frames
    come in order, and neither pass needs more memory than the policy allows.
    """

    def __init__(
        self,
        predictor: Sam3TrackerPredictor,
        frames: RecentFrames,
        prompts: Sequence[ObjectPrompt],
        direction: str = "both",
        max_frames: int | None = None,
        spool_folder: Path | None = None,
    ) -> None:
        """Plan the passes; nothing is computed yet.

        Args:
            predictor: With any memory policy: no prompt is given after tracking has begun.
            frames: The video, of known length.
            prompts: All prompts on all objects.
            direction: From the first prompted frame "forward", "backward", or "both" ways.
            max_frames: The most frames beyond the first prompted one, each way.
            spool_folder: Where masks of the backward pass wait, in a file without a name; None: where the system keeps
                temporary files.
        """
        assert frames.num_frames is not None
        self.predictor, self.frames, self.prompts = predictor, frames, prompts
        self.spool_folder = spool_folder
        self.start = min(prompt.frame_idx for prompt in prompts)
        self.passes = passes(self.start, frames.num_frames, direction, max_frames)
        self.num_steps = sum(map(len, self.passes))
        """How often ``on_step`` will be called."""

    def __call__(self, on_step: Callable[[], Any]) -> Iterator[Tracked]:
        """The tracked frames; ``on_step`` is called after each frame of the model's work.

        Raises:
            PromptError: If a prompt cannot be used.
            VideoDecodeError: If a frame cannot be decoded, after handing out all that can be tracked without it: damage
                behind the start ends the backward pass alone.
        """
        fault: VideoDecodeError | None = None
        for number, span in enumerate(self.passes):
            run = self._run if span.step > 0 else partial(self._run_backward, is_last=number == len(self.passes) - 1)
            try:
                yield from run(span, on_step)
            except VideoDecodeError as error:  # behind the prompt: the way forward may be whole
                if fault is None or str(fault) == str(error):
                    fault = error
                else:
                    fault = VideoDecodeError(f"{fault}; {error}", fault.frame_idx)
        if fault is not None:
            raise fault

    def _run_backward(self, span: range, on_step: Callable[[], Any], is_last: bool) -> Iterator[Tracked]:
        """A pass whose frames are handed out last first, also if it was stopped; then what stopped it is raised."""
        stop: VideoDecodeError | KeyboardInterrupt | None = None
        with open_spool(self.spool_folder) as spool:
            try:
                for tracked in self._run(span, on_step):
                    spool.append(_pack(tracked))
            except (VideoDecodeError, KeyboardInterrupt) as error:
                stop = error
            # The start, which came first, is what the next pass begins with; after Ctrl-C there is none.
            leave = 0 if is_last or isinstance(stop, KeyboardInterrupt) else 1
            for record in spool.last_first(leave):
                yield _unpack(record, self.frames.size_hw)
        if stop is not None:
            raise stop

    def _run(self, span: range, on_step: Callable[[], Any]) -> Iterator[Tracked]:
        state = self.predictor.init_state(video_path=self.frames)
        for prompt in self.prompts:
            self._add(state, clip_box(prompt, self.frames.size_hw))
        results = self.predictor.propagate_in_video(state, span.start, len(span) - 1, reverse=span.step < 0)
        for frame_idx, obj_ids, _, logits, scores in results:
            on_step()
            yield Tracked(
                frame_idx, list(obj_ids), scores[:, 0].float().sigmoid().tolist(), (logits[:, 0] > 0).cpu().numpy()
            )

    def _add(self, state: Any, prompt: ObjectPrompt) -> None:
        height, width = self.frames.size_hw
        try:
            if prompt.mask is not None:
                self.predictor.add_new_mask(state, prompt.frame_idx, prompt.obj_id, prompt.mask, need_output=False)
                return
            self.predictor.add_new_points_or_box(
                state,
                prompt.frame_idx,
                prompt.obj_id,
                points=[(x / width, y / height) for x, y in prompt.points_xy_px] or None,
                labels=list(prompt.labels) or None,
                box=prompt.box_xyxy_px
                and [v / s for v, s in zip(prompt.box_xyxy_px, (width, height) * 2, strict=True)],
                need_output=False,
            )
        except PromptError as error:
            raise PromptError(f"{prompt.where}: {error}") from error


class TextTracker:
    """Finds and follows everything that a text describes, from the first frame on."""

    def __init__(
        self, video_model: Sam3VideoInference, frames: RecentFrames, text: str, max_frames: int | None = None
    ) -> None:
        """Plan the run; nothing is computed yet.

        Args:
            video_model: Results come late by its probation for new objects; ``frames`` should remember that many.
            frames: The video, of known length.
            text: What to find.
            max_frames: The most frames beyond the first one.
        """
        assert frames.num_frames is not None
        self.video_model, self.frames, self.text = video_model, frames, text
        self.max_frames = max_frames
        self.num_steps = frames.num_frames if max_frames is None else min(max_frames + 1, frames.num_frames)

    def __call__(self, on_step: Callable[[], Any]) -> Iterator[Tracked]:
        """See `PromptedTracker`."""
        state = self.video_model.init_state(self.frames, edit_window=0)
        self.video_model.add_prompt(state, 0, text_str=self.text)
        for frame_idx, outputs in self.video_model.propagate_in_video(state, 0, self.max_frames):
            on_step()
            yield Tracked(
                frame_idx, outputs["out_obj_ids"].tolist(), outputs["out_probs"].tolist(), outputs["out_binary_masks"]
            )


@dataclass
class TrackRun:
    """How a run over a video went."""

    num_frames: int = 0
    """Frames that were written."""
    first_frame: int = 0
    last_frame: int = -1
    """They are the frames from the first one to the last one."""
    seconds: float = 0.0
    failure: str | None = None
    """Why not all frames were tracked."""
    is_interrupted: bool = False


def track_video(
    tracker: PromptedTracker | TextTracker, frames: RecentFrames, writer: FrameWriter, *, show_progress: bool = True
) -> TrackRun:
    """Track a whole video, as far as its frames can be decoded; what was done is written, however the run ends.

    At Ctrl-C the frame at hand is finished, and all that was tracked is written. A second one ends it at once.

    Args:
        tracker: What to follow.
        frames: Where the pixels to draw on come from: the source that the tracker reads.
        writer: Gets each frame, and is closed.
        show_progress: Draw a bar with the frames per second.
    """
    run, begin = TrackRun(), time.perf_counter()
    stopped_by: str | None = "error"
    with _stopping(frames):
        try:
            with tqdm(total=tracker.num_steps, unit=" frames", bar_format=_BAR, disable=not show_progress) as bar:
                for tracked in tracker(bar.update):
                    pixels, time_s = frames.to_draw_on(tracked.frame_idx), frames.time_s(tracked.frame_idx)
                    writer.add(TrackedFrame(tracked.frame_idx, time_s, pixels, *tracked[1:]))
                    run.first_frame = run.first_frame if run.num_frames else tracked.frame_idx
                    run.last_frame = tracked.frame_idx
                    run.num_frames += 1
            stopped_by = None
        except VideoDecodeError as error:
            run.failure = stopped_by = str(error)
        except KeyboardInterrupt:
            run.is_interrupted, stopped_by = True, "interrupted"
        finally:
            writer.close(stopped_by)
    run.seconds = time.perf_counter() - begin
    return run


@contextmanager
def _stopping(frames: RecentFrames) -> Iterator[None]:
    """Let the first Ctrl-C stop the frames, so that it strikes where the tracker expects it and nowhere else."""

    def stop(*_: Any) -> None:
        frames.is_stopped = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _pack(tracked: Tracked) -> list[Any]:
    return [*tracked[:3], [encode_mask(mask)["counts"] for mask in tracked.masks]]


def _unpack(record: list[Any], size_hw: tuple[int, int]) -> Tracked:
    frame_idx, obj_ids, scores, counts = record
    masks = [decode_mask({"size": list(size_hw), "counts": text}) for text in counts]
    return Tracked(frame_idx, obj_ids, scores, np.array(masks, dtype=bool).reshape(-1, *size_hw))
