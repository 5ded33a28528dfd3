"""A small model and a video session whose detections, and if wanted tracked masks, follow a script."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from golden import fill
from torch import Tensor

from sam3.config import Sam3Config
from sam3.model.sam3_image import Sam3Image
from sam3.model.sam3_tracker import TrackerFeatures
from sam3.model.sam3_video_base import _Tracks
from sam3.model.sam3_video_inference import Sam3VideoInference
from sam3.model.video_config import VideoConfig
from sam3.model.video_detection import Detections, EncodedFrame
from sam3.model.video_state import VideoState
from sam3.model_builder import assemble_image_model

SMALL = Sam3Config.preset("tiny").replace(image_size_px=84)
"""A grid of 6 x 6, masks of 24 x 24."""
SIDE = SMALL.grid_size * 4
HEIGHT, WIDTH = 30, 40
Found = Sequence[tuple[float, tuple[int, int]]]
"""Detections of a frame: score, first column and last column + 1 of the mask grid, over rows 4 to 20."""
FAST = VideoConfig(hotstart_delay=3, hotstart_unmatch_thresh=2, hotstart_dup_thresh=2, recondition_every_nth_frame=4)
LEFT, MIDDLE, RIGHT = (1, 6), (9, 14), (18, 23)
LOOSE = VideoConfig(
    score_threshold_detection=0.0,
    new_det_thresh=0.0,
    det_nms_thresh=0.5,
    hotstart_delay=0,
    max_num_objects=3,
    fill_hole_area=0,
)
"""Random weights find something."""
CLICK: dict[str, Any] = {"points": [[0.5, 0.5]], "point_labels": [1], "obj_id": 7}
SCRIPT: dict[int, Found] = {t: [(0.9, LEFT), (0.8, RIGHT)] for t in range(40)}
"""Two objects that stay."""


@functools.cache
def small_model() -> Sam3Image:
    """Detector and tracker with deterministic weights, in eval mode."""
    return fill(assemble_image_model(SMALL, enable_tracker=True))


def make_frames(count: int, seed: int = 0) -> list[np.ndarray]:
    """Noise that moves, RGB uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return [np.roll(base, t, axis=1) for t in range(count)]


def noise_features(frame_idx: int) -> TrackerFeatures:
    """What a trunk might say about a frame."""
    generator = torch.Generator().manual_seed(frame_idx)
    dim, grid = SMALL.hidden_dim, SMALL.grid_size
    shapes = (dim // 8, 4 * grid), (dim // 4, 2 * grid), (dim, grid)
    return TrackerFeatures(*(torch.randn(1, channels, side, side, generator=generator) for channels, side in shapes))


def strip(first: int, end: int) -> Tensor:
    """Logits of a mask over some columns, (24, 24)."""
    logits = torch.full((SIDE, SIDE), -8.0)
    logits[4:20, first:end] = 8.0
    return logits


class ScriptedVideo(Sam3VideoInference):
    """The real loop and tracker; detections come from a script, and features are noise of each frame.

    Attributes:
        script: Frame -> detections; a missing frame has none.
        tracks: Object id and frame -> columns of the tracked mask, in place of what the tracker says; None: its own.
        processed: Frames that went through the loop, in order.
    """

    def __init__(
        self,
        script: Mapping[int, Found],
        config: VideoConfig = FAST,
        tracks: Callable[[int, int], tuple[int, int]] | None = None,
        track_logit: float = 3.0,
        model: Sam3Image | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model or small_model(), config, **options)
        self.script = script
        self.tracks = tracks
        self.track_logit = track_logit
        self.processed: list[int] = []
        self.propagated: list[int] = []

    def process_frame(self, state: VideoState, frame_idx: int, reverse: bool = False) -> Any:
        self.processed.append(frame_idx)
        return super().process_frame(state, frame_idx, reverse)

    def propagate_groups(self, state: VideoState, frame_idx: int, touched: set[int], reverse: bool = False) -> Any:
        self.propagated.append(frame_idx)
        return super().propagate_groups(state, frame_idx, touched, reverse)

    def encode(self, state: VideoState, frame_idx: int, need_detector: bool) -> EncodedFrame:
        state.frames.frame(frame_idx)
        state.encoded = EncodedFrame(frame_idx, noise_features(frame_idx), None)
        return state.encoded

    def _applies(self, state: VideoState, frame_idx: int, reverse: bool) -> bool:
        return False  # nothing to encode for the detector

    def _detections(self, state: VideoState, encoded: EncodedFrame, reverse: bool) -> Detections:
        found = self.script.get(encoded.frame_idx, ()) if state.prompt is not None else ()
        masks = [strip(*columns) for _, columns in found]
        return Detections([score for score, _ in found], torch.stack(masks) if masks else torch.zeros(0, SIDE, SIDE))

    def _propagate(self, state: VideoState, encoded: EncodedFrame, reverse: bool) -> _Tracks:
        tracks = super()._propagate(state, encoded, reverse)
        if self.tracks is None or not tracks.obj_ids:
            return tracks
        masks = [strip(*self.tracks(obj_id, encoded.frame_idx)) for obj_id in tracks.obj_ids]
        return dataclasses.replace(
            tracks, masks=torch.stack(masks)[:, None], logits=dict.fromkeys(tracks.obj_ids, self.track_logit)
        )


def run_all(video: Sam3VideoInference, state: VideoState, **options: Any) -> dict[int, dict[str, Any]]:
    """Outputs by frame."""
    return dict(video.propagate_in_video(state, **options))


def assert_same_outputs(first: Mapping[int, dict[str, Any]], second: Mapping[int, dict[str, Any]]) -> None:
    """Everything of every frame is equal to the last bit."""
    assert list(first) == list(second)
    for frame_idx in first:
        for name in ("out_obj_ids", "out_probs", "out_boxes_xywh", "out_binary_masks"):
            np.testing.assert_array_equal(first[frame_idx][name], second[frame_idx][name], f"{frame_idx} {name}")
        assert first[frame_idx]["frame_stats"] == second[frame_idx]["frame_stats"]


def fixed(obj_id: int, frame_idx: int) -> tuple[int, int]:
    """Columns of objects that stay where they are."""
    return (LEFT, RIGHT, MIDDLE)[min(obj_id, 2)]


def start(count: int = 8, frame_idx: int = 0, **options: Any) -> tuple[ScriptedVideo, VideoState]:
    """A session in which a text has found two objects, 0 and 1."""
    video = ScriptedVideo(SCRIPT, tracks=fixed)
    state = video.init_state(make_frames(count), **options)
    video.add_prompt(state, frame_idx, text_str="thing")
    return video, state
