"""The student of a training checkpoint: read, described, built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sam3.checkpoint_keys import DETECTOR_PREFIX, TRACKER_PREFIX, student_from_published, student_to_published
from sam3.checkpoint_merge import shapes_of
from sam3.config import Sam3Config, StudentConfig
from sam3.model.student_encoder import StudentEncoder, build_student
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
    """The student's, under published names (``backbone.model.*``, ``head.*``)."""
    other_weights: dict[str, Tensor]
    """What else was trained, under released names (``detector.*``, ``tracker.*``)."""
    is_ema: bool
    epoch: int
    step: int
    metrics: dict[str, float]
    """Of the last validation before the checkpoint."""
    config: dict[str, Any]
    teacher_sha256: str | None
    """Hash of the trunk that the student learned from (`sam3_train.teacher.Teacher.sha256`); None if not recorded."""
    initial_student_sha256: str | None
    """Hash of the student's weights that a fine-tuning began with; None for a checkpoint of stage 1."""


def read_student(path: Path, use_ema: bool | None = None) -> StudentCheckpoint:
    """Read a checkpoint of a stage that trains students; nothing in the file can run code.

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
    weights, other_weights = _split(state["ema" if is_ema else "model"])
    return StudentCheckpoint(
        path=path,
        name=config["MODEL"]["NAME"] or model.student.backbone,
        model=model,
        preprocess=preprocess,
        weights=weights,
        other_weights=other_weights,
        is_ema=is_ema,
        epoch=state["epoch"],
        step=state["step"],
        metrics=dict(state["metrics"]),
        config=config,
        teacher_sha256=_teacher_sha256(identity),
        initial_student_sha256=identity.get("initial_student_sha256"),
    )


def _split(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The student's weights and the others."""
    released = (DETECTOR_PREFIX, TRACKER_PREFIX)
    student = {key: value for key, value in weights.items() if not key.startswith(released)}
    return student, {key: value for key, value in weights.items() if key not in student}


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
            f"{path}: not a training checkpoint of a student: it lacks {', '.join(missing)} (it has "
            f"{sorted(map(str, state))[:6]}); give a ckpt_epoch_N.pth or best.pth of a training run"
        )


def build_trained_student(checkpoint: StudentCheckpoint) -> StudentEncoder:
    """The student as it was in training, in eval mode on the CPU.

    Raises:
        UserError: If the weights are not those of the described student.
    """
    assert checkpoint.model.student is not None
    student = build_student(checkpoint.model).eval()
    expected = shapes_of(student_to_published(student.state_dict(), checkpoint.model.student.backbone))
    found = shapes_of(checkpoint.weights)
    if expected != found:
        differing = sorted(expected.items() ^ found.items())
        raise UserError(
            f"{checkpoint.path}: the weights are not those of {checkpoint.model.student.backbone}: "
            f"{len(found)} keys, expected {len(expected)}; first difference {differing[0][0]}"
        )
    student.load_state_dict(student_from_published(checkpoint.weights, checkpoint.model.student.backbone))
    return student.requires_grad_(False)


def require_same_student(
    found: Sam3Config, wanted: Sam3Config, where: str, wanting: str, remedy: str
) -> tuple[StudentConfig, StudentConfig]:
    """Check that a file holds the student that is wanted, folded or not, in the same model, with any kind of memory.

    Args:
        found: What the file holds.
        wanted: What it has to hold; a model with a student.
        where: Names the file, for messages.
        wanting: Who wants it and how, e.g. ``the settings ask for``.
        remedy: What the user can do.

    Returns:
        The students of both, the file's first.

    Raises:
        UserError: If the file holds no student, another one, or one of another model.
    """
    theirs, ours = found.student, wanted.student
    if ours is None:
        raise ValueError(f"{where}: a model without a student can't be wanted")
    if theirs is None:
        raise UserError(f"{where} holds SAM 3's own trunk and no student: {remedy}")
    if (theirs.backbone, theirs.fuse_stride16) != (ours.backbone, ours.fuse_stride16):
        raise UserError(f"{where} holds the student {_describe(theirs)}, but {wanting} {_describe(ours)}: {remedy}")
    rest, wanted_rest = (config.replace(student=None, efficient_memory=None) for config in (found, wanted))
    if rest != wanted_rest:
        raise UserError(
            f"{where} belongs to the model {found.name!r} at {found.image_size_px} px, but {wanting} {wanted.name!r} "
            f"at {wanted.image_size_px} px, or their sizes differ: {remedy}"
        )
    return theirs, ours


def _describe(student: StudentConfig) -> str:
    return student.backbone + (" with fused stride 16" if student.fuse_stride16 else "")


def check_teacher(checkpoint: StudentCheckpoint, trunk: str | None, path: Path, remedy: str, is_allowed: bool) -> str:
    """Compare the teacher that a student learned from with the one whose neck and heads it will stand before.

    They read the features of their own trunk, which are those that the student has to imitate.

    Args:
        checkpoint: The student's.
        trunk: Hash of the trunk that neck and heads of ``path`` belong to; None if the file does not record it.
        path: The file with neck and heads, for messages.
        remedy: What to do about another teacher, beside ``--allow-other-teacher``.
        is_allowed: Make a warning of the error.

    Returns:
        One line for the report.

    Raises:
        UserError: If the student learned from another teacher.
    """
    if checkpoint.teacher_sha256 is None:
        return f"teacher not checked: {checkpoint.path} does not record which teacher the student learned from"
    if trunk is None:
        return f"teacher not checked: {path} does not record whose neck and heads it holds"
    if checkpoint.teacher_sha256 == trunk:
        return f"teacher checked: the student learned from this SAM 3 trunk (sha256 {trunk[:12]})"
    difference = (
        f"{checkpoint.path} learned from a teacher whose trunk has sha256 {checkpoint.teacher_sha256}, but the trunk "
        f"of {path} has {trunk}"
    )
    if is_allowed:
        return f"warning: {difference}; merged because of --allow-other-teacher"
    raise UserError(f"{difference}: {remedy}, or --allow-other-teacher")
