"""How a command of the model library ends when nobody reads its output to the end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TEACHER = Path("data/demo/tiny_teacher.safetensors")
ROOT = Path(__file__).parents[1]


def test_a_reader_that_leaves_early_causes_no_traceback() -> None:
    command = [sys.executable, "-m", "sam3.inspect", str(TEACHER)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True) as running:
        assert running.stdout is not None and running.stderr is not None
        running.stdout.close()
        said = running.stderr.read()
    assert running.returncode == 0 and said == ""
