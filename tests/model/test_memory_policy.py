"""Memory policies: sessions that drop records give what sessions that keep everything give, or refuse."""

from __future__ import annotations

import pytest
from tracking_sessions import TwinSessions, small_model

from sam3.model.memory_policy import EditRefusedError, KeepEverything, NoLateEdits, RecentEdits, parse
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


@pytest.fixture(scope="module")
def plain():
    """As released, without memory selection."""
    return Sam3TrackerPredictor(small_model())


def test_forward_streaming_with_prompts_on_the_way_and_ahead(predictor):
    twins = TwinSessions(predictor, NoLateEdits(), num_frames=28)
    assert twins.click(0, 7) and twins.box(0, 9)
    for t in range(28):
        if t % 4 == 3:
            assert twins.prompt(min(t + twins.chance.choice((0, 0, 3)), 27), twins.chance.choice((7, 9)))
        if t == 21:
            assert twins.mask(t, 12)  # an object that comes later
        assert twins.track(t, t)
    group = twins.pruned.groups[0]
    assert len(group.bank.non_cond) <= 16 and len(group.bank.cond) <= 5
    assert all(len(group.prompted_frames(obj_id)) <= 6 for obj_id in group.obj_ids)
    assert group.bank.nbytes < twins.full.groups[0].bank.nbytes / 2
    assert not twins.click(27, 7)


def test_edits_within_the_window(predictor):
    """Clicks, boxes, masks and taking them back on recent frames, tracking on from anywhere there, and backward."""
    twins = TwinSessions(predictor, RecentEdits(6), num_frames=32, seed=1)
    assert twins.box(0, 1) and twins.click(0, 2) and twins.track(0, 19)
    newest, done = 19, 0
    for turn in range(6):
        frame_idx = twins.chance.randint(newest - 5, newest)
        done += twins.prompt(frame_idx, twins.chance.choice((1, 2)))
        if turn == 3:
            done += twins.clear(frame_idx, 1)
        if turn == 4:
            done += twins.track(newest, newest - 3, reverse=True)
        done += twins.track(twins.chance.randint(newest - 5, frame_idx), newest + (turn != 2))
        newest += turn != 2
    assert done == 14 and twins.num_refused == 0
    assert not twins.click(newest - 6, 1)
    assert not twins.track(newest - 6, newest)
    assert twins.num_refused == 2


def test_snapshots_bring_back_any_frame(predictor):
    twins = TwinSessions(predictor, SnapshotReplay(every=6, max_snapshots=3), num_frames=32, seed=2)
    assert twins.box(0, 1) and twins.click(0, 2) and twins.track(0, 24)
    group = twins.pruned.groups[0]
    assert len(group.bank.non_cond) <= 16
    assert twins.click(13, 1) and twins.prompt(9, 2)  # two edits before tracking on
    assert twins.track(13, 18)
    assert not twins.click(20, 1) and not twins.track(22, 22)  # tracked before the edit
    assert twins.track(19, 24)
    assert twins.clear(13, 1)
    assert twins.prompt(22, 2) and twins.track(21, 25)
    assert twins.prompt(15, 1) and twins.track(14, 20)
    assert twins.track(21, 25)
    assert twins.click(23, 2) and twins.click(23, 2)
    assert twins.track(23, 28)
    assert len(group.horizon.snapshots) <= 3 and len(group.bank.non_cond) <= 17
    assert not twins.track(4, 3, reverse=True)
    assert twins.num_refused == 3


@pytest.mark.parametrize("reverse", [False, True])
def test_snapshots_do_not_skip_what_an_edit_made_old(plain, reverse):
    """Beyond the end of the pass that knows the edit, a session that keeps everything reads what was tracked before."""
    twins = TwinSessions(plain, SnapshotReplay(every=4), num_frames=31)

    def at(frame_idx: int) -> int:
        return 30 - frame_idx if reverse else frame_idx

    assert twins.box(at(0), 1) and twins.click(at(25), 1) and twins.track(at(0), at(20), reverse)
    assert twins.click(at(5), 1) and twins.track(at(5), at(7), reverse)
    with pytest.raises(
        EditRefusedError, match=f"frame {at(21)}: frames up to {at(20)} were .* only up to {at(7)}: go on"
    ):
        next(plain.propagate_in_video(twins.pruned, at(21), 0, reverse))
    for frame_idx in (9, 20, 21, 22, 25, 26):  # 25 is prompted, and its masks are there
        assert not twins.track(at(frame_idx), at(frame_idx), reverse)
    for frame_idx in (8, 20):
        assert not twins.click(at(frame_idx), 1)
    for frame_idx in (25, 28):  # beyond what was tracked: the prompt waits
        assert twins.click(at(frame_idx), 1) and not twins.track(at(frame_idx), at(frame_idx), reverse)
    assert twins.track(at(8), at(20), reverse)
    assert twins.click(at(22), 1) and twins.track(at(24), at(29), reverse)  # nothing old lies ahead any more


def test_both_directions(plain):
    twins = TwinSessions(plain, NoLateEdits(both_directions=True), num_frames=40)
    assert twins.click(18, 1) and twins.track(18, 30)
    assert twins.track(18, 8, reverse=True)
    assert twins.track(31, 33)
    assert twins.click(4, 1)  # ahead of the way back
    assert twins.track(7, 0, reverse=True)
    assert not twins.track(12, 12) and not twins.track(12, 12, reverse=True)
    assert not twins.click(20, 1)
    bank = twins.pruned.groups[0].bank
    assert len(bank.non_cond) <= 32


def test_a_first_pass_backward(plain):
    twins = TwinSessions(plain, RecentEdits(2), num_frames=24)
    assert twins.click(23, 1) and twins.track(23, 6, reverse=True)
    assert len(twins.pruned.groups[0].bank.non_cond) <= 17
    assert twins.box(7, 1) and twins.track(7, 3, reverse=True)
    assert not twins.box(7, 1) and not twins.track(7, 8)


@pytest.mark.parametrize("policy", [NoLateEdits(), SnapshotReplay(every=8)])
def test_removing_an_object(plain, policy):
    independent = TwinSessions(Sam3TrackerPredictor(plain.model, objects="independent"), policy, num_frames=14)
    joint = TwinSessions(plain, policy, num_frames=14)
    for twins in (independent, joint):
        assert twins.box(0, 1) and twins.click(0, 2) and twins.track(0, 9)
    remove = plain.remove_object
    assert independent.both(lambda state: remove(state, 1, need_output=False)[0]) and independent.track(10, 13)
    if isinstance(policy, NoLateEdits):
        wanted = "object 1 has a prompt on frame 0, of .* no longer be edited.*; or remove it with need_output=False"
        with pytest.raises(EditRefusedError, match=wanted):
            plain.remove_object(joint.pruned, 1)
    assert not joint.remove(1)  # the other's mask on frame 0 is gone; the snapshots are those of both
    is_done = joint.both(lambda state: remove(state, 1, need_output=False)[0])
    assert is_done == isinstance(policy, NoLateEdits)
    assert joint.track(10, 13)


def test_removing_an_object_that_selects_frames_for_another_is_refused():
    predictor = Sam3TrackerPredictor(small_model(use_memory_selection=True))
    twins = TwinSessions(predictor, NoLateEdits(), num_frames=6)
    assert twins.box(0, 1) and twins.click(0, 2) and twins.track(0, 2)
    with pytest.raises(EditRefusedError, match=r"object 1 cannot be removed exactly: .* in one batch with \[2\]"):
        predictor.remove_object(twins.pruned, 1, need_output=False)
    predictor.reset_state(twins.pruned)
    predictor.add_new_points_or_box(twins.pruned, 0, 1, box=[0.1, 0.1, 0.5, 0.5])  # all is forgotten, so all is allowed
    assert twins.pruned.groups[0].horizon is None


def test_a_refusal_names_the_frame_the_policy_and_what_is_possible(plain):
    twins = TwinSessions(plain, RecentEdits(2), num_frames=8)
    assert twins.box(0, 1) and twins.track(0, 5)
    with pytest.raises(EditRefusedError, match=r"frame 3 can no longer.*RecentEdits\(num_frames=2.*from 4 on"):
        plain.add_new_points_or_box(twins.pruned, 3, 1, [[0.5, 0.5]], [1])
    with pytest.raises(EditRefusedError, match="tracking cannot start on frame 2 again"):
        next(plain.propagate_in_video(twins.pruned, 2))
    assert twins.track(6, 7)  # a refusal changes nothing


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("keep_everything", KeepEverything()),
        ("no_late_edits", NoLateEdits()),
        ("recent_edits:30", RecentEdits(30)),
        ("snapshot_replay:16", SnapshotReplay(every=16)),
    ],
)
def test_policies_have_names(plain, text, policy):
    assert parse(text) == policy
    assert plain.init_state(9, 9, 20, memory_policy=text).policy == policy


@pytest.mark.parametrize(
    "text", ["recent", "recent_edits", "recent_edits:-1", "no_late_edits:3", "snapshot_replay:x", ""]
)
def test_unknown_policies_are_refused_by_name(text):
    with pytest.raises(ValueError, match=f"unknown memory policy '{text}': choose"):
        parse(text)


@pytest.mark.parametrize(
    "make", [lambda: RecentEdits(-1), lambda: SnapshotReplay(every=0), lambda: SnapshotReplay(max_snapshots=1)]
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(ValueError, match="give"):
        make()
