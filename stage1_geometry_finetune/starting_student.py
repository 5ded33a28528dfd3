"""The weights that a fine-tune starts from: the student of a merged file, or of a training checkpoint of stage 1.

What is read is compared with the settings before anything is computed: another backbone, another model, other inputs
or a folded student are errors, and nothing ever falls back to random weights (D-89).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from yacs.config import CfgNode

from sam3.checkpoint_io import CheckpointFile, read_checkpoint
from sam3.checkpoint_keys import BACKBONE_PREFIX, STUDENT_PREFIX, student_from_published, student_to_published
from sam3.checkpoint_merge import shapes_of
from sam3.config import Sam3Config
from sam3.model.student_encoder import StudentEncoder, build_student
from sam3.preprocess import Preprocess
from sam3.recognition import Recognised, recognise
from sam3_train.checkpoint import state_dict_sha256
from sam3_train.distillation_config import RANDOM_INIT, model_config
from sam3_train.errors import UserError
from sam3_train.student_checkpoint import StudentCheckpoint, read_student, require_same_student


@dataclass(frozen=True)
class StartingStudent:
    """Weights and where they came from."""

    model: Sam3Config
    """The student's model."""
    weights: dict[str, Tensor]
    """Under published names, float32."""
    origin: str
    """One line for the plan."""
    teacher_sha256: str | None = None
    """Hash of the trunk that the student learned from; None if not recorded."""
    merged: Recognised | None = None
    """The merged file, if it is one."""

    @cached_property
    def sha256(self) -> str:
        """Hash of the weights, whatever file they came from."""
        return state_dict_sha256(self.weights)

    def build(self) -> StudentEncoder:
        """The student, ready to be trained."""
        assert self.model.student is not None
        student = build_student(self.model)
        student.load_state_dict(student_from_published(self.weights, self.model.student.backbone))
        return student


def read_starting_student(cfg: CfgNode, preprocess: Preprocess) -> StartingStudent:
    """Read ``MODEL.PRETRAINED`` and check that it is the student of the settings.

    Args:
        cfg: The stage's settings.
        preprocess: What this run's images go through; compared if the file records its own.

    Raises:
        UserError: If the file is missing, of another student, folded, or does not hold a student at all.
        CheckpointError: If it cannot be read or recognised.
        PreprocessMismatchError: If its student was trained on other inputs.
    """
    source, model = cfg.MODEL.PRETRAINED, model_config(cfg)
    if source == RANDOM_INIT:
        return _random_student(cfg, model)
    if not source:
        raise UserError(
            "MODEL.PRETRAINED (--pretrained) is empty: name the merged file of stage 1 or its best.pth; "
            f"{RANDOM_INIT} starts from fresh weights"
        )
    if not Path(source).is_file():
        raise UserError(
            f"MODEL.PRETRAINED: there is no file {source}: name the merged file of stage 1 or its best.pth "
            "(--pretrained)"
        )
    file = read_checkpoint(source)
    if any(key.removeprefix("module.").startswith(BACKBONE_PREFIX) for key in file.state_dict):
        found = _of_checkpoint(read_student(Path(source)), model, preprocess)
    else:
        found = _of_merged_file(file, model, preprocess)
    _require_weights(found, source)
    return found


def _random_student(cfg: CfgNode, model: Sam3Config) -> StartingStudent:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.SEED)
        student = build_student(model)
    weights = student_to_published(student.state_dict(), cfg.MODEL.BACKBONE)
    return StartingStudent(model, weights, f"RANDOM weights, as MODEL.PRETRAINED {RANDOM_INIT} says")


def _of_checkpoint(checkpoint: StudentCheckpoint, model: Sam3Config, preprocess: Preprocess) -> StartingStudent:
    where = f"MODEL.PRETRAINED {checkpoint.path}"
    _require_student_of_settings(checkpoint.model, model, where)
    checkpoint.preprocess.require_equal(preprocess, where, "the training config (DATA.PREPROCESS)")
    if checkpoint.other_weights:
        raise UserError(
            f"{where}: this run trained neck or mask decoder too ({len(checkpoint.other_weights)} weights beside the "
            "student): continue it with --resume, or start from the stage-1 student that it started from"
        )
    averaged = "averaged weights, " if checkpoint.is_ema else ""
    origin = f"{checkpoint.path} ({averaged}epoch {checkpoint.epoch}, step {checkpoint.step})"
    return StartingStudent(model, _float32(checkpoint.weights), origin, checkpoint.teacher_sha256)


def _of_merged_file(file: CheckpointFile, model: Sam3Config, preprocess: Preprocess) -> StartingStudent:
    merged = recognise(file)
    where = f"MODEL.PRETRAINED {merged.source}"
    _require_student_of_settings(merged.config, model, where)
    if merged.preprocess is not None:
        merged.preprocess.require_equal(preprocess, where, "the training config (DATA.PREPROCESS)")
    weights = {
        key.removeprefix(STUDENT_PREFIX): value
        for key, value in merged.weights.items()
        if key.startswith(STUDENT_PREFIX)
    }
    dtypes = sorted({str(v.dtype).removeprefix("torch.") for v in weights.values() if v.is_floating_point()})
    record = merged.metadata.get("provenance")
    teacher = record.get("student_teacher_trunk_sha256") if isinstance(record, dict) else None
    origin = f"{merged.source} ({len(weights)} keys, {', '.join(dtypes)})"
    return StartingStudent(model, _float32(weights), origin, teacher, merged)


def _require_student_of_settings(found: Sam3Config, model: Sam3Config, where: str) -> None:
    """Check that a file's student is the one of the settings, and can be trained.

    Raises:
        UserError: If it is another one, there is none, or it is folded.
    """
    remedy = (
        "name this student's merged file of stage 1 or its best.pth, or change MODEL.PRESET, MODEL.BACKBONE and "
        "MODEL.FUSE_STRIDE16"
    )
    theirs, _ = require_same_student(found, model, where, "the settings ask for", remedy)
    if theirs.fused:
        raise UserError(
            f"{where}: its student is folded for deployment and cannot be trained: name the training checkpoint that "
            "it was merged from, or merge it again without --fuse"
        )


def _require_weights(found: StartingStudent, source: str) -> None:
    assert found.model.student is not None
    backbone = found.model.student.backbone
    with torch.device("meta"):
        expected = shapes_of(student_to_published(build_student(found.model).state_dict(), backbone))
    given = shapes_of(found.weights)
    if given != expected:
        differing = sorted(key for key in {*given, *expected} if given.get(key) != expected.get(key))
        raise UserError(
            f"MODEL.PRETRAINED {source}: these are not the weights of {backbone}: {len(given)} keys, expected "
            f"{len(expected)}; first difference {differing[0]}"
        )
    broken = [key for key, value in found.weights.items() if not value.isfinite().all()]
    if broken:
        raise UserError(f"MODEL.PRETRAINED {source}: {len(broken)} weights are not finite, such as {broken[0]}")


def _float32(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # A copy: a memory-mapped file must not be what training writes to.
    return {k: v.detach().clone().float() if v.is_floating_point() else v.clone() for k, v in weights.items()}
