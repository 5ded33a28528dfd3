"""Everything that belongs to one video of the text-prompted model, and nothing that belongs to the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from sam3.model.frame_spans import FrameSpans
from sam3.model.memory_policy import EditRefusedError
from sam3.model.memory_pruning import Front
from sam3.model.prompt import Prompt
from sam3.model.video_association import Hotstart
from sam3.model.video_config import VideoConfig
from sam3.model.video_detection import EncodedFrame
from sam3.model.video_groups import Scene, TrackedGroup
from sam3.model.video_outputs import OutputCache
from sam3.video.frame_source import FrameSource


@dataclass
class TextPrompt:
    """What the detector looks for on all frames."""

    text: str | None
    """None: the boxes alone say what to find."""
    features: Mapping[str, Tensor]
    """``language_features`` and ``language_mask`` of one text."""
    number: int
    """Tells prompts of one session apart."""


@dataclass
class VideoState:
    """One video: its frames, prompts, objects, and what is remembered of it.

    Attributes:
        edit_window: So many of the last frames can be clicked, propagated from and fetched again; None: all frames,
            for which memory grows with the video.
    """

    frames: FrameSource
    scene: Scene
    config: VideoConfig
    edit_window: int | None
    prompt: TextPrompt | None = None
    boxes: dict[int, Prompt] = field(default_factory=dict)
    """Frame -> geometric prompt."""
    groups: list[TrackedGroup] = field(default_factory=list)
    hotstart: Hotstart = field(init=False)
    last_occluded: dict[int, int] = field(default_factory=dict)
    scores: dict[int, float] = field(default_factory=dict)
    """Living object -> the score of its first detection; 1 after a click."""
    next_obj_id: int = 0
    cache: OutputCache = field(default_factory=OutputCache)
    encoded: EncodedFrame | None = None
    """The last frame."""
    first_frame: int | None = None
    """The first frame that was processed; propagation backward starts before it."""
    last_frame: int | None = None
    """The frame that the last pass came to, or that an earlier one in its direction had come to if that is farther."""
    turned_at: int | None = None
    """The first frame since the direction changed; None: it did not."""
    oldest_whole: int | None = None
    """The frame from which on everything is kept, in the direction of the last pass; None: all frames."""
    is_reverse: bool = False
    """The last pass went towards smaller indices."""
    was_propagated: bool = False
    known: FrameSpans = field(default_factory=FrameSpans)
    """Frames on which all objects were looked for and handed out, whether or not that is still kept."""
    touched: dict[bool, dict[int, int]] = field(default_factory=lambda: {False: {}, True: {}})
    """Direction -> clicked object -> the frame from which on known frames show it as it was before its clicks."""
    num_edits: int = 0
    """Prompts, clicks and removals so far: a propagation that runs meanwhile ends."""

    def __post_init__(self) -> None:
        self.hotstart = Hotstart(self.config)

    @property
    def num_frames(self) -> int | None:
        """Of the video; None while nobody knows."""
        return self.frames.num_frames

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width of the video."""
        return self.frames.size_hw

    @property
    def obj_ids(self) -> list[int]:
        """Living objects in ascending order."""
        return sorted(self.scores)

    def group_of(self, obj_id: int) -> TrackedGroup | None:
        """The group that tracks an object."""
        return next((group for group in self.groups if obj_id in group.obj_ids), None)

    def clear(self) -> None:
        """Forget prompts, objects and outputs; the video stays open and encoded."""
        fresh = VideoState(self.frames, self.scene, self.config, self.edit_window)
        keep = {"encoded": self.encoded, "num_edits": self.num_edits + 1}
        self.__dict__.update(vars(fresh) | keep)

    def add_objects(self, obj_ids: list[int], scores: list[float], frame_idx: int, is_from_user: bool = False) -> None:
        """Take in new objects."""
        self.hotstart.add(obj_ids, frame_idx, is_from_user)
        self.scores.update(zip(obj_ids, scores, strict=True))
        self.next_obj_id = max(self.next_obj_id, *(obj_id + 1 for obj_id in obj_ids))

    def discard_objects(self, obj_ids: set[int]) -> None:
        """Forget objects for good.

        Raises:
            EditRefusedError: If the others first seen with one of them would read what was dropped.
        """
        if not obj_ids:
            return
        self.require_discardable(obj_ids)
        shared = self.scene.tracker.settings.shared_iou_score
        groups = [group.without(obj_ids, shared) for group in self.groups]
        self.groups = [group for group in groups if group is not None]
        self.hotstart.discard(obj_ids)
        self.cache.discard_objects(obj_ids)
        for obj_id in obj_ids:
            self.scores.pop(obj_id, None)
            self.last_occluded.pop(obj_id, None)
            for touched in self.touched.values():
                touched.pop(obj_id, None)

    def require_discardable(self, obj_ids: set[int]) -> None:
        """Check that the objects first seen with some others do without them as if everything were kept.

        Raises:
            EditRefusedError: If they would read what was dropped.
        """
        settings = self.scene.tracker.settings
        if not (settings.use_memory_selection and settings.shared_iou_score):
            return
        for group in self.groups:
            gone, left = obj_ids.intersection(group.obj_ids), set(group.obj_ids) - obj_ids
            if gone and left and not group.is_whole:
                raise EditRefusedError(
                    f"object {min(gone)} cannot be removed exactly: it was first seen with {sorted(left)}, and which "
                    "frames are good for them would be judged anew, also frames that are no longer kept; the session "
                    f"was opened with edit_window={self.edit_window}: open it with None to keep everything, or build "
                    "the model with apply_temporal_disambiguation=False, where no frames are selected"
                )

    def is_cached(self, frame_idx: int) -> bool:
        """Whether all that was found on a frame can be handed out again; of some there is only what was clicked."""
        return frame_idx in self.cache and frame_idx in self.known

    def touch(self, obj_id: int, frame_idx: int) -> None:
        """An object was clicked: what is known of it in both directions is out of date."""
        for touched, earliest in ((self.touched[False], min), (self.touched[True], max)):
            touched[obj_id] = earliest(frame_idx, touched.get(obj_id, frame_idx))

    def settle(self, obj_ids: Iterable[int], first: int, last: int, reverse: bool) -> None:
        """Clicked objects were tracked again: forget the clicks if no known frame is left that does not show them.

        Args:
            obj_ids: What was tracked.
            first: The first frame.
            last: The last frame.
            reverse: Towards smaller indices.
        """
        step = -1 if reverse else 1
        known = [t * step for t, _ in self.known.items()]
        touched = self.touched[reverse]
        for obj_id in touched.keys() & set(obj_ids):
            stale = touched[obj_id] * step
            if any(stale <= t < first * step for t in known):
                continue  # frames were left out
            if all(t <= last * step for t in known):
                del touched[obj_id]
            else:
                touched[obj_id] = max(stale, last * step + 1) * step

    def require_editable(self, frame_idx: int) -> None:
        """Check that a click on a frame, and tracking on from it, find all that they read.

        Raises:
            EditRefusedError: If some of it was dropped.
        """
        step = -1 if self.is_reverse else 1
        if self.oldest_whole is not None and (frame_idx - self.oldest_whole) * step < 0:
            self._refuse(frame_idx)

    def require_startable(self, first: int, reverse: bool) -> None:
        """Check that a propagation finds all that it reads.

        Args:
            first: The first frame that it computes.
            reverse: Towards smaller indices.

        Raises:
            EditRefusedError: If some of it was dropped.
        """
        if self.oldest_whole is None:
            return
        if reverse == self.is_reverse:
            self.require_editable(first)
        elif not (reverse and self.first_frame is not None and first == self.first_frame - 1):
            self._refuse(first)

    def _refuse(self, frame_idx: int) -> None:
        raise EditRefusedError(
            f"frame {frame_idx}: what clicks on it and tracking from it read is no longer kept; the session is at "
            f"frame {self.last_frame} and was opened with edit_window={self.edit_window}: open it with a larger one, "
            "or with None to keep everything"
        )

    def prune(self, frame_idx: int, reverse: bool, is_again: bool = False) -> None:
        """Drop what no frame after this one can read; see `sam3.model.memory_pruning`.

        The window lies behind the farthest frame; while frames behind that are tracked once more, nothing is dropped.

        Args:
            frame_idx: The frame that was processed.
            reverse: Where it goes on.
            is_again: The frame itself will be processed once more.
        """
        step = -1 if reverse else 1
        if self.last_frame is not None:
            if reverse != self.is_reverse:
                self.turned_at = frame_idx
            elif (frame_idx - self.last_frame) * step < 0:
                return
        self.last_frame, self.is_reverse = frame_idx, reverse
        if self.first_frame is None:
            self.first_frame = frame_idx
        if self.edit_window is None:
            return
        window = self.edit_window
        oldest = frame_idx - step * (max(window - 1, 0) if window or is_again else -1)
        if self.turned_at is not None and window:
            oldest = max(oldest * step, self.turned_at * step) * step  # an earlier pass dropped what lies behind
        self.oldest_whole = oldest
        fronts = [Front(oldest, reverse)]
        if not reverse and not self.frames.is_sequential and self.first_frame > 0:
            fronts.append(Front(self.first_frame - 1, reverse=True))
        first, last = sorted((oldest, frame_idx))
        if not window and not is_again:
            first, last = 0, -1
        for group in self.groups:
            if not self._may_lose_an_object(group, oldest, step):
                group.prune(self.scene, fronts, first, last, self.config.click_demotion_window)
        self.cache.keep_between(min(frame_idx, oldest), max(frame_idx, oldest))
        self.boxes = {t: box for t, box in self.boxes.items() if t * step >= (frame_idx - step) * step}

    def _may_lose_an_object(self, group: TrackedGroup, oldest: int, step: int) -> bool:
        """Whether the probation of one object can yet change which frames are good for the others of its group."""
        is_shared = self.scene.tracker.settings.shared_iou_score and len(group.obj_ids) > 1
        return is_shared and (oldest - group.first_frame) * step <= self.config.hotstart_delay
