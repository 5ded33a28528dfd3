"""The training forward of a clip: plans, prompts, gradients through the memory, and clips that are tracked at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sam3.config import Sam3Config
from sam3.model.clip_forward import (
    PROMPT_KINDS,
    ClipPlan,
    ClipPrompting,
    ClipResult,
    draw_plan,
    forward_clip,
    is_present,
)
from sam3.model.sam3_tracker import NO_OBJECT_LOGIT, Sam3Tracker, TrackerFeatures

TINY = Sam3Config.preset("tiny").replace(image_size_px=112)
GRID = TINY.grid_size


def make_tracker(object_score: float = 5.0) -> Sam3Tracker:
    torch.manual_seed(0)
    tracker = Sam3Tracker(TINY, memory_dtype=torch.float32).train()
    with torch.no_grad():
        tracker.sam_mask_decoder.pred_obj_score_head.layers[-1].weight.mul_(0.1)
        tracker.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(object_score)
    return tracker


def make_clip(num_frames: int, rows: int = 1, seed: int = 1) -> list[TrackerFeatures]:
    generator = torch.Generator().manual_seed(seed)
    dim = TINY.hidden_dim
    shapes = ((rows, dim // 8, 4 * GRID, 4 * GRID), (rows, dim // 4, 2 * GRID, 2 * GRID), (rows, dim, GRID, GRID))
    return [TrackerFeatures(*(torch.randn(shape, generator=generator) for shape in shapes)) for _ in range(num_frames)]


def make_coverage(num_frames: int, num_objects: int = 2) -> Tensor:
    coverage = torch.zeros(num_frames, num_objects, 4 * GRID, 4 * GRID)
    for t in range(num_frames):
        for i in range(num_objects):
            coverage[t, i, 2 + t : 10 + t, 3 + 9 * i : 11 + 9 * i] = 1.0
    return coverage


def test_plans_keep_their_bounds_and_shares() -> None:
    generator = torch.Generator().manual_seed(0)
    prompting = ClipPrompting(num_prompted=(1, 2), num_corrected=(1, 2))
    plans = [draw_plan(5, prompting, generator) for _ in range(400)]
    shares = {kind: sum(plan.kind == kind for plan in plans) / len(plans) for kind in PROMPT_KINDS}
    assert shares == pytest.approx({"mask": 0.5, "box": 0.25, "click": 0.25}, abs=0.08)
    for plan in plans:
        assert plan.prompted[0] == 0 and len(set(plan.prompted)) == len(plan.prompted) in (1, 2)
        assert all(0 <= t < 5 for t in (*plan.prompted, *plan.corrected))
        if plan.kind == "mask":
            assert not plan.corrected
        else:
            assert len(set(plan.corrected)) == len(plan.corrected) in (1, 2)
            assert plan.corrected[0] == 0, "prompted frames are corrected first"
    assert draw_plan(1, ClipPrompting(num_prompted=(2, 2)), generator).prompted == (0,)


@pytest.mark.parametrize("kind", PROMPT_KINDS)
def test_every_frame_is_answered_and_remembered(kind: str) -> None:
    """Defect D-124, 7.6 (18, 22) of the published training."""
    plan = ClipPlan(kind, (0, 2), () if kind == "mask" else (0, 3))
    prompting = ClipPrompting(clicks_per_frame=2)
    result = forward_clip(make_tracker(), make_clip(4), make_coverage(4), plan, prompting)
    assert set(result.outputs) == {0, 1, 2, 3}
    frames = [answer.frame_idx for answer in result.answers]
    assert frames == ([1, 3] if kind == "mask" else [0, 0, 0, 2, 1, 3, 3, 3])
    assert list(result.bank.cond) == ([0, 2] if kind == "mask" else [0, 2, 3])
    assert list(result.bank.non_cond) == ([1, 3] if kind == "mask" else [1])
    assert set(result.conditioned) == {1, 3}, "prompted frames read no memory"
    # One click or none: three candidates; a box or more clicks: the single mask.
    candidates = [answer.sam.mask_logits.shape[1] for answer in result.answers]
    assert candidates == {"mask": [3, 3], "box": [1, 1, 1, 1, 3, 3, 3, 1], "click": [3, 1, 1, 3, 3, 3, 3, 1]}[kind]


def test_gradients_reach_everything_through_the_memory() -> None:
    tracker = make_tracker()
    result = forward_clip(tracker, make_clip(3), make_coverage(3), ClipPlan("mask", (0,)))
    result.answers[-1].sam.mask_logits.square().mean().backward()
    for name in ("maskmem_backbone.out_proj", "maskmem_backbone.mask_downsampler.encoder.0", "obj_ptr_proj.layers.0"):
        assert tracker.get_parameter(f"{name}.weight").grad.abs().max() > 0, name
    for name in ("mask_downsample.weight", "maskmem_tpos_enc", "obj_ptr_tpos_proj.weight", "no_mem_embed"):
        grad = tracker.get_parameter(name).grad
        assert (grad is None) == (name == "no_mem_embed"), name
        assert grad is None or grad.abs().max() > 0, name


def test_gradients_may_stop_at_the_masks_of_earlier_frames() -> None:
    found: dict[bool, tuple[ClipResult, Tensor | None, Tensor | None]] = {}
    for through in (True, False):
        tracker = make_tracker()
        for parameter in tracker.obj_ptr_proj.parameters():
            torch.nn.init.zeros_(parameter)  # so that masks are the only way back to the first answer
        for pointer in (tracker.no_obj_ptr, tracker.obj_ptr_tpos_proj.weight):
            pointer.requires_grad_(False)
        result = forward_clip(tracker, make_clip(2), make_coverage(2), ClipPlan("click", (0,)), through_masks=through)
        first = result.answers[0].sam.mask_logits
        result.answers[1].sam.mask_logits.sum().backward(inputs=[first, *tracker.maskmem_backbone.parameters()])
        found[through] = result, first.grad, tracker.maskmem_backbone.out_proj.weight.grad
    assert torch.equal(*(result.answers[1].sam.mask_logits for result, _, _ in found.values()))
    assert found[True][1] is not None and found[True][1].abs().sum() > 0
    assert found[False][1] is None
    assert all(weight is not None and weight.abs().sum() > 0 for _, _, weight in found.values())


def test_clips_tracked_at_once_give_what_each_gives_alone() -> None:
    tracker = make_tracker().eval()
    first, second = make_clip(3, seed=1), make_clip(3, seed=2)
    both = [
        TrackerFeatures(*(torch.cat(pair) for pair in zip(a, b, strict=True)))
        for a, b in zip(first, second, strict=True)
    ]
    coverage, plan = make_coverage(3), ClipPlan("mask", (0,))
    with torch.no_grad():
        together = forward_clip(tracker, both, coverage, plan)
        for i, clip in enumerate((first, second)):
            alone = forward_clip(tracker, clip, coverage[:, i : i + 1], plan)
            torch.testing.assert_close(
                together.outputs[2].pred_masks[i], alone.outputs[2].pred_masks[0], atol=1e-4, rtol=1e-4
            )


def test_a_click_on_an_object_in_the_corner_lands_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defect D-111, 7.6 (2) of the published training."""
    tracker = make_tracker()
    seen: list[tuple[Tensor, Tensor]] = []
    decode = tracker.decode

    def spy(features, conditioned, num_objects, point_inputs=None, *rest):
        seen.append(point_inputs)
        return decode(features, conditioned, num_objects, point_inputs, *rest)

    monkeypatch.setattr(tracker, "decode", spy)
    coverage = torch.zeros(1, 1, 4 * GRID, 4 * GRID)
    coverage[0, 0, -3:, -4:] = 1.0
    cell = TINY.image_size_px / (4 * GRID)
    for kind in ("click", "box"):
        forward_clip(tracker, make_clip(1), coverage, ClipPlan(kind, (0,)), ClipPrompting(box_noise=0.0))
    click, box = (points[0] for points, _ in seen)
    low, high = TINY.image_size_px - cell * torch.tensor([4.0, 3.0]), TINY.image_size_px - 1.0
    assert ((click[0] >= low - 0.5) & (click[0] <= high)).all()
    torch.testing.assert_close(box[0], low + 0.5 * cell - 0.5)
    assert seen[0][1].tolist() == [[1]] and seen[1][1].tolist() == [[2, 3]]


def test_absent_objects_get_a_negative_click_or_an_empty_mask() -> None:
    """Defect D-115, 7.6 (16) of the published training."""
    coverage = make_coverage(2)
    coverage[0, 1] = 0.0
    assert is_present(coverage).tolist() == [[True, False], [True, True]]
    tracker = make_tracker()
    for kind, labels in (("click", [[1], [0]]), ("box", [[2, 3], [0, -1]])):
        seen: list[Tensor] = []
        decode = tracker.decode
        tracker.decode = lambda *args, seen=seen, decode=decode: (seen.append(args[3]), decode(*args))[1]
        forward_clip(tracker, make_clip(1), coverage[:1], ClipPlan(kind, (0,)))
        del tracker.decode
        assert seen[0][1].tolist() == labels
    record = forward_clip(tracker, make_clip(1), coverage[:1], ClipPlan("mask", (0,))).bank.cond[0]
    assert (record.object_score_logits[:, 0] > 0).tolist() == [True, False]


def test_forced_presence_keeps_masks_and_gradients() -> None:
    """Defect 7.6 (8) of the published training."""
    coverage = make_coverage(2)
    coverage[1, 1] = 0.0

    def masks(force: bool) -> tuple[ClipResult, Sam3Tracker]:
        tracker = make_tracker(object_score=-5.0)
        return forward_clip(tracker, make_clip(2), coverage, ClipPlan("mask", (0,)), force_presence=force), tracker

    lost, _ = masks(False)
    assert (lost.outputs[1].pred_masks == NO_OBJECT_LOGIT).all()
    assert (lost.answers[0].sam.mask_logits != NO_OBJECT_LOGIT).all(), "answers are judged as they were decoded"
    kept, tracker = masks(True)
    assert (kept.outputs[1].pred_masks[0] != NO_OBJECT_LOGIT).all()
    assert (kept.outputs[1].pred_masks[1] == NO_OBJECT_LOGIT).all()
    kept.bank.non_cond[1].obj_ptr.sum().backward()
    assert tracker.no_obj_ptr.grad.abs().max() > 0 and tracker.obj_ptr_proj.layers[0].weight.grad.abs().max() > 0


def test_the_same_seed_gives_the_same_clip() -> None:
    def play() -> Tensor:
        generator = torch.Generator().manual_seed(7)
        prompting = ClipPrompting(mask_share=0.0)
        plan = draw_plan(3, prompting, generator)
        with torch.no_grad():
            result = forward_clip(make_tracker(), make_clip(3), make_coverage(3), plan, prompting, generator=generator)
        return torch.cat([result.outputs[t].pred_masks for t in range(3)])

    assert torch.equal(play(), play())


def test_bad_arguments() -> None:
    tracker, clip, coverage = make_tracker(), make_clip(2), make_coverage(2)
    with pytest.raises(ValueError, match=r"coverage must be \(2, B, h, w\)"):
        forward_clip(tracker, clip, coverage[:1], ClipPlan("mask", (0,)))
    with pytest.raises(ValueError, match="names frame 5, but the clip has 2 frames"):
        forward_clip(tracker, clip, coverage, ClipPlan("mask", (0, 5)))
    with pytest.raises(ValueError, match="can't be corrected"):
        ClipPlan("mask", (0,), (0,))
    with pytest.raises(ValueError, match="'scribble' is not one of"):
        ClipPlan("scribble", (0,))
    with pytest.raises(ValueError, match="add up to more than 1"):
        ClipPrompting(mask_share=0.7, box_share=0.5)
    with pytest.raises(ValueError, match="num_prompted"):
        ClipPrompting(num_prompted=(0, 1))
