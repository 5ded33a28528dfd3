"""What the text-prompted video model refuses."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from video_world import (
    CLICK,
    FAST,
    LEFT,
    LOOSE,
    MIDDLE,
    RIGHT,
    SMALL,
    ScriptedVideo,
    fixed,
    make_frames,
    run_all,
    small_model,
    start,
)

from sam3.model.memory_policy import EditRefusedError
from sam3.model.sam3_video_inference import Sam3VideoInference
from sam3.model_builder import assemble_image_model
from sam3.sam.prompts import PromptError
from sam3.video.frame_source import FrameRangeError, VideoInputError

BAD_PROMPTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "nothing": ({}, PromptError, "no prompt"),
    "an empty text": ({"text_str": "  "}, PromptError, "empty"),
    "two texts": ({"text_str": ["a", "b"]}, PromptError, "one text"),
    "a frame after the end": ({"frame_idx": 8, "text_str": "x"}, FrameRangeError, "has no frame 8; it has 8"),
    "a negative frame": ({"frame_idx": -1, "text_str": "x"}, FrameRangeError, "has no frame -1"),
    "a frame that is no integer": ({"frame_idx": 1.5, "text_str": "x"}, PromptError, "1.5"),
    "a box in pixels as fractions": ({"boxes_xywh": [3, 4, 10, 10]}, PromptError, "box"),
    "a box without area": ({"boxes_xywh": [0.1, 0.1, 0.0, 0.2]}, PromptError, "no area"),
    "three numbers for a box": ({"boxes_xywh": [0.1, 0.1, 0.2]}, PromptError, "shape"),
    "too many labels of a box": ({"boxes_xywh": [0.1, 0.1, 0.2, 0.2], "box_labels": [1, 0]}, PromptError, "labels"),
    "a click with a text": ({"text_str": "x", **CLICK}, PromptError, "calls of their own"),
    "a click on nobody": ({**CLICK, "obj_id": None}, PromptError, "obj_id"),
    "a click on a name": ({**CLICK, "obj_id": "cat"}, PromptError, "'cat'"),
    "no points": ({"obj_id": 0}, PromptError, "points and point_labels"),
    "an empty list of points": ({**CLICK, "points": np.zeros((0, 2)), "point_labels": []}, PromptError, "at least one"),
    "a point outside": ({**CLICK, "points": [[20, 12]]}, PromptError, "outside the image"),
    "a point beside the video": ({**CLICK, "points": [[41, 3]], "rel_coordinates": False}, PromptError, "outside"),
    "a point that is not finite": ({**CLICK, "points": [[float("nan"), 0.1]]}, PromptError, "finite"),
    "a box corner's label": ({**CLICK, "point_labels": [2]}, PromptError, "label 2"),
    "points of three numbers": ({**CLICK, "points": [[0.1, 0.1, 0.1]]}, PromptError, "shape"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompts_are_refused_and_change_nothing(name: str) -> None:
    options, error, message = BAD_PROMPTS[name]
    video, state = start()
    with pytest.raises(error, match=message):
        video.add_prompt(state, **{"frame_idx": 0, **options})
    assert state.obj_ids == [0, 1] and state.prompt is not None and state.prompt.text == "thing"


def test_other_mistakes_are_refused() -> None:
    video, state = start()
    with pytest.raises(PromptError, match=r"no object 5 to remove; there are \[0, 1\]"):
        video.remove_object(state, 5)
    with pytest.raises(PromptError, match="obj_id must be an integer"):
        video.remove_object(state, [0])  # type: ignore[arg-type]
    with pytest.raises(FrameRangeError, match="has no frame 99"):
        next(video.propagate_in_video(state, 99))
    with pytest.raises(PromptError, match="max_frame_num_to_track"):
        next(video.propagate_in_video(state, 0, -1))
    with pytest.raises(PromptError, match="max_frame_num_to_track must be an integer from 0 on, got 'all'"):
        next(video.propagate_in_video(state, 0, "all"))  # type: ignore[arg-type]
    with pytest.raises(VideoInputError):
        video.init_state("missing.mp4")
    with pytest.raises(ValueError, match=r"video_loader_type must be one of .* got 'opencv'"):
        video.init_state(make_frames(2), video_loader_type="opencv")
    with pytest.raises(ValueError, match="edit_window"):
        video.init_state(make_frames(2), edit_window=-1)
    with pytest.raises(ValueError, match="enable_tracker=True"):
        Sam3VideoInference(assemble_image_model(SMALL).eval())
    with pytest.raises(ValueError, match="needs the detector"):
        Sam3VideoInference(assemble_image_model(SMALL, enable_detector=False, enable_tracker=True).eval())
    untrained = Sam3VideoInference(assemble_image_model(SMALL, enable_tracker=True).train())
    with pytest.raises(RuntimeError, match="training mode"):
        untrained.add_prompt(untrained.init_state(make_frames(1)), 0, text_str="x")


def test_a_bounded_session_refuses_what_it_no_longer_keeps() -> None:
    video, state = start(30, edit_window=4)
    for _ in itertools.islice(video.propagate_in_video(state), 12):
        pass
    assert state.last_frame is not None
    video.add_prompt(state, state.last_frame - 3, **CLICK)
    with pytest.raises(EditRefusedError, match="edit_window=4"):
        video.add_prompt(state, state.last_frame - 6, **CLICK)
    with pytest.raises(EditRefusedError):
        list(video.propagate_in_video(state, 0))


def test_a_session_without_a_window_goes_on_and_nowhere_else() -> None:
    video, state = start(24, frame_idx=3, edit_window=0)
    run_all(video, state, max_frame_num_to_track=8)
    for first in (3, 10, 11):
        with pytest.raises(EditRefusedError, match="at frame 11"):
            next(video.propagate_in_video(state, first))
    with pytest.raises(EditRefusedError):
        video.add_prompt(state, 11, **CLICK)
    assert list(run_all(video, state, start_frame_idx=12, max_frame_num_to_track=2)) == [12, 13, 14]
    with pytest.raises(EditRefusedError):
        next(video.propagate_in_video(state, 9, reverse=True))
    assert list(run_all(video, state, reverse=True)) == [2, 1, 0]
    with pytest.raises(EditRefusedError):
        next(video.propagate_in_video(state, 15))


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_removal_that_others_would_notice_is_refused(is_shared: bool) -> None:
    """Objects first seen together share the quality of frames; without one it is another, on dropped frames too."""
    settings = small_model().tracker.settings.replace(use_memory_selection=True, shared_iou_score=is_shared)
    script = {t: [(0.9, LEFT), (0.8, RIGHT), *([(0.8, MIDDLE)] if t > 1 else [])] for t in range(18)}
    for last, edit_window, is_exact in ((2, 4, True), (16, 4, False), (16, None, True)):
        video = ScriptedVideo(script, tracks=fixed, tracker_settings=settings)
        state = video.init_state(make_frames(18), edit_window=edit_window)
        video.add_prompt(state, 0, text_str="thing")
        run_all(video, state, max_frame_num_to_track=last)
        if last > 2:
            video.remove_object(state, 2)  # it was first seen alone
        if is_exact or not is_shared:
            video.remove_object(state, 0)
        else:
            groups = list(state.groups)
            with pytest.raises(EditRefusedError, match=r"object 0 cannot be removed exactly: .* with \[1\].*window=4"):
                video.remove_object(state, 0)
            assert state.groups == groups and state.obj_ids == [0, 1]


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_probation_on_the_way_back_that_needs_what_was_dropped_ends_the_way(is_shared: bool) -> None:
    """Object 1 is not found before frame 8, where the session began; forward it was found long enough."""
    settings = small_model().tracker.settings.replace(use_memory_selection=True, shared_iou_score=is_shared)
    script = {t: [(0.9, LEFT), *([(0.8, RIGHT)] if t >= 8 else [])] for t in range(30)}
    config = FAST.replace(hotstart_delay=5, hotstart_unmatch_thresh=3)
    found = []
    for edit_window in (None, 0):
        video = ScriptedVideo(script, config, tracks=fixed, tracker_settings=settings)
        state = video.init_state(make_frames(30), edit_window=edit_window)
        video.add_prompt(state, 8, text_str="thing")
        run_all(video, state)
        assert state.obj_ids == [0, 1]
        outputs, way_back = [], video.propagate_in_video(state, reverse=True)
        if is_shared and edit_window == 0:
            with pytest.raises(EditRefusedError, match=r"object 1 cannot be removed exactly: .* with \[0\]"):
                for frame_idx, _ in way_back:
                    outputs.append(frame_idx)
        else:
            outputs = [frame_idx for frame_idx, _ in way_back]
            assert state.obj_ids == [0], "probation ends it"
        found.append(outputs)
    whole, bounded = found
    assert whole == list(range(7, -1, -1))
    assert bounded == (whole if not is_shared else whole[: len(bounded)]) and len(bounded) >= 1


def test_damaged_weights_are_noticed() -> None:
    model = assemble_image_model(SMALL, enable_tracker=True).eval()
    with torch.no_grad():
        model.dot_prod_scoring.hs_proj.bias.fill_(float("nan"))
    video = Sam3VideoInference(model, LOOSE)
    with pytest.raises(ValueError, match="not finite"):
        video.add_prompt(video.init_state(make_frames(1)), 0, text_str="x")
