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
    start,
)

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
