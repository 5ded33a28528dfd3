"""Which records of a memory bank any future frame can still read, and a bank of nothing else.

A *front* is a place where tracking may go on: its first computed frame and its direction. Every rule of
`sam3.model.memory_bank` looks back from the frame that is computed, a bounded number of records; so a front needs the
few records behind it, and the prompted frames ahead of it. Whoever knows all fronts that can ever be used (that is a
policy's business, `sam3.model.memory_policy`) can drop all other records, and every result stays the same to the last
bit: the same records are read, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from sam3.model.memory_bank import FrameRecord, MemoryBank, max_object_pointers
from sam3.tracker_config import TrackerConfig


class Front(NamedTuple):
    """Where tracking may go on."""

    frame_idx: int
    """The first frame that is computed; all frames behind it are known, none of those ahead is read before it is
    computed anew."""
    reverse: bool = False
    """Towards smaller indices; "behind" then means larger ones."""

    def is_behind(self, frame_idx: int) -> bool:
        """Whether a frame is known before this front moves."""
        return frame_idx > self.frame_idx if self.reverse else frame_idx < self.frame_idx

    def distance(self, frame_idx: int) -> int:
        """How far a frame lies behind; 1 for the adjacent one."""
        return frame_idx - self.frame_idx if self.reverse else self.frame_idx - frame_idx


@dataclass(frozen=True)
class Needs:
    """Frames of a bank that a front reads, each with all that is named before it too."""

    entries: frozenset[int] = frozenset()
    """Conditioning frames that are only counted: where more exist than are attended to, the order of reading changes,
    and with it the last bits of sums."""
    pointers: frozenset[int] = frozenset()
    """Frames whose pointers and scores are read."""
    memories: frozenset[int] = frozenset()
    """Frames whose spatial memories are read."""
    masks: frozenset[int] = frozenset()
    """Prompted frames ahead, whose stored masks are the output when tracking comes to them."""

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            self.entries | other.entries,
            self.pointers | other.pointers,
            self.memories | other.memories,
            self.masks | other.masks,
        )


def needs_of(bank: MemoryBank, front: Front, config: TrackerConfig, num_frames: int) -> Needs:
    """What tracking from a front can read of a bank, now and at any later frame in its direction.

    Args:
        bank: The records so far.
        front: Where tracking goes on.
        config: The rules' settings.
        num_frames: As for `attended_memories`.
    """
    needs = _conditioning_needs(bank, front, config)
    if config.use_memory_selection:
        return needs | _selected_needs(bank, front, config, num_frames)
    return needs | _recent_needs(bank, front, config, num_frames)


def prune(
    bank: MemoryBank,
    fronts: Iterable[Front],
    config: TrackerConfig,
    num_frames: int,
    whole: Callable[[int], bool] = lambda frame_idx: False,
) -> MemoryBank:
    """The smallest bank with which tracking from any of the fronts gives what it would give with all records.

    Args:
        bank: Stays as it is; records are shared or copied without what is dropped.
        fronts: All places where tracking may go on.
        config: The rules' settings.
        num_frames: As for `attended_memories`.
        whole: Frames that are kept with everything, masks included, because they may be edited.
    """
    needs = Needs()
    for front in fronts:
        needs |= needs_of(bank, front, config, num_frames)
    read = needs.pointers | needs.memories | needs.masks

    def keep(store: dict[int, FrameRecord], named: frozenset[int]) -> dict[int, FrameRecord]:
        return {
            t: record if whole(t) else _without(record, t not in needs.memories, t not in needs.masks)
            for t, record in store.items()
            if t in named or whole(t)
        }

    return MemoryBank(keep(bank.cond, read | needs.entries), keep(bank.non_cond, read))


def _without(record: FrameRecord, memory: bool, masks: bool) -> FrameRecord:
    """The record without its spatial memory, without its masks."""
    if memory and record.maskmem_features is not None:
        record = replace(record, maskmem_features=None)
    if masks and record.pred_masks is not None:
        record = replace(record, pred_masks=None)
    return record


def _conditioning_needs(bank: MemoryBank, front: Front, config: TrackerConfig) -> Needs:
    """All prompted frames ahead, and the nearest behind: frames that are passed later only push farther ones out."""
    limit = config.max_cond_frames_in_attn
    ahead = {t for t in bank.cond if not front.is_behind(t)}
    behind = sorted(bank.cond.keys() - ahead, key=front.distance)
    read = ahead | set(behind[:limit])
    if config.keep_first_cond_frame and bank.cond:
        read.add(min(bank.cond))
    # One more that is never read tells that there are more than are read.
    entries = read | set(behind[: limit + 1])
    return Needs(frozenset(entries), frozenset(read), frozenset(read), frozenset(ahead))


def _recent_needs(bank: MemoryBank, front: Front, config: TrackerConfig, num_frames: int) -> Needs:
    """Without memory selection: windows behind the front. Prompted frames in them count, as those not read as such."""
    frames = [t for t in (*bank.cond, *bank.non_cond) if front.is_behind(t)]
    pointers = {t for t in frames if front.distance(t) < max_object_pointers(config, num_frames)}
    stride, num_recent = config.memory_temporal_stride, config.num_recent_frames
    # The farthest of the recent frames is a multiple of the stride, and so are all nearer ones but the adjacent.
    if front.reverse:
        farthest = -(-(front.frame_idx + 2) // stride) * stride + (num_recent - 2) * stride - front.frame_idx
    else:
        farthest = front.frame_idx - (front.frame_idx - 2) // stride * stride + (num_recent - 2) * stride
    memories = {t for t in frames if t % stride == 0 and front.distance(t) <= farthest and num_recent > 1}
    if num_recent:
        memories |= {t for t in frames if front.distance(t) == 1}
    return Needs(pointers=frozenset(pointers | memories), memories=frozenset(memories))


def _selected_needs(bank: MemoryBank, front: Front, config: TrackerConfig, num_frames: int) -> Needs:
    """With memory selection: the adjacent frame and the nearest good ones, for each object and phase of the stride."""
    frames = sorted((t for t in (*bank.cond, *bank.non_cond) if front.is_behind(t)), key=front.distance)
    memories = {t for t in frames if front.distance(t) == 1}
    pointers = set(memories)
    # Frame 0 is never good.
    scores = {t: bank.non_cond[t].eff_iou_score for t in frames if 1 <= t < num_frames and t in bank.non_cond}
    good_of = {t: [s > config.mf_threshold for s in score.tolist()] for t, score in scores.items() if score is not None}
    num_objects = max((len(good) for good in good_of.values()), default=0)
    for i in range(num_objects):
        for phase in range(config.memory_temporal_stride):
            good = [t for t, of in good_of.items() if of[i] and t % config.memory_temporal_stride == phase]
            pointers |= set(good[: max_object_pointers(config, num_frames) - 1])
            memories |= set(good[: config.num_recent_frames])
    return Needs(pointers=frozenset(pointers | memories), memories=frozenset(memories))
