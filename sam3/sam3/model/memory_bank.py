"""What the tracker keeps of each frame, and which of it the next frame reads.

The rules are pure functions of the bank's indices and scores, so that a memory policy can be proven against them: a
record that they never return again can be dropped without changing any result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sam3.tracker_config import TrackerConfig


@dataclass(frozen=True, eq=False)
class FrameRecord:
    """What is known of B objects on one frame.

    Fields that a later frame cannot need may be None: a policy drops them with `dataclasses.replace`.
    """

    pred_masks: Tensor | None
    """Low-resolution logits, float32, (B, 1, 4 G, 4 G); of a mask prompt (B, 1, h / 14 * 4, w / 14 * 4)."""
    obj_ptr: Tensor
    """Object pointers, (B, C)."""
    object_score_logits: Tensor
    """Whether each object is in the frame, float32, (B, 1), above 0 if it is."""
    maskmem_features: Tensor | None = None
    """Spatial memory, in the tracker's ``memory_dtype``: (B, Cm, G, G), of a compressed memory (B, tokens, Cm)."""
    iou_score: Tensor | None = None
    """Predicted IoU of the mask that was chosen, float32, (B,)."""
    eff_iou_score: Tensor | None = None
    """Quality by which frames are selected for memory, float32 on the CPU, (B,); equal numbers where objects share it.
    None without memory selection, and for records that have no quality."""
    is_from_points: bool = False

    @property
    def num_objects(self) -> int:
        """B."""
        return self.obj_ptr.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors().values())

    def select(self, indices: Sequence[int], shared_iou_score: bool | None = None) -> FrameRecord:
        """The record of some of the objects, in the given order.

        Args:
            indices: Rows that are kept.
            shared_iou_score: `TrackerConfig.shared_iou_score`, to compute ``eff_iou_score`` anew from the objects that
                are left, as the released tracker does, also where there was none; None keeps the rows as they are.
        """
        rows = list(indices)
        kept: dict[str, Any] = {name: tensor[rows] for name, tensor in self._tensors().items()}
        selected = replace(self, **kept)
        if shared_iou_score is None or selected.iou_score is None or not rows:
            return selected
        score = effective_iou(selected.object_score_logits, selected.iou_score, shared_iou_score)
        return replace(selected, eff_iou_score=score)

    def to(self, device: torch.device) -> FrameRecord:
        """The record with its tensors on a device; ``eff_iou_score`` stays on the CPU. Itself if they are there."""
        moved: dict[str, Any] = {
            name: tensor.to(device)
            for name, tensor in self._tensors().items()
            if name != "eff_iou_score" and tensor.device != device
        }
        return replace(self, **moved) if moved else self

    def _tensors(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass
class MemoryBank:
    """Records by frame index. The order in which conditioning records were put in is the order they are read in."""

    cond: dict[int, FrameRecord] = field(default_factory=dict)
    """Frames that received a prompt."""
    non_cond: dict[int, FrameRecord] = field(default_factory=dict)
    """Frames that were tracked."""

    @property
    def num_objects(self) -> int:
        """B; 0 in an empty bank."""
        return next((r.num_objects for store in (self.cond, self.non_cond) for r in store.values()), 0)

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""
        return sum(record.nbytes for store in (self.cond, self.non_cond) for record in store.values())

    def copy(self) -> MemoryBank:
        """A bank of the same records, whose own dicts can change."""
        return MemoryBank(dict(self.cond), dict(self.non_cond))

    def select_objects(self, indices: Sequence[int], shared_iou_score: bool | None = None) -> MemoryBank:
        """A bank of some of the objects; see `FrameRecord.select`."""
        stores = (self.cond, self.non_cond)
        return MemoryBank(*({t: r.select(indices, shared_iou_score) for t, r in store.items()} for store in stores))


class AttendedMemory(NamedTuple):
    """A spatial memory that a frame reads."""

    frame_idx: int
    record: FrameRecord
    temporal_index: int
    """Row of the temporal table; the last one for conditioning frames."""
    age: int = 0
    """Distance in frames; 0 for conditioning frames, which do not age."""


class AttendedPointer(NamedTuple):
    """Object pointers that a frame reads."""

    frame_idx: int
    record: FrameRecord
    position: int
    """Distance in frames; under memory selection the rank among the good frames."""


def effective_iou(object_score_logits: Tensor, iou_score: Tensor, shared: bool) -> Tensor:
    """Predicted IoU weighted by the certainty that the object is there, float32 on the CPU, (B,).

    Args:
        object_score_logits: (B, 1).
        iou_score: (B,).
        shared: One number for all objects. As released it is mean(certainty) * mean(IoU), the mean over a product that
            broadcasts (B, 1) with (B,).
    """
    logits = object_score_logits.detach().to(torch.float32).flatten()
    iou = iou_score.detach().to(torch.float32).flatten()
    certainty = torch.where(logits > 0, 2 * logits.sigmoid() - 1, 0.0)
    if not shared:
        return (certainty * iou).cpu()
    return (certainty.mean() * iou.mean()).cpu().expand(len(iou)).clone()


def attended_memories(
    bank: MemoryBank,
    frame_idx: int,
    config: TrackerConfig,
    num_frames: int,
    reverse: bool = False,
    object_index: int = 0,
) -> list[AttendedMemory]:
    """The spatial memories that a frame reads: conditioning frames, then recent ones from far to near.

    Args:
        bank: The records so far.
        frame_idx: The frame to be tracked.
        config: The rules' settings.
        num_frames: Of the whole video; for an unknown length any number above every index and not below 16.
        reverse: Tracking runs towards smaller indices.
        object_index: Whose scores select; of no account where objects share them.
    """
    chosen, unselected = _split_conditioning(bank, frame_idx, config)
    found = [AttendedMemory(t, bank.cond[t], config.num_maskmem - 1) for t in chosen]
    for rel, t in _recent_frames(bank, frame_idx, config, num_frames, reverse, object_index):
        record = bank.non_cond.get(t) or unselected.get(t)
        if record is not None:
            found.append(AttendedMemory(t, record, config.temporal_index(rel), abs(frame_idx - t)))
    return found


def attended_pointers(
    bank: MemoryBank,
    frame_idx: int,
    config: TrackerConfig,
    num_frames: int,
    reverse: bool = False,
    object_index: int = 0,
    with_future: bool = False,
) -> list[AttendedPointer]:
    """The object pointers that a frame reads: of conditioning frames, then of recent ones from near to far.

    Args:
        bank: As for `attended_memories`, and so are the next five.
        frame_idx: As there.
        config: As there.
        num_frames: As there.
        reverse: As there.
        object_index: As there.
        with_future: Also of conditioning frames that tracking has not reached, at negative positions; in training.
    """
    direction = -1 if reverse else 1
    chosen, unselected = _split_conditioning(bank, frame_idx, config)
    distances = [(t, (frame_idx - t) * direction) for t in chosen]
    found = [AttendedPointer(t, bank.cond[t], d) for t, d in distances if d >= 0 or with_future]
    for d, t in _pointer_frames(bank, frame_idx, config, num_frames, reverse, object_index):
        record = bank.non_cond.get(t) or unselected.get(t)
        if record is not None:
            found.append(AttendedPointer(t, record, d))
    return found


def max_object_pointers(config: TrackerConfig, num_frames: int) -> int:
    """How many positions of pointers there are; they are divided by this number less one."""
    return min(num_frames, config.max_obj_ptrs_in_encoder)


def good_frames(
    bank: MemoryBank, frame_idx: int, config: TrackerConfig, num_frames: int, reverse: bool, object_index: int = 0
) -> list[int]:
    """Frames that memory selection reads, from far to near; the adjacent frame is always the last.

    Frame 0 is never scanned, as released. Empty on the first frame (in reverse: on the last).
    """
    step = config.memory_temporal_stride
    adjacent = frame_idx + 1 if reverse else frame_idx - 1
    if not 0 <= adjacent < num_frames:
        return []
    scanned = range(adjacent, num_frames, step) if reverse else range(adjacent, 0, -step)
    near_to_far: list[int] = []
    limit = max_object_pointers(config, num_frames) - 1
    for t in _stored_frames(bank.non_cond, scanned):
        if len(near_to_far) >= limit:
            break
        score = bank.non_cond[t].eff_iou_score
        if score is not None and float(score[object_index]) > config.mf_threshold:
            near_to_far.append(t)
    if adjacent not in near_to_far:
        near_to_far.insert(0, adjacent)
    return near_to_far[::-1]


def _stored_frames(store: dict[int, FrameRecord], frames: range) -> Iterator[int]:
    """Those of the frames that are stored, in order; to find the first few does not take a look at all records."""
    near, far = frames[: len(store)], frames[len(store) :]
    yield from (t for t in near if t in store)
    yield from sorted((t for t in store if t in far), reverse=frames.step < 0)  # where a policy left gaps


def _split_conditioning(
    bank: MemoryBank, frame_idx: int, config: TrackerConfig
) -> tuple[list[int], dict[int, FrameRecord]]:
    """Conditioning frames that are read as such, and the records of the others."""
    frames = list(bank.cond)
    limit = config.max_cond_frames_in_attn
    if len(frames) <= limit:
        return frames, {}
    chosen: list[int] = [min(frames)] if config.keep_first_cond_frame else []
    before = max((t for t in frames if t < frame_idx), default=None)
    after = min((t for t in frames if t >= frame_idx), default=None)
    chosen += [t for t in (before, after) if t is not None and t not in chosen]
    others = sorted((t for t in frames if t not in chosen), key=lambda t: abs(t - frame_idx))
    chosen = [*chosen, *others][:limit]
    return chosen, {t: bank.cond[t] for t in frames if t not in chosen}


def _recent_frames(
    bank: MemoryBank, frame_idx: int, config: TrackerConfig, num_frames: int, reverse: bool, object_index: int
) -> list[tuple[int, int]]:
    """(rel, frame) of the recent slots, from far to near; there may be no record of a frame."""
    rels = range(config.num_recent_frames, 0, -1)
    if config.use_memory_selection:
        good = good_frames(bank, frame_idx, config, num_frames, reverse, object_index)
        return [(rel, good[-rel]) for rel in rels if rel <= len(good)]
    return [(rel, _strided_frame(frame_idx, rel, config.memory_temporal_stride, reverse)) for rel in rels]


def _strided_frame(frame_idx: int, rel: int, stride: int, reverse: bool) -> int:
    """The ``rel``-th recent frame; beyond the adjacent one they lie on multiples of the stride."""
    if rel == 1:
        return frame_idx + 1 if reverse else frame_idx - 1
    if reverse:
        return math.ceil((frame_idx + 2) / stride) * stride + (rel - 2) * stride
    return (frame_idx - 2) // stride * stride - (rel - 2) * stride


def _pointer_frames(
    bank: MemoryBank, frame_idx: int, config: TrackerConfig, num_frames: int, reverse: bool, object_index: int
) -> list[tuple[int, int]]:
    """(position, frame) of the recent pointers, from near to far; there may be no record of a frame."""
    positions = range(1, max_object_pointers(config, num_frames))
    if config.use_memory_selection:
        good = good_frames(bank, frame_idx, config, num_frames, reverse, object_index)
        return [(d, good[-d]) for d in positions if d < len(good)]  # the farthest good frame is left out, as released
    direction = -1 if reverse else 1
    frames = [(d, frame_idx - d * direction) for d in positions]
    return [(d, t) for d, t in frames if 0 <= t < num_frames]
