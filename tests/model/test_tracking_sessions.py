"""What a session promises: edits at any time, no effect on others, nothing lost, nothing computed in vain."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from tracking_parts import CONFIG, HEIGHT, MASK, NUM_FRAMES, WIDTH, click, make_frames, make_model, track

from sam3.model.sam3_image import Sam3Image
from sam3.model.sam3_tracking_predictor import Sam3TrackerPredictor
from sam3.model.tracker_state import TrackerState
from sam3.model_builder import assemble_image_model
from sam3.preprocess import Preprocess
from sam3.video.frame_source import VideoDecodeError


@pytest.fixture(scope="module")
def model() -> Sam3Image:
    return make_model()


@pytest.fixture(scope="module")
def predictor(model: Sam3Image) -> Sam3TrackerPredictor:
    return Sam3TrackerPredictor(model)


@pytest.fixture
def state(predictor: Sam3TrackerPredictor) -> TrackerState:
    return predictor.init_state(video_path=make_frames())


def assert_same(found: dict[int, Tensor], expected: dict[int, Tensor], row: slice = slice(None)) -> None:
    assert found.keys() == expected.keys()
    for frame, masks in found.items():
        torch.testing.assert_close(masks, expected[frame][row], atol=1e-4, rtol=0)


# --- results --------------------------------------------------------------------------------------------------------


def test_shapes_ids_and_the_frames_that_are_visited(predictor, state) -> None:
    frame, obj_ids, low_res, masks = click(predictor, state, 2, 5)
    assert (frame, obj_ids, low_res) == (2, [5], None)
    assert masks.shape == (1, 1, HEIGHT, WIDTH) and masks.dtype == torch.float32
    click(predictor, state, 2, 3)
    side = CONFIG.low_res_mask_size
    for _, obj_ids, low_res, masks, scores in predictor.propagate_in_video(state):
        assert obj_ids == [5, 3]
        assert (low_res.shape, masks.shape, scores.shape) == ((2, 1, side, side), (2, 1, HEIGHT, WIDTH), (2, 1))
        obj_ids.clear()  # a copy: it changes nothing
    assert state.obj_ids == [5, 3]
    assert list(track(predictor, state)) == [2, 3, 4, 5, 6, 7]
    assert list(track(predictor, state, 3, 2)) == [3, 4, 5]
    assert list(track(predictor, state, max_frame_num_to_track=0)) == [2]
    assert list(track(predictor, state, 2, reverse=True)) == [2, 1, 0]
    assert list(track(predictor, state, 0, reverse=True)) == [0]
    assert state["frames_already_tracked"][0] == {"reverse": True}


def test_results_carry_no_gradient(predictor, state) -> None:
    _, _, _, masks = click(predictor, state, 0, 1)
    assert not masks.requires_grad
    assert not any(x.requires_grad for out in predictor.propagate_in_video(state) for x in out[2:])
    assert not any(t.requires_grad for t in state.groups[0].bank.non_cond[1]._tensors().values())


def test_an_object_without_anything_on_a_frame_is_nowhere(predictor, state) -> None:
    click(predictor, state, 0, 1)
    _, obj_ids, _, masks = click(predictor, state, 4, 2)
    assert obj_ids == [1, 2]
    assert bool((masks[0] < -1023).all()) and bool((masks[1] > -1023).any())


def test_the_released_names_of_the_state(predictor, state) -> None:
    click(predictor, state, 0, 4)
    predictor.add_new_mask(state, 1, 9, MASK)
    track(predictor, state)
    assert state["num_frames"] == NUM_FRAMES and (state["video_height"], state["video_width"]) == (HEIGHT, WIDTH)
    assert state["obj_id_to_idx"] == {4: 0, 9: 1} and state["obj_idx_to_id"] == {0: 4, 1: 9}
    assert list(state["point_inputs_per_obj"][0]) == [0] and state["mask_inputs_per_obj"][1] == [1]
    assert state["tracking_has_started"] and state["first_ann_frame_idx"] == 0
    assert state["consolidated_frame_inds"] == [0, 1]
    stores = state["output_dict_per_obj"][1]
    assert sorted(stores["non_cond_frame_outputs"]) == [2, 3, 4, 5, 6, 7]
    assert stores["cond_frame_outputs"][0].num_objects == 1
    assert set(state.keys()) >= {"images", "device", "storage_device", "cached_features"} and "images" in state
    with pytest.raises(KeyError, match="the state has video_height"):
        state["output"]


# --- prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["stretch", "letterbox"])
def test_coordinates_arrive_in_the_model_frame(mode: str) -> None:
    size = CONFIG.image_size_px
    model = assemble_image_model(
        CONFIG, Preprocess(size_px=size, mode=mode), enable_tracker=True, enable_detector=False
    ).eval()
    predictor = Sam3TrackerPredictor(model)
    state = predictor.init_state(video_path=make_frames())
    predictor.add_new_points(state, 0, 1, points=[[0.5, 1.0]], labels=[0], box=[0.1, 0.2, 0.6, 0.7])
    pixels = torch.tensor([[6.0, 8.0], [36.0, 28.0], [30.0, 40.0]])
    stored = state.groups[0].points[1][0]
    torch.testing.assert_close(stored.coords_px[0], model.preprocess.coords_to_model(pixels, (HEIGHT, WIDTH)))
    assert stored.labels.tolist() == [[2, 3, 0]]
    predictor.add_new_points(state, 1, 1, points=stored.coords_px[:, 2:], labels=[[0]], rel_coordinates=False)
    torch.testing.assert_close(state.groups[0].points[1][1].coords_px, stored.coords_px[:, 2:])


def test_points_are_added_or_replaced_and_at_most_sixteen_count(predictor, state, caplog) -> None:
    click(predictor, state, 0, 1, x=0.25)
    click(predictor, state, 0, 1, x=0.5, clear_old_points=False)
    assert state.groups[0].points[1][0].coords_px[0, :, 0].tolist() == [28.0, 56.0]
    click(predictor, state, 0, 1, x=0.75)
    assert state.groups[0].points[1][0].coords_px[0, :, 0].tolist() == [84.0]
    xs = np.arange(20) / 20
    with caplog.at_level(logging.WARNING):
        predictor.add_new_points(state, 0, 1, points=np.stack([xs, xs], axis=1), labels=np.ones(20))
    assert "20 points on one frame: the first 8 and the last 8 count" in caplog.text
    found = state.groups[0].points[1][0].coords_px[0, :, 0] / CONFIG.image_size_px
    torch.testing.assert_close(found, torch.from_numpy(np.r_[xs[:8], xs[12:]]).float())


def test_a_second_click_starts_from_the_first_mask(predictor, state) -> None:
    click(predictor, state, 0, 1)
    _, _, _, refined = click(predictor, state, 0, 1, x=0.2, clear_old_points=False)
    fresh = predictor.init_state(video_path=make_frames())
    _, _, _, at_once = predictor.add_new_points(fresh, 0, 1, points=[[0.5, 0.5], [0.2, 0.5]], labels=[1, 1])
    assert (refined - at_once).abs().max() > 0.01


def test_a_mask_is_shown_as_it_was_given_and_the_last_writer_wins(predictor, state) -> None:
    _, _, _, masks = predictor.add_new_mask(state, 0, 1, MASK)
    assert torch.equal(masks[0, 0] > 0, torch.from_numpy(MASK)) and masks.abs().min() == 1024
    other = np.zeros((HEIGHT * 2, WIDTH * 2), dtype=np.float32)
    other[20:40, 20:70] = 1
    _, _, _, masks = predictor.add_new_mask(state, 0, 2, other)
    assert torch.equal(masks[1, 0] > 0, torch.from_numpy(other[::2, ::2] > 0.5))
    assert torch.equal(masks[0, 0] > 0, torch.from_numpy(MASK & (other[::2, ::2] < 0.5)))
    tracked = track(predictor, state, 0, 0)[0]
    assert ((tracked > 0) != (masks > 0)).float().mean() < 0.05


def test_an_empty_mask_says_that_a_known_object_is_absent(predictor, state) -> None:
    click(predictor, state, 0, 1)
    track(predictor, state)
    _, _, _, masks = predictor.add_new_mask(state, 3, 1, np.zeros_like(MASK))
    assert bool((masks < 0).all())
    scores = {out[0]: out[4] for out in predictor.propagate_in_video(state)}
    assert scores[3].tolist() == [[-10.0]]


# --- edits after tracking -------------------------------------------------------------------------------------------


def test_a_correction_changes_what_is_tracked_again(predictor, state) -> None:
    click(predictor, state, 0, 1)
    before = track(predictor, state)
    _, _, _, corrected = click(predictor, state, 3, 1, x=0.1, y=0.9, label=0)
    assert (corrected - before[3]).abs().max() > 0.01
    after = track(predictor, state, 3)
    assert_same({3: after[3]}, {3: corrected})
    assert (after[5] - before[5]).abs().max() > 1e-3
    assert state["consolidated_frame_inds"] == [0, 3]
    assert sorted(state.groups[0].bank.non_cond) == [1, 2, 4, 5, 6, 7]


def test_taking_a_correction_back(predictor, state) -> None:
    click(predictor, state, 0, 1)
    before = track(predictor, state)
    click(predictor, state, 3, 1, x=0.1, y=0.9, label=0)
    track(predictor, state, 3)
    predictor.clear_all_points_in_frame(state, 3, 1)
    assert state["consolidated_frame_inds"] == [0]
    assert 3 in state.groups[0].bank.non_cond and 3 not in state["frames_already_tracked"]
    assert_same(track(predictor, state, 0), before)
    frame, obj_ids, _, masks = predictor.clear_all_points_in_frame(state, 0, 1)
    assert (frame, obj_ids) == (0, [1]) and bool((masks < -1023).all())
    assert not state["tracking_has_started"] and not state["frames_already_tracked"]
    with pytest.raises(RuntimeError, match="nothing to track"):
        predictor.propagate_in_video(state)


def test_a_prompt_that_waits_survives_another_being_taken_back(predictor, state) -> None:
    click(predictor, state, 0, 1)
    click(predictor, state, 4, 1)
    assert predictor.clear_all_points_in_frame(state, 0, 1, need_output=False) is None
    assert list(track(predictor, state)) == [4, 5, 6, 7]


def test_adding_an_object_after_tracking_has_started(predictor, state) -> None:
    click(predictor, state, 0, 1)
    before = track(predictor, state)
    click(predictor, state, 2, 8, x=0.2)
    both = track(predictor, state, 0)
    assert all(masks.shape[0] == 2 for masks in both.values())
    assert_same(before, both, slice(0, 1))
    alone = predictor.init_state(video_path=make_frames())
    click(predictor, alone, 2, 8, x=0.2)
    assert_same(track(predictor, alone, 0), both, slice(1, 2))


def test_objects_that_never_share_a_frame(model, state) -> None:
    predictor = Sam3TrackerPredictor(model, objects="independent")
    for obj, x in ((1, 0.2), (2, 0.8)):
        click(predictor, state, 0, obj, x=x)
    click(predictor, state, 3, 1, x=0.3, clear_old_points=False)
    together = track(predictor, state)
    assert [sorted(group.bank.cond) for group in state.groups] == [[0, 3], [0]]
    alone = predictor.init_state(video_path=make_frames())
    click(predictor, alone, 0, 2, x=0.8)
    assert_same(track(predictor, alone), together, slice(1, 2))


@pytest.mark.parametrize("objects", ["joint", "independent"])
def test_removing_an_object_leaves_the_others(model, objects: str) -> None:
    predictor = Sam3TrackerPredictor(model, objects=objects)
    state, untouched = (predictor.init_state(video_path=make_frames()) for _ in range(2))
    for session in (state, untouched):
        for obj, x in ((1, 0.2), (2, 0.5), (3, 0.8)):
            click(predictor, session, 0, obj, x=x)
        track(predictor, session, 0, 3)
    expected = track(predictor, untouched, 4)
    remaining, shown = predictor.remove_object(state, 2)
    assert remaining == [1, 3] == state.obj_ids
    assert [(frame, masks.shape[0]) for frame, masks in shown] == [(0, 2)]
    assert_same(track(predictor, state, 4), expected, slice(0, 3, 2))
    assert predictor.remove_object(state, 2) == ([1, 3], [])
    predictor.remove_object(state, 1, need_output=False)
    assert predictor.remove_object(state, 3) == ([], [])
    assert state.obj_ids == [] and not state.is_trackable
    click(predictor, state, 0, 3)
    assert list(track(predictor, state, 0, 1)) == [0, 1]


def test_removing_an_object_computes_shared_scores_anew(model, state) -> None:
    predictor = Sam3TrackerPredictor(model)
    tracker = predictor.tracker
    tracker.settings = tracker.config.tracker.replace(use_memory_selection=True)
    try:
        click(predictor, state, 0, 1, x=0.2)
        click(predictor, state, 0, 2, x=0.8)
        track(predictor, state, 0, 2)
        predictor.remove_object(state, 1)
        record = state.groups[0].bank.non_cond[1]
        certainty = 2 * record.object_score_logits[0, 0].sigmoid() - 1
        assert record.eff_iou_score is not None and record.iou_score is not None
        torch.testing.assert_close(record.eff_iou_score[0], certainty.clamp(min=0) * record.iou_score[0])
    finally:
        tracker.settings = tracker.config.tracker


def test_an_object_whose_prompts_were_all_taken_back(predictor, state) -> None:
    click(predictor, state, 0, 1)
    track(predictor, state, 0, 1)
    click(predictor, state, 2, 2)
    predictor.clear_all_points_in_frame(state, 2, 2)
    for _, obj_ids, _, masks, scores in predictor.propagate_in_video(state, 0, 3):
        assert obj_ids == [1, 2]
        assert bool((masks[1] < -1023).all()) and scores[1] < 0


def test_reset_gives_what_a_new_session_gives(predictor, state) -> None:
    click(predictor, state, 0, 1)
    first = track(predictor, state)
    predictor.add_new_mask(state, 5, 2, MASK)
    track(predictor, state, reverse=True)
    predictor.reset_state(state)
    assert state.obj_ids == [] and state["frames_already_tracked"] == {}
    click(predictor, state, 0, 1)
    assert_same(track(predictor, state), first)


def test_a_prompt_while_tracking_counts_from_the_next_frame(predictor, state) -> None:
    click(predictor, state, 0, 1)
    seen = {}
    for frame, obj_ids, *_ in predictor.propagate_in_video(state):
        seen[frame] = obj_ids
        if frame == 2:
            click(predictor, state, 2, 4, x=0.2)
    assert seen[2] == [1] and seen[3] == [1, 4]


# --- sessions -------------------------------------------------------------------------------------------------------


def test_two_sessions_on_one_model_do_not_disturb_each_other(predictor) -> None:
    def steps(seed: int) -> Iterator[Tensor]:
        state = predictor.init_state(video_path=make_frames(seed))
        yield click(predictor, state, 0, 1, x=0.3)[3]
        yield predictor.add_new_mask(state, 0, 2, MASK)[3]
        for out in predictor.propagate_in_video(state, 0, 4):
            yield out[3]
        yield click(predictor, state, 2, 1, x=0.7, label=0)[3]
        for out in predictor.propagate_in_video(state, 4, reverse=True):
            yield out[3]

    apart = [list(steps(seed)) for seed in (1, 2)]
    interleaved = list(zip(steps(1), steps(2), strict=True))
    for i, results in enumerate(apart):
        for found, expected in zip((pair[i] for pair in interleaved), results, strict=True):
            assert torch.equal(found, expected)


def test_a_live_source_of_unknown_length(predictor) -> None:
    def camera() -> Iterator[np.ndarray]:
        yield from make_frames()

    state = predictor.init_state(video_path=camera())
    assert state["num_frames"] is None
    click(predictor, state, 0, 1)
    found = track(predictor, state)
    assert list(found) == list(range(NUM_FRAMES)) and state["num_frames"] == NUM_FRAMES
    long_video = predictor.init_state(video_path=np.concatenate([make_frames()] * 3))
    click(predictor, long_video, 0, 1)
    assert_same(found, track(predictor, long_video, 0, NUM_FRAMES - 1))


def test_what_was_tracked_stays_when_the_video_fails_midway(predictor) -> None:
    def broken() -> Iterator[np.ndarray]:
        yield from make_frames()[:4]
        raise OSError("the plug was pulled")

    state = predictor.init_state(video_path=broken())
    click(predictor, state, 0, 1)
    found = []
    with pytest.raises(VideoDecodeError, match="failed at frame 4"):
        for out in predictor.propagate_in_video(state):
            found.append(out[0])
    assert found == [0, 1, 2, 3]
    assert sorted(state.groups[0].bank.non_cond) == [1, 2, 3]


def test_frames_are_encoded_once_and_masks_enlarged_on_demand(model, state, monkeypatch) -> None:
    predictor = Sam3TrackerPredictor(model)
    calls = {"features": 0, "enlarged": 0}
    encode, enlarge = model.tracker_features, Preprocess.masks_to_image

    def count_features(images):
        calls["features"] += 1
        return encode(images)

    def count_enlarged(self, *args):
        calls["enlarged"] += 1
        return enlarge(self, *args)

    monkeypatch.setattr(model, "tracker_features", count_features)
    monkeypatch.setattr(Preprocess, "masks_to_image", count_enlarged)
    for x in (0.2, 0.4, 0.6):
        assert click(predictor, state, 0, 1, x=x, clear_old_points=False, need_output=False) is None
    for frame in range(4):
        predictor.track_frame(state, frame)
    assert calls == {"features": 4, "enlarged": 0}
    assert list(state.features) == [2, 3]


def test_features_that_are_handed_in(predictor, model, state) -> None:
    click(predictor, state, 0, 1)
    expected = track(predictor, state, 0, 3)
    images = torch.stack([model.preprocess(frame) for frame in make_frames()[:4]])
    features = {t: model.tracker_features(image[None]) for t, image in enumerate(images)}
    as_released = {t: (None, {"tracker_backbone_out": {"backbone_fpn": list(f)}}) for t, f in features.items()}
    for cached in (features, as_released):
        session = predictor.init_state(HEIGHT, WIDTH, NUM_FRAMES, cached_features=cached)
        click(predictor, session, 0, 1)
        assert_same(track(predictor, session, 0, 3), expected)
    with pytest.raises(ValueError, match="frame 4 has no cached_features"):
        track(predictor, session, 4)


def test_a_model_without_a_tracker_is_refused() -> None:
    model = assemble_image_model(CONFIG, enable_inst_interactivity=True, enable_detector=False)
    with pytest.raises(ValueError, match="enable_tracker=True"):
        Sam3TrackerPredictor(model)
