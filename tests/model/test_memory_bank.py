"""Which frames are read again: the released rules, by hand-made examples."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from sam3.model.memory_bank import (
    FrameRecord,
    MemoryBank,
    attended_memories,
    attended_pointers,
    effective_iou,
    good_frames,
)
from sam3.tracker_config import TrackerConfig

PLAIN = TrackerConfig()
SELECTING = PLAIN.replace(use_memory_selection=True)


def record(score: float | None = None, num_objects: int = 1) -> FrameRecord:
    eff = None if score is None else torch.full((num_objects,), score)
    return FrameRecord(None, torch.zeros(num_objects, 4), torch.ones(num_objects, 1), eff_iou_score=eff)


def bank_of(cond: list[int], non_cond: list[int], bad: tuple[int, ...] = ()) -> MemoryBank:
    tracked = {t: record(0.0 if t in bad else 0.5) for t in non_cond}
    return MemoryBank({t: record() for t in cond}, tracked)


def memories(bank: MemoryBank, frame: int, config: TrackerConfig, total: int = 100, reverse: bool = False) -> list:
    return [(m.frame_idx, m.temporal_index) for m in attended_memories(bank, frame, config, total, reverse)]


def pointers(bank: MemoryBank, frame: int, config: TrackerConfig, total: int = 100, reverse: bool = False) -> list:
    return [(p.frame_idx, p.position) for p in attended_pointers(bank, frame, config, total, reverse)]


def test_recent_frames_from_far_to_near_and_pointers_from_near_to_far() -> None:
    bank = bank_of([0], list(range(1, 20)))
    assert memories(bank, 20, PLAIN) == [(0, 6), (14, 5), (15, 4), (16, 3), (17, 2), (18, 1), (19, 0)]
    assert pointers(bank, 20, PLAIN) == [(0, 20), *((20 - d, d) for d in range(1, 16))]


def test_missing_frames_leave_their_slots_empty() -> None:
    bank = bank_of([0], [1, 3, 4])
    assert memories(bank, 5, PLAIN) == [(0, 6), (1, 3), (3, 1), (4, 0)]
    assert pointers(bank, 5, PLAIN) == [(0, 5), (4, 1), (3, 2), (1, 4)]


def test_backwards_everything_is_mirrored() -> None:
    bank = bank_of([30], list(range(21, 30)))
    assert memories(bank, 20, PLAIN, reverse=True) == [(30, 6), *((20 + rel, rel - 1) for rel in range(6, 0, -1))]
    assert pointers(bank, 20, PLAIN, reverse=True) == [(30, 10), *((20 + d, d) for d in range(1, 10))]


def test_four_conditioning_frames_at_most_and_the_others_count_as_recent() -> None:
    bank = bank_of([0, 30, 10, 19, 40, 18], [])
    # 19 before, 30 at or after, then 18 and 10 by distance; 0 and 40 are left out, too far to be recent.
    assert memories(bank, 20, PLAIN) == [(19, 6), (30, 6), (18, 6), (10, 6)]
    narrow = PLAIN.replace(max_cond_frames_in_attn=2)
    assert memories(bank, 20, narrow) == [(19, 6), (30, 6), (18, 1)]
    assert pointers(bank, 20, narrow) == [(19, 1), (18, 2), (10, 10)]
    first = PLAIN.replace(max_cond_frames_in_attn=3, keep_first_cond_frame=True)
    assert memories(bank, 20, first)[:3] == [(0, 6), (19, 6), (30, 6)]


def test_future_conditioning_frames_give_memory_but_pointers_in_training_alone() -> None:
    bank = bank_of([0, 9], [1, 2])
    assert memories(bank, 3, PLAIN)[:2] == [(0, 6), (9, 6)]
    assert pointers(bank, 3, PLAIN)[:1] == [(0, 3)]
    with_future = attended_pointers(bank, 3, PLAIN, 100, with_future=True)
    assert [(p.frame_idx, p.position) for p in with_future][:2] == [(0, 3), (9, -6)]


def test_stride() -> None:
    """The adjacent frame, and beyond it multiples of the stride."""
    config = PLAIN.replace(memory_temporal_stride=3)
    forward = [(6, 5), (9, 4), (12, 3), (15, 2), (18, 1), (21, 0)]
    assert memories(bank_of([], list(range(22))), 22, config) == forward
    backward = [(39, 5), (36, 4), (33, 3), (30, 2), (27, 1), (24, 0)]
    assert memories(bank_of([], list(range(24, 60))), 23, config, reverse=True) == backward


def test_selection_skips_bad_frames_and_never_frame_0() -> None:
    bank = bank_of([5], [0, 1, 2, 3, 4, 6, 7, 8, 9], bad=(3, 8))
    assert good_frames(bank, 10, SELECTING, 100, False) == [1, 2, 4, 6, 7, 9]
    assert memories(bank, 10, SELECTING) == [(5, 6), (1, 5), (2, 4), (4, 3), (6, 2), (7, 1), (9, 0)]
    assert pointers(bank, 10, SELECTING) == [(5, 5), (9, 1), (7, 2), (6, 3), (4, 4), (2, 5)]  # without the farthest


def test_selection_reads_the_adjacent_frame_even_if_bad() -> None:
    bank = bank_of([0], [1, 2, 3], bad=(3,))
    assert good_frames(bank, 4, SELECTING, 100, False) == [1, 2, 3]
    assert memories(bank, 1, SELECTING) == [(0, 6)]  # an adjacent conditioning frame takes its slot and gives nothing
    assert good_frames(bank, 0, SELECTING, 100, False) == []
    assert good_frames(bank, 3, SELECTING, 4, True) == []


def test_selection_backwards() -> None:
    bank = bank_of([9], [4, 5, 6, 7, 8], bad=(6,))
    assert good_frames(bank, 3, SELECTING, 10, True) == [8, 7, 5, 4]
    assert memories(bank, 3, SELECTING, 10, True) == [(9, 6), (8, 3), (7, 2), (5, 1), (4, 0)]


def test_selection_keeps_one_less_than_the_pointers() -> None:
    bank = bank_of([0], list(range(1, 60)))
    assert good_frames(bank, 60, SELECTING, 100, False) == list(range(45, 60))
    assert good_frames(bank, 60, SELECTING, 8, False) == []  # beyond the end of so short a video


def test_effective_iou() -> None:
    logits, ious = torch.tensor([[2.0], [-1.0]]), torch.tensor([0.8, 0.6])
    certainty = 2 * torch.sigmoid(torch.tensor(2.0)).item() - 1
    assert effective_iou(logits, ious, shared=False).tolist() == pytest.approx([certainty * 0.8, 0.0])
    assert effective_iou(logits, ious, shared=True).tolist() == pytest.approx([certainty / 2 * 0.7] * 2)


def test_selecting_objects_recomputes_what_they_shared() -> None:
    logits, ious = torch.tensor([[2.0], [-1.0], [3.0]]), torch.tensor([0.8, 0.6, 0.4])
    whole = FrameRecord(
        torch.arange(12.0).view(3, 1, 2, 2), torch.arange(6.0).view(3, 2), logits, iou_score=ious, is_from_points=True
    )
    part = whole.select([2, 0])
    assert (part.num_objects, part.is_from_points, part.maskmem_features) == (2, True, None)
    assert part.obj_ptr.tolist() == [[4, 5], [0, 1]] and part.eff_iou_score is None
    shared = whole.select([2, 0], shared_iou_score=True)
    assert torch.equal(shared.eff_iou_score, effective_iou(logits[[2, 0]], ious[[2, 0]], shared=True))
    bank = MemoryBank({0: whole}, {1: whole})
    smaller = bank.select_objects([1])
    assert (bank.num_objects, smaller.num_objects, MemoryBank().num_objects) == (3, 1, 0)
    assert smaller.nbytes * 3 == bank.nbytes
    snapshot = bank.copy()
    del bank.non_cond[1]
    assert list(snapshot.non_cond) == [1]


@pytest.mark.parametrize("reverse", [False, True])
def test_selection_finds_the_same_frames_in_any_bank(reverse: bool) -> None:
    """Whole, with gaps, far away and with a stride, beside the rule as it is written."""
    chance, found = random.Random(0), 0
    for _ in range(300):
        total, step = chance.choice((12, 40, 400)), chance.choice((1, 1, 3))
        config = SELECTING.replace(memory_temporal_stride=step)
        stored = [t for t in range(total) if chance.random() < chance.choice((0.02, 0.3, 1.0))]
        bad = tuple(t for t in stored if chance.random() < chance.choice((0.0, 0.5, 1.0)))
        frame = chance.randrange(total)
        adjacent = frame + 1 if reverse else frame - 1
        if not 0 <= adjacent < total:
            continue
        behind = [
            t for t in stored if (t >= adjacent if reverse else 1 <= t <= adjacent) and (t - adjacent) % step == 0
        ]
        good = sorted(set(behind) - set(bad), reverse=not reverse)[: min(total, 16) - 1]
        expected = [*good[::-1], *([] if adjacent in good else [adjacent])]
        chance.shuffle(stored)  # the order in which frames were tracked says nothing
        assert good_frames(bank_of([], stored, bad), frame, config, total, reverse) == expected
        found += len(good)
    assert found > 500


def test_selection_looks_at_near_frames_alone() -> None:
    class Counting(dict):
        looks = 0

        def __contains__(self, key: object) -> bool:
            self.looks += 1
            return super().__contains__(key)

        def __iter__(self) -> Iterator[int]:
            raise AssertionError("all records are looked at")

    bank = bank_of([0], [])
    bank.non_cond = Counting({t: record(0.5 if t % 3 else 0.0) for t in range(1, 2000)})
    assert len(good_frames(bank, 2000, SELECTING, 3000, reverse=False)) == 15
    assert bank.non_cond.looks <= 24
