"""From a training checkpoint and SAM 3's weights to one proven file.

The splice itself is `sam3.checkpoint_merge.merge_student`. Here: what to read, what to fold, what to write down about
the result, and its proof (`sam3_train.merged_proof`). SAM 3's weights are memory-mapped and streamed to the new file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam3.checkpoint_io import CheckpointFile, read_checkpoint, sha256_file, write_merged
from sam3.checkpoint_keys import EFFICIENT_PREFIX, STUDENT_PREFIX, TRUNK_PREFIX, student_to_published
from sam3.checkpoint_merge import MergeError, MergeReport, merge_student, require_representable, shapes_of, with_dot
from sam3.config import EfficientMemoryConfig, Sam3Config
from sam3.model.student_encoder import build_student, fuse_for_inference
from sam3.model_builder import build_trunk
from sam3.recognition import recognise
from sam3.released_names import load_trunk, released_layout
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
    usage_lines,
    written_aside,
)
from sam3_train.student_checkpoint import StudentCheckpoint, build_trained_student, check_teacher, read_student

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class MergeRequest:
    """What to merge; see ``convert_stage1_weights.py --help``."""

    student_path: Path
    sam3_path: Path
    output: Path
    target_prefix: str = STUDENT_PREFIX
    replace_prefix: str = TRUNK_PREFIX
    dtype: str = "fp32"
    fuse: bool = False
    use_ema: bool | None = None
    image: Path | None = None
    allow_other_teacher: bool = False


@dataclass(frozen=True)
class MergeResult:
    """What was written and how it was proven."""

    output: Path
    report: MergeReport
    proof: MergedProof
    notes: list[str]
    """Whether the student learned from this teacher, in one line; and warnings."""

    def lines(self) -> list[str]:
        """The report, ending with the lines of Python that use the file."""
        return [
            *self.report.lines(),
            *self.notes,
            self.proof.line(),
            *usage_lines(self.output),
        ]


def merge_files(request: MergeRequest) -> MergeResult:
    """Read, splice, write aside, prove, and only then put the file at its place.

    Raises:
        UserError: If a flag or the student checkpoint is wrong, the student learned from another teacher, or the proof
            fails; nothing is left at the output.
        CheckpointError: If the SAM 3 file cannot be read or does not fit.
    """
    _check_request(request)
    checkpoint = read_student(request.student_path, request.use_ema)
    if checkpoint.other_weights:
        raise UserError(
            f"--student-ckpt {request.student_path} trained more than the student, such as "
            f"{next(iter(checkpoint.other_weights))}: merge its student first, as it was before the fine-tuning, then "
            "put this checkpoint into the merged file with stage1_geometry_finetune/convert_geometry_finetune.py"
        )
    trained = build_trained_student(checkpoint)
    folded = fuse_for_inference(trained) if request.fuse else trained
    weights = student_to_published(folded.state_dict(), folded.student.backbone)
    dtype = DTYPES[request.dtype]
    sam3 = read_checkpoint(request.sam3_path)
    memory = _compressed_memory(sam3)
    model = checkpoint.model.replace(student=folded.student, efficient_memory=memory)
    released = released_layout(sam3.state_dict, str(request.sam3_path))
    merged, report = splice(weights, released, model, request)
    teacher_trunk = trunk_sha256(released, model, request)
    remedy = "give --sam3-ckpt the file that the embeddings were exported with"
    teacher_note = check_teacher(checkpoint, teacher_trunk, request.sam3_path, remedy, request.allow_other_teacher)
    try:
        require_representable(merged, dtype)
    except MergeError as error:
        raise UserError(str(error)) from None
    with written_aside(request.output) as aside:
        write_merged(aside, merged, _metadata(request, checkpoint, model, teacher_trunk), dtype)
        stored = as_stored(folded, dict.fromkeys(folded.state_dict(), dtype))
        student = ProvenStudent(trained, folded, stored, checkpoint.preprocess)
        proof = prove(aside, student, request.output, request.image)
    return MergeResult(request.output, report, proof, [teacher_note, *memory_notes(request.sam3_path, memory)])


def _compressed_memory(sam3: CheckpointFile) -> EfficientMemoryConfig | None:
    """The compressed memory that stage 2 trained in front of SAM 3's own trunk, if the file holds one."""
    if not any(EFFICIENT_PREFIX in key for key in sam3.state_dict):
        return None
    return recognise(sam3).efficient_memory


def _check_request(request: MergeRequest) -> None:
    inputs = {"--student-ckpt": request.student_path, "--sam3-ckpt": request.sam3_path}
    problems = file_problems(request.output, inputs, request.image)
    if with_dot(request.target_prefix).removeprefix("module.") != STUDENT_PREFIX:
        problems.append(
            f"--target-prefix {request.target_prefix!r}: sam3.load_model looks for a student under {STUDENT_PREFIX!r} "
            "alone, so that the merged file could not be loaded; leave the flag out"
        )
    if problems:
        raise UserError.from_problems("nothing was merged", problems)


def splice(
    student: Mapping[str, Tensor], sam3: Mapping[str, Tensor], model: Sam3Config, request: MergeRequest
) -> tuple[dict[str, Tensor], MergeReport]:
    """`merge_student` with the key sets that the model description demands.

    Raises:
        UserError: If anything does not fit.
    """
    assert model.student is not None
    with torch.device("meta"):
        trunk = build_trunk(model.replace(student=None)).state_dict()
    expected_trunk = shapes_of(trunk)
    # Rotary tables are recomputed on loading; files that cannot hold complex numbers leave them out.
    prefix = with_dot(request.replace_prefix)
    if not any(key.startswith(prefix) and key.endswith(".freqs_cis") for key in sam3):
        expected_trunk = {key: shape for key, shape in expected_trunk.items() if not key.endswith(".freqs_cis")}
    expected_student = shapes_of(student_to_published(build_student(model).state_dict(), model.student.backbone))
    try:
        return merge_student(
            student, sam3, expected_student, expected_trunk, request.target_prefix, request.replace_prefix
        )
    except MergeError as error:
        raise UserError(f"{request.student_path} and {request.sam3_path} cannot be merged: {error}") from None


def trunk_sha256(released: Mapping[str, Tensor], model: Sam3Config, request: MergeRequest) -> str:
    """Hash of the teacher trunk in the SAM 3 file: what `sam3_train.teacher.Teacher.sha256` gives for that file.

    Args:
        released: The SAM 3 weights in the released layout.
        model: The student's model; the teacher is the same one without the student.
        request: Names the file and the prefix of its trunk.

    Raises:
        CheckpointError: If the trunk does not fit the model.
    """
    prefix, teacher = with_dot(request.replace_prefix), model.replace(student=None)
    weights = {TRUNK_PREFIX + k.removeprefix(prefix): v for k, v in released.items() if k.startswith(prefix)}
    with torch.device("meta"):
        trunk = build_trunk(teacher)
    load_trunk(trunk, teacher, weights, source=str(request.sam3_path))
    return state_dict_sha256(dict(trunk.named_parameters()))


def _metadata(
    request: MergeRequest, checkpoint: StudentCheckpoint, model: Sam3Config, teacher_trunk: str
) -> dict[str, Any]:
    return {
        "variant": checkpoint.name,
        "model": model.to_dict(),
        "preprocess": checkpoint.preprocess.to_dict(),
        "dtype": request.dtype,
        "provenance": {
            "teacher_file": request.sam3_path.name,
            "teacher_sha256": sha256_file(request.sam3_path),
            "teacher_trunk_sha256": teacher_trunk,
            "student_teacher_trunk_sha256": checkpoint.teacher_sha256,
            "student_file": request.student_path.name,
            "student_sha256": sha256_file(request.student_path),
            "is_ema": checkpoint.is_ema,
            "epoch": checkpoint.epoch,
            "step": checkpoint.step,
            "metrics": checkpoint.metrics,
            "config": checkpoint.config,
            "versions": package_versions(("efficientsam3", "torch", "timm")),
        },
    }
