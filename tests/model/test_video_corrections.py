"""Corrections of the text-prompted video model, and tracking on from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from video_world import (
    CLICK,
    FAST,
    LEFT,
    MIDDLE,
    RIGHT,
    SCRIPT,
    ScriptedVideo,
    assert_same_outputs,
    fixed,
    make_frames,
    run_all,
    small_model,
    start,
)

from sam3.model.memory_policy import EditRefusedError
from sam3.model.video_state import VideoState

AT_ONCE = FAST.replace(hotstart_delay=0, hotstart_unmatch_thresh=0, hotstart_dup_thresh=0)
CORRECTION: dict[str, Any] = {"points": [[0.2, 0.5], [0.9, 0.1]], "point_labels": [1, 0], "obj_id": 0}


def test_after_a_click_unknown_frames_get_everything() -> None:
    """Frames that are known track the clicked object alone; beyond them all are tracked, and new ones are found."""
    script = {t: [(0.9, LEFT), (0.8, RIGHT), *([(0.8, MIDDLE)] if t == 6 else [])] for t in range(10)}
    video = ScriptedVideo(script, AT_ONCE, tracks=fixed)
    state = video.init_state(make_frames(10))
    video.add_prompt(state, 0, text_str="thing")
    run_all(video, state, max_frame_num_to_track=4)
    video.add_prompt(state, 3, **CORRECTION)
    video.processed.clear()
    outputs = run_all(video, state)
    assert video.propagated == [0, 1, 2, 3, 4] and video.processed == [5, 6, 7, 8, 9]
    assert list(outputs) == list(range(10))
    found = [outputs[t]["out_obj_ids"].tolist() for t in range(5, 10)]
    assert found == [[0, 1], *[[0, 1, 2]] * 4]
    assert_same_outputs(outputs, run_all(video, state))
    assert len(video.processed) == 5 and len(video.propagated) == 5, "all of it is known by now"


def test_a_click_backward_of_what_is_known() -> None:
    video, state = start(10, frame_idx=4)
    run_all(video, state)
    video.add_prompt(state, 6, **CORRECTION)
    video.processed.clear()
    outputs = run_all(video, state, start_frame_idx=6, reverse=True)
    assert video.propagated == [5, 4] and video.processed == [3, 2, 1, 0]
    assert all(1 in out["out_obj_ids"] for out in outputs.values())


def test_a_frame_that_was_only_clicked_is_not_known() -> None:
    video, state = start(10)
    run_all(video, state, max_frame_num_to_track=3)
    video.add_prompt(state, 7, **CLICK)
    video.processed.clear()
    assert run_all(video, state, start_frame_idx=7)[7]["out_obj_ids"].tolist()[:2] == [0, 1]
    assert video.processed == [7, 8, 9]
    video.add_prompt(state, 5, **CLICK)
    run_all(video, state, start_frame_idx=7)
    run_all(video, state, start_frame_idx=5, max_frame_num_to_track=0)
    assert video.processed == [7, 8, 9, 5]


@pytest.mark.parametrize("stops", [[7], [5, 6, 9], [7, 11]])
def test_a_correction_in_parts_is_that_in_one_go(stops: list[int]) -> None:
    found = []
    for ends in ([11], [*stops, 11]):
        video = ScriptedVideo(SCRIPT, AT_ONCE)
        state = video.init_state(make_frames(12))
        video.add_prompt(state, 0, text_str="thing")
        before = run_all(video, state)
        video.add_prompt(state, 5, **CORRECTION)
        outputs, first = {}, 5
        for end in ends:
            if first <= end:
                outputs |= run_all(video, state, start_frame_idx=first, max_frame_num_to_track=end - first)
            first = end + 1
        found.append(outputs)
        assert video.propagated == list(range(5, 12)) and state.touched[False] == {}
        late = [(outputs[t]["out_binary_masks"], before[t]["out_binary_masks"]) for t in range(8, 12)]
        assert not all(np.array_equal(*pair) for pair in late), "the correction shows behind the first stop"
    assert_same_outputs(*found)


def test_frames_that_a_correction_left_out_are_tracked_when_they_are_asked_for() -> None:
    video = ScriptedVideo(SCRIPT, AT_ONCE)
    state = video.init_state(make_frames(12))
    video.add_prompt(state, 0, text_str="thing")
    run_all(video, state)
    video.add_prompt(state, 5, **CORRECTION)
    run_all(video, state, start_frame_idx=9)
    assert video.propagated == [9, 10, 11]
    run_all(video, state, start_frame_idx=5)
    assert video.propagated[3:] == list(range(5, 12))
    run_all(video, state, start_frame_idx=5)
    assert len(video.propagated) == 10


# --- bounded sessions -------------------------------------------------------------------------------------------------


def twins(edit_window: int, count: int, selection: bool = True) -> tuple[ScriptedVideo, list[VideoState]]:
    """A session that keeps a window and one that keeps everything; both looked for a text on frame 0."""
    settings = small_model().tracker.settings.replace(use_memory_selection=selection)
    video = ScriptedVideo(SCRIPT, AT_ONCE, tracks=fixed, tracker_settings=settings)
    states = [video.init_state(make_frames(count), edit_window=window) for window in (edit_window, None)]
    for state in states:
        video.add_prompt(state, 0, text_str="thing")
    return video, states


def track_both(video: ScriptedVideo, states: list[VideoState], first: int, last: int) -> dict[int, dict[str, Any]]:
    """Track in both; the results must be equal."""
    options = {"start_frame_idx": first, "max_frame_num_to_track": last - first}
    bounded, whole = (run_all(video, state, **options) for state in states)
    assert_same_outputs(bounded, whole)
    assert list(bounded) == list(range(first, last + 1))
    return bounded


@pytest.mark.parametrize("obj_id", [0, 7])
def test_a_bounded_session_is_corrected_like_one_that_keeps_everything(obj_id: int) -> None:
    """An object of the text, and one that the click makes; the others stay."""
    video, states = twins(6, 16)
    track_both(video, states, 0, 10)
    for frame_idx, last in ((7, 9), (8, 11), (11, 13)):
        for state in states:
            video.add_prompt(state, frame_idx, points=[[0.5, 0.5]], point_labels=[1], obj_id=obj_id)
        outputs = track_both(video, states, frame_idx, last)
        if obj_id == 7:
            assert all({0, 1} <= set(out["out_obj_ids"].tolist()) for out in outputs.values())
    track_both(video, states, 13, 15)
    assert min(states[0].cache.frames) >= 10 and len(states[1].cache.frames) == 16
    with pytest.raises(EditRefusedError, match="at frame 15"):
        video.add_prompt(states[0], 9, **CLICK)


@pytest.mark.parametrize("selection", [True, False])
def test_a_click_brings_back_conditioning_frames_from_before_the_window(selection: bool) -> None:
    """It takes that rank from the detector's frames nearby, and so farther ones are attended to again."""
    video, states = twins(3, 34, selection)
    track_both(video, states, 0, 30)
    assert sorted(states[1].groups[0].bank.cond) == list(range(0, 31, 4))
    for state in states:
        video.add_prompt(state, 29, **CORRECTION)
    assert sorted(states[1].groups[0].bank.cond) == [0, 4, 8, 12, 29]
    track_both(video, states, 29, 33)


def test_a_session_that_turned_back_keeps_what_it_has_seen_since() -> None:
    video, state = start(12, frame_idx=6, edit_window=4)
    run_all(video, state)
    run_all(video, state, reverse=True, max_frame_num_to_track=2)
    video.add_prompt(state, 5, **CLICK)
    for frame_idx in (6, 7):
        with pytest.raises(EditRefusedError, match="edit_window=4"):
            video.add_prompt(state, frame_idx, **CLICK)
