"""Rewrite a checkpoint in another layout, container or precision, and prove that the result holds the same weights."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam3.checkpoint_fit import RECOMPUTED_SUFFIX
from sam3.checkpoint_io import CheckpointError, CheckpointFile, read_checkpoint, sha256_file, write_merged
from sam3.checkpoint_keys import EFFICIENT_PREFIX, TRUNK_PREFIX
from sam3.checkpoint_merge import MergeError, require_representable
from sam3.hf_keys import POINT_PROJECTIONS, released_to_hf
from sam3.model.sam3_image import Sam3Image
from sam3.model.vitdet import TABLE_KEY, Attention
from sam3.recognition import Recognised, recognise

SUFFIXES = (".pt", ".pth", ".safetensors")
LAYOUTS = ("meta", "hf")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_POSITIONS = TRUNK_PREFIX + "pos_embed"


@dataclass(frozen=True)
class ConversionRequest:
    """What to convert; see ``python -m sam3.convert --help``."""

    source: Path
    output: Path
    layout: str = "meta"
    dtype: str | None = None
    """One of `DTYPES`; None keeps what the file has."""
    overwrite: bool = False


@dataclass(frozen=True)
class Conversion:
    """What was written."""

    request: ConversionRequest
    source: Recognised
    output: Recognised
    num_read: int
    """Tensors of the old file, under its own names."""
    num_tensors: int
    """Tensors of the new one."""
    num_bytes: int
    lost: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report, as a person reads it."""
        missing = self.output.missing_parts
        return [
            f"read    {self.source.source}: {self.source.layout}, {self.num_read:,} tensors",
            f"wrote   {self.request.output}: {self.output.layout}, {self.num_tensors:,} tensors, "
            f"{self.num_bytes / 1e6:,.1f} MB",
            *(f"lost    {text}" for text in self.lost),
            *(f"added   {text}" for text in self.added),
            *([f"absent  {', '.join(missing)}"] if missing else []),
            "checked the new file opens, and holds the same weights"
            + (f" rounded to {self.request.dtype}" if self.request.dtype not in (None, "fp32") else ""),
        ]


def convert_checkpoint(request: ConversionRequest) -> Conversion:
    """Read, rename, write aside, open what was written, compare, and only then put the file at its place.

    Raises:
        CheckpointError: If the request makes no sense, the file cannot be read or does not fit what it says it is, the
            layout cannot hold it, or the result differs; nothing is left at the output then.
    """
    _check_request(request)
    checkpoint = read_checkpoint(request.source)
    source = recognise(checkpoint)
    model = source.assemble()
    source.check(model)
    target, lost, added = _target_weights(source, model, request)
    dtype = None if request.dtype is None else DTYPES[request.dtype]
    if dtype is not None:
        try:
            require_representable(target, dtype)
        except MergeError as error:
            raise CheckpointError(f"{request.source}: {error}") from None
    # The suffix stays, because it decides the format.
    aside = request.output.with_name(f".{request.output.stem}.{os.getpid()}.unproven{request.output.suffix}")
    try:
        write_merged(aside, target, _metadata(request, checkpoint, source), dtype)
        written = _prove(aside, source, dtype, request)
        num_bytes = aside.stat().st_size
        os.replace(aside, request.output)
    except OSError as error:
        raise CheckpointError(
            f"{request.output}: cannot be written ({error}); free some space or choose another place"
        ) from error
    finally:
        aside.unlink(missing_ok=True)
    num_tensors = len(target)
    if request.output.suffix == ".safetensors":
        num_tensors -= sum(key.endswith(RECOMPUTED_SUFFIX) for key in target)
    num_read = len(checkpoint.state_dict)
    return Conversion(request, source, written, num_read, num_tensors, num_bytes, lost, added)


def _check_request(request: ConversionRequest) -> None:
    output = request.output
    if request.layout not in LAYOUTS:
        raise CheckpointError(f"layout {request.layout!r} is not one of {', '.join(LAYOUTS)}")
    if request.dtype is not None and request.dtype not in DTYPES:
        raise CheckpointError(f"dtype {request.dtype!r} is not one of {', '.join(DTYPES)}")
    if output.is_dir():
        raise CheckpointError(f"{output}: is a folder; name a file in it")
    if output.suffix not in SUFFIXES:
        raise CheckpointError(f"{output}: the name must end in one of {', '.join(SUFFIXES)}")
    if request.layout == "hf" and output.suffix != ".safetensors":
        raise CheckpointError(f"{output}: Hugging Face's layout is stored as .safetensors alone")
    if not output.exists():
        return
    if request.source.exists() and output.samefile(request.source):
        raise CheckpointError(f"{output}: is the file to convert itself; choose another name")
    if not request.overwrite:
        raise CheckpointError(f"{output}: exists already; choose another name, or replace it with --force")


def _target_weights(
    source: Recognised, model: Sam3Image, request: ConversionRequest
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The new file's tensors, and what of the old file is lost and what is added."""
    weights = source.weights
    lost: list[str] = []
    added: list[str] = []
    if request.layout == "hf":
        if source.config.student is not None:
            raise CheckpointError(
                f"{request.source}: holds the student {source.config.student.backbone}, for which Hugging Face's "
                "classes have no place; only SAM 3 itself goes there"
            )
        compressed = [key for key in weights if key.startswith(EFFICIENT_PREFIX)]
        if compressed:
            lost.append(f"{len(compressed)} tensors of the compressed memory, for which there is no place there")
            weights = {key: value for key, value in weights.items() if not key.startswith(EFFICIENT_PREFIX)}
        if source.has_point_prompts:
            lost.append(f"{len(POINT_PROJECTIONS)} tensors for point prompts of the detector, which has none there")
        table = weights[_POSITIONS]
        if bool(table[:, 0].any()):
            lost.append("the class token's row of the trunk's position table, which nothing reads")
        return released_to_hf(weights), lost, added
    complete = source.weights_for(model)
    if len(complete) > len(weights):
        added.append("zeros for point prompts of the detector, which the file lacks; such prompts are then refused")
    tables = _rotary_tables(model)
    if request.output.suffix != ".safetensors":
        absent = {key: table for key, table in tables.items() if key not in complete}
        if absent:
            added.append(f"{len(absent)} rotary tables, recomputed")
        complete = complete | absent
    elif any(key in complete for key in tables):
        lost.append(f"{len(tables)} rotary tables: safetensors cannot hold complex numbers, loading recomputes them")
    return dict(complete), lost, added


def _rotary_tables(model: Sam3Image) -> dict[str, Tensor]:
    """The complex tables that ``sam3.pt`` holds, by released name; {} for a student."""
    trunk = model.backbone.vision_backbone.trunk
    return {
        f"{TRUNK_PREFIX}{name}.{TABLE_KEY}": module.released_table(torch.device("cpu"))
        for name, module in trunk.named_modules()
        if isinstance(module, Attention)
    }


def _metadata(request: ConversionRequest, checkpoint: CheckpointFile, source: Recognised) -> dict[str, Any]:
    """The old record, a description for files that had none, and where the file comes from."""
    config = source.config.replace(efficient_memory=None) if request.layout == "hf" else source.config
    record = {
        **checkpoint.metadata,
        "model": config.to_dict(),
        "converted": {
            "files": {file.name: sha256_file(file) for file in checkpoint.files},
            "from_layout": source.layout,
            "layout": request.layout,
            "dtype": request.dtype,
        },
    }
    if request.dtype is not None:
        record["dtype"] = request.dtype
    return record


def _prove(path: Path, source: Recognised, dtype: torch.dtype | None, request: ConversionRequest) -> Recognised:
    """Open the new file as `load_model` would and compare each tensor with the old file's.

    Raises:
        CheckpointError: If a tensor is missing or differs.
    """
    written = recognise(read_checkpoint(path))
    written.check(written.assemble())
    for key, value in source.weights.items():
        is_left_out = request.layout == "hf" and (key in POINT_PROJECTIONS or key.startswith(EFFICIENT_PREFIX))
        if key.endswith(RECOMPUTED_SUFFIX) or is_left_out:
            continue
        if key not in written.weights:
            raise CheckpointError(f"{request.output}: not written, {key} would be missing")
        stored = written.weights[key]
        if key == _POSITIONS and request.layout == "hf":
            stored, value = stored[:, 1:], value[:, 1:]
        if stored.shape != value.shape or not _equal(stored, value.to(stored.dtype)):
            raise CheckpointError(f"{request.output}: not written, {key} would differ from {request.source}")
        if dtype is not None and stored.is_floating_point() and stored.dtype not in (dtype, torch.float32):
            raise CheckpointError(f"{request.output}: not written, {key} would be stored as {stored.dtype}")
    return written


def _equal(a: Tensor, b: Tensor) -> bool:
    """Equal numbers, where NaN equals NaN."""
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
