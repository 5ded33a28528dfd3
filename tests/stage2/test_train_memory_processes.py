"""The training of the memory in two processes: identical weights, and the same ones after kill -9."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from toy_training import kill_9_inside_an_epoch, learnt, run_group
from training_world import MemoryWorld

from sam3_train.checkpoint import state_dict_sha256
from sam3_train.log import read_metrics
from stage2 import run as run_module
from stage2.task import Stage2Task
from stage2.train_memory_stage2 import _train

LAST = "ckpt_epoch_1.pth"


def run_config(world: MemoryWorld) -> Path:
    """Two processes, one clip each: two steps an epoch, each of them saved; clips grow in the last epoch."""
    return world.config(
        "processes",
        DATA__BATCH_SIZE=1,
        CLIPS__LENGTHS=[2, 3],
        CLIPS__LENGTH_EPOCHS=[0, 1],
        CLIPS__MAX_OBJECTS=1,
        TRAIN__EPOCHS=2,
        TRAIN__SAVE_EVERY_STEPS=1,
        TRAIN__REPLICA_CHECK_STEPS=1,
        VAL__ENABLE=False,
    )


def train_and_hash(cfg: Path, output: Path) -> None:
    """Train on this rank and write down what its own weights are."""
    tasks: list[Stage2Task] = []
    build = run_module.build_task

    def build_and_keep(*args: Any) -> tuple[Stage2Task, float | None]:
        task, start_error = build(*args)
        tasks.append(task)
        return task, start_error

    run_module.build_task = build_and_keep
    _train(["--cfg", str(cfg), "--output", str(output), "--device", "cpu"])
    (output / f"weights{os.environ['RANK']}.txt").write_text(state_dict_sha256(tasks[0].saved_state()))


@pytest.fixture(scope="module")
def uninterrupted(memory_world: MemoryWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    ended = run_group(train_and_hash, 2, folder, run_config(memory_world), folder)
    assert ended.codes == [0, 0], ended.text
    return folder


def test_two_processes_end_with_identical_parameters(uninterrupted: Path) -> None:
    """D-110, 7.6 (3): gradients are averaged; each rank's own weights are hashed, not rank 0's checkpoint."""
    first, second = ((uninterrupted / f"weights{rank}.txt").read_text() for rank in (0, 1))
    assert first == second == learnt(uninterrupted / LAST)["model"]
    assert [record["step"] for record in read_metrics(uninterrupted, "train")] == [1, 2, 3, 4]
    assert (uninterrupted / "model_final.pth").is_file()


def test_a_run_killed_with_kill_9_ends_with_the_same_weights(
    uninterrupted: Path, memory_world: MemoryWorld, tmp_path: Path
) -> None:
    """D-122, 7.6 (24): both processes die inside an epoch; the same command continues, bit for bit."""
    cfg, run = run_config(memory_world), tmp_path / "run"
    kill_9_inside_an_epoch(train_and_hash, tmp_path, cfg, run)
    assert not (run / LAST).exists()
    ended = run_group(train_and_hash, 2, tmp_path, cfg, run)
    assert ended.codes == [0, 0] and "continuing from" in ended.text, ended.text
    assert learnt(run / LAST) == learnt(uninterrupted / LAST)
