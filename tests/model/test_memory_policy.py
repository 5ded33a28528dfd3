"""Memory policies: sessions that drop records give what sessions that keep everything give, or refuse."""

from __future__ import annotations

import pytest
from tracking_sessions import TwinSessions, small_model

from sam3.model.memory_policy import NoLateEdits, RecentEdits
from sam3.model.memory_snapshots import SnapshotReplay
from sam3.model.sam3_tracking_predictor import Sam3TrackerPredictor

KINDS = {
    "all frames": ({}, "joint"),
    "selection": ({"use_memory_selection": True, "mf_threshold": 0.4}, "joint"),
    "own selection": ({"use_memory_selection": True, "mf_threshold": 0.4, "shared_iou_score": False}, "independent"),
}
"""Settings of the tracker, and how objects are grouped. About half of the frames pass the threshold."""


@pytest.fixture(scope="module", params=list(KINDS))
def predictor(request):
    settings, objects = KINDS[request.param]
    return Sam3TrackerPredictor(small_model(**settings), objects=objects)


def test_forward_streaming_with_prompts_on_the_way_and_ahead(predictor):
    twins = TwinSessions(predictor, NoLateEdits(), num_frames=36)
    assert twins.click(0, 7) and twins.box(0, 9)
    for t in range(36):
        if t % 4 == 3:
            assert twins.prompt(min(t + twins.chance.choice((0, 0, 3)), 35), twins.chance.choice((7, 9)))
        if t == 21:
            assert twins.mask(t, 12)  # an object that comes later
        assert twins.track(t, t)
    group = twins.pruned.groups[0]
    assert len(group.bank.non_cond) <= 16 and len(group.bank.cond) <= 5
    assert group.bank.nbytes < twins.full.groups[0].bank.nbytes / 2
    assert not twins.click(35, 7)


def test_edits_within_the_window(predictor):
    """Clicks, boxes, masks and taking them back on recent frames, tracking on from anywhere there, and backward."""
    twins = TwinSessions(predictor, RecentEdits(6), num_frames=40, seed=1)
    assert twins.box(0, 1) and twins.click(0, 2) and twins.track(0, 9)
    newest, done = 9, 0
    for turn in range(7):
        frame_idx = twins.chance.randint(newest - 5, newest)
        done += twins.prompt(frame_idx, twins.chance.choice((1, 2)))
        if turn == 3:
            done += twins.clear(frame_idx, 1)
        if turn == 4:
            done += twins.track(newest, newest - 3, reverse=True)
        done += twins.track(twins.chance.randint(newest - 5, frame_idx), newest + (turn != 2))
        newest += turn != 2
    assert done == 16 and twins.num_refused == 0
    assert not twins.click(newest - 6, 1)
    assert not twins.track(newest - 6, newest)
    assert twins.num_refused == 2


def test_snapshots_bring_back_any_frame(predictor):
    twins = TwinSessions(predictor, SnapshotReplay(every=8, max_snapshots=3), num_frames=40, seed=2)
    assert twins.box(0, 1) and twins.click(0, 2) and twins.track(0, 30)
    group = twins.pruned.groups[0]
    assert len(group.bank.non_cond) <= 16
    assert twins.click(13, 1) and twins.prompt(9, 2)  # two edits before tracking on
    assert twins.track(13, 20)
    assert not twins.click(25, 1)  # tracked before the edit
    assert twins.track(21, 30)
    assert twins.clear(13, 1)
    assert twins.prompt(27, 2) and twins.track(24, 32)
    assert twins.prompt(11, 1) and twins.track(10, 33)
    assert twins.click(30, 2) and twins.click(30, 2)
    assert twins.track(30, 36)
    assert len(group.horizon.snapshots) <= 3
    assert len(group.bank.non_cond) <= 17
    assert twins.num_refused == 1
