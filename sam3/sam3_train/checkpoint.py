"""Training checkpoints: written whole or not at all, verified, found again through a pointer, loaded strictly.

A run's folder holds::

    ckpt_epoch_3.pth       after epoch 3 (zero-based) and its validation
    ckpt_step_00001200.pth inside an epoch, after 1200 optimizer steps; ``_1`` follows the number if that exists
    best.pth               the epoch with the best validation metric (a hard link where the file system has them)
    last.json              pointer: the newest verified files with their SHA-256, newest first

Only ``last.json`` decides what a run continues from; other ``*.pth`` files in the folder are never looked at. It is
written before the first checkpoint, so checkpoints without it are not mistaken for a new run; and it names the files
that are about to be written or removed, so that what a crash leaves behind is told from what others put there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sam3.checkpoint_io import sync_folder
from sam3_train.checkpoint_file import file_sha256, load_checkpoint, save_checkpoint
from sam3_train.errors import UserError

__all__ = [
    "CheckpointManager",
    "load_checkpoint",
    "load_common",
    "load_strict",
    "save_checkpoint",
    "state_dict_sha256",
]

POINTER_NAME = "last.json"
BEST_NAME = "best.pth"

_CHECKPOINT_NAME = re.compile(r"ckpt_(epoch_\d+|step_\d+(_\d+)?)\.pth")
_RECORD_FIELDS = {"file": str, "sha256": str, "bytes": int, "epoch": int, "step": int}


def load_strict(
    module: nn.Module, state_dict: Mapping[str, Tensor], what: str, allow_missing: Sequence[str] = ()
) -> None:
    """Load weights, refusing every difference in names or shapes that is not listed.

    Args:
        module: Receives the weights; untouched if anything differs.
        state_dict: Name to tensor.
        what: What the weights are and where from, for the message.
        allow_missing: Exact names that may be absent.

    Raises:
        UserError: If keys are missing or unexpected or shapes differ; the message counts them and names the first.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in state_dict and key not in allow_missing]
    unexpected = [key for key in state_dict if key not in own]
    shapes = [
        f"{key}: {tuple(state_dict[key].shape)} in the file, {tuple(own[key].shape)} in the model"
        for key in own
        if key in state_dict and state_dict[key].shape != own[key].shape
    ]
    problems = [
        f"{len(found)} {kind}, first {', '.join(found[:3])}"
        for kind, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if found
    ]
    if problems:
        raise UserError(f"{what} does not fit {type(module).__name__} ({len(own)} keys): " + "; ".join(problems))
    module.load_state_dict(dict(state_dict), strict=not allow_missing)


def state_dict_sha256(state_dict: Mapping[str, Tensor]) -> str:
    """Hash of names, dtypes, shapes and bytes of tensors, independent of their order and device."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class CheckpointManager:
    """The checkpoints of one run's folder. Used by one process, the main one.

    Args:
        folder: The run's folder; made if missing.
        keep_last: How many of the newest checkpoints to keep (at least 2, so that there is one to fall back on).
        keep_every: Also keep every n-th epoch's; 0 for none.
        warn: Called with one line about each damaged checkpoint.
        reads_pointer: False begins a new history, whatever the folder holds; see `adopt`.

    Raises:
        UserError: If the pointer cannot be read, or is missing where checkpoints are.
    """

    def __init__(
        self,
        folder: str | Path,
        keep_last: int = 2,
        keep_every: int = 0,
        warn: Callable[[str], None] = print,
        reads_pointer: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self.keep_last = max(2, keep_last)
        self.keep_every = keep_every
        self._warn = warn
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the output folder {self.folder}: {error.strerror}; choose another") from None
        self._remains: list[str] = []
        """What a killed process was about to write or remove."""
        self._records: list[dict[str, Any]] = self._read_pointer() if reads_pointer else []

    @property
    def newest(self) -> dict[str, Any] | None:
        """The newest record (``file``, ``sha256``, ``bytes``, ``epoch``, ``step``), or None before the first save."""
        return self._records[0] if self._records else None

    def save_epoch(self, state: dict[str, Any], epoch: int, step: int, is_best: bool = False) -> Path:
        """Write ``ckpt_epoch_<epoch>.pth`` (zero-based) after a whole epoch, point to it, and apply retention."""
        return self._save(f"ckpt_epoch_{epoch}.pth", state, epoch, step, is_best)

    def save_step(self, state: dict[str, Any], epoch: int, step: int, is_best: bool = False) -> Path:
        """Write a checkpoint inside an epoch under a name that no record has, point to it, and apply retention."""
        stem, recorded = f"ckpt_step_{step:08d}", self.names()
        names = (stem + suffix + ".pth" for suffix in ("", *(f"_{i}" for i in range(1, len(recorded) + 1))))
        return self._save(next(name for name in names if name not in recorded), state, epoch, step, is_best)

    def problem(self, name: str) -> str | None:
        """What is wrong with the recorded checkpoint called ``name``; None if it holds what was written."""
        record = next(record for record in self._records if record["file"] == name)
        found = _content_problem(self.folder / name, record)
        return found and f"{self.folder / name}: {found}"

    def names(self) -> list[str]:
        """File names of the recorded checkpoints, newest first."""
        return [record["file"] for record in self._records]

    def go_back_to(self, name: str) -> None:
        """Make the recorded checkpoint called ``name`` the newest."""
        self._records = self._records[self.names().index(name) :]

    def warn(self, message: str) -> None:
        """Hand a line to the caller's log."""
        self._warn(message)

    def adopt(self, path: Path, state: Mapping[str, Any]) -> None:
        """Begin the history with the checkpoint that the user continues from, if it is one of this folder.

        It is never removed then. A file from elsewhere is none of this folder's history.
        """
        if path.resolve().parent != self.folder.resolve() or not _CHECKPOINT_NAME.fullmatch(path.name):
            return
        record = {"file": path.name, "sha256": file_sha256(path), "bytes": path.stat().st_size, "pinned": True}
        self._records = [{**record, "epoch": state.get("epoch", 0), "step": state.get("step", 0)}]

    def _save(self, name: str, state: dict[str, Any], epoch: int, step: int, is_best: bool) -> Path:
        path = self.folder / name
        self._clear_remains(name)
        # A record of the same name ends before its file is replaced.
        self._write_pointer([other for other in self._records if other["file"] != name], unrecorded=[name])
        sha256 = save_checkpoint(path, state)
        record = {"file": name, "sha256": sha256, "bytes": path.stat().st_size, "epoch": epoch, "step": step}
        record["best"] = is_best
        if is_best:
            _link_or_copy(path, self.folder / BEST_NAME)
            for other in self._records:
                other["best"] = False
        old = [other for other in self._records if other["file"] != name]
        keep = [record, *(other for i, other in enumerate(old) if self._keeps(other, i + 1))]
        removed = [other["file"] for other in old if other not in keep]
        self._write_pointer(keep, unrecorded=removed)
        self._records = keep
        for other_name in removed:
            (self.folder / other_name).unlink(missing_ok=True)
        return path

    def _clear_remains(self, name: str) -> None:
        """Remove what a killed process left: half-written files, and a checkpoint that it could not record."""
        for pattern in (".ckpt_*.tmp", f".{BEST_NAME}.*.tmp", f".{POINTER_NAME}.*.tmp"):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)
        for remains in set(self._remains) - {name, *self.names()}:
            (self.folder / remains).unlink(missing_ok=True)
        self._remains = []

    def _keeps(self, record: dict[str, Any], age: int) -> bool:
        is_epoch = record["file"].startswith("ckpt_epoch_")
        nth = bool(self.keep_every) and is_epoch and (record["epoch"] + 1) % self.keep_every == 0
        return age < self.keep_last or nth or bool(record.get("best") or record.get("pinned"))

    def _read_pointer(self) -> list[dict[str, Any]]:
        path = self.folder / POINTER_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            records = [_checked_record(record) for record in content["checkpoints"]]
            self._remains = [str(name) for name in content.get("unrecorded", []) if _CHECKPOINT_NAME.fullmatch(name)]
        except FileNotFoundError:
            self._require_no_checkpoints()
            return []
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise UserError(
                f"{path} cannot be read ({error}); name a checkpoint with --resume, or choose another --output"
            ) from None
        return records

    def _require_no_checkpoints(self) -> None:
        """Raise a UserError if there are checkpoints: without the pointer a new run would write over them."""
        found = sorted(path.name for path in self.folder.glob("ckpt_*.pth") if _CHECKPOINT_NAME.fullmatch(path.name))
        if found:
            raise UserError(
                f"{self.folder} holds {len(found)} checkpoints ({', '.join(found[:3])}) but no {POINTER_NAME}, so it "
                "is not known which of them is whole: name one with --resume, or choose another --output for a new run"
            )

    def _write_pointer(self, records: list[dict[str, Any]], unrecorded: Sequence[str] = ()) -> None:
        path = self.folder / POINTER_NAME
        content = {"format_version": 1, "checkpoints": records, "unrecorded": list(unrecorded)}
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(aside, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
            sync_folder(self.folder)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error}. Free some space or choose another --output.") from error


def load_common(managers: Sequence[CheckpointManager]) -> list[tuple[Path, dict[str, Any]]] | None:
    """Load the newest checkpoint that all of several runs have, falling back to older ones with a warning.

    Runs that share a loop are saved one after the other, so a crash in between leaves some a step ahead.

    Returns:
        Path and content for each manager, or None if no folder holds a run yet.

    Raises:
        UserError: If there are checkpoints but none can be used: a run never restarts from nothing by itself.
    """
    if not any(manager.names() for manager in managers):
        return None
    problems: list[str] = []
    for name in managers[0].names():
        absent = [manager.folder for manager in managers if name not in manager.names()]
        if absent:
            problems.append(f"{name} is not in {', '.join(map(str, absent))}")
            continue
        damaged = [found for found in (manager.problem(name) for manager in managers) if found]
        for found in damaged:
            managers[0].warn(f"warning: checkpoint {found}; trying the one before")
        problems += damaged
        if not damaged:
            for manager in managers:
                manager.go_back_to(name)
            return [(manager.folder / name, load_checkpoint(manager.folder / name)) for manager in managers]
    folders = ", ".join(str(manager.folder) for manager in managers)
    raise UserError.from_problems(
        f"no checkpoint in {folders} can be used; name one with --resume, or choose another --output to start again",
        problems or [f"{managers[0].folder} holds no run, the others do"],
    )


def _checked_record(record: Any) -> dict[str, Any]:
    wrong = [name for name, kind in _RECORD_FIELDS.items() if not isinstance(record.get(name), kind)]
    if wrong:
        raise ValueError(f"a record has no proper {', '.join(wrong)}")
    return dict(record)


def _content_problem(path: Path, record: Mapping[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != record["bytes"]:
            return f"has {size} bytes instead of {record['bytes']}"
        if file_sha256(path) != record["sha256"]:
            return "content differs from what was written (SHA-256)"
    except OSError as error:
        return error.strerror or str(error)
    return None


def _link_or_copy(source: Path, target: Path) -> None:
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    aside.unlink(missing_ok=True)
    try:
        os.link(source, aside)
    except OSError:
        shutil.copyfile(source, aside)
    os.replace(aside, target)
    sync_folder(target.parent)
