"""From a trained memory and the file that it was trained in front of to one proven file that holds both memories.

The trained tensors come beside what is there, under names of their own (`sam3.efficient_keys`): SAM 3's own memory,
text encoder and detector stay bit for bit. Here: whether the two belong together, the merge dict to dict, what is
written down about the result, and in what order it is proven (`stage2.memory_proof`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam3.checkpoint_io import read_checkpoint, sha256_file, write_merged
from sam3.checkpoint_keys import EFFICIENT_PREFIX, TRACKER_PREFIX
from sam3.checkpoint_merge import MergeError, require_representable
from sam3.checkpoint_parts import FULL_MEMORY_PREFIXES, HEADS_PREFIXES
from sam3.efficient_keys import own_weights, tracker_from_released
from sam3.recognition import Recognised, recognise
from sam3_train.config import package_versions
from sam3_train.errors import UserError
from sam3_train.merged_proof import file_problems, require_written, written_aside
from sam3_train.student_checkpoint import require_same_student
from stage2.base_file import frozen_sha256
from stage2.memory_proof import MemoryProof, prove_memory
from stage2.trained_memory import STAGE, TrainedMemory, read_trained_memory

FLAGS = {"output": "--output_path", "trained": "--trained_checkpoint", "base": "--sam3_checkpoint"}


@dataclass(frozen=True)
class MergeRequest:
    """What to merge; see ``convert_memory_weights_stage2.py --help``."""

    trained_path: Path
    base_path: Path
    output: Path
    use_ema: bool | None = None
    allow_other_base: bool = False


@dataclass(frozen=True)
class MemoryMergeReport:
    """What a merge did; tensors are counted."""

    num_trained: int
    """Of the memory, all of which are in the result."""
    num_new: int
    """Of these, those whose names SAM 3 has nothing like: attention, resampler and projections."""
    num_beside: int
    """Of these, those that stand beside SAM 3's own of the same purpose: memory encoder and tables."""
    num_replaced: int
    """Tensors of an earlier compressed memory that went."""
    num_kept: int
    """Of the base file, kept bit for bit."""
    num_full_memory: int
    """Of these, SAM 3's own memory."""
    dtype: torch.dtype
    """In which the trained tensors are stored."""

    @property
    def num_total(self) -> int:
        """Tensors of the result."""
        return self.num_trained + self.num_kept


@dataclass(frozen=True)
class MergeResult:
    """What was written and how it was proven."""

    request: MergeRequest
    trained: TrainedMemory
    report: MemoryMergeReport
    notes: list[str]
    proof: MemoryProof

    def lines(self) -> list[str]:
        """The report, ending with the lines that use the file."""
        report, output = self.report, self.request.output
        size_mb = output.stat().st_size / 1e6
        left_out = ", ".join(f"{name} ({count})" for name, count in self.trained.left_out.items())
        dtype = str(report.dtype).removeprefix("torch.")
        return [
            f"Trained tensors:       {report.num_trained:5d}, written: {report.num_trained} (as {dtype})",
            f"  new to SAM 3:        {report.num_new:5d}  memory attention, resampler, projections",
            f"  beside SAM 3's own:  {report.num_beside:5d}  memory encoder and tables",
            f"Kept of {self.request.base_path.name}: {report.num_kept}, of them SAM 3's own memory: "
            f"{report.num_full_memory}",
            *([f"Replaced compressed memory: {report.num_replaced} tensors"] if report.num_replaced else []),
            *([f"Left out, for training alone: {left_out}"] if left_out else []),
            f"Total keys in output: {report.num_total}",
            "verified: every trained tensor is in the output, and every kept one is the base file's, bit for bit",
            *self.notes,
            *self.proof.lines(),
            f"wrote {output} ({size_mb:.1f} MB). Use it:",
            "",
            f"    python -m sam3.track VIDEO --checkpoint {output} --point X,Y --output DIR",
            "",
            "    import sam3",
            f"    model = sam3.load_model({str(output)!r})                    # the compressed memory",
            f'    model = sam3.load_model({str(output)!r}, memory="full")     # SAM 3\'s own',
        ]


def merge_files(request: MergeRequest) -> MergeResult:
    """Read, compare, merge, write aside, verify, prove, and only then put the file at its place.

    Raises:
        UserError: If a flag or the checkpoint is wrong, the two files do not belong together, or the proof fails;
            nothing is written at the output.
        CheckpointError: If the base file cannot be read or recognised.
        PreprocessMismatchError: If the base file expects other images than the training saw.
    """
    inputs = {FLAGS["trained"]: request.trained_path, FLAGS["base"]: request.base_path}
    problems = file_problems(request.output, inputs, flag=FLAGS["output"])
    if problems:
        raise UserError.from_problems("nothing was merged", problems)
    trained = read_trained_memory(request.trained_path, request.use_ema)
    base = recognise(read_checkpoint(request.base_path))
    require_pair(trained, base)
    notes = [_base_note(trained, base, request.allow_other_base)]
    weights, report = merge_memory(trained.weights, base)
    dtypes = {tracker_from_released(k): v.dtype for k, v in weights.items() if k.startswith(EFFICIENT_PREFIX)}
    with written_aside(request.output, FLAGS["output"]) as aside:
        write_merged(aside, weights, _metadata(request, trained, base))
        require_written(aside, weights, request.output)
        proof = prove_memory(aside, request.base_path, trained, dtypes, request.output)
    return MergeResult(request, trained, report, notes, proof)


def merge_memory(memory: Mapping[str, Tensor], base: Recognised) -> tuple[dict[str, Tensor], MemoryMergeReport]:
    """Put a trained memory beside what a file holds: dict to dict.

    Args:
        memory: The memory's tensors under the tracker's names.
        base: The file.

    Returns:
        The weights under the released names: the file's, the same objects, and the memory's in the precision of the
        file's tracker, in the place of a compressed memory that the file held.

    Raises:
        UserError: If a weight cannot be stored in that precision, or is not finite.
    """
    own = own_weights(memory)
    kept = {key: value for key, value in base.weights.items() if not key.startswith(EFFICIENT_PREFIX)}
    dtype = _tracker_dtype(kept)
    try:
        require_representable(own, dtype, "convert the file first (python -m sam3.convert FILE OUT --dtype fp32)")
    except MergeError as error:
        raise UserError(f"the trained memory cannot be stored as {base.source} is: {error}") from None
    merged = kept | {key: value.to(dtype) if value.is_floating_point() else value for key, value in own.items()}
    beside = [name for name in memory if (TRACKER_PREFIX + name).startswith(FULL_MEMORY_PREFIXES)]
    return merged, MemoryMergeReport(
        num_trained=len(own),
        num_new=len(own) - len(beside),
        num_beside=len(beside),
        num_replaced=len(base.weights) - len(kept),
        num_kept=len(kept),
        num_full_memory=sum(key.startswith(FULL_MEMORY_PREFIXES) for key in kept),
        dtype=dtype,
    )


def _tracker_dtype(weights: Mapping[str, Tensor]) -> torch.dtype:
    """The precision of a file's SAM heads: that of most of their tensors, since some are never rounded."""
    dtypes = [v.dtype for key, v in weights.items() if key.startswith(HEADS_PREFIXES) and v.is_floating_point()]
    return Counter(dtypes).most_common(1)[0][0]


# --- whether the two belong together ----------------------------------------------------------------------------------


def require_pair(trained: TrainedMemory, base: Recognised) -> None:
    """Check that a file has the model that a memory was trained in, but for the memory.

    Raises:
        UserError: If it has no SAM heads, or is another model or student.
        PreprocessMismatchError: If it expects other images.
    """
    where = f"{FLAGS['base']} {base.source}"
    remedy = f"give the file that the training began with{_start_name(trained)}"
    if not base.memories:
        raise UserError(
            f"{where} holds no tracker (missing: {', '.join(base.missing_parts)}), which a memory belongs to: {remedy}"
        )
    theirs, ours = (config.replace(efficient_memory=None) for config in (base.config, trained.model))
    if ours.student is not None:
        require_same_student(theirs, ours, where, f"{trained.path} was trained behind", remedy)
    elif theirs.student is not None:
        raise UserError(
            f"{where} holds the student {theirs.student.backbone}, but {trained.path} was trained behind SAM 3's own "
            f"trunk: {remedy}"
        )
    elif theirs != ours:
        raise UserError(
            f"{where} belongs to the model {theirs.name!r} at {theirs.image_size_px} px, but {trained.path} was "
            f"trained in {ours.name!r} at {ours.image_size_px} px, or their sizes differ: {remedy}"
        )
    if base.preprocess is not None:
        trained.preprocess.require_equal(base.preprocess, str(trained.path), where)


def _base_note(trained: TrainedMemory, base: Recognised, is_allowed: bool) -> str:
    """Compare what the memory was trained behind with what the file holds.

    Returns:
        One line for the report.

    Raises:
        UserError: If they differ, and that was not allowed.
    """
    found = frozen_sha256(base)
    if found == trained.frozen_sha256:
        _require_heads_unmoved(trained, base)
        return f"base checked: the memory was trained behind this file's backbone and heads (sha256 {found[:12]})"
    difference = (
        f"{trained.path} was trained behind a backbone and heads with sha256 {trained.frozen_sha256[:12]}, but those "
        f"of {base.source} have {found[:12]} (another SAM 3 or student, or the same one rounded or folded)"
    )
    if is_allowed:
        return f"warning: {difference}; merged because of --allow-other-base"
    raise UserError(
        f"{difference}: give the file that the training began with{_start_name(trained)}, or --allow-other-base"
    )


def _require_heads_unmoved(trained: TrainedMemory, base: Recognised) -> None:
    """The frozen heads that a final checkpoint holds beside its memory must be those of the file.

    Raises:
        UserError: If one has moved.
    """
    for name, value in trained.heads.items():
        own = base.weights.get(TRACKER_PREFIX + name)
        if own is not None and not torch.equal(own.float(), value.float()):
            raise UserError(
                f"{trained.path}: {name} is not what {base.source} holds, although the training says that it began "
                "there and froze it: the checkpoint has been changed; give another one of the run"
            )


def _start_name(trained: TrainedMemory) -> str:
    name = trained.start.get("file")
    return f", {name}" if name else ""


# --- the record -------------------------------------------------------------------------------------------------------


def _metadata(request: MergeRequest, trained: TrainedMemory, base: Recognised) -> dict[str, Any]:
    """The base file's record, with the memory in its description and its training in front of the provenance."""
    before = base.metadata.get("provenance")
    before = dict(before) if isinstance(before, dict) else {}
    kept = ("teacher_file", "teacher_sha256", "teacher_trunk_sha256", "student_teacher_trunk_sha256")
    preprocess = trained.preprocess if base.preprocess is None else base.preprocess
    return {
        **base.metadata,
        "variant": base.metadata.get("variant", base.config.name),
        "model": base.config.replace(efficient_memory=trained.model.efficient_memory).to_dict(),
        "preprocess": preprocess.to_dict(),
        "provenance": {
            "stage": STAGE,
            **{name: before[name] for name in kept if name in before},
            "memory_file": request.trained_path.name,
            "memory_sha256": sha256_file(request.trained_path),
            "frozen_sha256": trained.frozen_sha256,
            "is_ema": trained.is_ema,
            "epoch": trained.epoch,
            "step": trained.step,
            "metrics": trained.metrics,
            "config": trained.config,
            "versions": package_versions(("efficientsam3", "torch")),
            "start": trained.start,
            "base": {
                "file": request.base_path.name,
                "sha256": sha256_file(request.base_path),
                "provenance": before,
            },
        },
    }
