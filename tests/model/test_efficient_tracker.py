"""The tracker with a compressed memory: what it stores and reads, and that it is a tracker like the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from golden import table, tracker_value
from torch import Tensor

from sam3.config import EfficientMemoryConfig, Sam3Config
from sam3.model.building import building_on
from sam3.model.clip_forward import ClipPlan, forward_clip
from sam3.model.efficient_sam3_tracker import EfficientSam3Tracker
from sam3.model.memory_bank import MemoryBank, attended_memories, attended_pointers
from sam3.model.perceiver import PerceiverResampler
from sam3.model.sam3_tracker import Sam3Tracker, TrackerFeatures

TINY = Sam3Config.preset("tiny").with_efficient_memory()
GRID, DIM, MEM = TINY.grid_size, TINY.hidden_dim, TINY.tracker.mem_dim
CLICKS = torch.tensor([[[60.0, 80.0]], [[150.0, 40.0]]]), torch.ones(2, 1, dtype=torch.long)
NUM_FRAMES = 20


def with_memory(**changes: object) -> Sam3Config:
    assert TINY.efficient_memory is not None
    return TINY.with_efficient_memory(TINY.efficient_memory.replace(**changes))


def make_tracker(config: Sam3Config = TINY) -> EfficientSam3Tracker:
    tracker = EfficientSam3Tracker(config, torch.float32).eval()
    tracker.load_state_dict({key: tracker_value(key, value.shape) for key, value in tracker.state_dict().items()})
    return tracker


def features_of(tracker: Sam3Tracker, t: int, grid: int = GRID) -> TrackerFeatures:
    maps = [table(f"neck{t}.{i}", (1, DIM, grid * s, grid * s)) for i, s in enumerate((4, 2, 1))]
    return tracker.frame_features({"backbone_fpn": maps})


def track(tracker: Sam3Tracker, rows: list[int], num_frames: int = 3, grid: int = GRID) -> MemoryBank:
    """A click on each object, then propagation."""
    bank, points = MemoryBank(), (CLICKS[0][rows], CLICKS[1][rows])
    for t in range(num_frames):
        prompts: dict = {"point_inputs": points} if t == 0 else {}
        features = features_of(tracker, t, grid)
        record = tracker.track_step(
            t, features, bank, is_init_cond_frame=t == 0, num_frames=NUM_FRAMES, num_objects=len(rows), **prompts
        )
        (bank.cond if t == 0 else bank.non_cond)[t] = record
    return bank


KINDS = {
    "64 latents": ({}, 64),
    "16 latents": ({"num_latents": 16}, 16),
    "windows": ({"num_latents": 0, "num_latents_2d": 36}, 36),
    "both": ({"num_latents": 16, "num_latents_2d": 9}, 25),
    "uncompressed, pooled": ({"num_latents": 0, "pool_size": 2}, GRID * GRID),
    "linear": ({"attention": "linear"}, 64),
}


@torch.no_grad()
@pytest.mark.parametrize(("changes", "num_tokens"), KINDS.values(), ids=KINDS)
def test_records_hold_as_many_tokens_as_asked_for(changes: dict, num_tokens: int) -> None:
    tracker = make_tracker(with_memory(**changes))
    bank = track(tracker, [0, 1])
    for record in (bank.cond[0], bank.non_cond[2]):
        assert record.maskmem_features is not None and record.maskmem_features.shape == (2, num_tokens, MEM)
    where = (bank, 3, tracker.settings, NUM_FRAMES)
    memories, pointers = attended_memories(*where), attended_pointers(*where)
    tokens = tracker.memory_tokens(features_of(tracker, 3), memories, pointers, NUM_FRAMES)
    assert tokens.spatial.shape == (2, 3, num_tokens, MEM) and tokens.pointers.shape == (2, 3 * DIM // MEM, MEM)
    assert tokens.spatial_codes.shape == (3, num_tokens, MEM)


def test_a_frame_of_sam3_takes_a_81st_of_the_bytes() -> None:
    sam3 = Sam3Config().with_efficient_memory()
    assert sam3.efficient_memory is not None
    dense = 2 * sam3.tracker.mem_dim * sam3.grid_size**2
    assert dense == 663_552
    with torch.no_grad():
        tokens = PerceiverResampler(64, 72, sam3.efficient_memory)(table("memory", (1, 64, 72, 72)))
    memory = tokens.to(torch.bfloat16)
    assert memory.numel() * memory.element_size() == 8_192 == dense // 81


@torch.no_grad()
def test_objects_together_are_the_objects_alone() -> None:
    tracker = make_tracker()
    together = track(tracker, [0, 1])
    for row in (0, 1):
        alone = track(tracker, [row])
        for t in (1, 2):
            ours, theirs = together.non_cond[t].select([row]), alone.non_cond[t]
            for name in ("pred_masks", "obj_ptr", "maskmem_features"):
                torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_a_frame_reads_its_memory() -> None:
    tracker = make_tracker()
    bank, features = track(tracker, [0, 1]), features_of(tracker, 3)
    seen = tracker.condition(3, features, bank, NUM_FRAMES)
    assert seen.shape == (2, DIM, GRID, GRID)
    memory = bank.cond[0].maskmem_features
    assert memory is not None
    for changed in (memory.flip(1), memory + 0.5 * table("noise", memory.shape)):
        other = MemoryBank({0: replace(bank.cond[0], maskmem_features=changed)}, bank.non_cond)
        difference = (tracker.condition(3, features, other, NUM_FRAMES) - seen).abs().max()
        order_alone = torch.equal(changed, memory.flip(1))
        # Global tokens are a set: what they know of their place is in them, and travels with them.
        assert difference < 1e-4 if order_alone else difference > 1e-3


@torch.no_grad()
def test_order_of_windows_is_their_place() -> None:
    tracker = make_tracker(with_memory(num_latents=0, num_latents_2d=36))
    bank, features = track(tracker, [0, 1]), features_of(tracker, 3)
    record = bank.cond[0]
    assert record.maskmem_features is not None
    turned = MemoryBank({0: replace(record, maskmem_features=record.maskmem_features.flip(1))}, bank.non_cond)
    seen, other = (tracker.condition(3, features, b, NUM_FRAMES) for b in (bank, turned))
    assert (seen - other).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"num_latents": 0, "num_latents_2d": 36}], ids=["global", "windows"])
def test_moving_the_mask_changes_the_tokens(changes: dict) -> None:
    """Defect 7: compressed tokens carry a spatial position. The features of the frame are the same everywhere."""
    tracker = make_tracker(with_memory(**changes))
    features = TrackerFeatures(*(m[..., :1, :1].expand_as(m) for m in features_of(tracker, 0)))
    side = tracker.memory_mask_size
    mask = torch.full((1, 1, side, side), -5.0)
    mask[..., 32:80, 32:80] = 5.0
    score = torch.ones(1, 1)
    here, there = (tracker.encode_memory(features, m, score, True) for m in (mask, mask.roll((144, 144), (2, 3))))
    assert (here - there).abs().max() > 0.02


@torch.no_grad()
def test_frames_without_memory() -> None:
    """By default what SAM 3's decoder knows (the published change also broke the ordinary tracker: defect 12)."""
    tracker, features = make_tracker(), features_of(make_tracker(), 0)
    expected = features.coarse + tracker.no_mem_embed.transpose(1, 2)[..., None]
    assert torch.equal(tracker.without_memory(features), expected)
    published = make_tracker(TINY.with_efficient_memory(compat="published"))
    answer = published.without_memory(features)
    assert answer.shape == features.coarse.shape and not torch.allclose(answer, expected, atol=1e-2)
    per_object = TrackerFeatures(*(m.expand(3, -1, -1, -1) for m in features))
    torch.testing.assert_close(published.without_memory(per_object), answer.expand(3, -1, -1, -1))


@torch.no_grad()
def test_published_rules_make_320_tokens() -> None:
    bank = track(make_tracker(TINY.with_efficient_memory(compat="published")), [0])
    memory = bank.non_cond[2].maskmem_features
    assert memory is not None and memory.shape == (1, 320, MEM)


@torch.no_grad()
def test_other_grids_have_the_same_number_of_tokens() -> None:
    """Defect 7.6 (20, 23) of the published training."""
    tracker = make_tracker()
    memory = track(tracker, [0], grid=12).non_cond[2].maskmem_features
    assert memory is not None and memory.shape == (1, 64, MEM)


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        {"use_memory_selection": True},
        {"use_memory_selection": True, "shared_iou_score": False},
        {"memory_decay": 0.1},
        {"top_k_memories": 1},
        {"memory_frames": 8},
        {"num_maskmem": 0},
    ],
    ids=str,
)
def test_settings_of_the_released_memory(settings: dict) -> None:
    tracker = make_tracker()
    tracker.settings = tracker.settings.replace(**settings)
    bank = track(tracker, [0, 1], 4)
    masks = bank.non_cond[3].pred_masks
    assert masks is not None and masks.shape == (2, 1, 4 * GRID, 4 * GRID) and bool(masks.isfinite().all())


def test_memories_are_stored_in_bfloat16() -> None:
    with torch.no_grad():
        record = track(EfficientSam3Tracker(TINY).eval(), [0], 2).non_cond[1]
    assert record.maskmem_features is not None and record.maskmem_features.dtype == torch.bfloat16


def test_gradients_reach_all_of_the_memory() -> None:
    tracker = make_tracker().train()
    features = [features_of(tracker, t) for t in range(3)]
    coverage = torch.zeros(3, 2, GRID, GRID)
    coverage[:, 0, 2:8, 2:8] = coverage[:, 1, 9:15, 5:12] = 1.0
    result = forward_clip(tracker, features, coverage, ClipPlan("mask", (0,)), video_frames=16, force_presence=True)
    loss: Tensor = sum((a.sam.mask_logits.square().mean() for a in result.answers), torch.zeros(()))
    loss.backward()
    new = ("spatial_perceiver.", "memory_attention.", "mem_proj.", "mem_pos_proj.", "maskmem_backbone.", "maskmem_tpos")
    silent = [
        name
        for name, p in tracker.named_parameters()
        if name.startswith(new) and (p.grad is None or not bool(p.grad.any()))
    ]
    assert silent == []


def test_parameters_of_the_published_configuration() -> None:
    """Table 7.4 of the published model, without its backbone."""
    config = Sam3Config().with_efficient_memory(compat="published")
    with building_on(torch.device("meta")):
        tracker = EfficientSam3Tracker(config)
    sizes: dict[str, int] = {}
    for name, parameter in tracker.named_parameters():
        part = name.split(".")[0]
        sizes[part] = sizes.get(part, 0) + parameter.numel()
    assert sizes["maskmem_backbone"] == 1_384_608
    assert sizes["spatial_perceiver"] == 218_496
    assert sizes["memory_attention"] == 2_107_392
    assert sizes["mem_proj"] + sizes["mem_pos_proj"] == 33_280
    assert sum(sizes.values()) == 8_180_226
    assert len(tracker.state_dict()) == 297


def test_description_without_a_compressed_memory() -> None:
    with pytest.raises(ValueError, match=r"'tiny' has no compressed memory: take config\.with_efficient_memory\(\)"):
        EfficientSam3Tracker(Sam3Config.preset("tiny"))


def test_description_survives_a_checkpoint() -> None:
    for memory in (None, EfficientMemoryConfig(num_latents=16, num_latents_2d=9)):
        config = TINY.replace(efficient_memory=memory)
        assert Sam3Config.from_dict(config.to_dict()) == config
    old = Sam3Config().to_dict()
    del old["efficient_memory"]
    assert Sam3Config.from_dict(old) == Sam3Config()
