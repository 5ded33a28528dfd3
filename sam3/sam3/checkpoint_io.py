"""Checkpoint files: reading without executing anything, writing whole or not at all.

Reads ``.pt`` / ``.pth`` (flat, or with the weights under ``model``) and ``.safetensors``. A merged file holds, beside
the weights, a metadata record of plain types: format version, variant, model description, preprocessing, provenance.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT_VERSION = 1
SAFETENSORS_METADATA_KEY = "efficientsam3"
_RECOMPUTED_SUFFIX = ".freqs_cis"


class CheckpointError(ValueError):
    """A checkpoint file that cannot be used; the message names it and says why."""


def read_state_dict(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the weights of a checkpoint and its metadata record.

    Tensors are memory-mapped where the format allows it. Nothing in the file is executed.

    Args:
        path: ``.safetensors``, or a file that ``torch.save`` wrote, in which the weights lie at the top or under
            ``model``.

    Returns:
        Weights by key as they are in the file, and the metadata record ({} if the file has none).

    Raises:
        CheckpointError: If the file is missing, damaged, holds anything but tensors and plain types, or no weights.
    """
    path = Path(path)
    if not path.is_file():
        kind = "is a folder, not a checkpoint file" if path.is_dir() else "no such checkpoint file"
        raise CheckpointError(f"{path}: {kind}")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty (an interrupted copy or download?)")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _read_torch(path)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            record = (file.metadata() or {}).get(SAFETENSORS_METADATA_KEY)
            state_dict = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({error})") from error
    if not state_dict:
        raise CheckpointError(f"{path}: the file holds no tensors")
    try:
        metadata = json.loads(record) if record else {}
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: the metadata record {SAFETENSORS_METADATA_KEY!r} is not JSON") from error
    return state_dict, _checked_metadata(path, metadata)


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        # Only the zip container of torch >= 1.6 can be memory-mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, because the file is damaged, or holds objects that would run code when loaded; only "
            f"tensors and plain types are accepted ({_first_line(error)})"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AssertionError) as error:
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
    metadata = content.get("metadata", {}) if nested is state_dict else {}
    return dict(state_dict), _checked_metadata(path, metadata)


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
        dtype: Floating-point tensors are stored in it; None leaves them as they are.

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
            flat = {key: value for key, value in tensors.items() if not key.endswith(_RECOMPUTED_SUFFIX)}
            complex_keys = [key for key, value in flat.items() if value.is_complex()]
            if complex_keys:
                raise CheckpointError(f"{path}: safetensors cannot hold the complex tensor {complex_keys[0]!r}")
            save_file(flat, temporary, metadata={SAFETENSORS_METADATA_KEY: text})
        else:
            torch.save({"model": tensors, "metadata": json.loads(text)}, temporary)

    write_atomically(path, write)


def _storable(state_dict: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Contiguous CPU tensors, each with a storage of its own: a view would store its whole base."""
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, value in state_dict.items():
        tensor = value.detach().cpu()
        if dtype is not None and tensor.dtype.is_floating_point:
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
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
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
