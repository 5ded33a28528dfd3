"""Measurements in processes of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from run_apart import run_apart

SCRIPT = """
import json, os, sys
print("a warning")
print(json.dumps({"arguments": sys.argv[1:], "preset": os.environ.get("BENCH_PRESET"), "process": os.getpid()}))
if sys.argv[1] == "bad":
    sys.exit("no memory")
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "measure.py").write_text(SCRIPT)
    return str(tmp_path / "measure.py")


def test_the_last_line_is_the_result(script: str) -> None:
    found = run_apart(script, "ours", 3, Path("found.pt"), environment={"BENCH_PRESET": "tiny"})
    assert found.pop("process") != os.getpid()
    assert found == {"arguments": ["ours", "3", "found.pt"], "preset": "tiny"}
    assert run_apart(script, "ours")["preset"] is None


def test_a_failure_says_which_run_and_why(script: str) -> None:
    with pytest.raises(RuntimeError, match="bad 3: exit code 1: no memory"):
        run_apart(script, "bad", 3)
