"""Numbers of the original interactive predictor (fp32, memories in bf16) on deterministic weights: a whole session."""

from __future__ import annotations

import pytest
import torch
from golden import SMALL, fill
from test_golden_tracker import NUM_FRAMES, frame_features
from torch import Tensor

from sam3.model.sam3_tracking_predictor import Sam3TrackerPredictor
from sam3.model.tracker_state import TrackerState
from sam3.model_builder import assemble_image_model

# Positive pixels and mean logit of the masks at the video's size, for objects 7 and 9.
Expected = tuple[tuple[int, float], ...]
CLICK = ((1150, -1.39943),)
BOX = ((1247, -1.31750),)
PLAIN: dict[str, Expected] = {
    "tracked 1": ((10772, 0.11350), (11059, 0.13951)),
    "tracked 2": ((11078, 0.13931), (11142, 0.14681)),
    "tracked 3": ((11626, 0.19195), (11734, 0.20274)),
    "tracked 5": ((10936, 0.12085), (11029, 0.13037)),
    "negative click": ((11626, 0.19195), (13693, 0.53211)),
    "again 4": ((10374, 0.07485), (10320, 0.06646)),
    "again 6": ((11403, 0.16961), (11381, 0.16739)),
    "mask": ((4000, -597.333), (11059, 0.13951)),
    "reverse 1": ((3996, -597.333), (11059, 0.13951)),
}
SELECTED: dict[str, Expected] = PLAIN | {
    "tracked 2": ((11070, 0.13988), (11142, 0.14727)),
    "tracked 3": ((11627, 0.19220), (11736, 0.20348)),
    "tracked 5": ((10948, 0.12212), (11035, 0.13166)),
    "negative click": ((11627, 0.19220), (13693, 0.53213)),
    "again 4": ((10385, 0.07590), (10332, 0.06783)),
    "again 6": ((11437, 0.17244), (11415, 0.17045)),
}


@pytest.fixture(scope="module")
def predictor() -> Sam3TrackerPredictor:
    config = SMALL.replace(name="golden tracker", image_size_px=224)
    return Sam3TrackerPredictor(fill(assemble_image_model(config, enable_tracker=True, enable_detector=False)))


def describe(masks: Tensor) -> Expected:
    return tuple((int((mask > 0).sum()), mask.mean().item()) for mask in masks)


def run_session(predictor: Sam3TrackerPredictor) -> tuple[dict[str, Expected], TrackerState]:
    features = {t: frame_features(t) for t in range(8)}
    state = predictor.init_state(120, 160, NUM_FRAMES, cached_features=features)
    found: dict[str, Expected] = {}

    def track(name: str, start: int, count: int, reverse: bool = False) -> None:
        for t, obj_ids, low_res, masks, scores in predictor.propagate_in_video(state, start, count, reverse):
            assert obj_ids == [7, 9] and low_res.shape == (2, 1, 64, 64) and scores.shape == (2, 1)
            found[f"{name} {t}"] = describe(masks)

    _, _, _, masks = predictor.add_new_points_or_box(state, 0, 7, points=[[0.4, 0.5]], labels=[1])
    found["click"] = describe(masks)
    _, obj_ids, _, masks = predictor.add_new_points_or_box(state, 0, 9, box=[0.1, 0.2, 0.6, 0.7])
    assert obj_ids == [7, 9]
    found["box"] = describe(masks[1:])
    track("tracked", 0, 5)
    _, _, _, masks = predictor.add_new_points_or_box(state, 3, 9, points=[[0.7, 0.3]], labels=[0])
    found["negative click"] = describe(masks)
    track("again", 3, 3)
    mask = torch.zeros(120, 160, dtype=torch.bool)
    mask[30:80, 40:120] = True
    _, _, _, masks = predictor.add_new_mask(state, 1, 7, mask)
    found["mask"] = describe(masks)
    track("reverse", 1, 1, reverse=True)
    return found, state


@pytest.mark.parametrize(("selection", "expected"), [(False, PLAIN), (True, SELECTED)], ids=["plain", "selection"])
def test_the_published_session(predictor: Sam3TrackerPredictor, selection: bool, expected: dict[str, Expected]) -> None:
    tracker = predictor.tracker
    tracker.settings = tracker.config.tracker.replace(use_memory_selection=selection)
    try:
        found, state = run_session(predictor)
    finally:
        tracker.settings = tracker.config.tracker
    for name, values in (expected | {"click": CLICK, "box": BOX}).items():
        for (pixels, mean), (expected_pixels, expected_mean) in zip(found[name], values, strict=True):
            assert abs(pixels - expected_pixels) <= 5, name
            assert mean == pytest.approx(expected_mean, abs=1e-3), name
    assert sorted(state["consolidated_frame_inds"]) == [0, 1, 3]
    assert [name for name in found if name.startswith(("again", "reverse"))] == [
        *("again 3", "again 4", "again 5", "again 6", "reverse 1", "reverse 0")
    ]
