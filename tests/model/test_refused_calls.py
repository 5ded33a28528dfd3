"""A call that is refused leaves a session as it was, to the last bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from tracking_sessions import VIDEO_HW, HandedInFeatures, small_model
from video_world import ScriptedVideo, make_frames

from sam3.model.memory_policy import EditRefusedError, KeepEverything, NoLateEdits, RecentEdits
from sam3.model.memory_snapshots import SnapshotReplay
from sam3.model.sam3_tracking_predictor import Sam3TrackerPredictor
from sam3.model.tracker_state import TrackerState
from sam3.sam.prompts import PromptError
from sam3.video.frame_source import VideoDecodeError

Call = Callable[[Sam3TrackerPredictor, TrackerState], Any]
EMPTY = torch.zeros(VIDEO_HW)


def frozen(value: Any) -> Any:
    """All that an object holds, as something that can be compared."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.to(torch.float64).flatten().tolist()
    if isinstance(value, Mapping):
        return [(key, frozen(entry)) for key, entry in value.items()]
    if isinstance(value, (list, tuple)):
        return [frozen(entry) for entry in value]
    if dataclasses.is_dataclass(value) or type(value).__module__.startswith("sam3.model"):
        return type(value).__name__, frozen(vars(value))
    return value


def frozen_session(state: TrackerState) -> Any:
    return frozen([state.groups, state.policy])


def click(frame_idx: int, obj_id: int, **options: Any) -> Call:
    at = {"points": [[0.4, 0.6]], "labels": [1]} | options
    return lambda predictor, state: predictor.add_new_points_or_box(state, frame_idx, obj_id, **at)


def track(*arguments: Any, **options: Any) -> Call:
    return lambda predictor, state: list(predictor.propagate_in_video(state, *arguments, **options))


def session(predictor: Sam3TrackerPredictor, policy: KeepEverything | None) -> TrackerState:
    """Two objects were followed from frame 0 to 12, one was clicked again on frame 9, and a click on 15 waits."""
    features = HandedInFeatures(predictor.model.config, 20)
    state = predictor.init_state(*VIDEO_HW, 20, cached_features=features, memory_policy=policy)
    click(0, 1)(predictor, state)
    click(0, 2, points=[[0.7, 0.3]])(predictor, state)
    track(0, 8)(predictor, state)
    click(9, 1)(predictor, state)
    track(9, 3)(predictor, state)
    click(15, 2)(predictor, state)
    return state


MISTAKES: dict[str, Call] = {
    "no such frame to start": track(20),
    "a negative length": track(13, -1),
    "only one object": track(13, obj_ids=[1]),
    "a click on no frame": click(20, 1),
    "a click outside": click(14, 1, points=[[1.5, 0.5]]),
    "a label too few": click(14, 3, labels=[]),
    "a box beside old points": click(14, 1, box=[0.1, 0.1, 0.5, 0.5], clear_old_points=False),
    "an empty mask of a new object": lambda predictor, state: predictor.add_new_mask(state, 14, 3, EMPTY),
    "a mask on no frame": lambda predictor, state: predictor.add_new_mask(state, 20, 1, EMPTY + 1),
    "no such object to clear": lambda predictor, state: predictor.clear_all_points_in_frame(state, 0, 9),
    "no such object to remove": lambda predictor, state: predictor.remove_object(state, 9, strict=True),
}
LATE: dict[str, Call] = {
    "a start": track(3),
    "a start on a clicked frame that is gone": track(0),
    "a click": click(3, 1),
    "a click of a new object": click(3, 3),
    "a mask": lambda predictor, state: predictor.add_new_mask(state, 3, 1, EMPTY + 1),
    "taking back": lambda predictor, state: predictor.clear_all_points_in_frame(state, 0, 1),
    "one frame": lambda predictor, state: predictor.track_frame(state, 3),
    "removal": lambda predictor, state: predictor.remove_object(state, 1),
}
BACKWARD: dict[str, Call] = {"a start backward": track(11, reverse=True), "removal": LATE["removal"]}
CASES = [
    *[(None, name, call) for name, call in MISTAKES.items()],
    *[(policy, name, call) for policy in (NoLateEdits(), RecentEdits(3)) for name, call in LATE.items()],
    *[(SnapshotReplay(4), name, call) for name, call in BACKWARD.items()],
]


@pytest.fixture(scope="module")
def predictor() -> Sam3TrackerPredictor:
    return Sam3TrackerPredictor(small_model())


@pytest.fixture(scope="module")
def sessions(predictor: Sam3TrackerPredictor) -> dict[KeepEverything | None, TrackerState]:
    """One for each policy: no test may change it."""
    return {policy: session(predictor, policy) for policy in dict.fromkeys(policy for policy, _, _ in CASES)}


@pytest.mark.parametrize(
    ("policy", "call"),
    [(policy, call) for policy, _, call in CASES],
    ids=[f"{type(policy).__name__} {name}" for policy, name, _ in CASES],
)
def test_a_refused_call_changes_nothing(
    predictor: Sam3TrackerPredictor,
    sessions: dict[KeepEverything | None, TrackerState],
    policy: KeepEverything | None,
    call: Call,
) -> None:
    state = sessions[policy]
    before = frozen_session(state)
    with pytest.raises(PromptError if policy is None else EditRefusedError):
        call(predictor, state)
    assert frozen_session(state) == before
    assert set(state.groups[0].pending) == {15}


def test_what_is_compared_tells_states_apart(predictor: Sam3TrackerPredictor) -> None:
    state = session(predictor, NoLateEdits())
    before = frozen_session(state)
    assert frozen_session(session(predictor, NoLateEdits())) == before
    state.groups[0].bank.non_cond[12].obj_ptr[0, 0] += 1e-6
    assert frozen_session(state) != before
    track(13, 2)(predictor, state)
    assert set(state.groups[0].pending) == set()


def test_the_default_start_may_be_refused_too(predictor: Sam3TrackerPredictor) -> None:
    """It is the first frame with a prompt: with one that waits, or that still counts."""
    state = session(predictor, RecentEdits(3))
    before = frozen_session(state)
    with pytest.raises(EditRefusedError, match="tracking cannot start on frame 0 again"):
        track()(predictor, state)
    assert frozen_session(state) == before
    fresh = predictor.init_state(*VIDEO_HW, 20, cached_features=state.cached_features, memory_policy=NoLateEdits())
    click(5, 1)(predictor, fresh)
    assert [t for t, *_ in track(None, 2)(predictor, fresh)] == [5, 6, 7]


def test_text_sessions_keep_their_prompt_too() -> None:
    """A new prompt clears a session; not before its frame was encoded."""
    video = ScriptedVideo({t: [(0.9, (1, 6))] for t in range(6)})
    state = video.init_state(make_frames(6))
    video.add_prompt(state, 0, text_str="thing")
    before = frozen({k: v for k, v in vars(state).items() if k not in ("frames", "encoded")})
    read = state.frames.frame

    def torn(index: int) -> Any:
        if index == 3:
            raise VideoDecodeError("frame 3 is torn", 3)
        return read(index)

    state.frames.frame = torn  # type: ignore[method-assign]
    with pytest.raises(VideoDecodeError, match="torn"):
        video.add_prompt(state, 3, text_str="other")
    assert frozen({k: v for k, v in vars(state).items() if k not in ("frames", "encoded")}) == before
    assert state.prompt is not None and state.prompt.text == "thing"
