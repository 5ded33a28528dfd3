"""Pruned memory banks: whatever a frame reads of all records, it reads of the few that are left."""

from __future__ import annotations

import random

import pytest
import torch

from sam3.model.memory_bank import FrameRecord, MemoryBank, attended_memories, attended_pointers
from sam3.model.memory_pruning import Front, needs_of, prune
from sam3.tracker_config import TrackerConfig

CONFIGS = {
    "released": TrackerConfig(),
    "strided": TrackerConfig(memory_temporal_stride=3),
    "larger memory": TrackerConfig(memory_frames=12),
    "larger memory than pointers": TrackerConfig(memory_frames=12, max_obj_ptrs_in_encoder=5),
    "one recent frame": TrackerConfig(memory_frames=1, max_cond_frames_in_attn=1),
    "first prompt is kept": TrackerConfig(keep_first_cond_frame=True, max_cond_frames_in_attn=2),
    "no memory": TrackerConfig(num_maskmem=0),
}


def make_record(chance: random.Random, num_objects: int, shared: bool) -> FrameRecord:
    """A record whose tensors are its own; about half of the frames are good, with selection."""
    scores = [chance.choice((0.0, 0.005, 0.2, 0.5)) for _ in range(num_objects)]
    if shared:
        scores = scores[:1] * num_objects
    return FrameRecord(
        pred_masks=torch.zeros(num_objects, 1, 1, 1),
        obj_ptr=torch.zeros(num_objects, 1),
        object_score_logits=torch.zeros(num_objects, 1),
        maskmem_features=torch.zeros(num_objects, 1, 1, 1),
        eff_iou_score=torch.tensor(scores) if chance.random() < 0.9 else None,
    )


class Twins:
    """One story told to a bank that keeps everything and to one that is pruned; what they read must be the same."""

    def __init__(self, config: TrackerConfig, seed: int, num_frames: int = 10**6, shared: bool = True) -> None:
        self.config, self.num_frames, self.shared = config, num_frames, shared
        self.chance = random.Random(seed)
        self.full, self.pruned = MemoryBank(), MemoryBank()

    def record(self) -> FrameRecord:
        return make_record(self.chance, num_objects=2, shared=self.shared)

    def prompt(self, frame_idx: int) -> None:
        record = self.record()
        for bank in (self.full, self.pruned):
            bank.non_cond.pop(frame_idx, None)
            bank.cond[frame_idx] = record

    def clear(self, frame_idx: int) -> None:
        for bank in (self.full, self.pruned):
            bank.non_cond[frame_idx] = bank.cond.pop(frame_idx)

    def track(self, frame_idx: int, reverse: bool = False) -> None:
        """Compute a frame, unless it was prompted: then its masks are the output."""
        if frame_idx in self.full.cond:
            assert self.pruned.cond[frame_idx].pred_masks is self.full.cond[frame_idx].pred_masks
            return
        for i in range(2):
            read = [self.read(bank, frame_idx, reverse, i) for bank in (self.full, self.pruned)]
            assert read[0] == read[1], f"frame {frame_idx}, object {i}"
        record = self.record()
        for bank in (self.full, self.pruned):
            bank.non_cond[frame_idx] = record

    def read(self, bank: MemoryBank, frame_idx: int, reverse: bool, object_index: int) -> list[tuple[object, ...]]:
        """What the tracker takes from a bank, in its order: the very tensors, and how they are coded."""
        args = (bank, frame_idx, self.config, self.num_frames, reverse, object_index)
        memories = [(id(m.record.maskmem_features), m.temporal_index) for m in attended_memories(*args)]
        assert all(m.record.maskmem_features is not None for m in attended_memories(*args))
        pointers = [
            (id(p.record.obj_ptr), id(p.record.object_score_logits), p.position) for p in attended_pointers(*args)
        ]
        return [*memories, *pointers]

    def prune(self, *fronts: Front, whole=lambda t: False) -> None:
        self.pruned = prune(self.pruned, fronts, self.config, self.num_frames, whole)


def with_selection(config: TrackerConfig, is_on: bool) -> TrackerConfig:
    return config.replace(use_memory_selection=is_on)


@pytest.mark.parametrize("selection", [False, True], ids=["all frames", "selection"])
@pytest.mark.parametrize("name", CONFIGS)
def test_forward_streaming_with_prompts_on_the_way_and_ahead(name, selection):
    config = with_selection(CONFIGS[name], selection)
    for seed, shared in ((0, True), (1, False)):
        twins = Twins(config, seed, shared=shared)
        twins.prompt(0)
        for t in range(1, 110):
            if twins.chance.random() < 0.08:
                twins.prompt(t + twins.chance.choice((0, 0, 1, 5, 30)))
            twins.track(t)
            twins.prune(Front(t + 1))


@pytest.mark.parametrize("selection", [False, True], ids=["all frames", "selection"])
@pytest.mark.parametrize("name", CONFIGS)
def test_reverse_streaming(name, selection):
    twins = Twins(with_selection(CONFIGS[name], selection), seed=2, num_frames=150)
    twins.prompt(149)
    for t in range(148, -1, -1):
        if twins.chance.random() < 0.08:
            twins.prompt(max(t - twins.chance.choice((0, 0, 1, 5, 30)), 0))
        twins.track(t, reverse=True)
        twins.prune(Front(t - 1, reverse=True))


@pytest.mark.parametrize("selection", [False, True], ids=["all frames", "selection"])
@pytest.mark.parametrize("name", CONFIGS)
def test_both_directions_from_the_first_prompt_by_turns(name, selection):
    twins = Twins(with_selection(CONFIGS[name], selection), seed=3, num_frames=200)
    low = high = 100
    twins.prompt(100)
    while low > 0 or high < 199:
        reverse = twins.chance.random() < 0.5
        for _ in range(twins.chance.choice((1, 3, 20))):
            if reverse and low > 0:
                low -= 1
                twins.track(low, reverse=True)
            elif not reverse and high < 199:
                high += 1
                twins.track(high)
            twins.prune(Front(high + 1), Front(low - 1, reverse=True))


@pytest.mark.parametrize("selection", [False, True], ids=["all frames", "selection"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("window", [1, 12])
def test_edits_within_a_window(name, selection, window):
    """Prompts put and taken back, and passes in both directions from anywhere in the window, also broken off."""
    twins = Twins(with_selection(CONFIGS[name], selection), seed=window)
    twins.prompt(0)
    newest = 0
    while newest < 60:
        newest += 1
        oldest = max(newest - window + 1, 0)

        def shrink(newest=newest, oldest=oldest):
            twins.prune(Front(newest + 1), Front(oldest), whole=range(oldest, newest + 1).__contains__)

        twins.track(newest)
        shrink()
        if twins.chance.random() < 0.3:
            edited = twins.chance.randint(oldest, newest)
            if edited in twins.full.cond and twins.chance.random() < 0.7 and len(twins.full.cond) > 1:
                twins.clear(edited)
            else:
                twins.prompt(edited)
            start = twins.chance.randint(oldest, newest)
            for t in range(start, twins.chance.randint(start, newest) + 1):
                twins.track(t)
                shrink()
            for t in range(start, oldest - 1, -1):
                twins.track(t, reverse=True)
                shrink()


def test_size_is_constant_and_as_derived():
    """At most 7 + 4 memories and 16 + 4 pointers in the released configuration, plus one that is only counted."""
    for selection in (False, True):
        config = with_selection(TrackerConfig(), selection)
        twins = Twins(config, seed=4)
        twins.prompt(0)
        for t in range(1, 200):
            if t % 23 == 0:
                twins.prompt(t)
            twins.track(t)
            twins.prune(Front(t + 1))
            records = [*twins.pruned.cond.values(), *twins.pruned.non_cond.values()]
            assert sum(r.maskmem_features is not None for r in records) <= 7 + 4
            assert len(records) <= 16 + 4 + 1
            assert all(r.pred_masks is None for r in records)


def test_what_a_front_needs_is_what_the_rules_say():
    """Memory selection off: the prompt, 6 memories, 15 pointers."""
    twins = Twins(TrackerConfig(), seed=5)
    twins.prompt(0)
    for t in range(1, 40):
        twins.track(t)
    needs = needs_of(twins.full, Front(40), twins.config, twins.num_frames)
    assert needs.memories == {0, *range(34, 40)}
    assert needs.pointers == {0, *range(25, 40)}
    assert needs.masks == frozenset()


def test_the_bank_that_is_pruned_stays_as_it_was():
    twins = Twins(TrackerConfig(), seed=6)
    twins.prompt(0)
    for t in range(1, 60):
        twins.track(t)
    before = twins.full.copy()
    small = prune(twins.full, [Front(60)], twins.config, twins.num_frames)
    assert twins.full.cond == before.cond and twins.full.non_cond == before.non_cond
    assert small.nbytes < twins.full.nbytes
    assert twins.full.non_cond[1].maskmem_features is not None
