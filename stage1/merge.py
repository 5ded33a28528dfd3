"""From a training checkpoint and SAM 3's weights to one proven file.

The splice itself is `sam3.checkpoint_merge.merge_student`. Here: what to read, what to fold, what to write down about
the result, and the proof. SAM 3's weights are memory-mapped and streamed to the new file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sam3.checkpoint_io import CheckpointError, read_state_dict, sha256_file, write_merged
from sam3.checkpoint_keys import STUDENT_PREFIX, TRUNK_PREFIX, student_from_published, student_to_published
from sam3.checkpoint_merge import MergeError, MergeReport, merge_student, require_representable, shapes_of, with_dot
from sam3.config import Sam3Config
from sam3.loading import load_model
from sam3.model.sam3_image import Sam3Image
from sam3.model.student_encoder import StudentEncoder, build_student, fuse_for_inference
from sam3.model_builder import build_trunk
from sam3.released_names import load_trunk, released_layout
from sam3_train.checkpoint import state_dict_sha256
from sam3_train.config import package_versions
from sam3_train.errors import UserError
from stage1.student_checkpoint import StudentCheckpoint, read_student

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SUFFIXES = (".pt", ".pth", ".safetensors")
TOLERANCE = 1e-4
"""Largest difference of trunk outputs, over the largest output, that rounding explains."""
TOLERANCE_FUSED = 1e-3
"""The same between a student and its folded form, both in float32."""
TOLERANCE_FASTER = 5e-3
"""The same between the predictor's fast form of the trunk and the trunk, after the neck."""


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
    num_bytes: int
    trunk_error: float
    """Largest difference between deployed and training-time trunk output, over the largest output."""
    rounding_error: float
    """The same against the student before its weights were rounded to ``--dtype``."""
    teacher_note: str
    """Whether the student learned from this teacher, in one line."""

    def lines(self) -> list[str]:
        """The report, ending with the lines of Python that use the file."""
        return [
            *self.report.lines(),
            self.teacher_note,
            f"checked: the loaded file's trunk gives the student's features (relative error {self.trunk_error:.1e}"
            f"; {self.rounding_error:.1e} before rounding to --dtype)",
            f"wrote {self.output} ({self.num_bytes / 1e6:.1f} MB). Use it:",
            "",
            "    import numpy as np, sam3",
            "    from PIL import Image",
            f"    model = sam3.load_model({str(self.output)!r})",
            "    predictor = model.inst_interactive_predictor",
            '    predictor.set_image(Image.open("photo.jpg"))',
            "    masks, ious, _ = predictor.predict(box=np.array([100, 150, 420, 380]), multimask_output=False)",
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
    trained = build_trained_student(checkpoint)
    folded = fuse_for_inference(trained) if request.fuse else trained
    model = checkpoint.model.replace(student=folded.student)
    weights = student_to_published(folded.state_dict(), folded.student.backbone)
    dtype = DTYPES[request.dtype]
    sam3, _ = read_state_dict(request.sam3_path)
    released = released_layout(sam3, str(request.sam3_path))
    merged, report = splice(weights, released, model, request)
    teacher_trunk = trunk_sha256(released, model, request)
    teacher_note = check_teacher(checkpoint, teacher_trunk, request)
    try:
        require_representable(merged, dtype)
    except MergeError as error:
        raise UserError(str(error)) from None
    # The final suffix stays, because it decides the format.
    aside = request.output.with_name(f".{request.output.stem}.{os.getpid()}.unproven{request.output.suffix}")
    try:
        write_merged(aside, merged, _metadata(request, checkpoint, model, teacher_trunk), dtype)
        trunk_error, rounding_error = prove(aside, checkpoint, trained, folded, dtype, request)
        os.replace(aside, request.output)
    except OSError as error:
        raise UserError(
            f"cannot write {request.output}: {error}; free some space or choose another --output"
        ) from error
    finally:
        aside.unlink(missing_ok=True)
    num_bytes = request.output.stat().st_size
    return MergeResult(request.output, report, num_bytes, trunk_error, rounding_error, teacher_note)


def _check_request(request: MergeRequest) -> None:
    problems = []
    if request.output.suffix not in SUFFIXES:
        problems.append(f"--output {request.output}: the name must end in one of {', '.join(SUFFIXES)}")
    if request.output.is_dir():
        problems.append(f"--output {request.output} is a folder; name a file in it")
    for flag, path in (("--student-ckpt", request.student_path), ("--sam3-ckpt", request.sam3_path)):
        if not path.is_file():
            problems.append(f"{flag}: there is no file {path}")
        elif request.output.exists() and path.samefile(request.output):
            problems.append(f"--output {request.output} is the {flag} itself; choose another name")
    if with_dot(request.target_prefix).removeprefix("module.") != STUDENT_PREFIX:
        problems.append(
            f"--target-prefix {request.target_prefix!r}: sam3.load_model looks for a student under {STUDENT_PREFIX!r} "
            "alone, so that the merged file could not be loaded; leave the flag out"
        )
    if request.image is not None and not request.image.is_file():
        problems.append(f"--image: there is no file {request.image}")
    if problems:
        raise UserError.from_problems("nothing was merged", problems)


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
    """Hash of the teacher trunk in the SAM 3 file: what `stage1.teacher.Teacher.sha256` gives for that file.

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


def check_teacher(checkpoint: StudentCheckpoint, trunk: str, request: MergeRequest) -> str:
    """Compare the teacher that a student learned from with the one it is merged into.

    Neck and heads of SAM 3 read the features of their own trunk, which are those that the student has to imitate.

    Args:
        checkpoint: The student's.
        trunk: `trunk_sha256` of the SAM 3 file.
        request: Names the files; ``allow_other_teacher`` makes a warning of the error.

    Returns:
        One line for the report.

    Raises:
        UserError: If the student learned from another teacher.
    """
    if checkpoint.teacher_sha256 is None:
        return f"teacher not checked: {checkpoint.path} does not record which teacher the student learned from"
    if checkpoint.teacher_sha256 == trunk:
        return f"teacher checked: the student learned from this SAM 3 trunk (sha256 {trunk[:12]})"
    difference = (
        f"{checkpoint.path} learned from a teacher whose trunk has sha256 {checkpoint.teacher_sha256}, but the trunk "
        f"in {request.sam3_path} has {trunk}"
    )
    if request.allow_other_teacher:
        return f"warning: {difference}; merged because of --allow-other-teacher"
    raise UserError(
        f"{difference}: give --sam3-ckpt the file that the embeddings were exported with, or --allow-other-teacher"
    )


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


@torch.no_grad()
def prove(
    path: Path,
    checkpoint: StudentCheckpoint,
    trained: StudentEncoder,
    folded: StudentEncoder,
    dtype: torch.dtype,
    request: MergeRequest,
) -> tuple[float, float]:
    """Load a merged file as a user would and compare it with the student as it was in training.

    Args:
        path: The merged file.
        checkpoint: Where the student came from; its preprocessing has to be the deployed one.
        trained: The student.
        folded: The student in the form that went into the file: folded, or the same object.
        dtype: What the weights were stored in: the comparison rounds the weights alike, so that its tolerance need
            only cover the rounding of the arithmetic.
        request: Names the files in messages.

    Returns:
        Largest difference of the trunk outputs over the largest output: from the student with its weights rounded as in
        the file, and from the student as it was trained.

    Raises:
        UserError: If the outputs differ by more than rounding explains, or masks are not finite.
    """
    try:
        deployed = load_model(path, device="cpu", dtype=torch.float32)
    except CheckpointError as error:
        raise UserError(
            f"the merged file does not load: {str(error).replace(str(path), str(request.output))}"
        ) from None
    image = _proof_image(request.image)
    checkpoint.preprocess.require_equal(deployed.preprocess, "the training checkpoint", "the merged model")
    pixels = deployed.preprocess(image)[None]
    output = deployed.backbone.vision_backbone.trunk(pixels)[-1]
    expected = trained(pixels)
    difference = _relative_difference(output, _rounded(folded, dtype)(pixels))
    folding = _relative_difference(folded(pixels), expected) if request.fuse else 0.0
    if not (difference <= TOLERANCE and folding <= TOLERANCE_FUSED):
        raise UserError(
            f"{request.output} was not written: its trunk differs from the trained student by {difference:.1e} of "
            f"its largest output (limit {TOLERANCE:.0e}), folding alone by {folding:.1e} (limit {TOLERANCE_FUSED:.0e})"
        )
    _require_same_embedding(deployed, pixels, output, request.output)
    _require_masks(deployed, image)
    return difference, _relative_difference(output, expected)


def _require_same_embedding(model: Sam3Image, pixels: Tensor, trunk_output: Tensor, output: Path) -> None:
    """The predictor runs the trunk in a faster form; what its heads read must be the same within `TOLERANCE_FASTER`."""
    maps = model.backbone.vision_backbone.neck(trunk_output, need_detector=False)[2]
    assert maps is not None, "load_model builds the second neck"
    expected = model.heads.image_features({"backbone_fpn": maps}).embedding
    difference = _relative_difference(model.image_features(pixels).embedding, expected)
    if not difference <= TOLERANCE_FASTER:
        raise UserError(
            f"{output} was not written: the predictor's image embedding differs from the trunk's by {difference:.1e} "
            f"of its largest value (limit {TOLERANCE_FASTER:.0e})"
        )


def _relative_difference(output: Tensor, expected: Tensor) -> float:
    return float((output - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def _rounded(student: StudentEncoder, dtype: torch.dtype) -> StudentEncoder:
    if dtype == torch.float32:
        return student
    rounded = build_student_like(student)
    state = {k: v.to(dtype).float() if v.is_floating_point() else v for k, v in student.state_dict().items()}
    rounded.load_state_dict(state)
    return rounded


def build_student_like(student: StudentEncoder) -> StudentEncoder:
    """Another student of the same description, in eval mode."""
    return StudentEncoder(student.student, student.image_size_px, student.embed_dim, student.grid_size).eval()


def _require_masks(model: Sam3Image, image: Image.Image) -> None:
    width, height = image.size
    predictor = model.inst_interactive_predictor
    assert predictor is not None, "load_model builds the heads"
    predictor.set_image(image)
    box = np.array([width // 4, height // 4, 3 * width // 4, 3 * height // 4])
    masks, ious, logits = predictor.predict(box=box, multimask_output=False)
    if masks.shape[-2:] != (height, width) or not np.isfinite(logits).all() or not np.isfinite(ious).all():
        raise UserError("the merged model gives no finite mask for a box: are the SAM 3 weights whole?")


def _proof_image(path: Path | None) -> Image.Image:
    if path is not None:
        return Image.open(path).convert("RGB")
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    return coarse.resize((640, 480), Image.Resampling.BICUBIC)
