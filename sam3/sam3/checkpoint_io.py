"""Checkpoint files: reading without executing anything, writing whole or not at all.

Reads ``.pt`` / ``.pth`` (flat, or with the weights under ``model``), ``.safetensors``, and shards and folders of them.
A merged file holds, beside the weights, a metadata record of plain types: format version, variant, model description,
preprocessing, provenance.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT_VERSION = 1
SAFETENSORS_METADATA_KEY = "efficientsam3"
INDEX_SUFFIX = ".safetensors.index.json"
FOLDER_CONTENT = ("sam3.pt", "model.safetensors.index.json", "model.safetensors")
"""What is read of a folder: the first of these. ``sam3.pt`` holds more than Hugging Face's layout can."""
TABLE_SUFFIX = ".freqs_cis"
"""Rotary tables: complex, which safetensors cannot hold, and recomputed on loading."""
# The Fourier matrix of point codes, under released and Hugging Face's names: rounding it turns every code by degrees.
_NEVER_ROUNDED = (
    ".positional_encoding_gaussian_matrix",
    "shared_embedding.positional_embedding",
    "shared_image_embedding.positional_embedding",
)


class CheckpointError(ValueError):
    """A checkpoint file that cannot be used; the message names it and says why."""


@dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint as it lies on disk, before its keys are understood."""

    path: Path
    """As it was given: a file, an index of shards or a folder."""
    files: tuple[Path, ...]
    """The files that hold the weights."""
    container: str
    """``safetensors``, ``torch`` (a zip archive) or ``torch, legacy`` (a bare pickle, which cannot be mapped)."""
    state_dict: dict[str, Tensor]
    metadata: dict[str, Any]
    """The record of this project's files; {} if there is none."""
    is_nested: bool = False
    """Whether the weights lay under ``model``."""

    @property
    def num_bytes(self) -> int:
        """Size of the files."""
        return sum(file.stat().st_size for file in self.files)


def read_state_dict(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and metadata record of `read_checkpoint`."""
    checkpoint = read_checkpoint(path)
    return checkpoint.state_dict, checkpoint.metadata


def read_checkpoint(path: str | Path) -> CheckpointFile:
    """Read a checkpoint's weights by key, as they are in the file, and its metadata record.

    What the file is decides its content, not its name. Tensors are memory-mapped where the format allows it. Nothing
    in the file is executed.

    Args:
        path: A ``.safetensors`` file; a file that ``torch.save`` wrote, in which the weights lie at the top or under
            ``model``; an index of safetensors shards (``*.safetensors.index.json``); or a folder with one of
            `FOLDER_CONTENT`.

    Raises:
        CheckpointError: If the file is missing, damaged, holds anything but tensors and plain types, or no weights.
    """
    path = Path(path)
    file = _file_in_folder(path) if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    if file.stat().st_size == 0:
        raise CheckpointError(f"{file}: the file is empty (an interrupted copy or download?)")
    if file.name.endswith(INDEX_SUFFIX):
        return _read_shards(path, file)
    shard = re.search(r"-\d{5}-of-(\d{5})\.safetensors$", file.name)
    if shard and int(shard[1]) > 1:
        raise CheckpointError(f"{file}: one of {int(shard[1])} shards: give their index (*{INDEX_SUFFIX}) or folder")
    kind = sniff(file)
    if kind == "safetensors":
        state_dict, metadata = _read_safetensors(file)
        return CheckpointFile(path, (file,), kind, state_dict, metadata)
    if kind is None:
        raise CheckpointError(f"{file}: {_what_it_is_instead(file)}")
    state_dict, metadata, is_nested = _read_torch(file, is_zip=kind == "torch")
    return CheckpointFile(path, (file,), kind, state_dict, metadata, is_nested)


def sniff(path: Path) -> str | None:
    """The container (see `CheckpointFile`) that a file's first bytes announce, or None."""
    with path.open("rb") as file:
        head = file.read(16)
    header_size = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header_size + 8 <= path.stat().st_size:
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        return "torch"
    if head.startswith(b"\x80") and path.suffix != ".safetensors":
        return "torch, legacy"
    return None


def _what_it_is_instead(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(200)
    text = head.decode("utf-8", errors="replace")
    if text.startswith("version https://git-lfs"):
        return "a Git LFS pointer and not the weights: fetch them with `git lfs pull`"
    if text.lstrip().lower().startswith(("<!doctype", "<html", "<?xml")):
        return "a web page and not a checkpoint: the download gave an error page"
    damaged = "damaged or not a safetensors file" if path.suffix == ".safetensors" else "damaged or not a checkpoint"
    if text.isprintable() or text.replace("\n", " ").replace("\r", " ").replace("\t", " ").isprintable():
        return f"{damaged}: it is text, beginning with {text[:30]!r}"
    return f"{damaged}: its first bytes {head[:8].hex(' ')} are those of no format that is read here"


def _file_in_folder(folder: Path) -> Path:
    found = [folder / name for name in FOLDER_CONTENT if (folder / name).is_file()]
    if not found:
        raise CheckpointError(f"{folder}: is a folder without a checkpoint ({', '.join(FOLDER_CONTENT)})")
    return found[0]


def _read_shards(path: Path, index: Path) -> CheckpointFile:
    """Read the safetensors files that an index of Hugging Face's form names."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        if not all(isinstance(name, str) for pair in weight_map.items() for name in pair):
            raise ValueError("weight_map maps keys to file names")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not an index of safetensors shards ({_first_line(error)})") from error
    names = sorted(set(weight_map.values()))
    strange = [name for name in names if Path(name).name != name]
    if strange:
        raise CheckpointError(f"{index}: names the shard {strange[0]!r}, which is not a file beside it")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index}: {len(missing)} of {len(names)} shards are missing beside it, first {missing[0]}"
        )
    state_dict: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for name in names:
        part, record = _read_safetensors(index.parent / name)
        wrong = [key for key in part if weight_map.get(key) != name]
        wrong += [key for key, shard in weight_map.items() if shard == name and key not in part]
        if wrong:
            raise CheckpointError(f"{index}: does not agree with {name} about {wrong[0]!r}: files of two versions?")
        state_dict |= part
        metadata |= record
    if not state_dict:
        raise CheckpointError(f"{index}: names no tensors")
    return CheckpointFile(path, tuple(index.parent / name for name in names), "safetensors", state_dict, metadata)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            record = (file.metadata() or {}).get(SAFETENSORS_METADATA_KEY)
            state_dict = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except Exception as error:  # the library has errors of its own, and damaged headers lead into torch's
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({_first_line(error)})") from error
    if not state_dict:
        raise CheckpointError(f"{path}: the file holds no tensors")
    try:
        metadata = json.loads(record) if record else {}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the metadata record {SAFETENSORS_METADATA_KEY!r} is not JSON") from error
    return state_dict, _checked_metadata(path, metadata)


def _read_torch(path: Path, is_zip: bool) -> tuple[dict[str, Tensor], dict[str, Any], bool]:
    try:
        # Only a whole zip archive (torch >= 1.6) can be memory-mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip and zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {_why_refused(error)}") from error
    except Exception as error:  # flipped bits in a pickle lead to any error of Python's, torch's or the zip reader's
        raise CheckpointError(
            f"{path}: damaged or not a checkpoint (an interrupted copy or download?): {_first_line(error)}"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a dict of tensors")
    nested = content.get("model")
    state_dict = nested if isinstance(nested, Mapping) else content
    strange = [key for key, value in state_dict.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if strange or not state_dict:
        found = f"{strange[0]!r} is a {type(state_dict[strange[0]]).__name__}" if strange else "it is empty"
        raise CheckpointError(
            f"{path}: no state dict at the top or under 'model': {found}, not a tensor; top-level keys are "
            f"{sorted(map(str, content))[:6]}"
        )
    unusual = [key for key, v in state_dict.items() if v.is_meta or v.is_quantized or v.layout is not torch.strided]
    if unusual:
        raise CheckpointError(
            f"{path}: {unusual[0]!r} is a tensor without data, sparse or quantized; only plain tensors are read"
        )
    metadata = content.get("metadata", {}) if nested is state_dict else {}
    return dict(state_dict), _checked_metadata(path, metadata), nested is state_dict


def _why_refused(error: pickle.UnpicklingError) -> str:
    """torch's own message recommends to load the file all the same, which could run code."""
    wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
    if wanted is None:
        return (
            "refused, because the file is damaged, or holds objects that would run code when loaded; only tensors and "
            "plain types are accepted"
        )
    if wanted[1].startswith("yacs."):
        return (
            f"refused, because it holds a {wanted[1]} beside the weights: a training checkpoint of the published "
            "stage-1 scripts. Merge it into SAM 3 with them, or store its 'model' alone"
        )
    return f"refused, because loading it would run {wanted[1]}; only tensors and plain types are accepted"


def _checked_metadata(path: Path, metadata: Any) -> dict[str, Any]:
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: the metadata is a {type(metadata).__name__}, expected a dict")
    version = metadata.get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version!r} is newer than this program reads ({FORMAT_VERSION}): update it"
        )
    return metadata


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def write_merged(
    path: str | Path, state_dict: Mapping[str, Tensor], metadata: Mapping[str, Any], dtype: torch.dtype | None = None
) -> None:
    """Write weights and their metadata record; the file appears whole or not at all.

    ``.safetensors``: flat, the record as JSON under the file's metadata key ``efficientsam3``; the rotary tables
    (``*.freqs_cis``, complex, recomputed on loading) are left out. Other suffixes: ``{"model": ..., "metadata": ...}``.

    Args:
        path: The target; its folder is made.
        state_dict: Weights by key.
        metadata: Plain types only; ``format_version`` is added.
        dtype: Floating-point tensors are stored in it, but for the Fourier matrix of point codes, which is never
            rounded; None leaves them as they are.

    Raises:
        CheckpointError: If the metadata are not plain types, or a tensor cannot be stored.
    """
    path = Path(path)
    record = {"format_version": FORMAT_VERSION, **metadata}
    try:
        text = json.dumps(record, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the metadata hold something that JSON cannot ({error})") from error
    tensors = _storable(state_dict, dtype)

    def write(temporary: Path) -> None:
        if path.suffix == ".safetensors":
            flat = {key: value for key, value in tensors.items() if not key.endswith(TABLE_SUFFIX)}
            complex_keys = [key for key, value in flat.items() if value.is_complex()]
            if complex_keys:
                raise CheckpointError(f"{path}: safetensors cannot hold the complex tensor {complex_keys[0]!r}")
            # Readers of other projects want to know that the tensors are torch's.
            save_file(flat, temporary, metadata={"format": "pt", SAFETENSORS_METADATA_KEY: text})
        else:
            torch.save({"model": tensors, "metadata": json.loads(text)}, temporary)

    write_atomically(path, write)


def _storable(state_dict: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Contiguous CPU tensors, each with a storage of its own: a view would store its whole base."""
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, value in state_dict.items():
        tensor = value.detach().cpu()
        if dtype is not None and tensor.dtype.is_floating_point and not key.endswith(_NEVER_ROUNDED):
            tensor = tensor.to(dtype)
        is_whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        if not is_whole or tensor.data_ptr() in storages:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        storages.add(tensor.data_ptr())
        stored[key] = tensor
    return stored


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` make a file beside ``path``, flush it to disk and move it into place.

    On any error the target is as before and the temporary file is gone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777
        write(temporary)
        temporary.chmod(mode)  # safetensors' writer makes files that only their owner can read
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder survive a power cut, on systems where folders can be synced."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
