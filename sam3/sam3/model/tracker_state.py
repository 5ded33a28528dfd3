"""Everything that belongs to one video and not to the model: prompts, records, features of the last frames."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sam3.model.frame_spans import FrameSpans
from sam3.model.memory_bank import FrameRecord, MemoryBank
from sam3.model.sam3_tracker import TrackerFeatures
from sam3.sam.prompts import PromptError

if TYPE_CHECKING:
    from sam3.model.tracker_engine import TrackerEngine
    from sam3.video.frame_source import FrameSource

_MIN_UNKNOWN_LENGTH = 16
"""Results for a video of unknown length are those of any video of at least this many frames."""


class MemoryPolicy(Protocol):
    """Decides which records a session keeps; see `sam3.model.memory_policy`."""

    @property
    def num_frames_read(self) -> int | None:
        """How many of the last tracked frames' pictures may be read again; None: all."""

    def require_startable(self, state: TrackerState, frame_idx: int, reverse: bool) -> None:
        """A frame is about to be tracked: refuse if what it reads is gone."""

    def before_frame(self, state: TrackerState, frame_idx: int, reverse: bool) -> None:
        """A frame is about to be tracked: bring back what it reads."""

    def after_frame(self, state: TrackerState, frame_idx: int, reverse: bool) -> None:
        """A frame was tracked: drop what is no longer kept."""

    def require_editable(self, state: TrackerState, frame_idx: int) -> None:
        """A prompt on this frame is about to change: make that possible, or refuse."""

    def require_removable(self, state: TrackerState, obj_id: int, frames: Iterable[int]) -> None:
        """An object is about to be removed, and the others' masks on ``frames`` are asked for: the same."""


class PointPrompt(NamedTuple):
    """Clicks and box corners of one object on one frame."""

    coords_px: Tensor
    """x, y in pixels of the model input, (1, P, 2)."""
    labels: Tensor
    """(1, P)."""


@dataclass
class PendingOutput:
    """What a prompt gave for one object, until all objects of the frame are put together."""

    record: FrameRecord
    """B = 1, without memory. ``pred_masks`` is None after a mask prompt."""
    video_mask: Tensor | None = None
    """The mask prompt itself at the video's size, bool (H, W)."""


@dataclass
class ObjectGroup:
    """Objects that are tracked as one batch: they share conditioning frames."""

    obj_ids: list[int] = field(default_factory=list)
    """Row i of every record is the object ``obj_ids[i]``."""
    bank: MemoryBank = field(default_factory=MemoryBank)
    points: dict[int, dict[int, PointPrompt]] = field(default_factory=dict)
    """Points in force, by object and frame."""
    mask_frames: dict[int, set[int]] = field(default_factory=dict)
    """Frames on which a mask prompt is in force, by object."""
    pending: dict[int, dict[int, PendingOutput]] = field(default_factory=dict)
    """Outputs that are not in the bank yet, by frame and object."""
    tracked: FrameSpans = field(default_factory=FrameSpans)
    unread: set[int] = field(default_factory=set)
    """Frames near a correction, whose tracked masks later clicks start without."""
    has_started: bool = False
    """Prompts were put together at least once; objects that come later form another group."""
    horizon: Any = None
    """What the memory policy remembers of the group; None before its first frame."""

    def add_object(self, obj_id: int) -> None:
        """Make room for one more object."""
        self.obj_ids.append(obj_id)
        self.points[obj_id] = {}
        self.mask_frames[obj_id] = set()

    def remove_object(self, obj_id: int, shared_iou_score: bool | None) -> None:
        """Drop an object's row from everything; ``shared_iou_score`` as in `FrameRecord.select`."""
        rows = [i for i, other in enumerate(self.obj_ids) if other != obj_id]
        if rows:
            self.bank = self.bank.select_objects(rows, shared_iou_score)
        else:
            self.clear_results()
        self.obj_ids.remove(obj_id)
        for prompts in (self.points, self.mask_frames):
            prompts.pop(obj_id)
        for frame_idx in list(self.pending):
            self.drop_pending(frame_idx, obj_id)

    def prompted_frames(self, obj_id: int) -> set[int]:
        """Frames on which the object has points or a mask."""
        return self.points[obj_id].keys() | self.mask_frames[obj_id]

    def has_prompts_on(self, frame_idx: int) -> bool:
        """Whether any object has a prompt on this frame."""
        return any(frame_idx in self.prompted_frames(obj_id) for obj_id in self.obj_ids)

    def condition_on(self, frame_idx: int, record: FrameRecord) -> None:
        """Put a prompted frame into the bank; nothing waits for it any more."""
        self.bank.cond[frame_idx] = record
        self.bank.non_cond.pop(frame_idx, None)
        self.pending.pop(frame_idx, None)
        self.has_started = True

    def take_back(self, frame_idx: int, obj_id: int) -> None:
        """Forget what was said of an object on a frame.

        A frame that nothing is said of any more counts as tracked; without any prompted frame there are no results.
        """
        self.points[obj_id].pop(frame_idx, None)
        self.mask_frames[obj_id].discard(frame_idx)
        self.drop_pending(frame_idx, obj_id)
        if self.has_prompts_on(frame_idx):
            return
        record = self.bank.cond.pop(frame_idx, None)
        if record is not None:
            self.bank.non_cond[frame_idx] = record
        self.tracked.discard(frame_idx)
        if not self.bank.cond:
            self.clear_results()

    def forget_prompts_except(self, frames: Collection[int]) -> None:
        """Forget what the user said on other frames, but for the last word on each object."""
        for obj_id in self.obj_ids:
            prompted = self.prompted_frames(obj_id)
            for frame_idx in prompted - {max(prompted, default=-1), *self.pending, *frames}:
                self.points[obj_id].pop(frame_idx, None)
                self.mask_frames[obj_id].discard(frame_idx)

    def drop_pending(self, frame_idx: int, obj_id: int) -> None:
        """Forget an output that is not in the bank yet."""
        outputs = self.pending.get(frame_idx, {})
        outputs.pop(obj_id, None)
        if not outputs:
            self.pending.pop(frame_idx, None)

    def give_up_pixels(self, frame_idx: int, taken_hw: Tensor) -> None:
        """Leave pixels of a frame to a mask that was given later; only masks that were given too lose any."""
        for obj_id, waiting in self.pending.get(frame_idx, {}).items():
            if waiting.video_mask is not None:
                self.pending[frame_idx][obj_id] = PendingOutput(waiting.record, waiting.video_mask & ~taken_hw)

    def stored_record(self, frame_idx: int) -> FrameRecord | None:
        """What the bank holds of a frame, as far as clicks read it."""
        record = self.bank.cond.get(frame_idx)
        if record is None and frame_idx not in self.unread:
            record = self.bank.non_cond.get(frame_idx)
        return record

    def clear_results(self) -> None:
        """Forget all that was tracked; prompts that wait stay."""
        self.bank = MemoryBank()
        self.tracked.clear()
        self.unread.clear()
        self.has_started = False
        self.horizon = None


class TrackerState:
    """One session of `Sam3TrackerPredictor` on one video.

    Attributes can also be read by the names of the released state, e.g. ``state["num_frames"]``; ``list(state.keys())``
    names them.

    Attributes:
        groups: Objects that are tracked together; records are in ``group.bank``.
        features: Features of the last frames that were encoded.
        source: Where frames come from; None if features or frames are handed in.
        policy: What the session keeps; None: everything.
        engine: Runs the network for this session.
    """

    def __init__(
        self,
        *,
        engine: TrackerEngine,
        size_hw: tuple[int, int],
        num_frames: int | None,
        device: torch.device,
        source: FrameSource | None = None,
        cached_features: Mapping[int, Any] | None = None,
        max_cached_features: int = 2,
        policy: MemoryPolicy | None = None,
        offload_video_to_cpu: bool = False,
        offload_state_to_cpu: bool = False,
    ) -> None:
        self.engine = engine
        self.video_height, self.video_width = size_hw
        self.device = device
        self.storage_device = torch.device("cpu") if offload_state_to_cpu else device
        self.source = source
        self.cached_features = cached_features if cached_features is not None else {}
        self._policy_at_start = policy
        self.policy = copy.deepcopy(policy)
        self.offload_video_to_cpu = offload_video_to_cpu
        self.offload_state_to_cpu = offload_state_to_cpu
        self.groups: list[ObjectGroup] = []
        self.features: OrderedDict[int, TrackerFeatures] = OrderedDict()
        self.max_cached_features = max_cached_features
        self._num_frames = num_frames
        self._highest_frame_idx = 0
        self._newest_tracked = -1

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width of the video in pixels."""
        return self.video_height, self.video_width

    @property
    def num_frames(self) -> int | None:
        """Frames of the video; None while a live source has not ended."""
        return self._num_frames if self.source is None else self.source.num_frames

    @property
    def assumed_num_frames(self) -> int:
        """What the network is told: `num_frames`, or more than can matter while that is unknown."""
        known = self._num_frames
        return max(_MIN_UNKNOWN_LENGTH, self._highest_frame_idx + 2) if known is None else known

    @property
    def obj_ids(self) -> list[int]:
        """Ids of all objects, in the order of rows of all results; a copy."""
        return [obj_id for group in self.groups for obj_id in group.obj_ids]

    @property
    def has_pending_prompts(self) -> bool:
        """Whether there are prompts that the next tracked frame would not know yet."""
        return any(group.pending for group in self.groups)

    @property
    def is_trackable(self) -> bool:
        """Whether there is anything to follow."""
        return any(group.pending or group.bank.cond for group in self.groups)

    @property
    def first_ann_frame_idx(self) -> int | None:
        """The earliest conditioning frame."""
        return min((t for group in self.groups for t in group.bank.cond), default=None)

    @property
    def first_prompted_frame(self) -> int | None:
        """The earliest frame with a prompt, also one that waits."""
        return min((t for group in self.groups for t in (*group.bank.cond, *group.pending)), default=None)

    def group_of(self, obj_id: int) -> ObjectGroup:
        """The group that an object is in.

        Raises:
            PromptError: If there is no such object.
        """
        group = self.find_group(obj_id)
        if group is not None:
            return group
        raise PromptError(f"there is no object {obj_id}; the objects are {self.obj_ids or 'none yet: add a prompt'}")

    def find_group(self, obj_id: int) -> ObjectGroup | None:
        """The group that an object is in, or None."""
        return next((group for group in self.groups if obj_id in group.obj_ids), None)

    def require_trackable(self) -> None:
        """Check that there is anything to follow.

        Raises:
            RuntimeError: If there is not.
        """
        if not self.is_trackable:
            raise RuntimeError("there is nothing to track: add points, a box or a mask on some frame first")

    def has_frame(self, frame_idx: int) -> bool:
        """Whether the video has this frame; a live source waits for it, or for its end."""
        if self.source is not None:
            return self.source.has_frame(frame_idx)
        return frame_idx >= 0 and (self._num_frames is None or frame_idx < self._num_frames)

    def require_no_loss(self, frame_idx: int) -> None:
        """Check that reading on to a frame loses none that tracking has still to come to.

        Raises:
            PromptError: If it would: the frame lies ahead in a source that can be read only once, and keeps a few.
        """
        source, keeps_all = self.source, self.policy is None or self.policy.num_frames_read is None
        if source is None or keeps_all or not self.is_trackable:
            return
        if frame_idx > max(self._highest_frame_idx, self._newest_tracked + 1) and not source.is_at_hand(frame_idx):
            raise PromptError(
                f"frame {frame_idx} lies ahead, and {source.name} can be read only once: track up to this frame first, "
                "take the memory policy SnapshotReplay, which keeps all frames, or StreamingTracker, where prompts wait"
            )

    def reset(self) -> None:
        """Forget all objects, prompts and results."""
        self.groups = []
        self.policy = copy.deepcopy(self._policy_at_start)

    def close(self) -> None:
        """Give back the video's files and threads."""
        if self.source is not None:
            self.source.close()

    def touch(self, frame_idx: int, is_tracked: bool = False) -> None:
        """Note that a frame is used, for the assumed length of a live video, or tracked."""
        self._highest_frame_idx = max(self._highest_frame_idx, frame_idx)
        if is_tracked:
            self._newest_tracked = max(self._newest_tracked, frame_idx)

    def cache_features(self, frame_idx: int, features: TrackerFeatures) -> None:
        """Keep the features of a frame, and drop those that were used longest ago."""
        self.features[frame_idx] = features
        self.features.move_to_end(frame_idx)
        while len(self.features) > self.max_cached_features:
            self.features.popitem(last=False)

    def rows(self) -> Iterator[tuple[ObjectGroup, int, int]]:
        """Group, row in the group and id of every object."""
        for group in self.groups:
            for row, obj_id in enumerate(group.obj_ids):
                yield group, row, obj_id

    # --- the released state's names -----------------------------------------------------------------------------------

    def __getitem__(self, key: str) -> Any:
        if key not in _KEYS:
            raise KeyError(f"{key!r}: the state has {', '.join(_KEYS)}")
        return _KEYS[key](self)

    def keys(self) -> list[str]:
        """Names that ``state[name]`` answers."""
        return list(_KEYS)

    def __contains__(self, key: object) -> bool:
        return key in _KEYS

    def _by_index(self, value_of: Callable[[ObjectGroup, int, int], Any]) -> dict[int, Any]:
        return {i: value_of(group, row, obj_id) for i, (group, row, obj_id) in enumerate(self.rows())}


def require_state(state: Any) -> TrackerState:
    """The same state, if it is one.

    Raises:
        PromptError: If it is something else, e.g. None because no video was opened.
    """
    if not isinstance(state, TrackerState):
        raise PromptError(f"inference_state must come from init_state, got {type(state).__name__}: open a video first")
    return state


def make_policy(policy: MemoryPolicy | str | None) -> MemoryPolicy | None:
    """A policy from its name; see `sam3.model.memory_policy.parse`."""
    if not isinstance(policy, str):
        return policy
    from sam3.model.memory_policy import parse

    return parse(policy)


def _stores(bank: MemoryBank) -> dict[str, dict[int, FrameRecord]]:
    return {"cond_frame_outputs": bank.cond, "non_cond_frame_outputs": bank.non_cond}


_KEYS: dict[str, Callable[[TrackerState], Any]] = {
    "video_height": lambda s: s.video_height,
    "video_width": lambda s: s.video_width,
    "num_frames": lambda s: s.num_frames,
    "images": lambda s: s.source,
    "cached_features": lambda s: s.cached_features,
    "device": lambda s: s.device,
    "storage_device": lambda s: s.storage_device,
    "offload_video_to_cpu": lambda s: s.offload_video_to_cpu,
    "offload_state_to_cpu": lambda s: s.offload_state_to_cpu,
    "obj_ids": lambda s: s.obj_ids,
    "obj_id_to_idx": lambda s: OrderedDict((obj_id, i) for i, obj_id in enumerate(s.obj_ids)),
    "obj_idx_to_id": lambda s: OrderedDict(enumerate(s.obj_ids)),
    "point_inputs_per_obj": lambda s: s._by_index(lambda group, row, obj_id: dict(group.points[obj_id])),
    "mask_inputs_per_obj": lambda s: s._by_index(lambda group, row, obj_id: sorted(group.mask_frames[obj_id])),
    "output_dict_per_obj": lambda s: s._by_index(
        lambda group, row, obj_id: _stores(group.bank.select_objects([row])),
    ),
    "first_ann_frame_idx": lambda s: s.first_ann_frame_idx,
    "consolidated_frame_inds": lambda s: sorted({t for group in s.groups for t in group.bank.cond}),
    "tracking_has_started": lambda s: any(group.has_started for group in s.groups),
    "frames_already_tracked": lambda s: {t: {"reverse": d} for group in s.groups for t, d in group.tracked.items()},
}
