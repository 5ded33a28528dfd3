"""Tracking a source that never ends: frames are pushed one at a time, results come back per frame.

Example::

    tracker = StreamingTracker(predictor)
    tracker.add_points(obj_id=1, points=[[0.4, 0.6]], labels=[1])      # on the first frame, before or after its push
    for frame in camera:
        result = tracker.push(frame)
        show(result.masks > 0)                                         # (number of objects, 1, height, width)

The state holds only what future output can depend on: the records that the memory policy keeps, and the frames that
edits may still ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any

import numpy as np
from torch import Tensor

from sam3.image_input import ImageInputError, to_rgb_uint8
from sam3.model.memory_policy import EditRefusedError, KeepEverything, RecentEdits, parse
from sam3.model.sam3_tracking_predictor import Sam3TrackerPredictor
from sam3.model.tracker_prompts import parse_mask, parse_points, require_object_id
from sam3.model.tracker_state import TrackerState
from sam3.sam.prompts import PromptError, to_array
from sam3.video.frame_source import FrameGoneError, FrameSource, VideoInputError
from sam3.video.kept_frames import KeptFrames


@dataclass(frozen=True, eq=False)
class StreamResult:
    """All objects on one frame."""

    frame_idx: int
    obj_ids: list[int]
    low_res_masks: Tensor
    """float32 logits, (B, 1, 4 G, 4 G); they cover the model's square input."""
    object_score_logits: Tensor
    """float32, (B, 1): above 0 where the object is in the frame."""
    resize: Callable[[Tensor], Tensor]
    """Makes ``masks`` of ``low_res_masks``."""

    @cached_property
    def masks(self) -> Tensor:
        """Logits at the size of the frames, float32 (B, 1, H, W); above 0: the object."""
        return self.resize(self.low_res_masks)


class PushedFrames(FrameSource):
    """The last few frames of a stream, or all of them."""

    def __init__(self, num_kept: int | None) -> None:
        """
        Args:
            num_kept: How many frames can be asked for again; None: all, compressed without loss.
        """
        super().__init__("the stream", (0, 0), None, is_sequential=True)
        self._kept = KeptFrames(num_kept)

    @property
    def num_pushed(self) -> int:
        """How many frames came so far."""
        return self._kept.num_seen

    def push(self, frame: Any) -> int:
        """Take a frame; returns its index.

        Raises:
            VideoInputError: If it is no picture, has another size than the others, or the stream has ended.
        """
        if self.num_frames is not None or self._is_closed:
            raise VideoInputError(f"the stream ended after {self.num_pushed} frames: start another one")
        try:
            pixels = to_rgb_uint8(frame).permute(1, 2, 0).cpu().numpy()
        except ImageInputError as error:
            raise VideoInputError(f"frame {self.num_pushed} of the stream: {error}") from error
        if self.num_pushed and pixels.shape[:2] != self.size_hw:
            raise VideoInputError(
                f"frame {self.num_pushed} of the stream has {pixels.shape[1]} x {pixels.shape[0]} pixels, the first "
                f"frame {self.size_hw[1]} x {self.size_hw[0]}: all frames must have one size"
            )
        self.size_hw = (pixels.shape[0], pixels.shape[1])
        self._kept.append(np.array(pixels))
        return self.num_pushed - 1

    def end(self) -> None:
        """No frame follows."""
        self.num_frames = self.num_pushed

    def close(self) -> None:
        """See `FrameSource`."""
        super().close()
        self._kept.clear()

    def has_frame(self, index: int) -> bool:
        """See `FrameSource`."""
        return 0 <= index < self.num_pushed

    def is_at_hand(self, index: int) -> bool:
        """See `FrameSource`; asking for a frame reads nothing."""
        return True

    def _read(self, index: int) -> np.ndarray:
        if index < self._kept.oldest:
            raise FrameGoneError(f"frame {index} of the stream is gone: frames {self._kept.oldest} and later are kept")
        return self._kept[index]


class StreamingTracker:
    """One stream. The predictor and its model can serve any number of them.

    Objects whose first prompts are given before their frame is pushed are tracked as one batch: faster, and no two of
    them own a pixel of the memory. A prompt on a frame that was pushed is tracked at once, so its object is a batch of
    its own.

    Attributes:
        state: The session; see `TrackerState`.
        last_frame_idx: Index of the frame that was pushed last; -1 before the first one.
    """

    def __init__(self, predictor: Sam3TrackerPredictor, *, memory_policy: KeepEverything | str | None = None) -> None:
        """
        Args:
            predictor: With its settings for objects and memory.
            memory_policy: What is kept, a policy or its name; default: ``RecentEdits(1)``, so that the newest frame
                can be corrected. Frames are kept as far back as it can serve edits: under ``SnapshotReplay`` and
                ``KeepEverything`` all of them, compressed without loss, so that memory grows with the stream.

        Raises:
            ValueError: If there is no such policy.
        """
        policy = parse(memory_policy) if isinstance(memory_policy, str) else memory_policy or RecentEdits(1)
        self.predictor = predictor
        self._policy = policy
        self._frames = PushedFrames(policy.num_frames_read)
        self._state: TrackerState | None = None
        self._ahead: dict[int, list[tuple[int, Callable[[], Any]]]] = {}
        self._edited: int | None = None

    @property
    def state(self) -> TrackerState:
        """The session.

        Raises:
            PromptError: Before the first frame.
        """
        if self._state is None:
            raise PromptError("nothing was pushed yet: the first frame opens the session")
        return self._state

    @property
    def last_frame_idx(self) -> int:
        """Index of the frame that was pushed last; -1 before the first one."""
        return self._frames.num_pushed - 1

    # --- prompts ------------------------------------------------------------------------------------------------------

    def add_points(
        self,
        obj_id: int,
        points: Any = None,
        labels: Any = None,
        *,
        box: Any = None,
        frame_idx: int | None = None,
        clear_old_points: bool = True,
    ) -> StreamResult | None:
        """Click on an object, or box it.

        Args:
            obj_id: A number of your choice; a new one adds an object.
            points: x, y of P clicks as fractions of the frame's width and height, (P, 2).
            labels: 1 for a click on the object, 0 for one off it, (P,).
            box: x0, y0, x1, y1 as such fractions.
            frame_idx: Default: the frame pushed last (before the first push: frame 0). A frame ahead: the prompt waits
                for it. An older one: `retrack` brings the later frames up to date.
            clear_old_points: Replace this object's points on this frame.

        Returns:
            The frame with the prompt taken in; None while the prompt waits for its frame.

        Raises:
            PromptError: If an argument cannot be used; the state is as it was.
            EditRefusedError: If the memory policy does not serve edits on this frame any more, or, under
                ``SnapshotReplay``, not before a `retrack` that was broken off has come to it.
        """
        frame_idx = self._resolve(frame_idx)
        require_object_id(obj_id)
        if box is not None and not clear_old_points:
            raise PromptError("a box replaces the points of its object on this frame: set clear_old_points=True")
        parse_points(points, labels, box, True, self.predictor.model.preprocess, self._size_hw())
        # Copies: the caller may write into the arrays while the prompt waits.
        points, labels, box = (None if x is None else to_array(x, "prompt").copy() for x in (points, labels, box))
        return self._prompt(
            frame_idx,
            obj_id,
            lambda: self.predictor.add_new_points_or_box(
                self.state, frame_idx, obj_id, points, labels, clear_old_points, box=box, need_output=False
            ),
        )

    def add_mask(self, obj_id: int, mask: Any, *, frame_idx: int | None = None) -> StreamResult | None:
        """Say where an object is.

        Args:
            obj_id: As for `add_points`.
            mask: bool, or numbers from 0 to 1, (h, w) of any size.
            frame_idx: As for `add_points`.

        Returns:
            As `add_points`.

        Raises:
            PromptError: As `add_points`, and so for EditRefusedError.
        """
        frame_idx = self._resolve(frame_idx)
        require_object_id(obj_id)
        mask = parse_mask(mask)[0, 0]
        return self._prompt(
            frame_idx,
            obj_id,
            lambda: self.predictor.add_new_mask(self.state, frame_idx, obj_id, mask, need_output=False),
        )

    def clear_prompts(self, obj_id: int, frame_idx: int | None = None) -> None:
        """Take back all prompts of an object on a frame, also those that wait for it; default: the frame pushed last.

        Raises:
            PromptError: If there is no such object or frame, or the policy does not serve it any more.
        """
        frame_idx = self._resolve(frame_idx)
        if self._forget_waiting(obj_id, [frame_idx]):
            return
        self.predictor.clear_all_points_in_frame(self.state, frame_idx, obj_id, need_output=False)
        self._note_edit(frame_idx)

    def remove_object(self, obj_id: int) -> None:
        """Forget an object, also its prompts that wait; the others keep their results.

        Raises:
            PromptError: If there is no such object, or it cannot be removed exactly; nothing is forgotten.
        """
        is_known = self._state is not None and obj_id in self._state.obj_ids
        is_waiting = any(obj_id == other for waiting in self._ahead.values() for other, _ in waiting)
        if is_known or not is_waiting:  # refused, if at all, before anything is forgotten
            self.predictor.remove_object(self.state, obj_id, strict=True, need_output=False)
        self._forget_waiting(obj_id, list(self._ahead))

    def _resolve(self, frame_idx: int | None) -> int:
        if frame_idx is None:
            return max(self.last_frame_idx, 0)
        if isinstance(frame_idx, bool) or not isinstance(frame_idx, Integral) or frame_idx < 0:
            raise PromptError(f"frame_idx must be an index of a frame, 0 or more, got {frame_idx!r}")
        if self._frames.num_frames is not None and frame_idx >= self._frames.num_frames:
            raise PromptError(f"frame_idx {frame_idx}: the stream ended after {self._frames.num_frames} frames")
        return int(frame_idx)

    def _size_hw(self) -> tuple[int, int]:
        """Of the frames; before the first one any size, relative coordinates are checked the same way."""
        side = self.predictor.model.config.image_size_px
        return self._frames.size_hw if self._frames.num_pushed else (side, side)

    def _prompt(self, frame_idx: int, obj_id: int, add: Callable[[], Any]) -> StreamResult | None:
        if frame_idx > self.last_frame_idx:
            self._ahead.setdefault(frame_idx, []).append((obj_id, add))
            return None
        self._require_startable(frame_idx)
        add()
        self._note_edit(frame_idx)
        result = self._track(frame_idx)
        if self._edited == self.last_frame_idx:
            self._edited = None  # this frame was all there was to track again
        return result

    def _require_startable(self, frame_idx: int) -> None:
        """Refuse what has to wait until a `retrack` that was broken off has come to it; nothing is changed."""
        if self._edited is None or self.state.policy is None:
            return
        try:
            self.state.policy.require_startable(self.state, frame_idx, reverse=False)
        except EditRefusedError as error:
            raise EditRefusedError(f"{error}; retrack() does that for all frames up to the newest") from error

    def _forget_waiting(self, obj_id: int, frames: Iterable[int]) -> bool:
        """Drop prompts of an object that wait for some frames; whether there were any."""
        found = False
        for frame_idx in frames:
            waiting = self._ahead.get(frame_idx, [])
            kept = [(other, add) for other, add in waiting if other != obj_id]
            found |= len(kept) < len(waiting)
            if kept:
                self._ahead[frame_idx] = kept
            else:
                self._ahead.pop(frame_idx, None)
        return found

    def _note_edit(self, frame_idx: int) -> None:
        self._edited = frame_idx if self._edited is None else min(self._edited, frame_idx)

    # --- frames -------------------------------------------------------------------------------------------------------

    def push(self, frame: Any) -> StreamResult:
        """Track all objects into the next frame; prompts that wait for it are taken in before.

        Args:
            frame: RGB picture: numpy (H, W, 3), PIL, or a tensor (3, H, W); all frames of one size.

        Raises:
            VideoInputError: If it cannot be used; the stream goes on as if it had not been pushed.
            EditRefusedError: Under ``SnapshotReplay``, if `retrack` was broken off on its way to the newest frame; the
                stream goes on in the same way.
            PromptError: If a prompt that waited cannot be used on it; the others were, and the frame was taken:
                `retrack` tracks it.
        """
        self._require_startable(self.last_frame_idx + 1)
        frame_idx = self._frames.push(frame)
        if self._state is None:
            self._state = self.predictor.init_state(video_path=self._frames, memory_policy=self._policy)
        failure: PromptError | None = None
        for _, add in self._ahead.pop(frame_idx, ()):
            try:
                add()
            except PromptError as error:
                failure = failure or error
        if failure is not None:
            self._note_edit(frame_idx)
            raise failure
        return self._track(frame_idx)

    def retrack(self) -> Iterator[StreamResult]:
        """Track again from the oldest frame that was edited to the newest; nothing if none was.

        Raises:
            EditRefusedError: If the frames have left the policy's window since the edit; the results of later frames
                stay those without it.
        """
        while self._edited is not None:
            frame_idx = self._edited
            try:
                result = self._track(frame_idx)
            except EditRefusedError:
                self._edited = None
                raise
            self._edited = frame_idx + 1 if frame_idx < self.last_frame_idx else None
            yield result

    def run(self, frames: Iterable[Any]) -> Iterator[StreamResult]:
        """Push every frame of a source as it comes, then `finish`. Prompts may be given between the results.

        To edit after the last frame, push in a loop of your own: with `finish` the frames are gone.
        """
        for frame in frames:
            yield self.push(frame)
            # Before the source gives a frame that could not be tracked.
            self._require_startable(self.last_frame_idx + 1)
        self.finish()

    def finish(self) -> None:
        """No frame follows: let frames, features and prompts that still wait go. Records stay in ``state``."""
        self._frames.end()
        self._frames.close()
        self._ahead.clear()
        if self._state is not None:
            self._state.features.clear()

    def _track(self, frame_idx: int) -> StreamResult:
        state = self.state

        def resize(low_res_masks: Tensor) -> Tensor:
            return self.predictor.masks_at_video_size(state, low_res_masks)

        if not state.is_trackable:
            side = self.predictor.model.config.low_res_mask_size
            weight = self.predictor.tracker.no_mem_embed
            return StreamResult(frame_idx, [], weight.new_zeros(0, 1, side, side), weight.new_zeros(0, 1), resize)
        tracked = self.predictor.track_frame(state, frame_idx)
        return StreamResult(frame_idx, tracked.obj_ids, tracked.low_res_masks, tracked.object_score_logits, resize)
