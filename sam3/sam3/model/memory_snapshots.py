"""Edits anywhere at bounded memory: snapshots of the few records that tracking needs, and tracking again from them.

Between two snapshots, the records of old frames are gone. When one is wanted, because the user clicks on its frame or
tracks on from there, the frames since the last snapshot before it are tracked again. That gives the very records that
were lost only with the prompts that were in force when they were made; so each change of the prompts is noted with the
place from which it counted, and what was overwritten by a later pass is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sam3.model.frame_spans import FrameSpans
from sam3.model.memory_bank import FrameRecord, MemoryBank
from sam3.model.memory_policy import EditRefusedError, KeepEverything
from sam3.model.memory_pruning import Front, prune

if TYPE_CHECKING:
    from sam3.model.tracker_state import ObjectGroup, TrackerState

Records = dict[int, FrameRecord]


@dataclass
class PromptChange:
    """What counted as prompted from some place on."""

    place: int
    """The first frame that was tracked so."""
    cond: Records
    """All conditioning frames."""
    taken_back: Records
    """Frames that once were, and count as tracked since."""


@dataclass
class History:
    """How a group's records came about. Places are frame indices times the direction of tracking."""

    reverse: bool
    interval: int
    """Frames between snapshots."""
    head: int
    """The last place of the latest pass; later records are those of an earlier pass."""
    newest: int
    """The last place of any pass."""
    snapshots: dict[int, Records] = field(default_factory=dict)
    """Records of tracked frames that going on from behind a place needs, by place, in rising order."""
    changes: list[PromptChange] = field(default_factory=list)
    """In the order of their places."""
    computed: FrameSpans = field(default_factory=FrameSpans)
    """Frames up to the head that were tracked; others were prompted then, or left out."""
    cond: Records = field(default_factory=dict)
    """Conditioning frames when last seen."""
    taken_back: Records = field(default_factory=dict)
    """Records of frames that were conditioning frames, and were not tracked since."""

    def place(self, frame_idx: int) -> int:
        """How far a frame lies in the direction of tracking; and back."""
        return -frame_idx if self.reverse else frame_idx

    def front(self, place: int) -> Front:
        """Where tracking goes on with this place."""
        return Front(self.place(place), self.reverse)

    def observe(self, bank: MemoryBank) -> None:
        """See which conditioning frames were added and taken back."""
        gone = {t: bank.non_cond[t] for t in self.cond if t not in bank.cond and t in bank.non_cond}
        self.taken_back = {t: r for t, r in (self.taken_back | gone).items() if t not in bank.cond}
        self.cond = dict(bank.cond)

    def advance(self, place: int, is_computed: bool) -> None:
        """A place was passed; if an earlier pass came farther, forget how it did."""
        self.snapshots = {p: records for p, records in self.snapshots.items() if p < place} or {place - 1: {}}
        self.changes = [change for change in self.changes if change.place < place]
        for old in range(place, self.head + 1):
            self.computed.discard(self.place(old))
        if is_computed:
            self.computed.add(self.place(place), self.reverse)
            self.taken_back = {t: r for t, r in self.taken_back.items() if t != self.place(place)}
        self.head, self.newest = place, max(self.newest, place)

    def note_prompts(self, place: int) -> None:
        """Note what counts as prompted if it is not what was in force."""
        last = self.changes[-1] if self.changes else PromptChange(place, {}, {})
        # Records are compared by identity; the order of conditioning frames matters.
        if list(last.cond.items()) != list(self.cond.items()) or last.taken_back != self.taken_back:
            self.changes.append(PromptChange(place, self.cond, self.taken_back))

    def keep_snapshot(self, records: Records, max_snapshots: int) -> None:
        """Take a snapshot at the head if it is time; if there are too many, drop every other one."""
        if self.head - max(self.snapshots) < self.interval:
            return
        self.snapshots[self.head] = dict(records)
        if len(self.snapshots) > max_snapshots:
            self.snapshots = {p: self.snapshots[p] for p in list(self.snapshots)[::2]}
            self.interval *= 2


@dataclass(frozen=True)
class SnapshotReplay(KeepEverything):
    """Edits and starts on any frame, in the direction of the first pass, for a video whose frames can be read again."""

    every: int = 64
    """Frames between snapshots: an edit of an old frame tracks at most so many frames again, for each group of objects
    that are tracked together."""
    max_snapshots: int = 16
    """When there are more, every other one is dropped and the distance doubles."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.max_snapshots < 2:
            raise ValueError(
                f"snapshots every {self.every} frames and at most {self.max_snapshots} of them: give at least 1 and 2"
            )

    def require_startable(self, state: TrackerState, frame_idx: int, reverse: bool) -> None:
        """See `KeepEverything`."""
        for group in state.groups:
            history = group.horizon
            if history is None:
                continue
            if history.place(frame_idx) > history.head + 1:
                self._require_no_gap(history, frame_idx)
            if frame_idx in group.bank.cond or frame_idx in group.pending:
                continue
            if reverse != history.reverse:
                way = "backward" if history.reverse else "forward"
                raise EditRefusedError(
                    f"frame {frame_idx}: the memory policy {self!r} tracks in the direction of the first pass alone, "
                    f"{way}; use RecentEdits or NoLateEdits with both_directions=True, or keep everything"
                )

    def before_frame(self, state: TrackerState, frame_idx: int, reverse: bool) -> None:
        """See `KeepEverything`."""
        for group in state.groups:
            history = group.horizon
            if history is None or frame_idx in group.bank.cond:
                continue
            if history.place(frame_idx) <= history.head:
                self._restore(state, group, history, history.place(frame_idx) - 1)

    def after_frame(self, state: TrackerState, frame_idx: int, reverse: bool) -> None:
        """See `KeepEverything`."""
        for group in state.groups:
            is_prompted = frame_idx in group.bank.cond
            if not group.bank.cond:
                continue
            history = group.horizon
            if history is None:
                place = -frame_idx if reverse else frame_idx
                history = group.horizon = History(reverse, self.every, place - 1, place - 1)
            place = history.place(frame_idx)
            history.observe(group.bank)
            if is_prompted and place <= history.head:
                continue  # a stored result was handed out again
            history.advance(place, not is_prompted)
            history.note_prompts(place)
            fronts = [history.front(place + 1)]
            small = prune(group.bank, fronts, state.engine.tracker.settings, state.assumed_num_frames)
            group.bank = MemoryBank(group.bank.cond, small.non_cond | history.taken_back)
            history.keep_snapshot(small.non_cond, self.max_snapshots)

    def require_editable(self, state: TrackerState, frame_idx: int) -> None:
        """See `KeepEverything`; tracks old frames again if their records are gone."""
        known = [
            (group, group.horizon)
            for group in state.groups
            if group.horizon is not None and frame_idx not in group.bank.cond
        ]
        for _, history in known:
            if history.head < history.place(frame_idx) <= history.newest:
                self._require_no_gap(history, frame_idx)
        for group, history in known:
            if history.place(frame_idx) <= history.head:
                self._restore(state, group, history, history.place(frame_idx))

    def require_removable(self, state: TrackerState, obj_id: int, frames: Iterable[int]) -> None:
        """See `KeepEverything`; snapshots are those of whole groups."""
        group = state.group_of(obj_id)
        if group.horizon is not None and len(group.obj_ids) > 1:
            others = [other for other in group.obj_ids if other != obj_id]
            raise EditRefusedError(
                f"object {obj_id} cannot be removed exactly: it is tracked in one batch with {others}, and so are they "
                "in the snapshots; track objects as independent ones, or keep everything"
            )
        self._require_masks(state, obj_id, frames)

    def _require_no_gap(self, history: History, frame_idx: int) -> None:
        """Refuse a frame ahead if an earlier pass came farther than the latest one.

        A session that keeps everything would go on from what the earlier pass left behind the head; that is gone here.
        """
        if history.head < history.newest:
            raise EditRefusedError(
                f"frame {frame_idx}: frames up to {history.place(history.newest)} were tracked before the last edit, "
                f"and since then only up to {history.place(history.head)}: go on tracking from there first"
            )

    def _restore(self, state: TrackerState, group: ObjectGroup, history: History, place: int) -> None:
        """Put back the record of a place, whole, and the records that tracking on from it reads."""
        history.observe(group.bank)
        known = [p for p in history.snapshots if p < place]
        if not known:
            return  # nothing was tracked before
        settings, length = state.engine.tracker.settings, state.assumed_num_frames
        bank = MemoryBank({}, dict(history.snapshots[known[-1]]))
        for change in history.changes:
            if change.place <= known[-1]:
                bank.cond = change.cond
        for here in range(known[-1] + 1, place + 1):
            frame_idx = history.place(here)
            for change in history.changes:
                if change.place == here:
                    bank.cond = change.cond
                    bank.non_cond = _without(bank.non_cond, change.cond) | change.taken_back
            if frame_idx not in history.computed:
                continue
            bank.non_cond[frame_idx] = state.engine.compute_record(state, group, bank, frame_idx, history.reverse)
            fronts = [history.front(here), history.front(here + 1)]
            is_whole = history.place(place).__eq__
            bank.non_cond = prune(bank, fronts, settings, length, is_whole).non_cond
        restored = _without(bank.non_cond, group.bank.cond) | history.taken_back
        whole = {t for t, record in group.bank.non_cond.items() if record.pred_masks is not None}
        group.bank.non_cond.update({t: record for t, record in restored.items() if t not in whole})


def _without(records: Records, others: Records) -> Records:
    return {t: record for t, record in records.items() if t not in others}
