"""Stage-1 training on two nodes of one process each, through the launcher, against one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy_training import free_port, run_group

from sam3_train.checkpoint import load_checkpoint
from sam3_train.config import load_config
from sam3_train.distillation_config import model_config
from sam3_train.distributed import RunContext
from sam3_train.log import read_metrics
from stage1.config import get_defaults
from stage1.train_stage1 import _train as train_in_process
from stage1.train_stage1 import main
from stage1.training import build_initial_student

ROOT = Path(__file__).resolve().parents[2]


def start_node(rank: int, port: int, cfg: Path, output: Path, *words: str) -> subprocess.Popen[str]:
    keys = [f"CFG={cfg}", f"OUTPUT={output}", "DEVICE=cpu", "NPROC=1", "NNODES=2", f"NODE_RANK={rank}"]
    return subprocess.Popen(
        ["bash", "stage1/scripts/train_stage1_student.sh", *keys, f"RDZV_ENDPOINT=localhost:{port}", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def initial_weights(cfg_file: Path) -> dict[str, torch.Tensor]:
    cfg = load_config(get_defaults(), cfg_file)
    student = build_initial_student(cfg, model_config(cfg), RunContext(torch.device("cpu")), print)
    trained = {name for name, _ in student.named_parameters()}
    return {name: value for name, value in student.state_dict().items() if name in trained}


def train_on_own_disk(cfg: Path, root: Path, *words: str) -> None:
    output = root / f"node{os.environ['RANK']}"
    train_in_process(["--cfg", str(cfg), "--output", str(output), "--device", "cpu", *words])


def test_nodes_that_do_not_share_the_run_folder_resume_together(world, tmp_path):
    """D-51, D-47: rank 0 alone has checkpoints; which weights are read first is then decided for all ranks."""
    start = world.config("start", VAL__ENABLE=False)
    assert main(["--cfg", str(start), "--output", str(tmp_path), "--device", "cpu", "--max-steps", "1"]) == 0
    weights = tmp_path / "ckpt_step_00000001.pth"
    cfg = world.config("apart", MODEL__PRETRAINED=weights, DATA__BATCH_SIZE=2, VAL__ENABLE=False)
    for words in (["--max-steps", "1"], []):
        ended = run_group(train_on_own_disk, 2, tmp_path, cfg, tmp_path, *words)
        assert ended.codes == [0, 0], ended.text
    assert load_checkpoint(tmp_path / "node0" / "ckpt_epoch_0.pth")["step"] == 3
    assert not list(tmp_path.glob("node1/*.pth"))


def test_two_nodes_train_like_one_process_at_the_same_global_batch(world, tmp_path):
    """D-50, D-51: with synchronised BatchNorm, losses and weights agree to float tolerance; the ranks bit for bit.

    Plain SGD, because AdamW turns rounding noise of a gradient near zero into a whole step.
    """
    settings = {
        "TRAIN__OPTIMIZER__NAME": "sgd",
        "TRAIN__BASE_LR": 0.01,
        "TRAIN__REPLICA_CHECK_STEPS": 1,
    }
    alone = world.config("alone", **settings)
    assert main(["--cfg", str(alone), "--output", str(tmp_path / "alone"), "--device", "cpu"]) == 0
    settings |= {"DATA__BATCH_SIZE": 2, "DISTILL__TEACHER_EMBED_PATH": "named/by/the/launcher"}
    port, together = free_port(), world.config("together", **settings)
    words = ["--use-sync-bn", f"TEACHER_EMBED_PATH={world.store}"]
    nodes = [start_node(rank, port, together, tmp_path / "together", *words) for rank in (0, 1)]
    outputs = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    one, two = (read_metrics(tmp_path / name, "train") for name in ("alone", "together"))
    assert len(one) == len(two) == 3
    for mine, theirs in zip(two, one, strict=True):
        assert mine["global_batch"] == 4
        for term in ("loss", "mse", "cosine"):
            assert mine[term] == pytest.approx(theirs[term], rel=5e-4)
        # In float32 these gradients are good to about 1e-3, measured against float64.
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)
    mine, theirs = (load_checkpoint(tmp_path / name / "ckpt_epoch_0.pth")["model"] for name in ("together", "alone"))
    start = initial_weights(alone)
    moved = sum(float((theirs[key] - start[key]).double().square().sum()) for key in start) ** 0.5
    apart = sum(float((theirs[key] - mine[key]).double().square().sum()) for key in start) ** 0.5
    assert moved > 0.01
    assert apart < 0.02 * moved
    validations = [read_metrics(tmp_path / name, "val")[-1]["loss"] for name in ("together", "alone")]
    assert validations[0] == pytest.approx(validations[1], rel=1e-3)
