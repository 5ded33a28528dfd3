"""That the memory's training learns, and that what it learns is what its forward pass computes with.

Defects that are named by number are those of the published stage-2 training.
"""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
from torch import nn
from tracking_clips import TEACHER_FILE, make_batch, make_model

from sam3.config import EfficientMemoryConfig
from sam3.model.clip_forward import ClipPlan, ClipPrompting
from sam3.preprocess import Preprocess
from sam3_train.optim import parameter_groups
from stage2.distill import full_memory_teacher
from stage2.losses import MemoryDecoder, reconstruction_loss, temporal_loss, watched_compressions
from stage2.task import Stage2Options, Stage2Task

MEMORY = EfficientMemoryConfig(perceiver_head_dim=16, num_heads=4, mlp_dim=128, num_latents=0, num_latents_2d=64)
TRACK_ONLY = ClipPrompting(num_prompted=(1, 1), num_corrected=(0, 0))


def optimizer_of(task: Stage2Task, lr: float) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(parameter_groups(task, 0.0, task.lr_scale), lr=lr)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    return optimizer


def step(task: Stage2Task, batch: dict[str, Any], optimizer: torch.optim.Optimizer) -> float:
    loss = task(batch)["loss"]
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    return float(loss.detach())


def iou(task: Stage2Task, batch: dict[str, Any]) -> float:
    with torch.no_grad():
        found = task.eval().validate(batch)["iou"]
    task.train()
    return float(found.mean())


def test_two_clips_are_learned_in_a_few_steps() -> None:
    torch.manual_seed(0)
    task = Stage2Task(make_model(MEMORY), Stage2Options(TRACK_ONLY, feature_scale=30.0, val_kinds=("mask",)))
    batch = make_batch(3, 2)
    assert iou(task, batch) < 0.1
    task.start_from_full(full_memory_teacher(TEACHER_FILE, "cpu"), [make_batch(3, 1)])
    started, optimizer = iou(task, batch), optimizer_of(task, 5e-4)
    losses = [step(task, batch, optimizer) for _ in range(6)]
    assert losses[-1] < 0.7 * losses[0]
    assert started > 0.3 and iou(task, batch) > started + 0.15


def test_the_forward_pass_sees_the_weights_that_are_updated() -> None:
    """7.6 (1): nothing that a model is built with or runs through leaves autocast on, whose cache keeps old weights."""
    task = Stage2Task(make_model(MEMORY), Stage2Options(TRACK_ONLY)).train()
    batch, optimizer = make_batch(2, 1), optimizer_of(task, 1e-2)
    assert not torch.is_autocast_enabled("cpu")

    def loss_of(cache_enabled: bool) -> torch.Tensor:
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache_enabled):
            return task(batch)["loss"]

    loss_of(True).backward()
    assert not torch.is_autocast_enabled("cpu")
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(loss_of(True), loss_of(False))


def test_masks_boxes_clicks_and_corrections_are_all_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """D-124, D-125, 7.6 (18): not single clicks alone, and never a click where a mask was drawn."""
    task = Stage2Task(make_model(MEMORY))
    plans: list[ClipPlan] = []

    class Drawn(Exception):
        pass

    def note(tracker: Any, features: Any, coverage: Any, plan: ClipPlan, *rest: Any) -> None:
        plans.append(plan)
        raise Drawn

    monkeypatch.setattr(task, "_play", note)
    monkeypatch.setattr(task, "tracked_rows", lambda clips: ([None] * 4, torch.zeros(4, 1, 2, 2)))
    for seed in range(120):
        torch.manual_seed(seed)
        with pytest.raises(Drawn):
            task(make_batch(1, 1))
    kinds = collections.Counter(plan.kind for plan in plans)
    assert 40 < kinds["mask"] < 80 and kinds["box"] > 15 and kinds["click"] > 15
    assert all(bool(plan.corrected) == (plan.kind != "mask") for plan in plans)
    assert {len(plan.prompted) for plan in plans} == {1, 2}


def test_frames_are_normalised_as_the_backbone_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """7.6 (11): by the file's own record, not by constants of another network."""
    model = make_model(MEMORY)
    seen: list[torch.Tensor] = []
    original = model.clip_features
    monkeypatch.setattr(model, "clip_features", lambda images, *rest: (seen.append(images), original(images, *rest))[1])
    clips = make_batch(1, 1)["clips"]
    for preprocess in (model.preprocess, Preprocess(size_px=252, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.2))):
        model.preprocess = preprocess
        Stage2Task(model).tracked_rows(clips)
        mean, std = (torch.tensor(values)[:, None, None] for values in (preprocess.mean, preprocess.std))
        assert torch.allclose(seen[-1][0, 0], (clips.pixels[0, 0] / 255 - mean) / std, atol=1e-5)


def test_flicker_costs_and_a_steady_error_does_not() -> None:
    task = Stage2Task(make_model(MEMORY))
    features, coverage = task.tracked_rows(make_batch(3, 1)["clips"])
    with torch.no_grad():
        result = task._play(task.model, features, coverage, ClipPlan("box", (0,)), 0, False)
    best = [sam.ious.argmax(1) for _, sam in result.answers]
    for (_, sam), which in zip(result.answers, best, strict=True):
        sam.mask_logits[torch.arange(2), which] = 40.0 * coverage[0] - 20.0
    still = coverage[:1].repeat(3, 1, 1, 1)
    assert float(temporal_loss(result, still)) < 1e-4
    shifted = still.roll(9, dims=-1)
    assert float(temporal_loss(result, shifted)) < 1e-4
    _, sam = result.answers[1]
    sam.mask_logits[torch.arange(2), best[1]] *= -1
    assert float(temporal_loss(result, still)) > 1.0
    gone = still.clone()
    gone[:, 1:] = 0.0
    assert float(temporal_loss(result, torch.zeros_like(still))) == 0.0
    assert float(temporal_loss(result, gone)) > 1.0


def test_tokens_can_be_decoded_to_the_memory_they_were_made_of() -> None:
    torch.manual_seed(0)
    model, decoder = make_model(MEMORY), MemoryDecoder(16, 18)
    dense = nn.functional.interpolate(torch.randn(4, 16, 3, 3), (18, 18), mode="bilinear")
    with watched_compressions(model) as compressions:
        model.compress(dense)
    assert torch.equal(compressions[0].dense_bchw, dense) and compressions[0].tokens_bnc.shape == (4, 64, 16)
    optimizer = torch.optim.Adam([*decoder.parameters(), *model.spatial_perceiver.parameters()], 5e-3)
    losses = []
    for _ in range(60):
        with watched_compressions(model) as compressions:
            model.compress(dense.requires_grad_())
        loss = reconstruction_loss(decoder, compressions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 < losses[0]
    with watched_compressions(model) as compressions:
        pass
    with pytest.raises(ValueError, match="no compressed memory"):
        reconstruction_loss(decoder, compressions)
    assert not model.spatial_perceiver._forward_hooks
