"""Read the student out of a training checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sam3.config import Sam3Config
from sam3.preprocess import Preprocess
from sam3_train.checkpoint import load_checkpoint
from sam3_train.errors import UserError


@dataclass(frozen=True)
class StudentCheckpoint:
    """A trained student and what is known about it."""

    path: Path
    name: str
    """The run's MODEL.NAME, e.g. ``es_rv_m``, or its backbone."""
    model: Sam3Config
    preprocess: Preprocess
    weights: dict[str, Tensor]
    """Published names (``backbone.model.*``, ``head.*``)."""
    is_ema: bool
    epoch: int
    step: int
    metrics: dict[str, float]
    """Of the last validation before the checkpoint."""
    config: dict[str, Any]
    teacher_sha256: str | None
    """Hash of the trunk that the student learned from (`stage1.teacher.Teacher.sha256`); None if not recorded."""


def read_student(path: Path, use_ema: bool | None = None) -> StudentCheckpoint:
    """Read a checkpoint of ``train_stage1.py``; nothing in the file can run code.

    Args:
        path: ``ckpt_epoch_N.pth``, ``best.pth`` or a step checkpoint.
        use_ema: Take the averaged weights; None takes them if there are any.

    Raises:
        UserError: If the file is missing, damaged, of another kind, or lacks what is asked for.
    """
    state = load_checkpoint(path)
    _require_fields(state, path)
    identity = state["identity"]
    try:
        model, preprocess = Sam3Config.from_dict(identity["model"]), Preprocess.from_dict(identity["preprocess"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: its model description cannot be read: {error}") from None
    if model.student is None:
        raise UserError(f"{path}: it describes {model.name!r} without a student")
    if use_ema and "ema" not in state:
        raise UserError(f"{path}: it holds no averaged weights (TRAIN.EMA_DECAY was 0); leave --use-ema out")
    is_ema = "ema" in state if use_ema is None else use_ema
    config = state["config"]
    return StudentCheckpoint(
        path=path,
        name=config["MODEL"]["NAME"] or model.student.backbone,
        model=model,
        preprocess=preprocess,
        weights=dict(state["ema" if is_ema else "model"]),
        is_ema=is_ema,
        epoch=state["epoch"],
        step=state["step"],
        metrics=dict(state["metrics"]),
        config=config,
        teacher_sha256=_teacher_sha256(identity),
    )


def _teacher_sha256(identity: dict[str, Any]) -> str | None:
    teacher = identity.get("teacher")
    sha256 = teacher.get("sha256") if isinstance(teacher, dict) else None
    return str(sha256) if sha256 else None


_FIELDS = {"identity": dict, "model": dict, "config": dict, "metrics": dict, "epoch": int, "step": int}


def _require_fields(state: dict[str, Any], path: Path) -> None:
    missing = [name for name, kind in _FIELDS.items() if not isinstance(state.get(name), kind)]
    if "identity" not in missing:
        missing += [f"identity.{name}" for name in ("model", "preprocess") if name not in state["identity"]]
    if "config" not in missing and "NAME" not in (state["config"].get("MODEL") or {}):
        missing.append("config.MODEL.NAME")
    if missing:
        raise UserError(
            f"{path}: not a training checkpoint of stage 1: it lacks {', '.join(missing)} (it has "
            f"{sorted(map(str, state))[:6]}); give a ckpt_epoch_N.pth or best.pth of train_stage1.py"
        )
