"""Stage-1 training under its launcher, ended by kill -9 and started again: the weights of an uninterrupted run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stage1_world import Stage1World
from toy_training import free_port, run_group

from sam3_train.checkpoint import CheckpointManager, load_checkpoint, state_dict_sha256
from sam3_train.log import read_metrics
from stage1.train_stage1 import _train

ROOT = Path(__file__).resolve().parents[2]
NUM_EPOCHS = 4
LAST = f"ckpt_epoch_{NUM_EPOCHS - 1}.pth"


def run_config(world: Stage1World) -> Path:
    """Two processes, two images each: 12 steps, each of them saved."""
    return world.config(
        "resumed", DATA__BATCH_SIZE=2, TRAIN__EPOCHS=NUM_EPOCHS, TRAIN__SAVE_EVERY_STEPS=1, TRAIN__EMA_DECAY=0.9
    )


def learnt(folder: Path) -> dict[str, str]:
    """Hashes of what the finished run's last checkpoint holds."""
    state = load_checkpoint(folder / LAST)
    moments = {f"{i}.{k}": torch.as_tensor(v) for i, s in state["optimizer"]["state"].items() for k, v in s.items()}
    return {
        name: state_dict_sha256(part) for name, part in (*((n, state[n]) for n in ("model", "ema")), ("m", moments))
    }


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    argv = ["--cfg", str(run_config(world)), "--output", str(folder), "--device", "cpu"]
    ended = run_group(_train, 2, folder.parent, argv)
    assert ended.codes == [0, 0], ended.text
    return learnt(folder)


def start_nodes(num_nodes: int, cfg: Path, output: Path, log: Path) -> list[subprocess.Popen[bytes]]:
    words = [f"CFG={cfg}", f"OUTPUT={output}", "DEVICE=cpu", f"NPROC={2 // num_nodes}"]
    if num_nodes > 1:
        words += [f"NNODES={num_nodes}", f"RDZV_ENDPOINT=localhost:{free_port()}"]
    with open(log, "ab") as file:
        return [
            subprocess.Popen(
                [
                    "bash",
                    "stage1/scripts/train_stage1_student.sh",
                    *words,
                    *([f"NODE_RANK={n}"] if num_nodes > 1 else []),
                ],
                cwd=ROOT,
                env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
                stdout=file,
                stderr=file,
            )
            for n in range(num_nodes)
        ]


def descendants(pid: int) -> list[int]:
    """Process ids of everything that a process has started, the process first."""
    listed = subprocess.run(["ps", "-axo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(child): int(parent) for child, parent in (line.split() for line in listed.splitlines())}
    found = [pid]
    for ancestor in found:
        found += [child for child, parent in parents.items() if parent == ancestor]
    return found


def kill_one_process(nodes: list[subprocess.Popen[bytes]]) -> None:
    """The training process of the second node: out of memory, say."""
    os.kill(descendants(nodes[1].pid)[-1], signal.SIGKILL)


def kill_everything(nodes: list[subprocess.Popen[bytes]]) -> None:
    """Launcher, agent and training processes: the machine is gone."""
    for pid in descendants(nodes[0].pid):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("num_nodes, kill", [(2, kill_one_process), (1, kill_everything)])
def test_a_run_killed_under_its_launcher_ends_with_the_same_weights(
    world, uninterrupted, tmp_path, num_nodes: int, kill: Callable[[list[subprocess.Popen[bytes]]], None]
):
    """D-46, D-47, D-51: two agents on loopback, and one; the same command continues, bit for bit."""
    cfg, run, log = run_config(world), tmp_path / "run", tmp_path / "log.txt"
    nodes = start_nodes(num_nodes, cfg, run, log)
    deadline = time.monotonic() + 90
    while not (run / "last.json").exists() or len(CheckpointManager(run).names()) < 2:
        assert time.monotonic() < deadline and all(node.poll() is None for node in nodes), log.read_text()
        time.sleep(0.01)
    kill(nodes)
    assert all(node.wait(60) != 0 for node in nodes)
    assert not (run / LAST).exists() and "Traceback" not in log.read_text(), log.read_text()
    nodes = start_nodes(num_nodes, cfg, run, log)
    assert [node.wait(90) for node in nodes] == [0] * num_nodes, log.read_text()
    assert "continuing from" in log.read_text()
    assert learnt(run) == uninterrupted
    steps = [record["step"] for record in read_metrics(run, "train")]
    assert steps == list(range(1, 3 * NUM_EPOCHS + 1))
