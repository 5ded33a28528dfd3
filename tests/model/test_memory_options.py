"""What the released tracker does not have: off, nothing changes; on, each option does what it says."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from golden import table, tracker_value
from torch import Tensor

from sam3.config import Sam3Config
from sam3.model.memory_bank import FrameRecord, MemoryBank, attended_memories, attended_pointers, effective_iou
from sam3.model.sam3_tracker import Sam3Tracker, TrackerFeatures
from sam3.tracker_config import MEMORY_FRAMES_PRESETS, MemoryAttentionConfig, TrackerConfig

TINY = Sam3Config.preset("tiny")
GRID, DIM, MEM = TINY.grid_size, TINY.hidden_dim, TINY.tracker.mem_dim
FRAME, NUM_FRAMES = 20, 40


@pytest.fixture(scope="module")
def tracker() -> Sam3Tracker:
    tracker = Sam3Tracker(TINY, memory_dtype=torch.float32).eval()
    tracker.load_state_dict({key: tracker_value(key, value.shape) for key, value in tracker.state_dict().items()})
    return tracker


@pytest.fixture
def bank() -> MemoryBank:
    """A click on frame 0, two objects tracked up to frame 19, of which every third frame is bad for the second."""
    return MemoryBank({0: record(0)}, {t: record(t) for t in range(1, FRAME)})


@pytest.fixture(scope="module")
def features() -> TrackerFeatures:
    shapes = [(1, DIM // 8, 4 * GRID, 4 * GRID), (1, DIM // 4, 2 * GRID, 2 * GRID), (1, DIM, GRID, GRID)]
    return TrackerFeatures(*(table(f"input.level{i}", shape) for i, shape in enumerate(shapes)))


def record(t: int) -> FrameRecord:
    scores = torch.tensor([[5.0], [-5.0 if t % 3 == 0 else 5.0]])
    return FrameRecord(
        pred_masks=None,
        obj_ptr=table(f"pointer{t}", (2, DIM)),
        object_score_logits=scores,
        maskmem_features=3 * table(f"memory{t}", (2, MEM, GRID, GRID)),
        iou_score=torch.tensor([0.9, 0.8]),
        eff_iou_score=effective_iou(scores, torch.tensor([0.9, 0.8]), shared=False),
    )


@torch.no_grad()
def condition(tracker: Sam3Tracker, features: TrackerFeatures, bank: MemoryBank, settings: TrackerConfig) -> Tensor:
    before = tracker.settings
    tracker.settings = settings
    try:
        return tracker.condition(FRAME, features, bank, NUM_FRAMES)
    finally:
        tracker.settings = before


def test_switched_off_or_without_effect_nothing_changes(
    tracker: Sam3Tracker, features: TrackerFeatures, bank: MemoryBank
) -> None:
    default = TINY.tracker
    assert (default.memory_frames, default.memory_decay, default.top_k_memories) == (None, 0.0, None)
    expected = condition(tracker, features, bank, default)
    for settings in (default.replace(memory_frames=6), default.replace(top_k_memories=6)):
        assert torch.equal(condition(tracker, features, bank, settings), expected)


@pytest.mark.parametrize("count", MEMORY_FRAMES_PRESETS)
def test_more_frames_share_the_last_recent_row(bank: MemoryBank, count: int) -> None:
    read = attended_memories(bank, FRAME, TINY.tracker.replace(memory_frames=count), NUM_FRAMES)
    assert [memory.frame_idx for memory in read] == [0, *range(FRAME - count, FRAME)]
    assert [memory.temporal_index for memory in read] == [6, *[5] * (count - 5), 4, 3, 2, 1, 0]
    assert [memory.age for memory in read] == [0, *range(count, 0, -1)]


def test_more_frames_change_what_is_seen(tracker: Sam3Tracker, features: TrackerFeatures, bank: MemoryBank) -> None:
    older = replace(bank.non_cond[FRAME - 8], maskmem_features=torch.zeros(2, MEM, GRID, GRID))
    changed = MemoryBank(bank.cond, {**bank.non_cond, FRAME - 8: older})
    for settings, is_read in ((TINY.tracker.replace(memory_frames=8), True), (TINY.tracker, False)):
        first, second = (condition(tracker, features, b, settings) for b in (bank, changed))
        assert torch.equal(first, second) != is_read


def test_decay_is_a_bias_on_the_logits_by_age(
    tracker: Sam3Tracker, features: TrackerFeatures, bank: MemoryBank
) -> None:
    """By hand: the first layer's attention with the bias added, for one object."""
    tracker.settings = TINY.tracker.replace(memory_decay=0.5)
    where = (bank, FRAME, tracker.settings, NUM_FRAMES)
    memory = tracker.memory_tokens(features, attended_memories(*where), attended_pointers(*where), NUM_FRAMES)
    tracker.settings = TINY.tracker
    assert memory.frame_bias is not None
    assert memory.frame_bias.tolist() == [0.0, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5]
    attention = tracker.transformer.encoder.layers[0].cross_attn_image
    q, k = table("q", (1, 1, 5, DIM)), table("k", (1, 1, 7 * 4 + 3, DIM))
    values = table("v", (1, 7 * 4 + 3, MEM))
    bias = torch.cat([memory.frame_bias.repeat_interleave(4), torch.zeros(3)])
    with torch.no_grad():
        logits = q[0, 0] @ k[0, 0].T / DIM**0.5 + bias
        expected = attention.out_proj(logits.softmax(-1) @ attention.v_proj(values[0]))
        found = attention.attend(q, k, values, bias[None, None, None])
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)


def test_full_decay_leaves_prompted_frames_and_pointers(
    tracker: Sam3Tracker, features: TrackerFeatures, bank: MemoryBank
) -> None:
    found = condition(tracker, features, bank, TINY.tracker.replace(memory_decay=1e4))
    where = (bank, FRAME, TINY.tracker, NUM_FRAMES)
    with torch.no_grad():
        expected = tracker.condition_on_memory(
            features, attended_memories(*where)[:1], attended_pointers(*where), NUM_FRAMES
        )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    slight = condition(tracker, features, bank, TINY.tracker.replace(memory_decay=1e-6))
    torch.testing.assert_close(slight, condition(tracker, features, bank, TINY.tracker), atol=1e-4, rtol=1e-4)


def test_top_k_reads_the_frames_that_attract_most_attention(
    tracker: Sam3Tracker, features: TrackerFeatures, bank: MemoryBank
) -> None:
    """The two objects may read different frames; each result is that of a memory with these frames alone."""
    found = condition(tracker, features, bank, TINY.tracker.replace(top_k_memories=2))
    where = (bank, FRAME, TINY.tracker, NUM_FRAMES)
    memories, pointers = attended_memories(*where), attended_pointers(*where)
    for row in range(2):
        shares = attention_shares(tracker, features, bank, row)
        best = sorted(sorted(range(1, 7), key=lambda i: -shares[i])[:2])
        kept = [memories[i]._replace(record=memories[i].record.select([row])) for i in (0, *best)]
        own = [pointer._replace(record=pointer.record.select([row])) for pointer in pointers]
        with torch.no_grad():
            expected = tracker.condition_on_memory(features, kept, own, NUM_FRAMES)
        torch.testing.assert_close(found[row : row + 1], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def attention_shares(tracker: Sam3Tracker, features: TrackerFeatures, bank: MemoryBank, row: int) -> list[float]:
    """Share of the first layer's attention to spatial memories that each frame gets, over all tokens."""
    where = (bank, FRAME, TINY.tracker, NUM_FRAMES)
    memory = tracker.memory_tokens(features, attended_memories(*where), attended_pointers(*where), NUM_FRAMES)
    encoder = tracker.transformer.encoder
    layer, rotary = encoder.layers[0], encoder.rotary((GRID, GRID))
    x = features.coarse.flatten(2).transpose(1, 2) + 0.1 * encoder.position_code((GRID, GRID))
    q = layer.cross_attn_image.queries(layer.norm2(layer.read_frame(x, rotary)), rotary)[0, 0]
    keys = (memory.spatial + memory.spatial_codes)[row].flatten(0, 1)[None]
    k = layer.cross_attn_image.keys(keys, rotary)[0, 0]
    weights = (q @ k.T / DIM**0.5).softmax(-1)
    return weights.unflatten(-1, (-1, GRID * GRID)).sum(-1).mean(0).tolist()


def test_own_scores_select_own_frames(tracker: Sam3Tracker, features: TrackerFeatures, bank: MemoryBank) -> None:
    """Without a shared score an object's result does not depend on the others."""
    settings = TINY.tracker.replace(use_memory_selection=True, shared_iou_score=False)
    frames = [[m.frame_idx for m in attended_memories(bank, FRAME, settings, NUM_FRAMES, False, row)] for row in (0, 1)]
    assert frames == [[0, 14, 15, 16, 17, 18, 19], [0, 11, 13, 14, 16, 17, 19]]
    together = condition(tracker, features, bank, settings)
    for row in range(2):
        alone = condition(tracker, features, bank.select_objects([row]), settings)
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_maskmem": 1}, "num_maskmem 1 must be 0"),
        ({"memory_frames": 0}, "memory_frames 0 must be a whole number of at least 1"),
        ({"top_k_memories": 0}, "top_k_memories 0 must be a whole number of at least 1"),
        ({"memory_decay": -0.1}, "memory_decay -0.1 must be finite and not negative"),
        ({"memory_temporal_stride": 0}, "memory_temporal_stride 0 must be at least 1"),
        ({"memory_frames": 7.5}, "memory_frames 7.5 must be a whole number"),
        ({"memory_decay": math.nan}, "memory_decay nan must be finite"),
        ({"memory_decay": math.inf}, "memory_decay inf must be finite"),
        ({"num_maskmem": 0, "memory_frames": 8}, "memory_frames 8 has no effect with num_maskmem 0"),
        ({"num_maskmem": 0, "memory_decay": 0.5}, "memory_decay 0.5 has no effect with num_maskmem 0"),
    ],
)
def test_impossible_settings(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TINY.tracker.replace(**changes)


@pytest.mark.parametrize(
    ("changes", "message"), [({"num_maskmem": 9}, "weights hold 7"), ({"mem_dim": 32}, "mem_dim 32")]
)
def test_settings_that_do_not_fit_the_weights(tracker: Sam3Tracker, changes: dict, message: str) -> None:
    before = tracker.settings
    with pytest.raises(ValueError, match=message):
        tracker.settings = TINY.tracker.replace(**changes)
    assert tracker.settings is before


def test_memory_attention_has_a_layer() -> None:
    with pytest.raises(ValueError, match="memory attention: num_layers 0 must be at least 1"):
        MemoryAttentionConfig(num_layers=0)


def test_pointers_are_cut_into_whole_tokens() -> None:
    with pytest.raises(ValueError, match="hidden_dim 64 is not a multiple of the tracker's mem_dim 24"):
        TINY.replace(tracker=TINY.tracker.replace(mem_dim=24))
