"""A small tracking predictor and what its tests do with it."""

from __future__ import annotations

import numpy as np
from golden import fill
from torch import Tensor

from sam3.config import Sam3Config
from sam3.model.sam3_image import Sam3Image
from sam3.model.sam3_tracking_predictor import Sam3TrackerPredictor
from sam3.model.tracker_state import TrackerState
from sam3.model_builder import assemble_image_model

HEIGHT, WIDTH, NUM_FRAMES = 40, 60, 8
CONFIG = Sam3Config.preset("tiny").replace(name="tiny tracker", image_size_px=112)
MASK = np.zeros((HEIGHT, WIDTH), dtype=bool)
MASK[10:30, 20:50] = True


def make_model() -> Sam3Image:
    return fill(assemble_image_model(CONFIG, enable_tracker=True, enable_detector=False))


def make_frames(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (NUM_FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)


def click(
    predictor: Sam3TrackerPredictor,
    state: TrackerState,
    frame: int,
    obj: int,
    x: float = 0.5,
    y: float = 0.5,
    label: int = 1,
    **options,
):
    return predictor.add_new_points_or_box(state, frame, obj, points=[[x, y]], labels=[label], **options)


def track(predictor: Sam3TrackerPredictor, state: TrackerState, *args, **kwargs) -> dict[int, Tensor]:
    """Masks at the video's size, by frame."""
    return {out[0]: out[3] for out in predictor.propagate_in_video(state, *args, **kwargs)}
