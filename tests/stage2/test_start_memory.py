"""Where a compressed memory starts: near the full one, without a step of training."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from tracking_clips import TEACHER_FILE, make_batch, make_model

from sam3.config import EfficientMemoryConfig
from sam3.model.clip_forward import ClipPlan, ClipPrompting
from sam3.model.perceiver import PerceiverResampler
from sam3.model.sam3_tracker import Sam3Tracker
from sam3_train.errors import UserError
from stage2.distill import DistillWeights, forced_error, forced_features, full_memory_teacher
from stage2.start_tokens import fit, grid_places, start_resampler, token_places
from stage2.task import Stage2Options, Stage2Task

WINDOWS = EfficientMemoryConfig(perceiver_head_dim=16, num_heads=4, mlp_dim=128, num_latents=0, num_latents_2d=64)
ANCHORS = dataclasses.replace(WINDOWS, num_latents=64, num_latents_2d=0)


@pytest.fixture(scope="module")
def full() -> Sam3Tracker:
    return full_memory_teacher(TEACHER_FILE, "cpu")


def blobs(count: int, dim: int = 16, grid: int = 18) -> Tensor:
    """Smooth maps."""
    coarse = torch.randn(count, dim, 6, 6, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (grid, grid), mode="bilinear")


@pytest.mark.parametrize("memory", [WINDOWS, ANCHORS, dataclasses.replace(ANCHORS, num_latents=50)])
def test_tokens_start_as_what_is_stored_around_their_places(memory: EfficientMemoryConfig) -> None:
    torch.manual_seed(0)
    resampler = PerceiverResampler(16, 18, memory)
    dense = blobs(24)
    place = token_places(make_model(memory))

    def share_explained() -> float:
        tokens = resampler(dense)
        at = ((place + 0.5) * 18).long().clamp(max=17)
        wanted = dense[:, :, at[:, 1], at[:, 0]].transpose(1, 2)
        linear = fit(tokens.flatten(0, 1), wanted.flatten(0, 1))
        rest = wanted.flatten(0, 1) - (tokens.flatten(0, 1) @ linear[0].T + linear[1])
        return 1.0 - float(rest.var() / wanted.var())

    with torch.no_grad():
        before = share_explained()
        start_resampler(resampler, dense)
        after = share_explained()
    assert after > before + 0.3, (before, after)


@pytest.mark.parametrize("memory", [WINDOWS, ANCHORS])
def test_a_memory_starts_near_the_full_one(full: Sam3Tracker, memory: EfficientMemoryConfig) -> None:
    task, batches = Stage2Task(make_model(memory)), [make_batch(3, 1), make_batch(3, 1, absent=(2,))]
    before = torch.get_rng_state()
    error = task.start_from_full(full, batches)
    assert torch.equal(before, torch.get_rng_state())
    assert error < 0.7
    largest = max(float(value.abs().max()) for value in task.model.trained_state().values())
    assert largest < 1000.0, "a memory has to fit into files of half precision"
    options = Stage2Options(distill=DistillWeights(features=1.0), forced_batches=1)
    fresh, started = (
        float(Stage2Task(model, options, full)(batches[0])["loss"].detach())
        for model in (make_model(memory), task.model)
    )
    assert started < fresh / 3


def test_what_is_not_read_is_not_changed(full: Sam3Tracker) -> None:
    model = make_model(WINDOWS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Stage2Task(model).start_from_full(full, [make_batch(2, 1)])
    changed = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"spatial_perceiver", "memory_attention", "mem_proj", "mem_pos_proj"}
    assert torch.equal(model.memory_attention.norm.weight, before["memory_attention.norm.weight"])


@pytest.mark.parametrize(
    "changes",
    [
        {"num_latents_2d": 0},
        {"num_latents": 16, "num_latents_2d": 16},
        {"perceiver_heads": 2, "perceiver_head_dim": 16},
        {"num_layers": 3, "num_heads": 2, "mlp_dim": 64},
        {"position_on_keys": False, "position_on_latents_2d": False},
        {"attention": "linear"},
    ],
)
def test_memories_of_other_sizes_start_too(full: Sam3Tracker, changes: dict[str, Any]) -> None:
    task = Stage2Task(make_model(dataclasses.replace(WINDOWS, **changes)))
    assert task.start_from_full(full, [make_batch(2, 1)]) < 1.5


def test_clips_of_one_frame_show_no_memory(full: Sam3Tracker) -> None:
    task = Stage2Task(make_model(WINDOWS), Stage2Options(still_frames=1))
    with pytest.raises(UserError, match="no frame reads a memory"):
        task.start_from_full(full, [make_batch(1)])


def test_forced_steps_compress_what_the_teacher_stored(full: Sam3Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(WINDOWS)
    options = Stage2Options(
        ClipPrompting(num_corrected=(0, 1), clicks_per_frame=1), distill=DistillWeights(features=2.0), forced_batches=1
    )
    task = Stage2Task(model, options, full).train()
    torch.manual_seed(0)
    terms = task(make_batch(3))
    assert set(terms) == {"loss", "teacher_features"}
    assert float(terms["loss"].detach()) == pytest.approx(2.0 * float(terms["teacher_features"].detach()))
    terms["loss"].backward()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert {"spatial_perceiver", "memory_attention", "mem_proj", "mem_pos_proj"} <= moved
    assert all(p.grad is not None for p in task.parameters() if p.requires_grad)
    trained = {name: p for name, p in task.named_parameters() if p.requires_grad}
    unmoved = {name for name, p in trained.items() if not bool(p.grad.any())}
    assert unmoved == {name for name in trained if name.startswith(task.idle_prefixes())} != set()
    assert "focal" in task(make_batch(3)) and task.idle_prefixes() == ()


@pytest.mark.parametrize("plan", [ClipPlan("mask", (0,)), ClipPlan("box", (0, 2), (1,))])
def test_an_uncompressed_copy_is_forced_to_the_teacher_itself(full: Sam3Tracker, plan: ClipPlan) -> None:
    """Each frame reads the frames that the teacher read."""
    task = Stage2Task(make_model(), Stage2Options(ClipPrompting(num_corrected=(0, 1), clicks_per_frame=1)))
    features, coverage = task.tracked_rows(make_batch(4)["clips"])
    with torch.no_grad():
        result = task._play(full, features, coverage, plan, 0, False)
        found = forced_features(full, features, result, 16)  # the full tracker stores what it is given
        assert set(found) == set(result.conditioned)
        for t, wanted in result.conditioned.items():
            assert torch.allclose(found[t], wanted, atol=1e-3 * float(wanted.abs().max()))
        assert float(forced_error(full, features, result, coverage, 16)) < 1e-4


def test_places_are_the_middles_of_cells() -> None:
    assert grid_places((1, 2)).tolist() == [[-0.25, 0.0], [0.25, 0.0]]
    assert token_places(make_model(WINDOWS)).shape == (64, 2)


def test_forced_steps_need_the_weight_of_features() -> None:
    with pytest.raises(ValueError, match="5 forced_batches compare features alone"):
        Stage2Options(forced_batches=5, distill=DistillWeights(mask=1.0))
