"""What an embedding store says about itself: ``store.json``.

The description has a part that never changes (`StoreSpec`: shape, codec, teacher, preprocessing, augmentation) and a
history of phases. A phase is one plan of an export: which keys, over how many ranks, in batches of which size. A killed
export finds its phase again and continues it, so it ends with the same bytes as one that was never killed; added images
or another number of ranks begin a new phase that appends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sam3_train.embeddings.codecs import CODECS, Codec, Shape
from sam3_train.errors import UserError

STORE_FILE = "store.json"
EXPECTED_KEYS_FILE = "expected-keys.txt"
FORMAT_NAME = "efficientsam3-embeddings"
FORMAT_VERSION = 1
SEED_BYTES = 4


class StoreError(UserError):
    """A store that cannot be read or written; the message names the file, the value and the remedy."""


@dataclass(frozen=True)
class StoreSpec:
    """What every record of a store has in common."""

    shape: Shape
    """(C, H, W) of one embedding."""
    codec: str = "fp16"
    """A name in `sam3_train.embeddings.codecs.CODECS`."""
    teacher: dict[str, Any] = field(default_factory=dict)
    """``sha256`` of the trunk's weights, ``name`` of the model description and ``dtype`` of the forward."""
    preprocess: dict[str, Any] = field(default_factory=dict)
    """``Preprocess.to_dict()`` of what the teacher saw."""
    augmentation: dict[str, Any] | None = None
    """Description of the augmentation that a record's seed replays; None where the teacher saw the plain image."""

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or any(not isinstance(size, int) or size < 1 for size in self.shape):
            raise StoreError(f"embedding shape {self.shape} must be three positive integers (C, H, W)")
        if self.codec not in CODECS:
            raise StoreError(f"embedding codec {self.codec!r} is unknown: choose one of {sorted(CODECS)}")

    @property
    def codec_object(self) -> Codec:
        """The codec itself."""
        return CODECS[self.codec]

    @property
    def record_bytes(self) -> int:
        """Bytes of one record: the seed and the payload. 10,616,836 for fp16 at (1024, 72, 72)."""
        return SEED_BYTES + self.codec_object.payload_bytes(self.shape)

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return {
            "shape": list(self.shape),
            "dtype": "float16",
            "byte_order": "little",
            "codec": self.codec,
            "record_bytes": self.record_bytes,
            "teacher": self.teacher,
            "preprocess": self.preprocess,
            "augmentation": self.augmentation,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> StoreSpec:
        """Inverse of `to_dict`.

        Raises:
            StoreError: If the stated record size does not follow from shape and codec, or a field is impossible.
        """
        spec = cls(tuple(data["shape"]), data["codec"], data["teacher"], data["preprocess"], data.get("augmentation"))
        if data["record_bytes"] != spec.record_bytes:
            raise StoreError(
                f"record_bytes {data['record_bytes']} does not follow from shape {spec.shape} and codec {spec.codec!r}"
                f", which give {spec.record_bytes}"
            )
        return spec

    def differences(self, other: StoreSpec) -> list[str]:
        """One ``field: mine != theirs`` entry for every field that differs."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [f"{name}: {mine[name]!r} != {theirs[name]!r}" for name in mine if mine[name] != theirs[name]]


@dataclass(frozen=True)
class Phase:
    """One plan of an export and what the store held when it began."""

    key_order_sha256: str
    num_keys: int
    world_size: int
    batch_size: int
    records_before: tuple[int, ...]
    """Per rank, records that earlier phases wrote."""
    skipped_before: tuple[int, ...]
    """Per rank, quarantined keys of earlier phases."""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Phase:
        """Inverse of ``dataclasses.asdict`` through JSON, which has no tuples."""
        counts = {name: tuple(data[name]) for name in ("records_before", "skipped_before")}
        return cls(**{**data, **counts})

    def is_same_plan(self, other: Phase) -> bool:
        """Whether a run that wants ``other`` continues this phase."""
        names = ("key_order_sha256", "num_keys", "world_size", "batch_size")
        return all(getattr(self, name) == getattr(other, name) for name in names)


@dataclass(frozen=True)
class StoreInfo:
    """The content of ``store.json``."""

    spec: StoreSpec
    export_id: str
    """32 hex digits; every rank file of the export carries them, so that files of another export are noticed."""
    ranks: int
    """Rank files 0..ranks-1 belong to the store."""
    phases: tuple[Phase, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "export_id": self.export_id,
            "ranks": self.ranks,
            **self.spec.to_dict(),
            "phases": [dataclasses.asdict(phase) for phase in self.phases],
        }

    @property
    def key_order_sha256(self) -> str:
        """Hash of the ordered keys that the newest phase was asked for."""
        return self.phases[-1].key_order_sha256 if self.phases else ""


def new_export_id() -> str:
    """A fresh random id."""
    return uuid.uuid4().hex


def write_store_info(directory: Path, info: StoreInfo) -> None:
    """Write ``store.json`` whole or not at all."""
    write_file_atomic(directory / STORE_FILE, (json.dumps(info.to_dict(), indent=2) + "\n").encode())


def read_store_info(directory: Path) -> StoreInfo | None:
    """Read ``store.json``; None if the directory has none (a store of the public tool).

    Raises:
        StoreError: If the file is no valid description, or of a newer format.
    """
    path = directory / STORE_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise StoreError(f"{path}: not readable as JSON ({error}); restore it from a copy of the store") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT_NAME:
        raise StoreError(f'{path}: "format" is not {FORMAT_NAME!r}; this is no embedding store of this project')
    if data.get("version") != FORMAT_VERSION:
        raise StoreError(
            f"{path}: format version {data.get('version')!r}, this program reads {FORMAT_VERSION}; update it"
        )
    try:
        phases = tuple(Phase.from_dict(phase) for phase in data["phases"])
        return StoreInfo(StoreSpec.from_dict(data), data["export_id"], data["ranks"], phases)
    except StoreError as error:
        raise StoreError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{path}: field missing or malformed ({error!r}); restore it from a copy of the store"
        ) from None


def key_order_sha256(keys: Iterable[str]) -> str:
    """Hash of an ordered list of keys: sha256 over each key in UTF-8 followed by a newline."""
    digest = hashlib.sha256()
    for key in keys:
        digest.update(encode_key(key) + b"\n")
    return digest.hexdigest()


def encode_key(key: str) -> bytes:
    """A key as it stands in a key file, without the newline.

    Raises:
        StoreError: If the key is empty or holds a line break or a tab, which the text files cannot carry.
    """
    if not key or any(character in key for character in "\n\r\t\0"):
        raise StoreError(f"key {key!r} is empty or holds a line break, tab or NUL; rename the image")
    return key.encode("utf-8", "surrogateescape")


def decode_key(line: bytes) -> str:
    """Inverse of `encode_key`."""
    return line.decode("utf-8", "surrogateescape")


def write_expected_keys(directory: Path, keys: Iterable[str]) -> None:
    """Write the ordered keys that the newest phase was asked for, so that ``verify`` can name what is missing."""
    write_file_atomic(directory / EXPECTED_KEYS_FILE, b"".join(encode_key(key) + b"\n" for key in keys))


def read_expected_keys(directory: Path) -> list[str] | None:
    """The keys of `write_expected_keys`; None if there is no such file."""
    try:
        content = (directory / EXPECTED_KEYS_FILE).read_bytes()
    except FileNotFoundError:
        return None
    return [decode_key(line) for line in content.splitlines()]


def write_file_atomic(path: Path, content: bytes) -> None:
    """Write aside, fsync, rename, fsync the folder: after a crash the file is the old one or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            aside.unlink()
        raise
    fsync_directory(path.parent)


def fsync_directory(directory: Path) -> None:
    """Make the names of new files durable."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
