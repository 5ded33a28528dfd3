"""`handle_request` and `handle_stream_request` of the video predictor."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from video_world import ScriptedVideo, assert_same_outputs, make_frames

import sam3
from sam3.model.sam3_video_predictor import Sam3VideoPredictor, SessionError

SCRIPT = {t: [(0.9, (1, 6)), (0.8, (18, 23))] for t in range(40)}


@pytest.fixture
def predictor() -> Sam3VideoPredictor:
    return Sam3VideoPredictor(
        ScriptedVideo(SCRIPT, tracks=lambda obj_id, _: ((1, 6), (18, 23), (9, 14))[min(obj_id, 2)])
    )


def open_session(predictor: Sam3VideoPredictor, count: int = 6, **more: Any) -> str:
    return predictor.handle_request({"type": "start_session", "resource_path": make_frames(count), **more})[
        "session_id"
    ]


def prompt(predictor: Sam3VideoPredictor, session_id: str, frame_index: int = 0, **more: Any) -> dict[str, Any]:
    request = {"type": "add_prompt", "session_id": session_id, "frame_index": frame_index, **(more or {"text": "x"})}
    return predictor.handle_request(request)


def stream(predictor: Sam3VideoPredictor, session_id: str, **more: Any) -> dict[int, dict[str, Any]]:
    request = {"type": "propagate_in_video", "session_id": session_id, **more}
    return {answer["frame_index"]: answer["outputs"] for answer in predictor.handle_stream_request(request)}


def test_a_whole_session(predictor: Sam3VideoPredictor) -> None:
    session_id = open_session(predictor)
    answer = prompt(predictor, session_id, 2)
    assert answer["frame_index"] == 2 and answer["outputs"]["out_obj_ids"].tolist() == [0, 1]
    assert list(stream(predictor, session_id)) == [2, 3, 4, 5, 1, 0]
    forward = stream(predictor, session_id, propagation_direction="forward", start_frame_index=0)
    assert list(forward) == list(range(6))
    removal = {"type": "remove_object", "session_id": session_id, "obj_id": 0, "is_user_action": True}
    assert predictor.handle_request(removal) == {"is_success": True}
    again = stream(predictor, session_id, propagation_direction="backward", max_frame_num_to_track=1)
    assert {t: out["out_obj_ids"].tolist() for t, out in again.items()} == {1: [1]}
    clicked = prompt(predictor, session_id, 1, points=[[0.5, 0.5]], point_labels=[1], obj_id=4)
    assert 4 in clicked["outputs"]["out_obj_ids"]
    boxed = prompt(predictor, session_id, 0, bounding_boxes=[[0.1, 0.1, 0.3, 0.3]], bounding_box_labels=[1])
    assert boxed["frame_index"] == 0
    assert predictor.handle_request({"type": "reset_session", "session_id": session_id}) == {"is_success": True}
    assert predictor.handle_request({"type": "close_session", "session_id": session_id}) == {"is_success": True}
    assert predictor.session_ids == []


def test_sessions_of_several_threads_do_not_disturb_each_other(predictor: Sam3VideoPredictor) -> None:
    counts = [5, 7, 9]
    alone = []
    for count in counts:
        session_id = open_session(predictor, count)
        prompt(predictor, session_id)
        alone.append(stream(predictor, session_id))
    found: dict[int, dict[int, dict[str, Any]]] = {}

    def work(i: int) -> None:
        session_id = open_session(predictor, counts[i], session_id=f"thread {i}")
        prompt(predictor, session_id)
        found[i] = stream(predictor, session_id)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, expected in enumerate(alone):
        assert_same_outputs(expected, found[i])
    assert len(predictor.session_ids) == 6
    predictor.shutdown()
    assert predictor.session_ids == []


def test_closing_ends_a_stream_and_frees_the_video(predictor: Sam3VideoPredictor) -> None:
    session_id = open_session(predictor)
    prompt(predictor, session_id)
    state = predictor._sessions[session_id].state
    running = predictor.handle_stream_request({"type": "propagate_in_video", "session_id": session_id})
    next(running)
    predictor.handle_request({"type": "close_session", "session_id": session_id})
    with pytest.raises(SessionError, match="was closed"):
        next(running)
    assert state.groups == [] and state.encoded is None


BAD_REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "no type": ({}, "key 'type'"),
    "a list of types": ({"type": ["start_session"]}, "whose value is a word"),
    "an unknown type": ({"type": "track"}, "unknown request type 'track'; there are"),
    "no video": ({"type": "start_session"}, "lacks 'resource_path'"),
    "a session that is taken": (
        {"type": "start_session", "resource_path": make_frames(1), "session_id": "mine"},
        "'mine' already",
    ),
    "no session": ({"type": "add_prompt", "frame_index": 0, "text": "x"}, "lacks 'session_id'"),
    "a session that is not there": ({"type": "reset_session", "session_id": "yours"}, "no session 'yours'"),
    "a list of sessions": ({"type": "reset_session", "session_id": ["mine"]}, "no session"),
    "no frame": ({"type": "add_prompt", "session_id": "mine", "text": "x"}, "lacks 'frame_index'"),
    "an unknown option": (
        {"type": "start_session", "resource_path": make_frames(1), "editwindow": 30, "fps": 5},
        "'start_session' takes no 'editwindow', 'fps'; it takes .*'edit_window'",
    ),
    "an unknown prompt": (
        {"type": "add_prompt", "session_id": "mine", "frame_index": 0, "text": "x", "boxes": []},
        "'add_prompt' takes no 'boxes'",
    ),
    "no object": ({"type": "remove_object", "session_id": "mine"}, "lacks 'obj_id'"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_requests_are_refused(predictor: Sam3VideoPredictor, name: str) -> None:
    request, message = BAD_REQUESTS[name]
    open_session(predictor, 1, session_id="mine")
    with pytest.raises(SessionError, match=message):
        predictor.handle_request(request)


def test_bad_streams_are_refused_at_once(predictor: Sam3VideoPredictor) -> None:
    session_id = open_session(predictor, 1)
    with pytest.raises(SessionError, match="unknown stream request"):
        predictor.handle_stream_request({"type": "add_prompt", "session_id": session_id})
    with pytest.raises(SessionError, match=r"takes no 'start_frame'; it takes .*'start_frame_index'"):
        predictor.handle_stream_request({"type": "propagate_in_video", "session_id": session_id, "start_frame": 0})
    for direction in ("up", ["both"]):
        with pytest.raises(SessionError, match=r"propagation_direction .* is not one of"):
            predictor.handle_stream_request(
                {"type": "propagate_in_video", "session_id": session_id, "propagation_direction": direction}
            )


def test_the_builders_make_what_they_say() -> None:
    predictor = sam3.build_sam3_video_predictor(load_from_HF=False, config="tiny")
    video = predictor.model
    assert video.tracker.settings.use_memory_selection and video.config.hotstart_delay == 15
    assert not video.model.training
    plain = sam3.build_sam3_video_model(
        load_from_HF=False, config="tiny", apply_temporal_disambiguation=False, has_presence_token=False
    )
    assert not plain.tracker.settings.use_memory_selection and plain.config.hotstart_delay == 0
    assert not plain.config.use_presence
    with pytest.raises(ValueError, match="one device"):
        sam3.build_sam3_video_predictor(load_from_HF=False, config="tiny", gpus_to_use=[0, 1])
