"""Frames pushed one at a time: the results of a whole video, from a state that does not grow."""

from __future__ import annotations

import gc
import itertools
import types

import numpy as np
import pytest
import torch
from tracking_sessions import noise_frames, small_model

from sam3.model.memory_policy import EditRefusedError, KeepEverything, NoLateEdits, RecentEdits
from sam3.model.memory_snapshots import SnapshotReplay
from sam3.model.sam3_tracking_predictor import Sam3TrackerPredictor
from sam3.model.streaming import StreamingTracker
from sam3.sam.prompts import PromptError
from sam3.video.frame_source import VideoInputError

NUM_FRAMES = 22
CLICK = {"points": [[0.4, 0.5]], "labels": [1]}
BOX = {"box": [0.1, 0.2, 0.6, 0.7]}
SELECTION = {"use_memory_selection": True, "mf_threshold": 0.4, "shared_iou_score": False}


@pytest.fixture(scope="module")
def predictor():
    return Sam3TrackerPredictor(small_model())


@pytest.fixture(scope="module")
def frames():
    return noise_frames(NUM_FRAMES)


def same(result, expected):
    frame_idx, obj_ids, low_res, masks, scores = expected
    assert (result.frame_idx, result.obj_ids) == (frame_idx, obj_ids)
    assert torch.equal(result.low_res_masks, low_res) and torch.equal(result.masks, masks)
    assert torch.equal(result.object_score_logits, scores)
    return True


@pytest.mark.parametrize("policy", ["no_late_edits", None])
def test_equal_to_sessions_that_keep_everything(predictor, frames, policy):
    """Prompts before their frames, as a session on the whole video would be told."""
    tracker = StreamingTracker(predictor, memory_policy=policy)
    assert tracker.last_frame_idx == -1
    state = predictor.init_state(video_path=frames)
    assert tracker.add_points(1, **CLICK) is None
    predictor.add_new_points_or_box(state, 0, 1, **CLICK)
    for t, frame in enumerate(frames):
        if t in (4, 11):
            tracker.add_points(1, frame_idx=t, **BOX)
            predictor.add_new_points_or_box(state, t, 1, **BOX)
        if t == 7:
            tracker.add_mask(2, np.eye(24, 32) > 0, frame_idx=t)
            predictor.add_new_mask(state, t, 2, np.eye(24, 32) > 0)
        (expected,) = predictor.propagate_in_video(state, t, 0)
        assert same(tracker.push(frame), expected)
    assert sum(g.bank.nbytes for g in tracker.state.groups) < sum(g.bank.nbytes for g in state.groups)


def test_correcting_the_newest_frame_and_older_ones(predictor, frames):
    tracker = StreamingTracker(predictor, memory_policy=RecentEdits(4))
    state = predictor.init_state(video_path=frames)
    tracker.add_points(1, **CLICK)
    predictor.add_new_points_or_box(state, 0, 1, **CLICK)
    results = [tracker.push(frame) for frame in frames[:8]]
    list(predictor.propagate_in_video(state, 0, 7))
    corrected = tracker.add_points(1, [[0.9, 0.9]], [0])  # the newest frame
    predictor.add_new_points_or_box(state, 7, 1, [[0.9, 0.9]], [0])
    (expected,) = predictor.propagate_in_video(state, 7, 0)
    assert same(corrected, expected) and not torch.equal(corrected.masks, results[7].masks)
    tracker.add_points(1, frame_idx=4, **BOX)
    predictor.add_new_points_or_box(state, 4, 1, **BOX)
    expected = list(predictor.propagate_in_video(state, 4, 3))
    assert all(itertools.starmap(same, zip(tracker.retrack(), expected, strict=True)))
    assert list(tracker.retrack()) == []
    with pytest.raises(
        EditRefusedError, match=r"frame 3 can no longer be edited.*RecentEdits\(num_frames=4.*from 4 on"
    ):
        tracker.add_points(1, frame_idx=3, **CLICK)
    (expected,) = predictor.propagate_in_video(state, 8, 0)
    assert same(tracker.push(frames[8]), expected)


@pytest.mark.parametrize("policy", [SnapshotReplay(every=3, max_snapshots=2), KeepEverything()])
def test_edits_anywhere(predictor, frames, policy):
    """Also far behind, beside one another, and while an earlier one is being tracked through."""
    tracker = StreamingTracker(predictor, memory_policy=policy)
    state = predictor.init_state(video_path=frames)
    tracker.add_points(1, **CLICK)
    predictor.add_new_points_or_box(state, 0, 1, **CLICK)
    for t in range(9):
        (expected,) = predictor.propagate_in_video(state, t, 0)
        assert same(tracker.push(frames[t]), expected)

    def edit(frame_idx, obj_id, **prompt):
        found = tracker.add_points(obj_id, frame_idx=frame_idx, **prompt)
        predictor.add_new_points_or_box(state, frame_idx, obj_id, **prompt)
        (expected,) = predictor.propagate_in_video(state, frame_idx, 0)
        return same(found, expected)

    def retrack(start):
        expected = list(predictor.propagate_in_video(state, start, tracker.last_frame_idx - start))
        return all(itertools.starmap(same, zip(tracker.retrack(), expected, strict=True)))

    assert edit(5, 1, **BOX) and retrack(5)
    assert edit(3, 1, points=[[0.9, 0.9]], labels=[0])  # a prompted frame lies ahead
    assert edit(2, 2, **BOX) and retrack(2)
    tracker.clear_prompts(1, 5)
    predictor.clear_all_points_in_frame(state, 5, 1)
    assert retrack(5)
    (expected,) = predictor.propagate_in_video(state, 9, 0)
    assert same(tracker.push(frames[9]), expected)


def test_a_stream_that_replays_waits_for_what_an_edit_made_old(predictor, frames):
    tracker, source = StreamingTracker(predictor, memory_policy="snapshot_replay:4"), iter(frames)
    tracker.add_points(1, **CLICK)
    results = tracker.run(source)
    assert [next(results).frame_idx for _ in range(8)] == list(range(8))
    tracker.add_points(1, frame_idx=6, **BOX)
    tracker.add_points(1, frame_idx=2, **BOX)
    again = tracker.retrack()
    assert [next(again).frame_idx, next(again).frame_idx] == [2, 3]
    again.close()  # broken off
    for act in (
        lambda: tracker.push(frames[8]),
        lambda: tracker.add_points(1, frame_idx=5, **CLICK),
        lambda: tracker.add_points(1, frame_idx=6, **CLICK),
        lambda: next(results),
    ):
        with pytest.raises(EditRefusedError, match=r"then only up to 3: go on tracking from there first; retrack\(\)"):
            act()
    assert tracker.last_frame_idx == 7 and not tracker.state.has_pending_prompts
    assert [result.frame_idx for result in tracker.retrack()] == [4, 5, 6, 7]
    assert next(tracker.run(source)).frame_idx == 8
    np.testing.assert_array_equal(tracker.state.source.frame(8), frames[8])  # none was lost


def test_what_is_tracked_again_begins_with_the_frame_that_still_needs_it(predictor, frames):
    """A correction of the newest frame is tracked at once, and so is no reason to go back later."""
    tracker = StreamingTracker(predictor, memory_policy=RecentEdits(4))
    tracker.add_points(1, **CLICK)
    for frame in frames[:3]:
        tracker.push(frame)
    tracker.add_points(1, [[0.9, 0.9]], [0])
    assert list(tracker.retrack()) == []
    for frame in frames[3:12]:
        tracker.push(frame)
    tracker.add_points(1, frame_idx=9, **BOX)
    again = tracker.retrack()
    assert next(again).frame_idx == 9
    again.close()  # broken off: the rest is still to be done
    assert [result.frame_idx for result in tracker.retrack()] == [10, 11]
    tracker.clear_prompts(1, 9)
    for frame in frames[12:15]:
        tracker.push(frame)
    with pytest.raises(EditRefusedError, match="tracking cannot start on frame 9 again"):
        next(tracker.retrack())
    tracker.add_points(1, frame_idx=13, **BOX)
    assert [result.frame_idx for result in tracker.retrack()] == [13, 14]


def test_prompts_that_wait_can_be_taken_back_and_are_copies(predictor, frames):
    tracker, plain = (StreamingTracker(predictor) for _ in range(2))
    point, mask = np.array([[0.4, 0.5]]), np.eye(24, 32)
    tracker.add_points(1, point, [1], frame_idx=np.int64(1))
    tracker.add_mask(2, mask, frame_idx=1)
    point[:], mask[:] = 0.9, 0
    plain.add_points(1, [[0.4, 0.5]], [1], frame_idx=1)
    plain.add_mask(2, np.eye(24, 32), frame_idx=1)
    tracker.add_points(2, **CLICK, frame_idx=2)
    tracker.add_points(3, **CLICK, frame_idx=2)
    tracker.clear_prompts(2, 2)
    tracker.remove_object(3)
    for frame in frames[:4]:
        found, expected = tracker.push(frame), plain.push(frame)
        assert found.obj_ids == expected.obj_ids and torch.equal(found.masks, expected.masks)
    tracker.add_points(1, **BOX, frame_idx=6)
    tracker.remove_object(1)
    results = [tracker.push(frame) for frame in frames[4:8]]
    assert [result.obj_ids for result in results] == [[2]] * 4
    with pytest.raises(PromptError, match="there is no object 3"):
        tracker.remove_object(3)


def test_what_is_refused_leaves_a_stream_as_it_was(frames):
    """A removal keeps the prompts that wait, and a frame that is gone is an edit that the policy does not serve."""
    tracker = StreamingTracker(Sam3TrackerPredictor(small_model(use_memory_selection=True)))
    for frame in frames[:3]:
        tracker.push(frame)
    with pytest.raises(EditRefusedError, match="frame 0 of the stream is gone: frames 2 and later are kept: a larger"):
        tracker.add_points(1, frame_idx=0, **CLICK)
    assert tracker.state.obj_ids == []
    tracker.add_points(1, frame_idx=3, **CLICK)
    tracker.add_points(2, frame_idx=3, **BOX)
    tracker.push(frames[3])
    tracker.add_points(1, frame_idx=4, **BOX)
    with pytest.raises(EditRefusedError, match=r"object 1 cannot be removed exactly: .* in one batch with \[2\]"):
        tracker.remove_object(1)
    tracker.push(frames[4])
    assert tracker.state.group_of(1).prompted_frames(1) == {3, 4}


def test_objects_come_and_go(predictor, frames):
    tracker = StreamingTracker(Sam3TrackerPredictor(predictor.model, objects="independent"))
    empty = tracker.push(frames[0])
    assert empty.obj_ids == [] and empty.masks.shape == (0, 1, 24, 32)
    tracker.push(frames[1])
    assert tracker.add_points(5, **BOX).frame_idx == 1
    assert tracker.add_points(6, **CLICK).obj_ids == [5, 6]
    assert tracker.push(frames[2]).obj_ids == [5, 6]
    tracker.remove_object(5)
    assert tracker.push(frames[3]).obj_ids == [6]
    with pytest.raises(PromptError, match="there is no object 5"):
        tracker.remove_object(5)
    tracker.add_points(6, **BOX)
    tracker.clear_prompts(6)
    assert tracker.push(frames[4]).obj_ids == [6]


def test_an_endless_source_is_read_frame_by_frame(predictor, frames):
    taken = []

    def camera():
        for t in itertools.count():
            taken.append(t)
            yield frames[t % NUM_FRAMES]

    tracker = StreamingTracker(predictor)
    tracker.add_points(1, **BOX)
    for result in tracker.run(camera()):
        assert taken[-1] == result.frame_idx
        if result.frame_idx == 40:
            break
    group = tracker.state.groups[0]
    assert len(group.bank.cond) + len(group.bank.non_cond) <= 17
    assert sum(record.pred_masks is not None for record in group.bank.non_cond.values()) == 1
    assert len(tracker.state.features) <= 2 and tracker.state.num_frames is None
    with pytest.raises(VideoInputError, match="frame 39 of the stream is gone"):
        tracker.state.source.frame(39)


def footprint(root, *outside):
    """References and bytes of tensors that something holds, through whatever it holds, but for what is outside."""
    seen, waiting = {id(thing) for thing in outside}, [root]
    num_references, storages = 0, {}
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, (type, types.ModuleType)):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
            continue
        if isinstance(thing, np.ndarray):
            storages[id(thing)] = thing.nbytes
        held = [thing.__closure__] if isinstance(thing, types.FunctionType) else gc.get_referents(thing)
        num_references += len(held)
        waiting += held
    return num_references, sum(storages.values())


@pytest.mark.parametrize(("policy", "settings"), [("no_late_edits", {}), ("recent_edits:3", SELECTION)])
def test_whatever_a_stream_holds_does_not_grow(frames, policy, settings):
    """With corrections, masks, and prompts that wait; everything is counted, not records alone."""
    predictor = Sam3TrackerPredictor(small_model(**settings), objects="independent")
    tracker = StreamingTracker(predictor, memory_policy=policy)
    sizes = []
    for t in range(120):
        if t % 10 == 0:
            tracker.add_points(1, frame_idx=t, **BOX)
            tracker.add_mask(2, np.eye(24, 32) > 0, frame_idx=t)
        result = tracker.push(frames[t % NUM_FRAMES])
        if t % 10 == 5 and policy != "no_late_edits":
            result = tracker.add_points(1, [[0.9, 0.9]], [0], clear_old_points=False)
        if t % 10 == 9:
            sizes.append(footprint(tracker, predictor, predictor.model, predictor.tracker))
    assert result.obj_ids == [1, 2]
    assert sizes[2] > sizes[0] and sizes[2][1] > 100_000  # it is counted
    assert max(sizes[6:]) <= max(sizes[3:6])


def test_two_streams_do_not_disturb_each_other(predictor, frames):
    alone, one, other = (StreamingTracker(predictor, memory_policy="no_late_edits") for _ in range(3))
    for tracker in (alone, one):
        tracker.add_points(1, **CLICK)
    other.add_points(1, **BOX)
    expected = [alone.push(frame) for frame in frames[:6]]
    for result, frame, otherwise in zip(expected, frames, frames[::-1], strict=False):
        other.push(otherwise)
        assert torch.equal(one.push(frame).masks, result.masks)


def test_the_end_of_a_stream(predictor, frames):
    tracker = StreamingTracker(predictor, memory_policy=NoLateEdits())
    tracker.add_points(1, **CLICK)
    assert [result.frame_idx for result in tracker.run(frames[:3])] == [0, 1, 2]
    assert tracker.state.num_frames == 3
    with pytest.raises(VideoInputError, match="the stream ended after 3 frames"):
        tracker.push(frames[3])
    with pytest.raises(PromptError, match="frame_idx 3: the stream ended after 3 frames"):
        tracker.add_points(1, frame_idx=3, **CLICK)


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda t: t.push(np.zeros((9, 9, 3), np.uint8)), VideoInputError, "frame 1 of the stream has 9 x 9 pixels"),
        (lambda t: t.push("frame.png"), VideoInputError, "frame 1 of the stream"),
        (lambda t: t.push(np.zeros((24, 32, 7), np.uint8)), VideoInputError, "frame 1 of the stream"),
        (lambda t: t.add_points(1, [[1.4, 0.5]], [1]), PromptError, "outside"),
        (lambda t: t.add_points(1, [[1.4, 0.5]], [1], frame_idx=5), PromptError, "outside"),
        (lambda t: t.add_points(1, frame_idx=-1, **CLICK), PromptError, "frame_idx must be"),
        (lambda t: t.add_points("a", **CLICK), PromptError, "obj_id must be an integer"),
        (lambda t: t.add_points(1, frame_idx=3, clear_old_points=False, **BOX), PromptError, "clear_old_points=True"),
        (lambda t: t.add_mask(1, np.zeros((3, 3, 3)), frame_idx=3), PromptError, "mask"),
        (lambda t: t.clear_prompts(8), PromptError, "there is no object 8"),
        (lambda t: StreamingTracker(t.predictor).state, PromptError, "nothing was pushed yet"),
        (lambda t: StreamingTracker(t.predictor, memory_policy="some"), ValueError, "unknown memory policy 'some'"),
    ],
)
def test_bad_input_is_refused_and_the_stream_goes_on(predictor, frames, act, error, message):
    tracker = StreamingTracker(predictor)
    tracker.push(frames[0])
    with pytest.raises(error, match=message):
        act(tracker)
    assert tracker.push(frames[1]).frame_idx == 1


def test_a_waiting_prompt_that_fails_leaves_its_frame_to_be_tracked(predictor, frames):
    tracker = StreamingTracker(predictor)
    tracker.add_points(1, **CLICK)
    tracker.push(frames[0])
    tracker.add_mask(2, np.zeros((24, 32)), frame_idx=1)
    tracker.add_points(3, frame_idx=1, **BOX)
    with pytest.raises(PromptError, match="the mask of object 2 is empty"):
        tracker.push(frames[1])
    assert [(result.frame_idx, result.obj_ids) for result in tracker.retrack()] == [(1, [1, 3])]
