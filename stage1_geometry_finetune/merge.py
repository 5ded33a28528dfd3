"""From a fine-tuned student and the merged file of stage 1 to one proven file.

The replacement itself is `sam3.checkpoint_merge.replace_weights`. Here: what to read, whether the two belong together,
what to fold, what to write down about the result, and its proof (`sam3_train.merged_proof`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam3.checkpoint_io import read_checkpoint, sha256_file, write_merged
from sam3.checkpoint_keys import STUDENT_PREFIX, student_from_published, student_to_published
from sam3.checkpoint_merge import MergeError, ReplaceReport, replace_weights, require_representable, shapes_of
from sam3.checkpoint_parts import NECK_PREFIX, SAM2_NECK_PREFIX, SEGMENTATION_PREFIX
from sam3.config import Sam3Config, StudentConfig
from sam3.model.student_encoder import StudentEncoder, build_student, fuse_for_inference
from sam3.recognition import Recognised, recognise
from sam3_train.checkpoint import state_dict_sha256
from sam3_train.config import package_versions
from sam3_train.errors import UserError
from sam3_train.merged_proof import (
    MergedProof,
    ProvenStudent,
    as_stored,
    file_problems,
    memory_notes,
    prove,
    require_written,
    usage_lines,
    written_aside,
)
from sam3_train.student_checkpoint import (
    StudentCheckpoint,
    build_trained_student,
    check_teacher,
    read_student,
    require_same_student,
)

_TRAINED_PREFIXES = {
    "TRAIN_NECK": (NECK_PREFIX, SAM2_NECK_PREFIX),
    "TRAIN_MASK_DECODER": (SEGMENTATION_PREFIX, "tracker.sam_mask_decoder."),
}
"""What each setting makes trainable, under released names."""


@dataclass(frozen=True)
class ConvertRequest:
    """What to convert; see ``convert_geometry_finetune.py --help``."""

    finetune_path: Path
    pretrained_path: Path
    output: Path
    use_ema: bool | None = None
    image: Path | None = None
    allow_other_teacher: bool = False


@dataclass(frozen=True)
class ConvertResult:
    """What was written and how it was proven."""

    request: ConvertRequest
    num_extracted: int
    """Student keys of the checkpoint, before any folding."""
    report: ReplaceReport
    notes: list[str]
    proof: MergedProof

    def lines(self) -> list[str]:
        """The report, ending with the lines of Python that use the file."""
        report = self.report
        folded = (
            [f"Folded as the pretrained file is: {self.num_extracted} keys became {report.num_student}"]
            if report.num_student != self.num_extracted
            else []
        )
        parts = [f"Replaced {count} weights of the {name}" for name, count in report.parts.items()]
        others = report.num_total - report.num_replaced - sum(report.parts.values())
        return [
            f"Student encoder keys extracted: {self.num_extracted}",
            *folded,
            f"Keys matched in pretrained: {report.num_matched}",
            f"Replaced {report.num_replaced} weights of the student in {self.request.pretrained_path.name}",
            *parts,
            f"Total keys in output: {report.num_total}",
            f"verified: these weights are the fine-tuned ones, the other {others} are those of the pretrained file",
            *self.notes,
            self.proof.line(),
            *usage_lines(self.request.output),
        ]


def convert_files(request: ConvertRequest) -> ConvertResult:
    """Read, replace, write aside, verify, prove, and only then put the file at its place.

    Raises:
        UserError: If a flag or the checkpoint is wrong, the two files do not belong together, or the proof fails;
            nothing is written at the output.
        CheckpointError: If the pretrained file cannot be read or recognised.
    """
    inputs = {"--finetune-ckpt": request.finetune_path, "--pretrained": request.pretrained_path}
    problems = file_problems(request.output, inputs, request.image)
    if problems:
        raise UserError.from_problems("nothing was converted", problems)
    checkpoint = read_student(request.finetune_path, request.use_ema)
    if checkpoint.initial_student_sha256 is None:
        raise UserError(
            f"--finetune-ckpt {request.finetune_path} is a checkpoint of stage 1 and not of the geometry fine-tune: "
            "merge it with stage1/convert_stage1_weights.py"
        )
    _require_trained_parts(checkpoint)
    pretrained = recognise(read_checkpoint(request.pretrained_path))
    inside = _require_pair(checkpoint, pretrained)
    trained = build_trained_student(checkpoint)
    folded = fuse_for_inference(trained) if inside.fused else trained
    model = checkpoint.model.replace(student=folded.student, efficient_memory=pretrained.efficient_memory)
    weights, report = _replace(checkpoint, folded, model, pretrained)
    _require_own_rest(checkpoint, pretrained, report)
    trunk = _provenance(pretrained).get("teacher_trunk_sha256")
    remedy = "give --pretrained a file that was merged from the SAM 3 that the embeddings are of"
    notes = [
        check_teacher(checkpoint, trunk, request.pretrained_path, remedy, request.allow_other_teacher),
        _origin_note(checkpoint, pretrained),
        *memory_notes(request.pretrained_path, pretrained.efficient_memory),
    ]
    with written_aside(request.output) as aside:
        write_merged(aside, weights, _metadata(request, checkpoint, pretrained, model, report))
        require_written(aside, weights, request.output)
        student = ProvenStudent(trained, folded, _stored(folded, weights), checkpoint.preprocess)
        proof = prove(aside, student, request.output, request.image)
    return ConvertResult(request, len(checkpoint.weights), report, notes, proof)


def _require_trained_parts(checkpoint: StudentCheckpoint) -> None:
    """The checkpoint must hold of neck and mask decoder what its config says was trained."""
    for flag, prefixes in _TRAINED_PREFIXES.items():
        is_asked = bool(checkpoint.config["MODEL"].get(flag, False))
        found = [key for key in checkpoint.other_weights if key.startswith(prefixes)]
        if is_asked != bool(found):
            raise UserError(
                f"{checkpoint.path}: its config says MODEL.{flag} {is_asked}, but it holds {len(found)} weights of "
                "that part: it is not whole, give another checkpoint of the run"
            )


def _require_pair(checkpoint: StudentCheckpoint, pretrained: Recognised) -> StudentConfig:
    """Check that a merged file holds the student that a checkpoint trained on, folded or not.

    Returns:
        The merged file's description of its student.

    Raises:
        UserError: If it holds none, or another one.
        PreprocessMismatchError: If it expects other images.
    """
    where = f"--pretrained {pretrained.source}"
    remedy = "give the merged file of the same student (stage1/convert_stage1_weights.py writes it)"
    inside, _ = require_same_student(pretrained.config, checkpoint.model, where, f"{checkpoint.path} trained", remedy)
    if pretrained.preprocess is not None:
        checkpoint.preprocess.require_equal(pretrained.preprocess, str(checkpoint.path), where)
    return inside


def _replace(
    checkpoint: StudentCheckpoint, folded: StudentEncoder, model: Sam3Config, pretrained: Recognised
) -> tuple[dict[str, Tensor], ReplaceReport]:
    backbone = folded.student.backbone
    student = student_to_published(folded.state_dict(), backbone)
    with torch.device("meta"):
        expected = shapes_of(student_to_published(build_student(model).state_dict(), backbone))
    try:
        weights, report = replace_weights(student, checkpoint.other_weights, pretrained.weights, expected)
        _require_representable(
            {**{STUDENT_PREFIX + k: v for k, v in student.items()}, **checkpoint.other_weights}, weights
        )
    except MergeError as error:
        raise UserError(
            f"{checkpoint.path} and --pretrained {pretrained.source} do not fit together: {error}"
        ) from None
    if not report.num_student == report.num_matched == report.num_replaced:
        raise UserError(
            f"{pretrained.source}: of {report.num_student} student keys {report.num_matched} were matched and "
            f"{report.num_replaced} replaced; nothing was written"
        )
    return weights, report


def _require_own_rest(checkpoint: StudentCheckpoint, pretrained: Recognised, report: ReplaceReport) -> None:
    """What stays of the merged file must be SAM 3's own: a fine-tune runs in front of that, whatever it trains.

    Raises:
        UserError: If an earlier fine-tune trained a part that stays.
    """
    before = _provenance(pretrained)
    tuned = before.get("trained_parts")
    left = sorted({*map(str, tuned)} - report.parts.keys()) if isinstance(tuned, list) else []
    if left:
        origin = before.get("pretrained")
        file = f", {origin.get('file')}" if isinstance(origin, dict) else ""
        raise UserError(
            f"--pretrained {pretrained.source}: an earlier fine-tune trained its {' and '.join(left)}, but the student "
            f"of {checkpoint.path} was trained in front of SAM 3's own: give the file that it was made from{file}"
        )


def _require_representable(given: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """No weight may become infinite in the smaller type of the file."""
    for dtype in {stored[key].dtype for key in given if stored[key].is_floating_point()}:
        require_representable({key: value for key, value in given.items() if stored[key].dtype == dtype}, dtype)


def _stored(folded: StudentEncoder, weights: Mapping[str, Tensor]) -> StudentEncoder:
    dtypes = {k.removeprefix(STUDENT_PREFIX): v.dtype for k, v in weights.items() if k.startswith(STUDENT_PREFIX)}
    return as_stored(folded, student_from_published(dtypes, folded.student.backbone))


def _origin_note(checkpoint: StudentCheckpoint, pretrained: Recognised) -> str:
    """Whether the fine-tuning began with the student of the pretrained file, as far as that can be told."""
    inside = {k.removeprefix(STUDENT_PREFIX): v for k, v in pretrained.weights.items() if k.startswith(STUDENT_PREFIX)}
    # A fine-tune computes in float32 from whatever precision the file has, and records the hash of that.
    started = {key: value.float() if value.is_floating_point() else value for key, value in inside.items()}
    if state_dict_sha256(started) == checkpoint.initial_student_sha256:
        return "the fine-tuning began with the student of the pretrained file"
    return (
        "the pretrained file's student is not, bit for bit, the one that the fine-tuning began with (folded, rounded, "
        "or of another run): all of it was replaced"
    )


def _provenance(pretrained: Recognised) -> dict[str, Any]:
    """What the pretrained file records about its making; {} for files of other projects."""
    record = pretrained.metadata.get("provenance")
    return dict(record) if isinstance(record, dict) else {}


def _metadata(
    request: ConvertRequest,
    checkpoint: StudentCheckpoint,
    pretrained: Recognised,
    model: Sam3Config,
    report: ReplaceReport,
) -> dict[str, Any]:
    """The pretrained file's record, with the fine-tuning in front of its provenance."""
    before = _provenance(pretrained)
    kept = ("teacher_file", "teacher_sha256", "teacher_trunk_sha256")
    return {
        **pretrained.metadata,
        "variant": pretrained.metadata.get("variant", checkpoint.name),
        "model": model.to_dict(),
        "preprocess": checkpoint.preprocess.to_dict(),
        "provenance": {
            "stage": "stage1_geometry_finetune",
            **{name: before[name] for name in kept if name in before},
            "student_teacher_trunk_sha256": checkpoint.teacher_sha256,
            "student_file": request.finetune_path.name,
            "student_sha256": sha256_file(request.finetune_path),
            "initial_student_sha256": checkpoint.initial_student_sha256,
            "is_ema": checkpoint.is_ema,
            "epoch": checkpoint.epoch,
            "step": checkpoint.step,
            "metrics": checkpoint.metrics,
            "trained_parts": sorted(report.parts),
            "config": checkpoint.config,
            "versions": package_versions(("efficientsam3", "torch", "timm")),
            "pretrained": {
                "file": request.pretrained_path.name,
                "sha256": sha256_file(request.pretrained_path),
                "provenance": before,
            },
        },
    }
