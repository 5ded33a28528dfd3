"""The paths that only CUDA takes: bf16 by default, loss scaling, late flags, copies ahead, the device's clock."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.data import DataLoader
from toy_training import ToyData, ToyTask, newest, toy_config

from sam3_train.checkpoint import load_checkpoint
from sam3_train.data.samplers import PartitionSampler, ResumableDistributedSampler
from sam3_train.distributed import RunContext
from sam3_train.log import read_metrics
from sam3_train.loop import FitResult, fit
from sam3_train.precision import pick_dtype
from sam3_train.rng import seed_everything

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EXACT = ["AMP_ENABLE", "False", "DETERMINISTIC", "True"]


@pytest.fixture
def run() -> RunContext:
    return RunContext(torch.device("cuda", 0))


def train(run: RunContext, output, opts=(), **data) -> FitResult:
    seed_everything(0)
    sampler = ResumableDistributedSampler(48)
    loader = DataLoader(ToyData(48, **data), 4, sampler=sampler, drop_last=True, pin_memory=True)
    val = DataLoader(ToyData(11), 4, sampler=PartitionSampler(11))
    return fit(ToyTask(), loader, val, toy_config(opts), run, output)


def test_bf16_is_the_default_and_trains(run, tmp_path):
    assert pick_dtype(toy_config(), run.device) == torch.bfloat16
    result = train(run, tmp_path, ["TRAIN.EPOCHS", "4", "TRAIN.BASE_LR", "0.01"])
    losses = [record["loss"] for record in read_metrics(tmp_path, "val")]
    assert result.is_finished and losses[-1] < losses[0]
    record = read_metrics(tmp_path, "train")[-1]
    assert 0 <= record["data_wait_share"] <= 1 and record["peak_memory_mb"] > 0


def test_fp16_scales_the_loss_and_counts_what_overflows(run, tmp_path):
    """D-58"""
    train(run, tmp_path, ["AMP_DTYPE", "fp16", "TRAIN.EPOCHS", "3"])
    state = load_checkpoint(tmp_path / "ckpt_epoch_2.pth")
    assert state["scaler"]["scale"] > 0
    assert state["counters"]["updates"] + state["counters"]["skipped"] == state["step"]
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_a_bad_step_is_skipped_on_the_device(run, tmp_path):
    """D-58, D-54: the host learns of it a step later, the weights are never touched."""
    poison = ResumableDistributedSampler(48).order()[8:12]
    train(run, tmp_path / "bad", [*EXACT, "TRAIN.MAX_STEPS", "3"], poison=poison)
    train(run, tmp_path / "good", [*EXACT, "TRAIN.MAX_STEPS", "2"])
    bad, good = (newest(tmp_path / name) for name in ("bad", "good"))
    assert bad["counters"] == {"updates": 2, "skipped": 1, "skipped_in_row": 1}
    for name, tensor in good["model"].items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(bad["model"][name], tensor)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(run, tmp_path):
    """D-47: with the CUDA generator restored (dropout), to float tolerance."""
    train(run, tmp_path / "whole", [*EXACT, "TRAIN.EMA_DECAY", "0.9"])
    train(run, tmp_path / "parts", [*EXACT, "TRAIN.EMA_DECAY", "0.9", "TRAIN.MAX_STEPS", "7"])
    train(run, tmp_path / "parts", [*EXACT, "TRAIN.EMA_DECAY", "0.9"])
    whole, parts = (load_checkpoint(tmp_path / name / "ckpt_epoch_1.pth") for name in ("whole", "parts"))
    for part in ("model", "ema"):
        torch.testing.assert_close(parts[part], whole[part])
    assert whole["counters"] == parts["counters"]


def test_the_gpu_learns_what_the_cpu_learns(run, tmp_path):
    task_opts = [*EXACT, "TRAIN.EPOCHS", "1"]

    def losses(context: RunContext, name: str) -> list[float]:
        seed_everything(0)
        loader = DataLoader(ToyData(48), 4, sampler=ResumableDistributedSampler(48), drop_last=True)
        fit(ToyTask(norm=False), loader, None, toy_config(task_opts), context, tmp_path / name)
        return [record["loss"] for record in read_metrics(tmp_path / name, "train")]

    on_gpu, on_cpu = losses(run, "gpu"), losses(RunContext(torch.device("cpu")), "cpu")
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3) and all(map(math.isfinite, on_gpu))
