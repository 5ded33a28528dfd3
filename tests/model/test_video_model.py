"""The loop of the text-prompted video model on scripted detections, with the real tracker."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from video_world import (
    FAST,
    HEIGHT,
    SIDE,
    WIDTH,
    ScriptedVideo,
    assert_same_outputs,
    make_frames,
    noise_features,
    run_all,
    small_model,
    strip,
)

from sam3.model.sam3_video_inference import Sam3VideoInference
from sam3.model.video_config import VideoConfig
from sam3.model.video_groups import encode_tracked_memory, resize, stored_mask_logits
from sam3.model.video_state import VideoState

LEFT, MIDDLE, RIGHT = (1, 6), (9, 14), (18, 23)


def fixed(*columns: tuple[int, int]) -> Any:
    """Tracked masks that stay where they are: object i in ``columns[i]``."""
    return lambda obj_id, frame_idx: columns[obj_id]


def start(video: ScriptedVideo, count: int, frame_idx: int = 0, **options: Any) -> tuple[VideoState, dict[str, Any]]:
    state = video.init_state(make_frames(count), **options)
    return state, video.add_prompt(state, frame_idx, text_str="thing")[1]


def ids(outputs: dict[int, dict[str, Any]]) -> dict[int, list[int]]:
    return {t: out["out_obj_ids"].tolist() for t, out in outputs.items()}


# --- one frame --------------------------------------------------------------------------------------------------------


def test_outputs_are_sorted_and_typed() -> None:
    _, out = start(ScriptedVideo({0: [(0.55, RIGHT), (0.9, LEFT)]}), 2)
    assert out["out_obj_ids"].dtype == np.int64 and out["out_obj_ids"].tolist() == [0, 1]
    assert out["out_probs"].dtype == np.float32
    np.testing.assert_allclose(out["out_probs"], [0.55, 0.9], rtol=1e-6)
    assert out["out_binary_masks"].dtype == np.bool_ and out["out_binary_masks"].shape == (2, HEIGHT, WIDTH)
    assert out["frame_stats"] == {"num_obj_tracked": 2, "num_obj_dropped": 0}
    for box, mask in zip(out["out_boxes_xywh"], out["out_binary_masks"], strict=True):
        rows, columns = np.nonzero(mask)
        x, y = columns.min() / WIDTH, rows.min() / HEIGHT
        np.testing.assert_allclose(box, [x, y, columns.max() / WIDTH - x, rows.max() / HEIGHT - y], rtol=1e-6)
    assert out["out_boxes_xywh"][0, 0] > out["out_boxes_xywh"][1, 0]


def test_a_frame_without_objects_has_empty_outputs() -> None:
    _, out = start(ScriptedVideo({}), 2)
    assert {name: out[name].shape for name in out if name != "frame_stats"} == {
        "out_obj_ids": (0,),
        "out_probs": (0,),
        "out_boxes_xywh": (0, 4),
        "out_binary_masks": (0, HEIGHT, WIDTH),
    }


def test_pixels_of_two_objects_go_to_the_likelier() -> None:
    _, out = start(ScriptedVideo({0: [(0.6, (2, 12)), (0.9, (8, 20))]}), 1)
    first, second = out["out_binary_masks"]
    assert not (first & second).any()
    alone = start(ScriptedVideo({0: [(0.9, (8, 20))]}), 1)[1]["out_binary_masks"][0]
    np.testing.assert_array_equal(second, alone)
    assert out["out_boxes_xywh"][0, 2] > first.any(0).sum() / WIDTH  # boxes are those of the whole masks


def test_small_holes_and_specks_of_new_objects_are_filled() -> None:
    video = ScriptedVideo({0: [(0.9, LEFT)]})
    with_hole = strip(*LEFT)
    with_hole[8:10, 2:4] = -8.0
    with_hole[22, 20] = 8.0
    video._detections = lambda *_: dataclasses.replace(_scripted(video, [0.9]), masks=with_hole[None])
    out = start(video, 1)[1]["out_binary_masks"][0]
    np.testing.assert_array_equal(out, start(ScriptedVideo({0: [(0.9, LEFT)]}), 1)[1]["out_binary_masks"][0])


def _scripted(video: ScriptedVideo, scores: list[float]) -> Any:
    from sam3.model.video_detection import Detections

    return Detections(scores, torch.zeros(len(scores), SIDE, SIDE))


# --- objects come and go ----------------------------------------------------------------------------------------------


def test_objects_are_accepted_numbered_and_limited() -> None:
    script = {0: [(0.51, LEFT)], 1: [(0.69, RIGHT)], 2: [(0.7, RIGHT), (0.8, MIDDLE)], 3: [(0.9, (14, 17))]}
    config = dataclasses.replace(FAST, hotstart_delay=0, max_num_objects=2)
    video = ScriptedVideo(script, config, fixed(LEFT, MIDDLE))
    state, _ = start(video, 4)
    outputs = run_all(video, state)
    assert ids(outputs) == {0: [0], 1: [0], 2: [0, 1], 3: [0, 1]}
    assert [out["frame_stats"]["num_obj_dropped"] for out in outputs.values()] == [0, 0, 1, 1]
    np.testing.assert_allclose(outputs[3]["out_probs"], [0.51, 0.8], rtol=1e-6)
    assert [(group.obj_ids, group.first_frame) for group in state.groups] == [([0], 0), ([1], 2)]


def test_an_object_without_confirmation_disappears_from_frames_that_wait() -> None:
    script = {0: [(0.9, LEFT), (0.9, RIGHT)], **{t: [(0.9, LEFT)] for t in range(1, 8)}}
    video = ScriptedVideo(script, tracks=fixed(LEFT, RIGHT))
    state, out = start(video, 8)
    assert out["out_obj_ids"].tolist() == [0, 1]  # the prompted frame is shown at once
    outputs = run_all(video, state)
    assert ids(outputs) == {t: [0] for t in range(8)}
    assert list(state.scores) == [0] and state.groups[0].obj_ids == [0]
    assert all(record.num_objects == 1 for record in state.groups[0].bank.non_cond.values())


def test_results_wait_for_the_probation_and_all_come_out() -> None:
    video = ScriptedVideo({t: [(0.9, LEFT)] for t in range(40)}, VideoConfig(), fixed(LEFT))
    state, _ = start(video, 20)
    video.processed.clear()
    latency = []
    for t, _ in video.propagate_in_video(state):
        latency.append(len(video.processed) - 1 - t)
    assert latency == [14] * 6 + list(range(13, -1, -1))
    assert video.processed == list(range(20))


def test_a_removed_number_is_never_used_again() -> None:
    script = {0: [(0.9, LEFT)], 4: [(0.9, RIGHT)]}
    video = ScriptedVideo(script, tracks=lambda i, t: LEFT if i == 0 else RIGHT)
    state, _ = start(video, 6)
    assert ids(run_all(video, state))[5] == [1]


def test_the_object_that_came_back_later_is_hidden_in_outputs_and_memory() -> None:
    # Object 1 is hidden on frame 2 and comes back on the place of object 0, which was hidden on frame 1.
    def tracks(obj_id: int, t: int) -> tuple[int, int]:
        empty = (obj_id == 0 and t == 1) or (obj_id == 1 and t == 2)
        return (0, 0) if empty else LEFT if obj_id == 0 or t > 2 else RIGHT

    script = {0: [(0.9, LEFT), (0.9, RIGHT)]} | {t: [(0.6, LEFT), (0.6, RIGHT)] for t in range(1, 5)}
    video = ScriptedVideo(script, tracks=tracks)
    state, _ = start(video, 5)
    assert ids(run_all(video, state)) == {0: [0, 1], 1: [1], 2: [0], 3: [0], 4: [0]}
    assert state.last_occluded == {0: 1, 1: 4}


def test_memory_holds_the_shown_masks() -> None:
    video = ScriptedVideo({t: [(0.9, LEFT)] for t in range(3)}, tracks=fixed(LEFT), memory_dtype=torch.float32)
    state, _ = start(video, 3)
    run_all(video, state)
    features = video.encode(state, 2, need_detector=False).tracker
    expected = encode_tracked_memory(video.tracker, features, strip(*LEFT)[None, None])
    torch.testing.assert_close(state.groups[0].bank.non_cond[2].maskmem_features, expected)


def test_memory_has_the_size_of_its_encoder_under_any_rules() -> None:
    """Hugging Face's rules change the size of mask prompts, not that of masks that were tracked."""
    tracker, features = small_model().tracker, noise_features(0)
    theirs = copy.copy(tracker)
    theirs.settings = tracker.settings.replace(hugging_face_rules=True)
    assert theirs.mask_prompt_size != tracker.mask_prompt_size
    masks = torch.randn(2, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(*(encode_tracked_memory(each, features, masks) for each in (tracker, theirs)))


# --- renewal ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("logit", "is_renewed"), [(0.9, True), (0.8, False)])
def test_a_sure_detection_renews_pointer_and_not_memory(logit: float, is_renewed: bool) -> None:
    script = {t: [(0.85, LEFT), (0.75, RIGHT)] for t in range(6)}
    video = ScriptedVideo(script, tracks=fixed(LEFT, RIGHT), track_logit=logit, memory_dtype=torch.float32)
    plain = ScriptedVideo(
        script,
        dataclasses.replace(FAST, recondition_every_nth_frame=0),
        fixed(LEFT, RIGHT),
        memory_dtype=torch.float32,
    )
    banks = []
    for each in (video, plain):
        state, _ = start(each, 6)
        run_all(each, state, max_frame_num_to_track=4)
        banks.append(state.groups[0].bank)
    assert (4 in banks[0].cond) == is_renewed and 4 not in banks[1].cond
    ours, theirs = banks[0].cond.get(4) or banks[0].non_cond[4], banks[1].non_cond[4]
    differs = [bool((ours.obj_ptr[i] != theirs.obj_ptr[i]).any()) for i in range(2)]
    assert differs == [is_renewed, False]  # 0.75 is not sure enough
    if is_renewed:
        assert ours.object_score_logits[0].item() == 10.0
    # Frame 0 was processed twice and renewed too, so that memories differ by rounding of what came before.
    assert ours.maskmem_features is not None and theirs.maskmem_features is not None
    torch.testing.assert_close(ours.maskmem_features, theirs.maskmem_features)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_renewed_frame_conditions_all_objects_and_shows_what_was_tracked(reverse: bool) -> None:
    """On frames that are multiples of four, either way; the detection is one column wider than the tracked mask."""
    script = {t: [(0.85, (1, 7)), (0.75, RIGHT)] for t in range(9)}
    video = ScriptedVideo(script, tracks=fixed(LEFT, RIGHT))
    state, _ = start(video, 9, frame_idx=8 if reverse else 0)
    outputs = run_all(video, state, reverse=reverse)
    (group,) = state.groups
    assert group.obj_ids == [0, 1] and set(group.bank.cond) == {0, 4, 8}
    record, scene = group.bank.cond[4], state.scene
    prompt = (resize(strip(1, 7)[None, None], scene.tracker.mask_prompt_size) > 0).to(torch.float32)
    expected = scene.tracker.use_mask_as_output(noise_features(4), prompt)
    assert record.pred_masks is not None
    torch.testing.assert_close(record.pred_masks[:1], stored_mask_logits(scene, prompt))
    torch.testing.assert_close(record.obj_ptr[:1], expected.obj_ptr)
    assert record.pred_masks[1].abs().max() < 100 and float(record.object_score_logits[1]) != 10.0
    shown = outputs[4]["out_binary_masks"]
    np.testing.assert_array_equal(shown, outputs[5]["out_binary_masks"])
    assert shown.any(axis=(1, 2)).all()


def test_probation_counts_backward_too() -> None:
    script = {8: [(0.9, LEFT), (0.9, RIGHT)], **{t: [(0.9, LEFT)] for t in range(8)}}
    video = ScriptedVideo(script, tracks=fixed(LEFT, RIGHT))
    state, out = start(video, 9, frame_idx=8)
    assert out["out_obj_ids"].tolist() == [0, 1]
    assert ids(run_all(video, state, reverse=True)) == {t: [0] for t in range(7, -1, -1)}
    assert list(state.scores) == [0]


# --- memory -----------------------------------------------------------------------------------------------------------


def kept_tensors(state: VideoState) -> tuple[int, int]:
    """Number and bytes of all tensors that a session can reach, and the number of other things in it."""
    seen: set[int] = set()
    tensors: list[Tensor] = []
    others = 0
    todo: list[Any] = [vars(state)]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, (torch.nn.Module, type)) or item is state.frames:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            tensors.append(item)
        elif isinstance(item, dict):
            todo += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            todo += item
        elif hasattr(item, "__dict__"):
            todo.append(vars(item))
        else:
            others += 1
    return len(tensors), sum(t.untyped_storage().nbytes() for t in tensors)


CROWDED = {
    t: [(0.9, LEFT), *([(0.8, MIDDLE)] if t >= 5 else []), *([(0.8, RIGHT)] if t % 7 == 6 else [])] for t in range(180)
}
"""Object 0 and 1 stay; on the right new ones come and end again and again."""


def crowded_tracks(obj_id: int, frame_idx: int) -> tuple[int, int]:
    return (LEFT, MIDDLE)[obj_id] if obj_id < 2 else RIGHT


@pytest.mark.parametrize("selection", [True, False])
def test_a_forward_session_stays_the_same_size(selection: bool) -> None:
    settings = small_model().tracker.settings.replace(use_memory_selection=selection)
    video = ScriptedVideo(CROWDED, tracks=crowded_tracks, tracker_settings=settings)
    state, _ = start(video, 108, edit_window=0)
    sizes = {}
    for t, _ in video.propagate_in_video(state):
        sizes[t] = kept_tensors(state)
    assert max(sizes[t][0] for t in range(70, 105)) <= max(sizes[t][0] for t in range(35, 70))
    assert max(sizes[t][1] for t in range(70, 105)) <= max(sizes[t][1] for t in range(35, 70))
    assert sizes[100][0] < 250
    assert len(state.cache.frames) == 0 and len(state.scores) <= 3 and len(state.hotstart.objects) <= 3


@pytest.mark.parametrize(("limit", "count"), [(3, 36), (10_000, 16)])
def test_objects_that_come_and_go_are_bounded_by_their_limit_alone(limit: int, count: int) -> None:
    """Every third frame has a newcomer, which stays for two frames and passes probation; nobody is dropped."""
    config = FAST.replace(
        hotstart_delay=0, hotstart_unmatch_thresh=0, hotstart_dup_thresh=0, recondition_every_nth_frame=0
    ).replace(max_num_objects=limit)
    script = {t: [(0.9, RIGHT)] for t in range(0, count, 3)}
    video = ScriptedVideo(script, config, tracks=lambda obj_id, t: RIGHT if 0 <= t - 3 * obj_id < 2 else (0, 0))
    state, _ = start(video, count, edit_window=0)
    sizes, found = {}, {}
    for t, out in video.propagate_in_video(state):
        sizes[t], found[t] = kept_tensors(state), out["out_obj_ids"].tolist()
    assert found[3] == found[4] == [1] and found[5] == []
    assert len(state.scores) == len(state.groups) == min(limit, -(-count // 3))
    if limit == 3:
        for i in (0, 1):
            assert max(sizes[t][i] for t in range(31, 36)) <= max(sizes[t][i] for t in range(26, 31))


@functools.cache
def forward_and_backward(selection: bool, edit_window: int | None) -> tuple[dict[int, Any], dict[int, Any]]:
    """Outputs of a session that begins on frame 18 of 40; objects come and end."""
    settings = small_model().tracker.settings.replace(use_memory_selection=selection)
    video = ScriptedVideo(CROWDED, dataclasses.replace(FAST, max_num_objects=4), tracker_settings=settings)
    state, _ = start(video, 40, frame_idx=18, edit_window=edit_window)
    return run_all(video, state), run_all(video, state, reverse=True)


@pytest.mark.parametrize("selection", [True, False])
@pytest.mark.parametrize("edit_window", [0, 5])
def test_dropping_changes_nothing(selection: bool, edit_window: int) -> None:
    """Also backward from where the session began."""
    kept, dropped = forward_and_backward(selection, None), forward_and_backward(selection, edit_window)
    assert [len(outputs) for outputs in kept] == [22, 18]
    for expected, found in zip(kept, dropped, strict=True):
        assert_same_outputs(expected, found)


def test_two_sessions_on_one_model_do_not_disturb_each_other() -> None:
    scripts = [{t: [(0.9, LEFT)] for t in range(12)}, {t: [(0.8, RIGHT), (0.9, MIDDLE)] for t in range(12)}]
    alone = []
    for seed, script in enumerate(scripts):
        video = ScriptedVideo(script)
        state = video.init_state(make_frames(12, seed))
        video.add_prompt(state, 0, text_str="thing")
        alone.append(run_all(video, state))
    videos = [ScriptedVideo(script) for script in scripts]
    states = [video.init_state(make_frames(12, seed)) for seed, video in enumerate(videos)]
    for video, state in zip(videos, states, strict=True):
        video.add_prompt(state, 0, text_str="thing")
    together: list[dict[int, dict[str, Any]]] = [{}, {}]
    pairs = zip(*(v.propagate_in_video(s) for v, s in zip(videos, states, strict=True)), strict=True)
    for both in pairs:
        for outputs, (t, out) in zip(together, both, strict=True):
            outputs[t] = out
    for expected, found in zip(alone, together, strict=True):
        assert_same_outputs(expected, found)


def test_the_models_own_tracker_keeps_its_settings() -> None:
    model = small_model()
    video = Sam3VideoInference(model, memory_dtype=torch.float32)
    assert video.tracker.settings.use_memory_selection and not model.tracker.settings.use_memory_selection
    assert model.tracker.memory_dtype == torch.bfloat16
    assert video.tracker.no_obj_ptr is model.tracker.no_obj_ptr
    assert len(list(video.tracker.parameters())) == len(list(model.tracker.parameters()))
