"""Measurements in a process of their own, so that nothing that ran before is in their memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


def run_apart(script: str, *arguments: Any, environment: Mapping[str, str] | None = None) -> Any:
    """Run a script of this folder, whose last line of output is JSON; returns what that says.

    Args:
        script: Its path.
        *arguments: Of its command line.
        environment: Variables in addition to those of this process.

    Raises:
        RuntimeError: If it fails; with its arguments and the end of what it said.
    """
    given = [str(argument) for argument in arguments]
    done = subprocess.run(
        [sys.executable, script, *given],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(environment or {})},
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(given)}: exit code {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
