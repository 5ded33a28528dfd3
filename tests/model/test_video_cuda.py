"""Video on a GPU gives what the CPU gives: a session, a stream under a policy, and a text."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor
from tracking_sessions import VIDEO_HW, noise_frames, small_model
from video_world import LOOSE
from video_world import make_frames as make_text_frames
from video_world import small_model as small_text_model

from sam3.model.sam3_tracking_predictor import Sam3TrackerPredictor
from sam3.model.sam3_video_inference import Sam3VideoInference
from sam3.model.streaming import StreamingTracker

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NUM_FRAMES = 9
CLICK = {"points": [[0.4, 0.5]], "labels": [1]}
MASK = np.eye(*VIDEO_HW) > 0
Frames = dict[int, tuple[Tensor, Tensor]]
"""By frame, low-resolution logits and object scores."""


def predictor_on(device: str) -> Sam3TrackerPredictor:
    # In float32: rounding memories to bfloat16 would turn differences of 1e-6 into some of 1e-3.
    return Sam3TrackerPredictor(small_model().to(device), memory_dtype=torch.float32)


def session_on(device: str, offload_state_to_cpu: bool = False) -> Frames:
    """Clicks, a box and a mask, a correction on a tracked frame, and the way back."""
    predictor = predictor_on(device)
    state = predictor.init_state(video_path=noise_frames(NUM_FRAMES), offload_state_to_cpu=offload_state_to_cpu)
    predictor.add_new_points_or_box(state, 1, 1, **CLICK)
    predictor.add_new_points_or_box(state, 1, 2, box=[0.1, 0.2, 0.6, 0.7])
    predictor.add_new_mask(state, 1, 3, MASK)
    found = {t: (low, scores) for t, _, low, _, scores in predictor.propagate_in_video(state, 1)}
    predictor.add_new_points_or_box(state, 5, 2, points=[[0.7, 0.3]], labels=[0])
    for start, is_back in ((5, False), (1, True)):
        for t, _, low, masks, scores in predictor.propagate_in_video(state, start, reverse=is_back):
            assert low.device.type == masks.device.type == torch.device(device).type
            found[t] = low, scores
    kinds = {
        memory.device.type
        for group in state.groups
        for store in (group.bank.cond, group.bank.non_cond)
        for record in store.values()
        if (memory := record.maskmem_features) is not None
    }
    assert kinds == {"cpu" if offload_state_to_cpu else torch.device(device).type}
    return found


def stream_on(device: str) -> Frames:
    """Frames that are pushed, with a correction within the policy's reach."""
    tracker = StreamingTracker(predictor_on(device), memory_policy="recent_edits:3")
    tracker.add_points(1, **CLICK)
    found = {}
    for t, frame in enumerate(noise_frames(NUM_FRAMES)):
        results = [tracker.push(frame)]
        if t == 6:
            tracker.add_points(1, frame_idx=4, points=[[0.7, 0.3]], labels=[0])
            results = list(tracker.retrack())
        found |= {result.frame_idx: (result.low_res_masks, result.object_score_logits) for result in results}
    return found


def assert_close(gpu: Frames, cpu: Frames) -> None:
    assert sorted(gpu) == sorted(cpu) and len(cpu) == NUM_FRAMES
    for t, (low, scores) in cpu.items():
        torch.testing.assert_close(gpu[t][0].cpu(), low, atol=1e-2, rtol=1e-3)  # the resize rounds differently
        torch.testing.assert_close(gpu[t][1].cpu(), scores, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("offload_state_to_cpu", [False, True])
def test_a_session(offload_state_to_cpu: bool) -> None:
    assert_close(session_on("cuda", offload_state_to_cpu), session_on("cpu"))


def test_a_stream_under_a_policy() -> None:
    assert_close(stream_on("cuda"), stream_on("cpu"))


def test_a_text() -> None:
    model, frames = small_text_model(), make_text_frames(6)
    found = {}
    for device in ("cpu", "cuda"):
        video = Sam3VideoInference(copy.deepcopy(model).to(device), LOOSE)
        state = video.init_state(frames)
        video.add_prompt(state, 0, text_str="red circle")
        found[device] = dict(video.propagate_in_video(state, 0))
    assert sorted(found["cpu"]) == sorted(found["cuda"]) == list(range(6))
    for t, cpu in found["cpu"].items():
        gpu = found["cuda"][t]
        assert gpu["out_obj_ids"].tolist() == cpu["out_obj_ids"].tolist() and len(cpu["out_obj_ids"])
        np.testing.assert_allclose(gpu["out_probs"], cpu["out_probs"], atol=1e-3)
        # A pixel whose logit is next to 0 may fall on either side.
        assert (gpu["out_binary_masks"] != cpu["out_binary_masks"]).mean() < 0.01
