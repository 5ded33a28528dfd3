"""Videos with a compressed memory: sessions, streams, policies and texts work as with the released one."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import fill, tracker_value
from tracking_sessions import TwinSessions, noise_frames, small_config
from video_world import SMALL, ScriptedVideo, assert_same_outputs, make_frames, run_all

from sam3.checkpoint_io import write_merged
from sam3.config import Sam3Config
from sam3.efficient_keys import own_weights
from sam3.model.efficient_sam3_tracker import EfficientSam3Tracker
from sam3.model.memory_policy import NoLateEdits, RecentEdits
from sam3.model.memory_snapshots import SnapshotReplay
from sam3.model.sam3_image import Sam3Image
from sam3.model.sam3_tracking_predictor import Sam3TrackerPredictor
from sam3.model.streaming import StreamingTracker
from sam3.model.text_streaming import TextStream
from sam3.model_builder import assemble_image_model, build_sam3_video_predictor
from sam3.released_names import released_state_dict

NUM_TOKENS = 16
FRAMES = noise_frames(18)


def compressed(config: Sam3Config) -> Sam3Config:
    """With 16 tokens of a frame; grids are of 8 x 8 cells and smaller here."""
    memory = config.with_efficient_memory().efficient_memory
    assert memory is not None
    return config.with_efficient_memory(memory.replace(num_latents=NUM_TOKENS, perceiver_head_dim=16))


def make_model(**tracker: object) -> Sam3Image:
    torch.manual_seed(0)
    model = assemble_image_model(compressed(small_config(**tracker)), enable_detector=False, enable_tracker=True)
    weights = {k: tracker_value(k, tuple(v.shape)) for k, v in model.tracker.state_dict().items()}
    model.tracker.load_state_dict(weights)
    return model.eval().requires_grad_(False)


@functools.cache
def whole_model() -> Sam3Image:
    return fill(assemble_image_model(compressed(SMALL), enable_tracker=True))


OWN_SELECTION = {"use_memory_selection": True, "mf_threshold": 0.4, "shared_iou_score": False}
KINDS = {
    "all frames": ({}, "joint", NoLateEdits()),
    "own selection": (OWN_SELECTION, "independent", RecentEdits(4)),
}


@pytest.mark.parametrize(("settings", "objects", "policy"), KINDS.values(), ids=KINDS)
def test_dropping_what_is_not_read_changes_nothing(settings: dict, objects: str, policy: NoLateEdits) -> None:
    twins = TwinSessions(Sam3TrackerPredictor(make_model(**settings), objects=objects), policy, num_frames=20)
    assert twins.click(0, 7) and twins.box(0, 9)
    for t in range(20):
        if t % 6 == 5:
            assert twins.prompt(t, twins.chance.choice((7, 9)))
        assert twins.track(t, t)
    kept, full = (session.groups[0].bank for session in (twins.pruned, twins.full))
    assert kept.nbytes < full.nbytes
    stored = [r.maskmem_features for r in full.non_cond.values()]
    num_objects = full.num_objects
    assert all(m is not None and m.shape == (num_objects, NUM_TOKENS, 16) and m.dtype == torch.bfloat16 for m in stored)


def test_snapshots_bring_back_any_frame() -> None:
    twins = TwinSessions(Sam3TrackerPredictor(make_model()), SnapshotReplay(every=6, max_snapshots=3), num_frames=16)
    assert twins.box(0, 1) and twins.click(0, 2) and twins.track(0, 12)
    assert twins.click(8, 1) and twins.track(8, 14)
    assert twins.num_refused == 0


def test_a_stream_gives_what_the_whole_video_gives() -> None:
    predictor = Sam3TrackerPredictor(make_model())
    state = predictor.init_state(video_path=FRAMES)
    stream = StreamingTracker(predictor, memory_policy="no_late_edits")
    stream.add_points(1, points=[[0.4, 0.5]], labels=[1])
    predictor.add_new_points_or_box(state, 0, 1, points=[[0.4, 0.5]], labels=[1])
    for t, frame in enumerate(FRAMES):
        (expected,) = predictor.propagate_in_video(state, t, 0)
        result = stream.push(frame)
        assert result is not None and torch.equal(result.masks, expected[3]) and bool(result.masks.isfinite().all())


def test_corrections_removal_and_the_way_back() -> None:
    predictor = Sam3TrackerPredictor(make_model())
    state = predictor.init_state(video_path=FRAMES)
    predictor.add_new_points_or_box(state, 2, 1, box=[0.1, 0.2, 0.6, 0.7])
    predictor.add_new_mask(state, 2, 2, np.eye(24, 32) > 0)
    forward = {out[0]: out[3] for out in predictor.propagate_in_video(state)}
    predictor.add_new_points_or_box(state, 5, 1, [[0.2, 0.2]], [0], use_prev_mem_frame=True, clear_old_points=False)
    again = {out[0]: out[3] for out in predictor.propagate_in_video(state, 5)}
    assert not torch.equal(forward[8], again[8])
    back = list(predictor.propagate_in_video(state, 2, reverse=True))
    assert [out[0] for out in back] == [2, 1, 0]
    assert predictor.remove_object(state, 1)[0] == [2]
    assert next(iter(predictor.propagate_in_video(state, 7, 0)))[3].shape == (1, 1, 24, 32)


SCRIPT = {t: [(0.9, (1, 6))] if t < 3 else [(0.9, (1, 6)), (0.85, (16, 21))] for t in range(12)}


def tracked(obj_id: int, frame_idx: int) -> tuple[int, int]:
    return ((1, 6), (16, 21))[min(obj_id, 1)]


def test_texts_on_videos_and_streams() -> None:
    frames, video = make_frames(12), ScriptedVideo(SCRIPT, tracks=tracked, model=whole_model())
    assert isinstance(video.tracker, EfficientSam3Tracker)
    state = video.init_state(frames)
    video.add_prompt(state, 0, text_str="thing")
    expected = run_all(video, state)
    assert len(expected[11]["out_obj_ids"]) == 2
    stream, found = TextStream(video, "thing"), {}
    for frame in frames:
        found |= dict(stream.push(frame))
    assert_same_outputs(found | dict(stream.finish()), expected)
    stored = [r for group in stream.state.groups for r in group.bank.non_cond.values()]
    assert stored and all(r.maskmem_features is None or r.maskmem_features.shape[1] == NUM_TOKENS for r in stored)


def test_video_predictor_opens_a_file_with_both_memories(tmp_path: Path) -> None:
    full = fill(assemble_image_model(SMALL, enable_tracker=True))
    path = tmp_path / "both.pt"
    own = own_weights(whole_model().tracker.state_dict())
    write_merged(path, released_state_dict(full) | own, {"model": whole_model().config.to_dict()})
    for memory, is_compressed in ((None, True), ("full", False)):
        predictor = build_sam3_video_predictor(path, device="cpu", memory=memory)
        assert isinstance(predictor.model.tracker, EfficientSam3Tracker) == is_compressed
