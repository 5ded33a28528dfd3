"""Runs the steps of a long job one after the other and skips those whose inputs have not changed.

A step is a command with the files that decide its result. Its stamp, written when the command has succeeded, holds a
hash of the command, of those files and of the stamp of the step before; a step whose hash is the same and whose results
are still there is not run again. A change therefore repeats the step it concerns and all later ones.

The hash is written down when a step begins as well: a command that goes on from what it finds may only find what was
begun with the same hash. Otherwise the step's own output is deleted first.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Step:
    """One command of the job."""

    name: str
    """A word for the stamp's file and for messages."""
    title: str
    """What the step does, in a few words."""
    command: Sequence[str]
    inputs: Sequence[Path] = ()
    """Files whose content decides the result, beside the results of earlier steps."""
    results: Sequence[Path] = ()
    """What must exist afterwards."""
    env: Mapping[str, str] = field(default_factory=dict)
    owned: Sequence[Path] = ()
    """Files and folders that only this step writes; deleted before it runs if it was begun with another hash."""

    @property
    def command_line(self) -> str:
        """The command as a person would type it, settings of the environment first."""
        words = [f"{name}={shlex.quote(value)}" for name, value in self.env.items()]
        return " ".join([*words, *(shlex.quote(word) for word in self.command)])


class StepFailedError(RuntimeError):
    """A step's command failed; ``exit_code`` is its own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def step_key(step: Step, previous_key: str, root: Path) -> str:
    """Hash of everything that decides a step's result; paths are relative to ``root``.

    Raises:
        StepFailedError: If an input file is missing.
    """
    digest = hashlib.sha256(f"{previous_key}\n{step.command_line}\n".encode())
    for path in step.inputs:
        if not (root / path).is_file():
            raise StepFailedError(f"{step.name}: its input {path} is missing; restore it (git checkout)", 2)
        digest.update((root / path).read_bytes())
    return digest.hexdigest()


def run_steps(steps: Sequence[Step], stamps: Path, root: Path) -> None:
    """Run what is not done yet, in order.

    Args:
        steps: The job.
        stamps: Folder of the stamps, made if missing.
        root: Working folder of every command; inputs and results are relative to it.

    Raises:
        StepFailedError: If a command fails or leaves a result out; later steps are not started.
    """
    stamps.mkdir(parents=True, exist_ok=True)
    previous_key = ""
    for index, step in enumerate(steps, 1):
        label = f"[{index}/{len(steps)}] {step.title}"
        stamp = stamps / f"{index:02d}-{step.name}.json"
        key = step_key(step, previous_key, root)
        missing = [path for path in step.results if not (root / path).exists()]
        if not missing and read_stamp(stamp).get("key") == key:
            print(f"{label}: done before", flush=True)
        else:
            _run_step(step, label, stamp, key, root)
        previous_key = key


def _run_step(step: Step, label: str, stamp: Path, key: str, root: Path) -> None:
    _begin(step, stamp, key, root)
    print(f"\n{label}\n$ {step.command_line}", flush=True)
    start = time.monotonic()
    exit_code = run_command(step.command, root, step.env)
    seconds = time.monotonic() - start
    if exit_code:
        raise StepFailedError(
            f"{label}: failed with exit code {exit_code}; its own message is above. Mend it and run again: "
            "finished steps are kept.",
            exit_code,
        )
    missing = [path for path in step.results if not (root / path).exists()]
    if missing:
        raise StepFailedError(f"{label}: ended well but left out {missing[0]}", 1)
    record = {"name": step.name, "key": key, "command": step.command_line, "seconds": round(seconds, 2)}
    _write_whole(stamp, json.dumps(record, indent=1) + "\n")
    print(f"{label}: {seconds:.0f} s", flush=True)


def _begin(step: Step, stamp: Path, key: str, root: Path) -> None:
    """Delete what the step made with another key, and note the new one; output of unknown origin is not touched."""
    begun = stamp.with_suffix(".begun")
    earlier = begun.read_text() if begun.exists() else read_stamp(stamp).get("key")
    if earlier is not None and earlier != key:
        for path in (root / owned for owned in step.owned):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    _write_whole(begun, key)
    stamp.unlink(missing_ok=True)


def _write_whole(path: Path, text: str) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text(text)
    aside.replace(path)


def read_stamp(stamp: Path) -> dict[str, object]:
    """A stamp's record; empty if there is none or it was damaged, so that the step runs again."""
    try:
        record = json.loads(stamp.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def run_command(command: Sequence[str], root: Path, env: Mapping[str, str]) -> int:
    """Run a command in a process group of its own and return its exit code, 128 + n for signal n.

    An interrupt of this process reaches the whole group, then its exit is waited for: a training run saves first.
    """
    if shutil.which(command[0]) is None:
        raise StepFailedError(f"{command[0]} is not a command on this machine", 2)
    process = subprocess.Popen(command, cwd=root, env={**os.environ, **env}, start_new_session=True)

    def forward(signal_number: int, _frame: object) -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal_number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        exit_code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return exit_code if exit_code >= 0 else 128 - exit_code
