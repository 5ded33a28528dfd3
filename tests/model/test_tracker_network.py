"""The tracker's network where no published numbers exist: training, precision, sharing, other grids, misuse."""

from __future__ import annotations

import pytest
import torch
from golden import table, tracker_value
from torch import Tensor

from sam3.config import Sam3Config
from sam3.model import memory_attention
from sam3.model.grid_tables import RotaryTable, SineTable
from sam3.model.memory_bank import MemoryBank
from sam3.model.sam3_tracker import Sam3Tracker

TINY = Sam3Config.preset("tiny")
GRID, DIM = TINY.grid_size, TINY.hidden_dim
CLICKS = torch.tensor([[[60.0, 80.0]], [[150.0, 40.0]]]), torch.ones(2, 1, dtype=torch.long)


def make_tracker(config: Sam3Config = TINY, memory_dtype: torch.dtype = torch.float32) -> Sam3Tracker:
    tracker = Sam3Tracker(config, memory_dtype).eval()
    tracker.load_state_dict({key: tracker_value(key, value.shape) for key, value in tracker.state_dict().items()})
    return tracker


def maps_of(t: int, grid: int = GRID) -> dict:
    """What the second neck gives for a frame."""
    return {"backbone_fpn": [table(f"neck{t}.{i}", (1, DIM, grid * s, grid * s)) for i, s in enumerate((4, 2, 1))]}


def track(tracker: Sam3Tracker, rows: list[int], num_frames: int = 3, grid: int = GRID) -> MemoryBank:
    """A click on each object, then propagation."""
    bank, dtype = MemoryBank(), tracker.no_mem_embed.dtype
    points = CLICKS[0][rows], CLICKS[1][rows]
    for t in range(num_frames):
        maps = {"backbone_fpn": [m.to(dtype) for m in maps_of(t, grid)["backbone_fpn"]]}
        prompts: dict = {"point_inputs": points} if t == 0 else {}
        record = tracker.track_step(
            t, tracker.frame_features(maps), bank, is_init_cond_frame=t == 0, num_frames=num_frames, **prompts
        )
        (bank.cond if t == 0 else bank.non_cond)[t] = record
    return bank


@torch.no_grad()
def test_objects_together_are_the_objects_alone() -> None:
    """And what is the same for all of them is computed once: the first layer's self-attention."""
    tracker = make_tracker()
    batches: list[list[int]] = []
    for layer in tracker.transformer.encoder.layers:
        seen: list[int] = []
        layer.self_attn.q_proj.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(len(args[0])))
        batches.append(seen)
    together = track(tracker, [0, 1])
    assert batches == [[1, 1], [2, 2]]
    for row in (0, 1):
        alone = track(tracker, [row])
        for t in (1, 2):
            ours, theirs = together.non_cond[t].select([row]), alone.non_cond[t]
            for name in ("pred_masks", "obj_ptr", "object_score_logits", "maskmem_features"):
                torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_inference_attends_as_training_does(monkeypatch: pytest.MonkeyPatch, decay: float) -> None:
    """Without gradients attention runs in another form, in parts; the result is the same."""
    monkeypatch.setattr(memory_attention, "_QUERIES_AT_ONCE", 50)
    tracker = make_tracker()
    tracker.settings = tracker.settings.replace(memory_decay=decay)
    with torch.no_grad():
        bank, features = track(tracker, [0, 1]), tracker.frame_features(maps_of(3))
        found = tracker.condition(3, features, bank, 4)
    expected = tracker.condition(3, features, bank, 4)
    assert expected.requires_grad
    torch.testing.assert_close(found, expected.detach(), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_bfloat16_weights_give_nearly_the_same_masks() -> None:
    exact = track(make_tracker(), [0, 1])
    low = track(make_tracker().to(torch.bfloat16), [0, 1])
    for t in (1, 2):
        ours, theirs = exact.non_cond[t], low.non_cond[t]
        assert theirs.pred_masks is not None and theirs.pred_masks.dtype == torch.float32
        assert theirs.obj_ptr.dtype == torch.bfloat16
        assert (ours.pred_masks - theirs.pred_masks).abs().mean() < 0.1 * ours.pred_masks.abs().mean()


@torch.no_grad()
def test_memory_is_stored_as_asked() -> None:
    assert track(make_tracker(), [0], 1).cond[0].maskmem_features.dtype == torch.float32
    bank = track(Sam3Tracker(TINY).eval(), [0], 2)
    assert bank.cond[0].maskmem_features.dtype == torch.bfloat16
    assert bank.nbytes == sum(r.nbytes for r in (bank.cond[0], bank.non_cond[1]))
    floats = 16 * GRID * GRID + DIM + 1 + 1  # masks, pointer, object score, IoU
    assert bank.cond[0].nbytes == 4 * floats + 2 * TINY.tracker.mem_dim * GRID * GRID


@torch.no_grad()
def test_tables_of_the_own_grid_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = make_tracker()
    track(tracker, [0, 1], 1)  # the position code of the decoder depends on the weights: made on first use

    def refuse(*_: object) -> Tensor:
        raise AssertionError("computed again")

    for kind in (SineTable, RotaryTable):
        monkeypatch.setattr(kind, "compute", refuse)
    monkeypatch.setattr(type(tracker.sam_prompt_encoder.pe_layer), "encode_grid", refuse)
    track(tracker, [0, 1])
    assert not any("table" in key for key in tracker.state_dict())


@torch.no_grad()
def test_the_decoders_position_code_follows_its_weights() -> None:
    encoder = make_tracker().sam_prompt_encoder
    before = encoder.get_dense_pe(GRID)
    assert encoder.get_dense_pe(GRID) is before
    encoder.pe_layer.positional_encoding_gaussian_matrix.mul_(2)
    assert not torch.equal(encoder.get_dense_pe(GRID), before)
    assert encoder.to(torch.bfloat16).get_dense_pe(GRID).dtype == torch.bfloat16


@torch.no_grad()
def test_other_grids_work() -> None:
    bank = track(make_tracker(), [0, 1], grid=12)
    assert bank.non_cond[2].pred_masks.shape == (2, 1, 48, 48)
    assert bank.non_cond[2].maskmem_features.shape == (2, TINY.tracker.mem_dim, 12, 12)


def test_gradients_reach_every_weight() -> None:
    """Through a clip in training mode: prompts of all kinds, memory, pointers, an absent object."""
    tracker = make_tracker().train()
    bank, loss = MemoryBank(), torch.zeros(())
    mask = torch.zeros(2, 1, tracker.mask_prompt_size, tracker.mask_prompt_size)
    mask[0, :, 40:150, 60:200] = 1  # the second object is absent
    points = torch.tensor([[[20.0, 30.0], [200.0, 180.0], [90.0, 90.0], [5.0, 5.0]]]).expand(2, -1, -1)
    labels = torch.tensor([[2, 3, 1, 0]]).expand(2, -1)
    for t in range(5):
        features = tracker.frame_features(maps_of(t))
        prompts: dict = {}
        if t == 0:
            prompts = {"mask_inputs": mask}
        if t == 2:
            prompts = {"point_inputs": (points, labels), "prev_sam_mask_logits": table("prev", (2, 1, 72, 72))}
            prompts["use_prev_mem_frame"] = False
        output = tracker.track_step_full(t, features, bank, is_init_cond_frame=t == 0, num_frames=5, **prompts)
        record = tracker.make_record(features, output, prompts.get("mask_inputs"), "point_inputs" in prompts)
        (bank.cond if prompts else bank.non_cond)[t] = record
        assert record.maskmem_features is not None and record.maskmem_features.requires_grad
        if output.sam is not None:
            loss = loss + sum(x.square().mean() for x in output.sam)
    loss.backward()
    without = {name for name, parameter in tracker.named_parameters() if parameter.grad is None}
    assert without == {"no_mem_pos_enc"}
    assert all(p.grad.isfinite().all() for p in tracker.parameters() if p.grad is not None)


def test_dropout_is_for_training_alone() -> None:
    attention = TINY.tracker.memory_attention
    config = TINY.replace(tracker=TINY.tracker.replace(memory_attention=type(attention)(2, 1, 128, dropout=0.1)))
    tracker = make_tracker(config)
    with torch.no_grad():
        bank = track(tracker, [0, 1])
        features = tracker.frame_features(maps_of(3))
        calm = [tracker.condition(3, features, bank, 4) for _ in range(2)]
        tracker.train()
        wild = [tracker.condition(3, features, bank, 4) for _ in range(2)]
    assert torch.equal(*calm)
    assert not torch.equal(*wild)


def test_what_cannot_be_tracked() -> None:
    tracker = make_tracker()
    features = tracker.frame_features(maps_of(0))
    mask = torch.ones(2, 1, 288, 288)

    def step(bank: MemoryBank | None = None, **prompts: object) -> None:
        arguments: dict = {"is_init_cond_frame": False, "num_frames": 5, **prompts}
        tracker.track_step(1, features, bank or MemoryBank(), **arguments)

    for prompts, message in (
        ({"point_inputs": CLICKS, "mask_inputs": mask}, "points or masks, not both"),
        ({"prev_sam_mask_logits": mask, "num_objects": 2}, "corrected by points, and there are none"),
        ({"mask_inputs": mask[0]}, r"mask_inputs has shape \(1, 288, 288\), expected \(B, 1, h, w\)"),
        ({"mask_inputs": mask[..., :8]}, "mask_inputs are 288 x 8 pixels: resize them to 288, mask_prompt_size"),
        ({}, "num_objects is needed"),
        ({"num_objects": 2}, "frame 1: no memory to read; give a prompt on some frame first"),
    ):
        with pytest.raises(ValueError, match=message):
            step(**prompts)
    record = tracker.track_step(
        0, features, MemoryBank(), is_init_cond_frame=True, num_frames=5, point_inputs=CLICKS, run_mem_encoder=False
    )
    with pytest.raises(ValueError, match="the memory of frame 0 was dropped or never made, and is needed now"):
        step(MemoryBank(cond={0: record}))
