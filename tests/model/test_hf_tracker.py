"""The tracker's network beside Hugging Face's, on the same random weights (tiny configuration, fp32, CPU)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from golden import fill, table
from torch import Tensor, nn

from sam3.config import MemoryEncoderConfig, Sam3Config
from sam3.model.memory_attention import MemoryTokens
from sam3.model.memory_bank import FrameRecord, MemoryBank
from sam3.model.sam3_image import Sam3Image
from sam3.model.sam3_tracker import Sam3Tracker
from sam3.model_builder import assemble_image_model

transformers = pytest.importorskip("transformers")
from hf_models import build_hf_tracker_video_model, hf_tracker_video_config  # noqa: E402 (needs transformers)

TINY = Sam3Config.preset("tiny")
# Their mask channels always grow by 4.
CONFIG = TINY.replace(tracker=TINY.tracker.replace(memory_encoder=MemoryEncoderConfig(), hugging_face_rules=True))
GRID, DIM, MEM = CONFIG.grid_size, CONFIG.hidden_dim, CONFIG.tracker.mem_dim
NUM_FRAMES = 6


@pytest.fixture(scope="module")
def model() -> Sam3Image:
    return fill(assemble_image_model(CONFIG, enable_tracker=True, enable_detector=False))


@pytest.fixture(scope="module")
def tracker(model: Sam3Image) -> Sam3Tracker:
    return model.tracker


@pytest.fixture(scope="module")
def hf(model: Sam3Image) -> nn.Module:
    return build_hf_tracker_video_model(model)


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    assert 0.05 < ours.float().std() < 50  # random numbers, not all the same
    return (ours - theirs).abs().max().item()


@torch.no_grad()
def test_memory_encoder(tracker: Sam3Tracker, hf: nn.Module) -> None:
    features, masks = table("input.f", (1, DIM, GRID, GRID)), 10 * table("input.m", (2, 1, 16 * GRID, 16 * GRID))
    expected, codes = hf.memory_encoder(features.expand(2, -1, -1, -1), masks)
    assert difference(tracker.maskmem_backbone(features, masks), expected) <= 1e-5
    assert difference(tracker.memory_code((GRID, GRID)), codes[0].flatten(1).T) <= 1e-6


@pytest.mark.parametrize("num_frames", [0, 3])
@torch.no_grad()
def test_memory_attention(tracker: Sam3Tracker, hf: nn.Module, num_frames: int) -> None:
    """Two objects that share the frame's features; pointer tokens are not turned."""
    features = table("input.f", (1, DIM, GRID, GRID))
    memory = MemoryTokens(
        table("input.spatial", (2, num_frames, GRID * GRID, MEM)),
        table("input.codes", (num_frames, GRID * GRID, MEM)),
        table("input.pointers", (2, 8, MEM)),
        table("input.pointer_codes", (8, MEM)),
    )
    attention = tracker.transformer.encoder
    tokens = torch.cat([memory.spatial.flatten(1, 2), memory.pointers], dim=1).transpose(0, 1)
    codes = torch.cat([memory.spatial_codes.flatten(0, 1), memory.pointer_codes])[:, None].expand(-1, 2, -1)
    frame = features.flatten(2).permute(2, 0, 1).expand(-1, 2, -1)
    frame_codes = attention.position_code((GRID, GRID))[:, None].expand(-1, 2, -1)
    expected = hf.memory_attention(frame, tokens, frame_codes, codes, 8)[0]
    assert difference(attention(features, memory).flatten(2).transpose(1, 2), expected) <= 1e-5


MASK = torch.zeros(1, 1, TINY.image_size_px, TINY.image_size_px)
MASK[..., 60:200, 90:220] = 1
PROMPTS = {
    "click": {"point_inputs": (torch.tensor([[[60.0, 80.0]]]), torch.ones(1, 1, dtype=torch.long))},
    "box": {"point_inputs": (torch.tensor([[[40.0, 50.0], [190.0, 170.0]]]), torch.tensor([[2, 3]]))},
    "mask": {"mask_inputs": MASK},
}


@pytest.mark.parametrize(("prompt", "reverse"), [("click", False), ("box", True), ("mask", False)])
@torch.no_grad()
def test_clip(model: Sam3Image, hf: nn.Module, prompt: str, reverse: bool) -> None:
    side = TINY.image_size_px
    video = torch.stack([table(f"input.frame{t}", (3, side, side)) for t in range(NUM_FRAMES)])
    order = list(range(NUM_FRAMES))[:: -1 if reverse else 1]
    ours = run_ours(model, video, order, prompt)
    theirs = run_theirs(hf, video, order, prompt)
    for t in order:
        expected = theirs[t]
        record = ours[t]
        assert record.pred_masks is not None and record.maskmem_features is not None
        assert difference(record.obj_ptr, expected["object_pointer"][0]) <= 1e-4
        assert (record.object_score_logits - expected["object_score_logits"][0]).abs().max() <= 1e-4
        assert difference(record.pred_masks, expected["pred_masks"]) <= 1e-3
        memory = record.maskmem_features.flatten(2).permute(2, 0, 1)
        unequal = memory != expected["maskmem_features"]  # rounded to bfloat16 on both sides
        assert unequal.float().mean() <= 0.05


def run_ours(model: Sam3Image, video: Tensor, order: list[int], prompt: str) -> dict[int, FrameRecord]:
    bank = MemoryBank()
    for t in order:
        features = model.tracker_features(video[t : t + 1])
        is_first = t == order[0]
        arguments: dict = {"num_frames": len(order), "track_in_reverse": order[0] > 0}
        if is_first:
            arguments |= PROMPTS[prompt]
        record = model.tracker.track_step(t, features, bank, is_init_cond_frame=is_first, **arguments)
        if is_first and prompt == "mask":  # binarised by the predictors, theirs and the released one
            memory = model.tracker.encode_memory(features, 20 * MASK - 10, record.object_score_logits, True)
            record = replace(record, maskmem_features=memory)
        (bank.cond if is_first else bank.non_cond)[t] = record
    return bank.cond | bank.non_cond


def run_theirs(hf: nn.Module, video: Tensor, order: list[int], prompt: str) -> dict[int, dict]:
    side = video.shape[-1]
    session = transformers.Sam3TrackerVideoInferenceSession(
        video=video, video_height=side, video_width=side, dtype=torch.float32
    )
    index = session.obj_id_to_idx(1)
    if prompt == "mask":
        session.add_mask_inputs(index, order[0], MASK)
    else:
        coords, labels = PROMPTS[prompt]["point_inputs"]
        inputs = {"point_coords": coords[None], "point_labels": labels[None].to(torch.int32)}
        session.add_point_inputs(index, order[0], inputs)
    session.obj_with_new_inputs = [1]
    for t in order:
        hf(session, frame_idx=t, reverse=order[0] > 0)
    stored = session.output_dict_per_obj[index]
    return {**stored["cond_frame_outputs"], **stored["non_cond_frame_outputs"]}


def test_mask_channels_that_have_no_place_there() -> None:
    with pytest.raises(ValueError, match=r"no place for mask_channels \(4, 8, 16, 32\)"):
        hf_tracker_video_config(TINY)
