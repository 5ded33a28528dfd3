"""scripts/launch.sh: KEY=VALUE words in, a torchrun command line out."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = "stage1/scripts/save_stage1_embeddings.sh"
KEYS = ("CFG", "DATA_PATH", "OUTPUT", "BATCH_SIZE", "GPUS", "NPROC", "DEVICE", "MASTER_PORT", "NNODES", "NODE_RANK")


@pytest.fixture
def launch(tmp_path):
    """Runs the launcher with an interpreter that prints its arguments, one a line, instead of starting anything."""
    fake = tmp_path / "fake python"
    fake.write_text('#!/usr/bin/env bash\n[ "$1" = -c ] && exit 0\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if name not in KEYS}

    def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", LAUNCHER, *words],
            cwd=ROOT,
            env={**clean, "CUDA_VISIBLE_DEVICES": "", "PYTHON": str(fake), **env},
            capture_output=True,
            text=True,
            timeout=30,
        )

    return run


def test_a_bare_call_starts_one_process_with_the_teacher_config(launch):
    """D-69: no empty array is expanded under set -u."""
    words = launch().stdout.splitlines()
    assert words[:4] == ["-m", "sam3_train.torchrun", "--nproc_per_node", "1"]
    assert words[-2] == "--cfg" and words[-1].endswith("configs/teacher/sam_vit_huge_sa1b.yaml")
    assert "--device" not in words


def test_words_and_environment_set_flags_and_the_rest_goes_through(launch):
    done = launch(
        "DATA_PATH=a b", "--check-saved-embed", "4", "BATCH_SIZE=2", "--", "A=b", OUTPUT="o", BATCH_SIZE="9"
    )
    words = done.stdout.splitlines()
    script = next(i for i, word in enumerate(words) if word.endswith("save_embedding_stage1.py"))
    assert words[script + 3 :] == [
        *("--data-path", "a b", "--output", "o", "--batch-size", "2"),
        *("--check-saved-embed", "4", "A=b"),
    ]


@pytest.mark.parametrize(
    ("words", "processes", "device"),
    [
        (["GPUS=0"], "1", "cpu"),
        (["NPROC=2", "DEVICE=cpu"], "2", "cpu"),
        (["GPUS=3"], "3", "cuda"),
        (["GPUS=8", "NPROC=2"], "2", "cuda"),
    ],
)
def test_processes_and_device(launch, words, processes, device):
    done = launch(*words).stdout.splitlines()
    assert done[done.index("--nproc_per_node") + 1] == processes
    assert done[done.index("--device") + 1] == device


def test_visible_gpus_are_counted(launch):
    words = launch(CUDA_VISIBLE_DEVICES="0,2,3").stdout.splitlines()
    assert words[words.index("--nproc_per_node") + 1] == "3"


def test_several_nodes_meet_at_the_rendezvous(launch):
    words = launch("NNODES=2", "NODE_RANK=1", "RDZV_ENDPOINT=host:29501", "GPUS=0").stdout.splitlines()
    for flag, value in (("--nnodes", "2"), ("--node_rank", "1"), ("--rdzv_endpoint", "host:29501")):
        assert words[words.index(flag) + 1] == value
    assert "--standalone" not in words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["FOO=1"], "unknown key FOO in 'FOO=1'; known keys: CFG DATA_PATH"),
        (["GPUS=x"], "GPUS=x must be a whole number"),
        (["GPUS=0", "DEVICE=cuda"], "no GPU to run on"),
        (["NNODES=2", "NODE_RANK=2"], "NODE_RANK=2 must be below NNODES=2"),
        (["NPROC=0"], "NPROC=0 must be at least 1"),
        (["PYTHON=no-such-python"], "no-such-python cannot import this project"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(launch, words, message):
    done = launch(*words)
    assert done.returncode == 2 and not done.stdout
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
