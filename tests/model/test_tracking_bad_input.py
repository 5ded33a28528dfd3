"""What malformed prompts, unknown objects and steps out of order are told; the session stays as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tracking_parts import MASK, click, make_frames, make_model

from sam3.model.sam3_image import Sam3Image
from sam3.model.sam3_tracking_predictor import Sam3TrackerPredictor
from sam3.model.tracker_state import TrackerState


@pytest.fixture(scope="module")
def model() -> Sam3Image:
    return make_model()


@pytest.fixture(scope="module")
def predictor(model: Sam3Image) -> Sam3TrackerPredictor:
    return Sam3TrackerPredictor(model)


@pytest.fixture
def state(predictor: Sam3TrackerPredictor) -> TrackerState:
    return predictor.init_state(video_path=make_frames())


BAD_POINTS = {
    "no prompt": ({}, "no prompt: give points with labels, or a box"),
    "labels missing": ({"points": [[0.5, 0.5]]}, "labels is missing"),
    "points missing": ({"labels": [1]}, "points is missing"),
    "counts differ": ({"points": [[0.5, 0.5]], "labels": [1, 0]}, r"points \(1, 2\) and labels \(2,\) do not fit"),
    "several objects": ({"points": np.zeros((2, 1, 2)), "labels": np.ones((2, 1))}, "do not fit: .* for one object"),
    "no points": ({"points": np.zeros((0, 2)), "labels": np.zeros(0)}, "do not fit"),
    "unknown label": ({"points": [[0.5, 0.5]], "labels": [7]}, "labels holds 7: a label is 1"),
    "nan": ({"points": [[0.5, float("nan")]], "labels": [1]}, "points holds values that are not finite"),
    "words": ({"points": "centre", "labels": [1]}, "points must be an array of numbers"),
    "pixels for fractions": ({"points": [[30, 20]], "labels": [1]}, r"point \(30, 20\) lies outside the frame's 0..1"),
    "left of the image": ({"points": [[-0.2, 0.5]], "labels": [1]}, r"point \(-0.2, 0.5\) lies outside"),
    "outside the model input": (
        {"points": [[10, 113]], "labels": [1], "rel_coordinates": False},
        "outside the model input's 0..112 x 0..112 pixels",
    ),
    "box inverted": ({"box": [0.5, 0.1, 0.2, 0.3]}, "box .* is inverted"),
    "box shape": ({"box": [0.5, 0.1, 0.2]}, r"box has shape \(3,\)"),
    "box outside": ({"box": [0.5, 0.1, 1.2, 0.3]}, r"box corner \(1.2, 0.3\) lies outside"),
    "box beside old points": ({"box": [0, 0, 1, 1], "clear_old_points": False}, "set clear_old_points=True"),
    "frame out of range": ({"frame_idx": 8}, "frame_idx 8 is out of range: the video has frames 0 to 7"),
    "frame before the first": ({"frame_idx": -1}, "frame_idx -1 is out of range"),
    "fraction of a frame": ({"frame_idx": 1.5}, "frame_idx must be an integer, got 1.5"),
    "name for an id": ({"obj_id": "cat"}, "obj_id must be an integer, got 'cat'"),
}


@pytest.mark.parametrize("name", BAD_POINTS)
def test_bad_points_and_boxes_are_refused_and_change_nothing(predictor, state, name: str) -> None:
    given, message = BAD_POINTS[name]
    prompt = {} if set(given) & {"points", "labels", "box"} or not given else {"points": [[0.5, 0.5]], "labels": [1]}
    arguments = {"frame_idx": 0, "obj_id": 1} | prompt | given
    with pytest.raises(ValueError, match=message):
        predictor.add_new_points_or_box(state, **arguments)
    assert state.obj_ids == [] and not state.is_trackable


BAD_MASKS = {
    "empty": (np.zeros((4, 4)), "mask of object 1 is empty"),
    "bytes": (np.full((4, 4), 255), "holds values from 255 to 255, expected 0 outside and 1"),
    "negative": (np.full((4, 4), -0.5), "holds values from -0.5"),
    "batch": (np.ones((1, 4, 4)), r"mask has shape \(1, 4, 4\), expected \(height, width\)"),
    "no pixels": (np.ones((0, 4)), "expected"),
    "infinite": (np.full((4, 4), np.inf), "not finite"),
    "none": (None, "mask"),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_bad_masks_are_refused_and_change_nothing(predictor, state, name: str) -> None:
    mask, message = BAD_MASKS[name]
    with pytest.raises(ValueError, match=message):
        predictor.add_new_mask(state, 0, 1, mask)
    assert state.obj_ids == [] and not state.is_trackable


def test_steps_out_of_order_are_refused(predictor, state) -> None:
    for call in (
        lambda: click(predictor, None, 0, 1),
        lambda: predictor.add_new_mask({}, 0, 1, MASK),
        lambda: predictor.propagate_in_video(None),
        lambda: predictor.reset_state(None),
    ):
        with pytest.raises(ValueError, match="inference_state must come from init_state"):
            call()
    with pytest.raises(RuntimeError, match="nothing to track: add points, a box or a mask"):
        predictor.propagate_in_video(state)
    with pytest.raises(RuntimeError, match="nothing to track"):
        predictor.propagate_in_video_preflight(state)
    click(predictor, state, 0, 1)
    with pytest.raises(ValueError, match="start_frame_idx 99 is out of range"):
        predictor.propagate_in_video(state, 99)
    with pytest.raises(ValueError, match="max_frame_num_to_track must be a positive integer, got -1"):
        predictor.propagate_in_video(state, 0, -1)
    with pytest.raises(ValueError, match="obj_ids must be None"):
        predictor.propagate_in_video(state, obj_ids=[1])
    with pytest.raises(ValueError, match="run_mem_encoder=False keeps no memory for later frames"):
        predictor.propagate_in_video(state, 0, 1, run_mem_encoder=False)
    assert [frame for frame, *_ in predictor.propagate_in_video(state, 0, 0, run_mem_encoder=False)] == [0]


def test_unknown_objects_are_refused(predictor, state) -> None:
    with pytest.raises(ValueError, match="there is no object 5; the objects are none yet"):
        predictor.clear_all_points_in_frame(state, 0, 5)
    click(predictor, state, 0, 1)
    with pytest.raises(ValueError, match=r"there is no object 5; the objects are \[1\]"):
        predictor.clear_all_points_in_frame(state, 0, 5)
    with pytest.raises(ValueError, match="there is no object 5"):
        predictor.remove_object(state, 5, strict=True)
    assert state.obj_ids == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "video_height must be a positive integer, got None; give height and width, or a video"),
        ({"video_height": "clip.mp4"}, "video_height must be a positive integer, got 'clip.mp4'"),
        ({"video_height": 4, "video_width": 0}, "video_width must be a positive integer, got 0"),
        ({"video_height": 4, "video_width": 4, "num_frames": 0}, "num_frames must be a positive integer"),
        ({"video_path": make_frames(), "video_width": 61}, "the video's width is 60 pixels, video_width says 61"),
        ({"video_path": make_frames(), "num_frames": 9}, "the video's length is 8, num_frames says 9: leave it out"),
        ({"video_path": iter(make_frames()), "num_frames": 8}, "that only its end tells, num_frames says 8"),
        ({"video_path": 7}, "a video must be"),
        ({"video_path": "nowhere.mp4"}, "nowhere.mp4"),
    ],
)
def test_bad_videos_are_refused(predictor, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predictor.init_state(**arguments)


@pytest.mark.parametrize("batch", [1, 2])
def test_features_of_other_shapes_are_refused(predictor, batch: int) -> None:
    """Maps that were not narrowed, and features of several frames, which would pass for features of several objects."""
    features = predictor.model.tracker_features(torch.zeros(batch, 3, 112, 112))
    if batch == 1:
        features = features._replace(fine=torch.zeros(1, 64, 32, 32))
    state = predictor.init_state(40, 60, 8, cached_features={0: features})
    with pytest.raises(ValueError, match=r"cached_features has maps .*, expected \[\(1, 8, 32, 32\), "):
        click(predictor, state, 0, 1)
    assert state.obj_ids == []


@pytest.mark.parametrize("part", ["model", "tracker"])
def test_a_model_in_training_mode_is_refused(predictor, state, part: str) -> None:
    getattr(predictor, part).train()
    try:
        for prompt in (lambda: click(predictor, state, 0, 1), lambda: predictor.add_new_mask(state, 0, 1, MASK)):
            with pytest.raises(RuntimeError, match=r"training mode.*model.eval\(\)"):
                prompt()
        assert state.obj_ids == []
    finally:
        predictor.model.eval()
    click(predictor, state, 0, 1)


def test_bad_settings_are_refused(model) -> None:
    with pytest.raises(ValueError, match="objects must be 'joint' or 'independent', got 'both'"):
        Sam3TrackerPredictor(model, objects="both")
    with pytest.raises(ValueError, match="max_cached_features 1; got 16 and 0"):
        Sam3TrackerPredictor(model, max_cached_features=0)
