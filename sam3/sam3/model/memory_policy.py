"""How much of a tracking session is kept, and which edits it can serve.

Tracking reads a bounded number of records (`sam3.model.memory_pruning`), but who may still edit or re-track old frames
needs more. A policy is the promise in between::

    Sam3TrackerPredictor(model, memory_policy=RecentEdits(30))      # or memory_policy="recent_edits:30"

=====================  ===============================================  ================================================
policy                 edits and new starts                             memory per object, ``sam3`` preset
=====================  ===============================================  ================================================
``KeepEverything``     anywhere                                         1 MB per frame
``NoLateEdits``        on frames that were not tracked yet              7 + 4 memories: 7.3 MB
``RecentEdits(K)``     also on the last K frames                        the same, and 1 MB for each of the K frames
``SnapshotReplay(M)``  anywhere; old frames are tracked again first     the same, and at most 16 snapshots of 4.7 MB
=====================  ===============================================  ================================================

``SnapshotReplay`` asks for one thing: once tracking was taken up again on an old frame, it must go on from there, and
not skip to frames farther ahead; for what an earlier pass left before those is gone. Pictures that come only once, as a
camera's do, are kept of all frames that can be edited: for it and for ``KeepEverything`` all, compressed without loss.

Under every policy the results are those of a session that keeps everything, to the last bit on a device whose kernels
are deterministic; what cannot be served so is refused with `EditRefusedError`. Prompted frames never cost memory per
tracked frame: the nearest ones are kept (``SnapshotReplay`` keeps them all).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sam3.model.memory_pruning import Front, prune
from sam3.sam.prompts import PromptError

if TYPE_CHECKING:
    from sam3.model.tracker_state import ObjectGroup, TrackerState


class EditRefusedError(PromptError):
    """An edit, or a start of tracking, that the session's memory policy cannot serve exactly."""


@dataclass(frozen=True)
class KeepEverything:
    """Nothing is dropped, and everything can be edited; memory grows with the video."""

    @property
    def num_frames_read(self) -> int | None:
        """How many of the last tracked frames' pictures edits may read again; None: all. Sources that can be read only
        once keep so many."""
        return None

    def require_startable(self, state: TrackerState, frame_idx: int, reverse: bool) -> None:
        """A frame is about to be tracked, with prompts that wait taken in before: refuse if what it reads is gone for
        good. Nothing is changed."""

    def before_frame(self, state: TrackerState, frame_idx: int, reverse: bool) -> None:
        """A frame is about to be tracked, and is startable: bring back what it reads."""

    def after_frame(self, state: TrackerState, frame_idx: int, reverse: bool) -> None:
        """A frame was tracked: drop what is no longer kept."""

    def require_editable(self, state: TrackerState, frame_idx: int) -> None:
        """A prompt on this frame is about to change: make that possible, or refuse."""

    def require_removable(self, state: TrackerState, obj_id: int, frames: Iterable[int]) -> None:
        """An object is about to be removed, and the masks of others on ``frames`` are asked for: refuse what the others
        would not survive exactly."""

    def _require_masks(self, state: TrackerState, obj_id: int, frames: Iterable[int]) -> None:
        """Refuse masks of frames on which a removed object had a prompt, if they cannot be put together any more."""
        for frame_idx in frames:
            try:
                self.require_editable(state, frame_idx)
            except EditRefusedError as error:
                raise EditRefusedError(
                    f"object {obj_id} has a prompt on frame {frame_idx}, of which the others' masks are asked for: "
                    f"{error}; or remove it with need_output=False"
                ) from error


@dataclass
class Horizon:
    """What is left of a group of objects. Places are frame indices times the direction of the first pass."""

    reverse: bool
    """The first pass went towards smaller indices."""
    newest: int
    """The place that tracking has come to in this direction."""
    oldest: int
    """The place that it has come to in the other."""
    floor: int
    """The first place of the window: this and all later ones are whole, and tracking can start on them."""
    has_dropped_prompted: bool = False
    """Conditioning records are gone."""

    def place(self, frame_idx: int) -> int:
        """How far a frame lies in the direction of the first pass."""
        return -frame_idx if self.reverse else frame_idx

    def front(self, place: int, onward: bool = True) -> Front:
        """A front at a place, in the first pass's direction or against it."""
        return Front(self.place(place), self.reverse == onward)


@dataclass(frozen=True)
class RecentEdits(KeepEverything):
    """Edits and starts on the last ``num_frames`` tracked frames, and on any frame ahead."""

    num_frames: int
    """K: frames up to the newest that can be edited."""
    both_directions: bool = False
    """Tracking may also go the other way from where it began, as if it were the first pass."""

    def __post_init__(self) -> None:
        if self.num_frames < 0:
            raise ValueError(f"a memory policy cannot keep {self.num_frames} frames: give 0 or more")

    @property
    def num_frames_read(self) -> int | None:
        """See `KeepEverything`; the way back from where tracking began reads all that lies before."""
        return None if self.both_directions else max(self.num_frames, 1)

    def require_startable(self, state: TrackerState, frame_idx: int, reverse: bool) -> None:
        """See `KeepEverything`."""
        for group in state.groups:
            stored = group.bank.cond.get(frame_idx)
            if frame_idx in group.pending or (stored is not None and stored.pred_masks is not None):
                continue
            if stored is not None or not self._can_start(group, frame_idx, reverse):
                raise EditRefusedError(f"tracking cannot start on frame {frame_idx} again: {self._limits(group)}")

    def after_frame(self, state: TrackerState, frame_idx: int, reverse: bool) -> None:
        """See `KeepEverything`."""
        for group in state.groups:
            if not group.bank.cond:
                continue
            horizon = group.horizon
            if horizon is None:
                place = -frame_idx if reverse else frame_idx
                horizon = group.horizon = Horizon(reverse, place, place, place)
            place = horizon.place(frame_idx)
            horizon.newest, horizon.oldest = max(horizon.newest, place), min(horizon.oldest, place)
            horizon.floor = max(horizon.floor, horizon.newest - self.num_frames + 1)
            self._shrink(state, group, horizon)

    def require_editable(self, state: TrackerState, frame_idx: int) -> None:
        """See `KeepEverything`."""
        for group in state.groups:
            horizon = group.horizon
            if not self._can_start(group, frame_idx, reverse=horizon is not None and not horizon.reverse):
                raise EditRefusedError(f"frame {frame_idx} can no longer be edited: {self._limits(group)}")

    def require_removable(self, state: TrackerState, obj_id: int, frames: Iterable[int]) -> None:
        """See `KeepEverything`.

        The others of a batch lose the conditioning frames that only this object had prompts on, and with shared scores
        of memory selection other frames may turn out to be good: both can bring back what was dropped.
        """
        group = state.group_of(obj_id)
        horizon, settings = group.horizon, state.engine.tracker.settings
        others = [other for other in group.obj_ids if other != obj_id]
        if horizon is not None and others:
            sole = group.prompted_frames(obj_id).difference(*map(group.prompted_frames, others))
            frees_old = horizon.has_dropped_prompted and any(horizon.place(t) < horizon.floor for t in sole)
            if frees_old or (settings.use_memory_selection and settings.shared_iou_score):
                raise EditRefusedError(
                    f"object {obj_id} cannot be removed exactly: it is tracked in one batch with {others}, and records "
                    "that they would read then were dropped; track objects as independent ones, or keep everything"
                )
        self._require_masks(state, obj_id, frames)

    def _can_start(self, group: ObjectGroup, frame_idx: int, reverse: bool) -> bool:
        horizon = group.horizon
        if horizon is None or horizon.place(frame_idx) >= horizon.floor:
            return True
        is_other_way = self.both_directions and reverse != horizon.reverse
        return is_other_way and horizon.place(frame_idx) < horizon.oldest

    def _limits(self, group: ObjectGroup) -> str:
        horizon = group.horizon
        if horizon is None:
            return "its masks were dropped"
        word = "up to" if horizon.reverse else "from"
        return (
            f"the memory policy {self!r} serves frames {word} {horizon.place(horizon.floor)} on; a larger window "
            "(RecentEdits) or SnapshotReplay serves older ones"
        )

    def _shrink(self, state: TrackerState, group: ObjectGroup, horizon: Horizon) -> None:
        fronts = [horizon.front(horizon.newest + 1), horizon.front(horizon.floor)]
        beginning = None
        if self.both_directions:
            fronts.append(horizon.front(horizon.oldest - 1, onward=False))
            beginning = horizon.oldest

        def is_whole(frame_idx: int) -> bool:
            place = horizon.place(frame_idx)
            return place >= horizon.floor or (place == beginning and frame_idx in group.bank.cond)

        bank = prune(group.bank, fronts, state.engine.tracker.settings, state.assumed_num_frames, is_whole)
        if len(bank.cond) < len(group.bank.cond):
            horizon.has_dropped_prompted = True
            group.forget_prompts_except(bank.cond)
        group.bank = bank
        group.unread &= bank.non_cond.keys()


@dataclass(frozen=True)
class NoLateEdits(RecentEdits):
    """Prompts on frames that were not tracked yet, and tracking onward: the least that exact tracking needs."""

    num_frames: int = 0


def parse(text: str) -> KeepEverything:
    """A policy by its name: ``keep_everything``, ``no_late_edits``, ``recent_edits:K`` or ``snapshot_replay:M``.

    Raises:
        ValueError: If there is no such policy, or its number is missing or wrong.
    """
    from sam3.model.memory_snapshots import SnapshotReplay

    name, _, number = text.partition(":")
    if name in ("keep_everything", "no_late_edits") and not number:
        return KeepEverything() if name == "keep_everything" else NoLateEdits()
    if name in ("recent_edits", "snapshot_replay") and number.isdecimal():
        return RecentEdits(int(number)) if name == "recent_edits" else SnapshotReplay(int(number))
    raise ValueError(
        f"unknown memory policy {text!r}: choose keep_everything, no_late_edits, recent_edits:K (edits on the last K "
        "frames) or snapshot_replay:M (a snapshot every M frames)"
    )
