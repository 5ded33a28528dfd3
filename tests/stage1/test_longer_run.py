"""The README's longer run of es_ev_s on the demo world: its commands do what the text says, as they are written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import demo
import yaml
from stage1_world import make_world
from test_readme import shell_commands

from stage1 import convert_stage1_weights

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = "stage1/scripts/train_stage1_student.sh"


def longer_run() -> tuple[list[str], list[str]]:
    """Words of the training command and of the merge."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("### A longer run on the demo world")[1]
    train, merge = shell_commands(text.split("\n## ")[0])
    assert train[:2] == ["bash", LAUNCHER] and merge[:2] == ["python", "stage1/convert_stage1_weights.py"]
    return train[2:], merge[2:]


def test_the_longer_run_reads_what_the_demo_made_and_merges_what_it_trains():
    train, merge = longer_run()
    keys = dict(word.split("=", 1) for word in train)
    steps = {
        step.name: step
        for step in demo.demo_steps(demo.ROOT / "configs/demo.yaml", {"WORLD": {}}, demo.ROOT / "output/demo")
    }
    (world,), (export,) = steps["world"].owned, steps["export"].owned
    assert Path(keys["DATA_PATH"]) == world.relative_to(ROOT)
    assert Path(keys["TEACHER_EMBED_PATH"]) == export.relative_to(ROOT) / "embeddings"
    args = convert_stage1_weights.build_parser().parse_args(merge)
    assert Path(args.student_ckpt) == Path(keys["OUTPUT"]) / "best.pth" and Path(args.sam3_ckpt) == demo.TEACHER
    owned = {path.relative_to(ROOT) for step in steps.values() for path in step.owned}
    assert not {Path(keys["OUTPUT"]), Path(args.output)} & owned, "a changed demo step would delete it"
    student = yaml.safe_load((ROOT / keys["CFG"]).read_text())["MODEL"]
    assert student == {"NAME": "demo_es_ev_s", "BACKBONE": "efficientvit_b0"}


def test_the_documented_command_plans_the_longer_run(tmp_path):
    """A dry run of the very command, with the world, the store and the output of this test in place of the demo's."""
    world = make_world(tmp_path / "world", num_train=32)
    replaced = {"DATA_PATH": world.data, "TEACHER_EMBED_PATH": world.store, "OUTPUT": tmp_path / "run"}
    words = [f"{key}={replaced.get(key, value)}" for key, value in (word.split("=", 1) for word in longer_run()[0])]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", LAUNCHER, *words, "--dry-run"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "student   demo_es_ev_s: " in done.stdout
    assert "steps     24 (24 epochs of 1)" in done.stdout and "x 2 processes on cpu" in done.stdout
    assert not (tmp_path / "run").exists()
