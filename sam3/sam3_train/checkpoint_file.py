"""One checkpoint file: written whole or not at all, read back after writing, opened without running code."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from sam3.checkpoint_io import sync_folder
from sam3_train.errors import UserError
from sam3_train.plain_state import plain_state


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> str:
    """Write a checkpoint so that the file is either complete or absent, also after a power cut.

    Args:
        path: Target; its folder must exist. An existing file is replaced only by a complete one.
        state: Plain types and tensors only (tensors are stored on the CPU).

    Returns:
        SHA-256 of the file, read back from the disk.

    Raises:
        UserError: If it cannot be written (disk full, no permission); the old file is untouched.
        TypeError: If ``state`` holds anything else than plain types and tensors.
    """
    path = Path(path)
    plain = plain_state(state, "checkpoint")
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer = None
    try:
        with open(aside, "wb") as file:
            writer = _HashingWriter(file)
            torch.save(plain, writer)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        written = writer.digest.hexdigest()
        if file_sha256(aside) != written:
            raise OSError("what was read back differs from what was written")
        os.replace(aside, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        # After a write that failed, torch complains about a position instead.
        cause = error if writer is None or writer.error is None else writer.error
        raise UserError(
            f"cannot write checkpoint {path}: {cause}. Free some space or choose another --output; "
            "earlier checkpoints are untouched."
        ) from error
    return written


def load_checkpoint(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint of `save_checkpoint`; nothing in the file can run code.

    Raises:
        UserError: If the file is missing, damaged or not a checkpoint.
    """
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except pickle.UnpicklingError:
        # torch's own message suggests to load it all the same, which could run code.
        raise UserError(f"{path} is damaged or no training checkpoint: it holds more than plain types") from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        reason = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged or no training checkpoint: {reason}") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} is not a training checkpoint: it holds a {type(state).__name__}")
    return state


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in _blocks(file):
            digest.update(block)
    return digest.hexdigest()


def _blocks(file: Any) -> Iterable[bytes]:
    while block := file.read(1 << 20):
        yield block


class _HashingWriter:
    """A file object for torch.save that hashes what passes through."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None
        """What the file system answered, if a write failed."""

    def write(self, data: Any) -> int:
        self.digest.update(data)
        try:
            return int(self._file.write(data))
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()
