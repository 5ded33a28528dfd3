"""What each setting of a session and of its predictor does to results; parity leaves them at their defaults."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from tracking_sessions import VIDEO_HW, HandedInFeatures, noise_frames, small_config, small_model

from sam3.model.mask_rules import fill_holes_in_mask_scores
from sam3.model.sam3_image import Sam3Image
from sam3.model.sam3_tracking_predictor import Sam3TrackerPredictor
from sam3.model.tracker_state import TrackerState
from sam3.model_builder import assemble_image_model

NUM_FRAMES = 5
MAX_HOLE = 6


@pytest.fixture(scope="module")
def model() -> Sam3Image:
    return small_model()


def session(model: Sam3Image, **settings: Any) -> tuple[Sam3TrackerPredictor, TrackerState]:
    predictor = Sam3TrackerPredictor(model, **settings)
    features = HandedInFeatures(model.config, NUM_FRAMES)
    return predictor, predictor.init_state(*VIDEO_HW, NUM_FRAMES, cached_features=features)


def tracked(predictor: Sam3TrackerPredictor, state: TrackerState) -> dict[int, tuple[Tensor, Tensor]]:
    """Two objects that overlap: by frame, low-resolution logits and those at the video's size."""
    predictor.add_new_points_or_box(state, 0, 1, box=[0.1, 0.1, 0.7, 0.8])
    predictor.add_new_points_or_box(state, 0, 2, points=[[0.5, 0.5]], labels=[1])
    return {frame: (low, masks) for frame, _, low, masks, _ in predictor.propagate_in_video(state)}


def click(predictor: Sam3TrackerPredictor, state: TrackerState, frame: int) -> Tensor:
    return predictor.add_new_points_or_box(state, frame, 1, points=[[0.4, 0.5]], labels=[1])[3]


def test_each_pixel_of_the_results_may_go_to_one_object(model: Sam3Image) -> None:
    plain, owned = (tracked(*session(model, non_overlap_masks_for_output=flag)) for flag in (False, True))
    assert any(((masks > 0).sum(0) > 1).any() for _, masks in plain.values()), "the objects overlap"
    for frame, (low, masks) in plain.items():
        assert torch.equal(low, owned[frame][0]), "what is remembered is not touched"
        winner = masks.argmax(dim=0, keepdim=True)
        for obj, (mask, found) in enumerate(zip(masks, owned[frame][1], strict=True)):
            expected = torch.where(winner[0] == obj, mask, mask.clamp(max=-10.0))
            assert torch.equal(found, expected)


def test_holes_and_islands_may_be_filled_in_the_results(model: Sam3Image) -> None:
    plain, filled = (tracked(*session(model, fill_hole_area=area)) for area in (0, MAX_HOLE))
    num_changed = 0
    for frame, (low, masks) in plain.items():
        assert torch.equal(low, filled[frame][0]), "what is remembered is not touched"
        assert torch.equal(filled[frame][1], fill_holes_in_mask_scores(masks, MAX_HOLE))
        num_changed += int(((masks > 0) != (filled[frame][1] > 0)).sum())
    assert num_changed > 0


@pytest.mark.parametrize("is_cleared", [True, False])
def test_a_click_near_another_prompt_starts_from_the_tracked_mask_or_not(model: Sam3Image, is_cleared: bool) -> None:
    """As released, tracking's masks within a memory's reach of a new prompt are no start for later clicks."""
    fresh = click(*session(model), 2)
    predictor, state = session(model, clear_non_cond_mem_around_input=is_cleared)
    click(predictor, state, 0)
    assert len(list(predictor.propagate_in_video(state))) == NUM_FRAMES
    click(predictor, state, 4)
    predictor.propagate_in_video_preflight(state)
    assert torch.equal(click(predictor, state, 2), fresh) == is_cleared


def test_records_go_to_the_cpu_where_that_is_asked_for() -> None:
    """On a device that computes nothing: where the state would be put is decided before anything is computed."""
    config = small_config()
    with torch.device("meta"):
        model = assemble_image_model(config, enable_detector=False, enable_tracker=True).eval()
    model.to("meta")
    predictor = Sam3TrackerPredictor(model)
    for is_offloaded, kind in ((False, "meta"), (True, "cpu")):
        state = predictor.init_state(*VIDEO_HW, 3, cached_features={}, offload_state_to_cpu=is_offloaded)
        assert state.storage_device.type == kind and state["offload_state_to_cpu"] is is_offloaded


def test_frames_may_be_decoded_ahead_in_a_thread(model: Sam3Image) -> None:
    class Watched(list):
        """Pictures that say who read them."""

        def __getitem__(self, index: Any) -> Any:
            readers.add((index, threading.current_thread() is threading.main_thread()))
            return super().__getitem__(index)

    pictures = noise_frames(NUM_FRAMES)
    found = {}
    for is_async in (False, True):
        readers: set[tuple[int, bool]] = set()
        predictor = Sam3TrackerPredictor(model)
        state = predictor.init_state(video_path=Watched(pictures), async_loading_frames=is_async)
        found[is_async] = tracked(predictor, state)
        assert {pair for pair in readers if pair[0] > 0} == {(i, not is_async) for i in range(1, NUM_FRAMES)}
        state.close()
    for frame in range(NUM_FRAMES):
        assert torch.equal(found[False][frame][1], found[True][frame][1])
