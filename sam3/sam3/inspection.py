"""Say what a checkpoint holds without building it in memory or running anything in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam3.backbones import backbone_spec
from sam3.checkpoint_fit import RECOMPUTED_SUFFIX, first, fit_problems
from sam3.checkpoint_io import CheckpointError, CheckpointFile, read_checkpoint
from sam3.checkpoint_parts import EFFICIENT_MEMORY, PARTS, part_of
from sam3.hf_keys import POINT_PROJECTIONS
from sam3.recognition import Recognised, recognise
from sam3.released_names import to_released

VALUES_LIMIT_BYTES = 1 << 30
"""Files up to this size have their numbers looked at unless told otherwise."""
_BUFFERS = (
    RECOMPUTED_SUFFIX,
    ".positional_encoding_gaussian_matrix",
    ".running_mean",
    ".running_var",
    ".num_batches_tracked",
)
_LONG_FIELDS = ("model", "config", "preprocess")


@dataclass(frozen=True)
class PartContent:
    """One part of a file.

    Attributes:
        name: As in `sam3.checkpoint_parts`.
        state: ``complete``, ``partial``, ``absent``, or ``not read`` where another part lacks that it needs.
        tensors: Tensors in the file, buffers included.
        parameters: Numbers in them, buffers not included.
        missing: Tensors that the model needs and the file lacks; 0 for an absent part.
    """

    name: str
    state: str
    tensors: int
    parameters: int
    missing: int = 0


@dataclass(frozen=True)
class Inspection:
    """What `inspect_checkpoint` found.

    Attributes:
        path: The file, index or folder.
        container: ``safetensors``, ``torch`` or ``torch, legacy``.
        files: Names of the files that hold the weights.
        num_bytes: Their size.
        num_tensors: In the file, under its own names.
        dtypes: Tensors of each type.
        problem: Why `sam3.load_model` refuses it; None if it opens.
        layout: Whose names it has; None if it is not recognised.
        preset: Name of the model description.
        student: The backbone in the trunk's place, or None.
        student_name: The name of the released student with this backbone, or None.
        image_size_px: Side of the model's input.
        parts: What the file holds of each part.
        other_tensors: First words of the names that belong to no part, and how many tensors have each.
        missing_parts: What the opened model would lack.
        memories: Kinds of memory for videos, the one that is opened by default first.
        tokens_per_frame: That a compressed memory stores of a frame; None without one.
        preprocess: What the record says about images, or None.
        record: The metadata record of this project's files.
        non_finite: Names of tensors that hold NaN or infinity; None if the numbers were not looked at.
    """

    path: str
    container: str
    files: list[str]
    num_bytes: int
    num_tensors: int
    dtypes: dict[str, int]
    problem: str | None = None
    layout: str | None = None
    preset: str | None = None
    student: str | None = None
    student_name: str | None = None
    image_size_px: int | None = None
    parts: list[PartContent] = field(default_factory=list)
    other_tensors: dict[str, int] = field(default_factory=dict)
    missing_parts: list[str] = field(default_factory=list)
    memories: list[str] = field(default_factory=list)
    tokens_per_frame: int | None = None
    preprocess: dict[str, Any] | None = None
    record: dict[str, Any] = field(default_factory=dict)
    non_finite: list[str] | None = None

    @property
    def opens(self) -> bool:
        """Whether `sam3.load_model` opens it."""
        return self.problem is None

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {**asdict(self), "opens": self.opens}

    def lines(self) -> list[str]:
        """The report as a person reads it."""
        dtypes = ", ".join(f"{name} ({count:,})" for name, count in self.dtypes.items())
        shards = f", {len(self.files)} shards" if len(self.files) > 1 else ""
        lines = [
            f"file        {self.path} ({self.num_bytes / 1e6:,.1f} MB, {self.container}{shards})",
            f"layout      {self.layout or 'not recognised'}",
            f"tensors     {self.num_tensors:,}: {dtypes}",
        ]
        if self.preset is not None:
            lines.append(f"model       {self._model_text()}")
        if self.tokens_per_frame is not None:
            kinds = " and ".join(self.memories)
            lines.append(f"memory      {kinds}; the efficient one stores {self.tokens_per_frame} tokens of a frame")
        if self.preprocess is not None:
            lines.append("images      " + ", ".join(f"{key} {value}" for key, value in self.preprocess.items()))
        lines += _record_lines(self.record)
        lines += self._table()
        lines.append("opens       " + ("yes" if self.opens else f"no: {self.problem}"))
        if self.opens:
            lines.append("missing     " + (", ".join(self.missing_parts) or "nothing"))
        lines.append("values      " + self._values_text())
        return lines

    def _model_text(self) -> str:
        text = f"{self.preset}, {self.image_size_px} px"
        if self.student is None:
            return text + ", with its own trunk"
        name = f" ({self.student_name})" if self.student_name else ""
        return f"{text}, with the student {self.student}{name} in the trunk's place"

    def _values_text(self) -> str:
        if self.non_finite is None:
            return "not looked at (--values reads them)"
        if not self.non_finite:
            return "all finite"
        return f"NaN or infinity in {len(self.non_finite)} tensors: {first(self.non_finite)}"

    def _table(self) -> list[str]:
        if not self.parts:
            found = [f"  {name}: {count:,}" for name, count in self.other_tensors.items()]
            return ["names begin with", *found] if found else []
        rows = [f"{'part':<20}{'tensors':>9}{'parameters':>15}  "]
        for part in self.parts:
            state = f"{part.state}, {part.missing} missing" if part.missing else part.state
            rows.append(f"{part.name:<20}{part.tensors:>9,}{part.parameters:>15,}  {state}")
        if self.other_tensors:
            rows.append(f"{'other':<20}{sum(self.other_tensors.values()):>9,}")
        return ["", *rows, ""]


def inspect_checkpoint(path: str | Path, values: bool | None = None) -> Inspection:
    """Read a checkpoint's names, shapes and record; its numbers only if asked to.

    Args:
        path: What `sam3.load_model` takes, on this machine.
        values: Look for NaN and infinity, which reads the whole file; None does so up to `VALUES_LIMIT_BYTES`.

    Raises:
        CheckpointError: If the file is missing, damaged or holds no weights. A file that can be read but is not
            recognised is no error: `Inspection.problem` says why it does not open.
    """
    checkpoint = read_checkpoint(path)
    facts = _file_facts(checkpoint)
    if values or (values is None and checkpoint.num_bytes <= VALUES_LIMIT_BYTES):
        facts["non_finite"] = non_finite_keys(checkpoint.state_dict)
    try:
        found = recognise(checkpoint)
    except CheckpointError as error:
        groups = Counter(key.split(".")[0] for key in checkpoint.state_dict)
        return Inspection(**facts, problem=_without_path(error, path), other_tensors=dict(groups.most_common(8)))
    return Inspection(**facts, **_contents(found))


def non_finite_keys(state_dict: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    return [
        key
        for key, value in state_dict.items()
        if (value.is_floating_point() or value.is_complex()) and not bool(torch.isfinite(value).all())
    ]


def _file_facts(checkpoint: CheckpointFile) -> dict[str, Any]:
    dtypes = Counter(str(value.dtype).removeprefix("torch.") for value in checkpoint.state_dict.values())
    return {
        "path": str(checkpoint.path),
        "container": checkpoint.container,
        "files": [file.name for file in checkpoint.files],
        "num_bytes": checkpoint.num_bytes,
        "num_tensors": len(checkpoint.state_dict),
        "dtypes": dict(dtypes.most_common()),
        "record": checkpoint.metadata,
    }


def _contents(found: Recognised) -> dict[str, Any]:
    model = found.assemble()
    problem = None
    try:
        found.check(model)
    except CheckpointError as error:
        problem = _without_path(error, found.source)
    student, memory = found.config.student, found.efficient_memory
    expected = to_released(model.state_dict(), found.config) | found.other_memory()
    return {
        "problem": problem,
        "layout": found.layout,
        "preset": found.config.name,
        "student": None if student is None else student.backbone,
        "student_name": None if student is None else backbone_spec(student.backbone).student_name,
        "image_size_px": found.config.image_size_px,
        "parts": _parts(found, expected),
        "other_tensors": dict(Counter(key.split(".")[0] for key in found.weights if part_of(key) is None)),
        "missing_parts": list(found.missing_parts),
        "memories": list(found.memories),
        "tokens_per_frame": None if memory is None else memory.num_tokens or found.config.grid_size**2,
        "preprocess": None if found.preprocess is None else found.preprocess.to_dict(),
    }


def _parts(found: Recognised, expected: Mapping[str, Tensor]) -> list[PartContent]:
    if not any(key in found.weights for key in POINT_PROJECTIONS):  # no half of a part: `Inspection.missing_parts`
        expected = {key: value for key, value in expected.items() if key not in POINT_PROJECTIONS}
    rows = []
    for part in (*PARTS, *([EFFICIENT_MEMORY] if EFFICIENT_MEMORY in found.parts else [])):
        own = {key: value for key, value in found.weights.items() if key.startswith(part.prefixes)}
        needed = {key: value for key, value in expected.items() if key.startswith(part.prefixes)}
        missing = sum(key not in own and not key.endswith(RECOMPUTED_SUFFIX) for key in needed) if own else 0
        parameters = sum(value.numel() for key, value in own.items() if not key.endswith(_BUFFERS))
        if not own:
            state = "absent"
        elif not needed:
            state = "not read"
        else:
            state = "partial" if missing else "unfit" if fit_problems(own, needed) else "complete"
        rows.append(PartContent(part.name, state, len(own), parameters, missing))
    return rows


def _record_lines(record: Mapping[str, Any]) -> list[str]:
    """The record without what is printed elsewhere or too long for a terminal."""
    lines = []
    for key, value in record.items():
        if key in _LONG_FIELDS:
            continue
        if isinstance(value, dict):
            lines.append(f"{key}")
            lines += [f"  {k}: {_short(v)}" for k, v in value.items() if k not in _LONG_FIELDS]
        else:
            lines.append(f"{key:<11} {_short(value)}")
    return lines


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _without_path(error: CheckpointError, path: str | Path) -> str:
    return str(error).removeprefix(f"{path}: ")
