"""What a later reader needs to repeat a run: command, versions, git state."""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from sam3_train.errors import UserError


def environment_record() -> dict[str, Any]:
    """What a later reader needs to repeat a run: command, time, versions, git state, host."""
    names = ("torch", "torchvision", "timm", "numpy", "pillow", "efficientsam3", "tensorboard", "pycocotools")
    return {
        "command": sys.argv,
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "versions": package_versions(names),
        "git": git_state(Path(__file__).resolve().parent),
    }


@functools.cache
def package_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Installed versions of those packages that are there."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether files differ from it; None outside a git checkout or without git."""
    try:
        commit = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
        status = subprocess.run(
            ["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if commit.returncode or status.returncode:
        return None
    return {"commit": commit.stdout.strip(), "modified": bool(status.stdout.strip())}


def write_json_record(path: Path, record: dict[str, Any]) -> Path:
    """Write a JSON file whole or not at all; what it held before goes under ``previous``.

    Raises:
        UserError: If it cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        old = _read_json(path)
        if old:
            record = {**record, "previous": [*old.pop("previous", []), old]}
        aside.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free some space or choose another --output") from error
    return path


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if the file is missing or was cut off."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
