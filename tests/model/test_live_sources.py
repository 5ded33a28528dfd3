"""Sessions on sources that can be read only once: what a policy promises holds, and what it does not is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tracking_sessions import noise_frames, small_model

from sam3.model.memory_policy import EditRefusedError
from sam3.model.sam3_tracking_predictor import Sam3TrackerPredictor
from sam3.sam.prompts import PromptError
from sam3.video.frame_source import FrameGoneError, FrameRangeError
from sam3.video.kept_frames import KeptFrames

NUM_FRAMES = 18
CLICK = {"points": [[0.4, 0.5]], "labels": [1]}
BOX = {"box": [0.5, 0.1, 0.9, 0.9]}


@pytest.fixture(scope="module")
def predictor():
    return Sam3TrackerPredictor(small_model())


@pytest.fixture(scope="module")
def frames():
    return noise_frames(NUM_FRAMES)


def tracked(predictor, state, start, num_frames):
    return [(t, masks) for t, _, _, masks, _ in predictor.propagate_in_video(state, start, num_frames)]


def same(found, expected):
    return [t for t, _ in found] == [t for t, _ in expected] and all(
        torch.equal(one, other) for (_, one), (_, other) in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize(
    ("policy", "oldest", "is_threaded"),
    [("recent_edits:4", 3, False), ("recent_edits:4", 3, True), ("snapshot_replay:3", 1, True), (None, 1, False)],
)
def test_edits_that_the_policy_serves(predictor, frames, policy, oldest, is_threaded):
    """The click is given while tracking goes on, when the source has come as far as the policy must look back."""
    live = predictor.init_state(video_path=iter(frames), memory_policy=policy, async_loading_frames=is_threaded)
    whole = predictor.init_state(video_path=frames)
    for state in (live, whole):
        predictor.add_new_points_or_box(state, 0, 1, **CLICK)
    assert same(tracked(predictor, live, 0, 6), tracked(predictor, whole, 0, 6))
    for state in (live, whole):
        predictor.add_new_points_or_box(state, oldest, 1, **BOX)
    assert live.source.has_frame(7)  # what is tracked next is there, and pushes none out that waits
    assert same(tracked(predictor, live, oldest, 7), tracked(predictor, whole, oldest, 7))
    live.close()


def test_edits_that_it_does_not_serve_are_refused_by_name(predictor, frames):
    state = predictor.init_state(video_path=iter(frames), memory_policy="recent_edits:3")
    predictor.add_new_points_or_box(state, 5, 1, **CLICK)  # the first prompt of all may skip frames
    with pytest.raises(EditRefusedError, match="frame 1 is gone; a live source keeps its last 4: a larger window"):
        predictor.add_new_points_or_box(state, 1, 2, **CLICK)
    assert state.obj_ids == [1]
    assert [t for t, _ in tracked(predictor, state, 5, 3)] == [5, 6, 7, 8]
    with pytest.raises(EditRefusedError, match="frame 5 can no longer be edited"):
        predictor.add_new_points_or_box(state, 5, 1, **CLICK)


@pytest.mark.parametrize("policy", ["recent_edits:3", "no_late_edits"])
def test_a_prompt_ahead_does_not_eat_the_frames_before_it(predictor, frames, policy):
    taken = itertools.count()
    state = predictor.init_state(
        video_path=(frame for frame, _ in zip(frames, taken, strict=False)), memory_policy=policy
    )
    predictor.add_new_points_or_box(state, 0, 1, **CLICK)
    for edit in (
        lambda: predictor.add_new_points_or_box(state, 10, 1, **BOX),
        lambda: predictor.add_new_mask(state, 10, 2, np.eye(24, 32) > 0),
    ):
        with pytest.raises(PromptError, match="frame 10 lies ahead, and the live source can be read only once: track"):
            edit()
    assert next(taken) == 1 and state.obj_ids == [1]  # the first frame alone was taken
    assert [t for t, _ in tracked(predictor, state, 0, 3)] == [0, 1, 2, 3]
    predictor.add_new_points_or_box(state, 4, 1, **BOX)  # the next one
    with pytest.raises(PromptError, match="frame 5 lies ahead"):
        predictor.add_new_points_or_box(state, 5, 1, **BOX)
    assert [t for t, _ in tracked(predictor, state, 4, 1)] == [4, 5]


def test_a_prompt_ahead_where_all_frames_are_kept(predictor, frames):
    live = predictor.init_state(video_path=iter(frames), memory_policy="snapshot_replay:4")
    whole = predictor.init_state(video_path=frames)
    for state in (live, whole):
        predictor.add_new_points_or_box(state, 0, 1, **CLICK)
        predictor.add_new_points_or_box(state, 5, 1, **BOX)
    assert same(tracked(predictor, live, 0, 6), tracked(predictor, whole, 0, 6))


def test_all_frames_are_kept_without_loss(frames):
    smooth = np.tile(np.arange(96, dtype=np.uint8)[:, None, None], (1, 64, 3))
    kept, window = KeptFrames(None), KeptFrames(3)
    for pixels in (*frames, *(smooth + np.uint8(t) for t in range(40))):
        kept.append(pixels)
        window.append(pixels)
    assert kept.oldest == 0 and all(np.array_equal(kept[t], frames[t]) for t in range(NUM_FRAMES))
    assert all(np.array_equal(kept[NUM_FRAMES + t], smooth + np.uint8(t)) for t in range(40))
    assert sum(map(len, kept._packed)) < sum(pixels.nbytes for pixels in frames) + 40 * smooth.nbytes / 4
    assert window.oldest == NUM_FRAMES + 37 and len(window) == 3
    with pytest.raises(IndexError, match=f"frames {NUM_FRAMES + 37} to {NUM_FRAMES + 39} are kept, not 5"):
        window[5]
    assert issubclass(FrameGoneError, FrameRangeError)
