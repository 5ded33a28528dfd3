"""Prompts, clicks and propagation of the text-prompted video model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from video_world import (
    CLICK,
    FAST,
    HEIGHT,
    LOOSE,
    SCRIPT,
    SMALL,
    WIDTH,
    ScriptedVideo,
    assert_same_outputs,
    fixed,
    make_frames,
    run_all,
    small_model,
    start,
)

from sam3.model.sam3_video_inference import Sam3VideoInference
from sam3.model.video_state import VideoState
from sam3.model_builder import assemble_image_model
from sam3.preprocess import Preprocess
from sam3.sam.prompts import PromptError
from sam3.video.frame_source import VideoDecodeError

# --- the real detector ------------------------------------------------------------------------------------------------


def test_a_text_is_found_and_followed_by_the_real_model() -> None:
    video = Sam3VideoInference(small_model(), LOOSE)
    state = video.init_state(make_frames(4))
    frame_idx, out = video.add_prompt(state, 0, text_str="red circle")
    assert frame_idx == 0 and 1 <= len(out["out_obj_ids"]) <= 3
    outputs = run_all(video, state)
    assert list(outputs) == [0, 1, 2, 3]
    assert all(len(out["out_obj_ids"]) for out in outputs.values())


def test_scores_hold_the_presence_once() -> None:
    """Also when the model gives joint scores itself."""
    found = {}
    for name, use_presence, is_joint in (("plain", True, False), ("joint", True, True), ("without", False, False)):
        video = Sam3VideoInference(small_model(), LOOSE.replace(use_presence=use_presence))
        state = video.init_state(make_frames(1))
        small_model().supervise_joint_box_scores = is_joint
        try:
            found[name] = video.add_prompt(state, 0, text_str="red circle")[1]["out_probs"]
        finally:
            small_model().supervise_joint_box_scores = False
    np.testing.assert_array_equal(found["plain"], found["joint"])
    assert found["without"].max() > found["plain"].max()


def test_a_box_speaks_for_its_frame_and_the_next() -> None:
    video = Sam3VideoInference(small_model(), LOOSE)
    state = video.init_state(make_frames(6))
    seen: dict[int, int] = {}
    detections = video._detections
    video._detections = lambda state, encoded, reverse: _note(
        seen, encoded.frame_idx, detections(state, encoded, reverse)
    )
    _, out = video.add_prompt(state, 2, boxes_xywh=[0.2, 0.2, 0.4, 0.4], box_labels=[1])
    assert len(out["out_obj_ids"])
    run_all(video, state)
    assert {t for t, count in seen.items() if count} == {2, 3}
    assert set(seen) == {2, 3, 4, 5}


def _note(seen: dict[int, int], frame_idx: int, found: Any) -> Any:
    seen[frame_idx] = len(found)
    return found


def test_boxes_in_pixels_and_fractions_are_the_same_and_several_are_taken() -> None:
    video = Sam3VideoInference(small_model(), LOOSE)
    relative, pixels = [[0.25, 0.2, 0.5, 0.4], [0.1, 0.5, 0.2, 0.2]], [[10, 6, 20, 12], [4, 15, 8, 6]]
    both = []
    for boxes, is_relative in ((relative, True), (pixels, False)):
        state = video.init_state(make_frames(1))
        options = {"boxes_xywh": boxes, "box_labels": [1, 0], "rel_coordinates": is_relative}
        both.append({0: video.add_prompt(state, 0, text_str="red circle", **options)[1]})
    assert_same_outputs(*both)
    state = video.init_state(make_frames(1))
    assert (both[0][0]["out_probs"] != video.add_prompt(state, 0, text_str="red circle")[1]["out_probs"]).any()


# --- clicks -----------------------------------------------------------------------------------------------------------


def test_a_click_starts_a_fresh_session() -> None:
    video = Sam3VideoInference(small_model(), LOOSE)
    state = video.init_state(make_frames(5))
    frame_idx, out = video.add_prompt(state, 1, **CLICK)
    assert frame_idx == 1 and out["out_obj_ids"].tolist() == [7]
    assert out["out_probs"].tolist() == [1.0] and out["frame_stats"] is None
    outputs = run_all(video, state)
    assert list(outputs) == [1, 2, 3, 4] and list(state.scores) == [7]
    assert list(run_all(video, state, reverse=True)) == [0]


def test_clicked_objects_have_no_probation_and_new_numbers_follow_them() -> None:
    video, state = start()
    video.add_prompt(state, 0, **CLICK)
    outputs = run_all(video, state)
    assert state.obj_ids == [0, 1, 7] and state.next_obj_id == 8
    assert outputs[7]["frame_stats"]["num_obj_tracked"] == 3


def test_numpys_integers_are_ids_and_frames() -> None:
    """Outputs hold them, and they come back in clicks."""
    video, state = start()
    obj_id = run_all(video, state)[3]["out_obj_ids"][1]
    assert isinstance(obj_id, np.int64)
    frame_idx, out = video.add_prompt(state, np.int64(3), **{**CLICK, "obj_id": obj_id})
    assert frame_idx == 3 and type(frame_idx) is int and state.obj_ids == [0, 1] and out["frame_stats"] is None
    assert list(run_all(video, state, start_frame_idx=np.int64(6), max_frame_num_to_track=np.int64(1))) == [6, 7]
    video.remove_object(state, obj_id)
    assert state.obj_ids == [0]


def test_a_click_changes_its_group_alone() -> None:
    """Objects 0 and 1, of another group, stay what they were on every frame."""
    video, state = start()
    before = run_all(video, state)
    video.processed.clear()
    video.add_prompt(state, 3, **CLICK)
    after = run_all(video, state, start_frame_idx=3)
    assert video.processed == [] and video.propagated == [3, 4, 5, 6, 7]
    assert all(7 in state.cache.frames[t].masks for t in after)
    boxes = {
        t: dict(zip(out["out_obj_ids"].tolist(), out["out_boxes_xywh"].tolist(), strict=True))
        for t, out in after.items()
    }
    for t, out in before.items():
        for obj_id, box in zip(out["out_obj_ids"].tolist(), out["out_boxes_xywh"].tolist(), strict=True):
            if t >= 3:
                assert boxes[t][obj_id] == box  # boxes are those of the masks before overlaps are resolved


def test_a_correction_makes_its_frame_conditioning_and_demotes_the_detectors() -> None:
    video, state = start()
    run_all(video, state)
    (group,) = state.groups
    pointers = group.bank.non_cond[5].obj_ptr
    assert 0 in group.bank.cond
    _, out = video.add_prompt(state, 5, points=[[0.2, 0.5], [0.9, 0.1]], point_labels=[1, 0], obj_id=0)
    assert out["out_probs"].tolist()[0] == 1.0
    (group,) = state.groups
    assert set(group.bank.cond) == {5} and group.clicked_frames == {5}
    assert group.bank.cond[5].maskmem_features is not None
    differs = (group.bank.cond[5].obj_ptr != pointers).any(dim=1).tolist()
    assert differs == [True, False]
    video.propagated.clear()
    list(video.propagate_in_video(state, 5))
    assert video.propagated == [5, 6, 7]
    list(video.propagate_in_video(state, 5, reverse=True))
    assert video.propagated[3:] == [4, 3, 2, 1, 0]
    video.propagated.clear()
    list(video.propagate_in_video(state, 0))  # all of it is known by now
    assert video.propagated == []


def test_a_click_on_a_removed_number_makes_a_new_object() -> None:
    video, state = start()
    run_all(video, state)
    video.remove_object(state, 0)
    assert all(set(cached.masks) == {1} for cached in state.cache.frames.values())
    video.add_prompt(state, 4, points=[[0.5, 0.5]], point_labels=[1], obj_id=0)
    assert state.obj_ids == [0, 1] and len(state.groups) == 2


# --- propagation ------------------------------------------------------------------------------------------------------


def test_what_is_known_is_handed_out_again_without_computing() -> None:
    video, state = start()
    first = run_all(video, state)
    video.processed.clear()
    assert_same_outputs(first, run_all(video, state))
    part = run_all(video, state, start_frame_idx=2, max_frame_num_to_track=3)
    assert list(part) == [2, 3, 4, 5]
    video.remove_object(state, 1)
    assert all(out["out_obj_ids"].tolist() == [0] for out in run_all(video, state).values())
    assert video.processed == []


def test_forward_and_backward_from_the_middle() -> None:
    video, state = start(10, frame_idx=4)
    assert list(run_all(video, state)) == [4, 5, 6, 7, 8, 9]
    assert list(run_all(video, state, reverse=True)) == [3, 2, 1, 0]
    assert list(run_all(video, state, reverse=True, max_frame_num_to_track=2)) == [3, 2]
    video.processed.clear()
    assert list(run_all(video, state, start_frame_idx=0)) == list(range(10))
    assert video.processed == []


def test_a_propagation_can_go_on_where_it_stopped() -> None:
    video, state = start(10)
    first = run_all(video, state, max_frame_num_to_track=4)
    assert list(first) == [0, 1, 2, 3, 4]
    assert list(run_all(video, state, start_frame_idx=5)) == [5, 6, 7, 8, 9]


def test_a_new_text_resets_the_session() -> None:
    video, state = start()
    run_all(video, state)
    video.add_prompt(state, 2, text_str="other thing")
    assert state.first_frame == 2 and state.obj_ids == [0, 1] and list(state.cache.frames) == [2]
    video.reset_state(state)
    assert state.obj_ids == [] and state.groups == [] and state.prompt is None
    with pytest.raises(PromptError, match="nothing to propagate"):
        next(iter(video.propagate_in_video(state)))


@pytest.mark.parametrize("edit", ["prompt", "click", "removal"])
def test_an_edit_ends_a_running_propagation(edit: str) -> None:
    video, state = start()
    running = video.propagate_in_video(state)
    next(running)
    edits: dict[str, Callable[[], Any]] = {
        "prompt": lambda: video.add_prompt(state, 0, text_str="x"),
        "click": lambda: video.add_prompt(state, 0, **CLICK),
        "removal": lambda: video.remove_object(state, 1),
    }
    edits[edit]()
    with pytest.raises(RuntimeError, match="edited while"):
        next(running)


def test_a_live_source_is_followed_to_its_end() -> None:
    """With the results of a video whose length is known, unless that has fewer than 16 frames."""
    outputs = []
    for frames in (iter(make_frames(18)), make_frames(18)):
        video = ScriptedVideo(SCRIPT)
        state = video.init_state(frames)
        assert (state.num_frames, state.edit_window) == ((18, None) if isinstance(frames, list) else (None, 0))
        video.add_prompt(state, 0, text_str="thing")
        outputs.append(run_all(video, state))
    assert list(outputs[0]) == list(range(18))
    assert_same_outputs(*outputs)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), VideoDecodeError("the file is cut off", 6)])
def test_what_waits_is_handed_out_before_a_run_ends_early(monkeypatch, stop: BaseException) -> None:
    """Results on probation are done: Ctrl-C and a damaged file keep them."""
    video = ScriptedVideo(SCRIPT, dataclasses.replace(FAST, hotstart_delay=15), tracks=fixed)
    state = video.init_state(make_frames(9))
    video.add_prompt(state, 0, text_str="thing")
    original, found = video.process_frame, []

    def process_frame(state: VideoState, frame_idx: int, reverse: bool = False) -> Any:
        if frame_idx == 6:
            raise stop
        return original(state, frame_idx, reverse)

    monkeypatch.setattr(video, "process_frame", process_frame)
    with pytest.raises(type(stop)):
        for frame_idx, out in video.propagate_in_video(state):
            found.append((frame_idx, out["out_obj_ids"].tolist()))
    assert found == [(t, [0, 1]) for t in range(6)]


def test_a_picture_is_a_video_of_one_frame(tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    Image.fromarray(make_frames(1)[0]).save(path)
    video = ScriptedVideo(SCRIPT)
    state = video.init_state(path)
    assert state.num_frames == 1 and state.size_hw == (HEIGHT, WIDTH)
    video.add_prompt(state, 0, text_str="thing")
    assert list(run_all(video, state)) == [0]


def test_a_letterboxed_model_gives_masks_in_the_videos_frame() -> None:

    video = Sam3VideoInference(
        assemble_image_model(SMALL, Preprocess(84, "letterbox"), enable_tracker=True).eval(), LOOSE
    )
    state = video.init_state(make_frames(3))
    _, out = video.add_prompt(state, 0, **CLICK)
    assert out["out_binary_masks"].shape[1:] == (HEIGHT, WIDTH)
    assert list(run_all(video, state)) == [0, 1, 2]
