"""The fine-tune in two processes: identical weights, and the same ones after kill -9."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from finetune_world import FinetuneWorld
from toy_training import kill_9_inside_an_epoch, learnt, run_group

from sam3_train.checkpoint import load_checkpoint, state_dict_sha256
from sam3_train.log import read_metrics
from stage1_geometry_finetune import run as run_module
from stage1_geometry_finetune.task import GeometryTask
from stage1_geometry_finetune.train_geometry_finetune import _train

LAST = "ckpt_epoch_2.pth"


def run_config(world: FinetuneWorld) -> Path:
    """Two processes, one image each: three steps an epoch, each of them saved; the neck is trained too."""
    return world.finetune(
        "processes",
        DATA__BATCH_SIZE=1,
        PROMPTS__MAX_OBJECTS=1,
        MODEL__TRAIN_NECK=True,
        TRAIN__EPOCHS=3,
        TRAIN__BASE_LR=0.001,
        TRAIN__SAVE_EVERY_STEPS=1,
        TRAIN__REPLICA_CHECK_STEPS=1,
        VAL__ENABLE=False,
    )


def train_and_hash(cfg: Path, output: Path) -> None:
    """Train on this rank and write down what its own weights are."""
    tasks: list[GeometryTask] = []
    build = run_module.build_task

    def build_and_keep(*args):
        tasks.append(build(*args))
        return tasks[0]

    run_module.build_task = build_and_keep
    _train(["--cfg", str(cfg), "--output", str(output), "--device", "cpu"])
    (output / f"weights{os.environ['RANK']}.txt").write_text(state_dict_sha256(tasks[0].saved_state()))


@pytest.fixture(scope="module")
def uninterrupted(finetune_world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    ended = run_group(train_and_hash, 2, folder, run_config(finetune_world), folder)
    assert ended.codes == [0, 0], ended.text
    return folder


def test_two_processes_end_with_identical_parameters(uninterrupted, finetune_world):
    """D-80: gradients are averaged, neck included; each rank's own weights are hashed, not rank 0's checkpoint."""
    first, second = ((uninterrupted / f"weights{rank}.txt").read_text() for rank in (0, 1))
    assert first == second == learnt(uninterrupted / LAST)["model"]
    start = load_checkpoint(finetune_world.start)["model"]
    end = load_checkpoint(uninterrupted / LAST)["model"]
    assert any(not torch.equal(value, end[key]) for key, value in start.items())


def test_a_run_killed_with_kill_9_ends_with_the_same_weights(uninterrupted, finetune_world, tmp_path):
    """D-87: both processes die inside an epoch; the same command continues, bit for bit."""
    cfg, run = run_config(finetune_world), tmp_path / "run"
    kill_9_inside_an_epoch(train_and_hash, tmp_path, cfg, run)
    assert not (run / LAST).exists()
    ended = run_group(train_and_hash, 2, tmp_path, cfg, run)
    assert ended.codes == [0, 0] and "continuing from" in ended.text, ended.text
    assert learnt(run / LAST) == learnt(uninterrupted / LAST)
    assert [record["step"] for record in read_metrics(run, "train")] == list(range(1, 10))
