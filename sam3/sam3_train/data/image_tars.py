"""Photos that stay inside the tars they were shipped in.

A tar is uncompressed, so a table of offsets makes every image one positioned read. The table is built once per tar
(headers only; about a second for 11,000 images) and kept beside the tar or in a cache folder.
"""

from __future__ import annotations

import os
import tarfile
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sam3_train.data.decode import IMAGE_SUFFIXES
from sam3_train.data.packed_strings import PackedStrings, first_duplicate
from sam3_train.errors import UserError

MAX_OPEN_TARS = 64
TABLE_VERSION = 1
_BLOCK = 512


class TarTableError(UserError):
    """A tar that is no whole, plain tar of images."""


@dataclass
class TarTable:
    """Where the images of one tar lie.

    Attributes:
        keys: File stems, in the tar's order.
        suffix_codes: uint8, (N,): position of the image file's suffix, in lower case, in `IMAGE_SUFFIXES`.
        offsets: int64, (N, 2): first byte of image and annotation; -1 without annotation.
        sizes: int64, (N, 2): bytes of both.
    """

    keys: PackedStrings
    suffix_codes: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray


def build_tar_table(path: Path) -> TarTable:
    """Read all headers of a tar.

    Raises:
        TarTableError: If the file is empty, no uncompressed tar, cut off, holds no image or one name twice.
    """
    members = _regular_members(path)
    images: dict[str, tuple[int, int, int]] = {}
    annotations: dict[str, tuple[int, int]] = {}
    for name, offset, size in members:
        stem, suffix = os.path.splitext(name.rpartition("/")[2])
        if stem.startswith("."):
            continue
        if suffix.lower() in IMAGE_SUFFIXES:
            if stem in images:
                raise TarTableError(f"{path}: holds two images called {stem!r}; fetch the tar again")
            images[stem] = (IMAGE_SUFFIXES.index(suffix.lower()), offset, size)
        elif suffix.lower() == ".json":
            annotations[stem] = (offset, size)
    if not images:
        raise TarTableError(f"{path}: holds no image; fetch the tar again or remove it")
    none = (-1, -1)
    pairs = [(image, annotations.get(stem, none)) for stem, image in images.items()]
    try:
        keys = PackedStrings.pack(images)
    except ValueError as error:
        raise TarTableError(f"{path}: a member's name cannot be a key: {error}") from error
    return TarTable(
        keys,
        np.array([image[0] for image, _ in pairs], np.uint8),
        np.array([(image[1], annotation[0]) for image, annotation in pairs], np.int64),
        np.array([(image[2], annotation[1]) for image, annotation in pairs], np.int64),
    )


def _regular_members(path: Path) -> list[tuple[str, int, int]]:
    """(name, first byte, bytes) of the regular files in a tar that is whole."""
    try:
        size = path.stat().st_size
        if size == 0:
            raise TarTableError(f"{path}: is empty; fetch the tar again")
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            members = []
            for member in tar:
                if member.isreg():
                    if member.offset_data + member.size > size:
                        raise TarTableError(f"{path}: is cut off inside {member.name}; fetch the tar again")
                    members.append((member.name, member.offset_data, member.size))
            _check_end(path, file, tar.offset)
    except (tarfile.TarError, EOFError) as error:
        raise TarTableError(f"{path}: no whole uncompressed tar ({error}); fetch the tar again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    return members


def _check_end(path: Path, file: BinaryIO, offset: int) -> None:
    """A tar ends with a block of zeros; the standard library takes a damaged header or a cut for the end."""
    file.seek(offset - offset % _BLOCK)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK or block.strip(b"\0"):
        raise TarTableError(f"{path}: is cut off or damaged near byte {offset}; fetch the tar again")


def require_whole_tar(path: Path) -> None:
    """Check that a tar can be read from its first to its last header and ends as a tar does.

    Raises:
        TarTableError: If it is empty, no uncompressed tar, or cut off.
        UserError: If the disk fails.
    """
    _regular_members(path)


def table_path(tar: Path, cache_dir: Path | None) -> Path:
    """Where a tar's table is kept."""
    return (tar.parent / ".tar_tables" if cache_dir is None else cache_dir) / f"{tar.name}.npz"


def load_tar_table(tar: Path, cache_dir: Path | None = None, must_keep: bool = False) -> TarTable:
    """A tar's table: the kept one if the tar's size and time of change are still the same, else a new one.

    Args:
        tar: The tar.
        cache_dir: Where tables are kept; None: beside the tars.
        must_keep: A new table that cannot be kept is an error; otherwise it is made again next time.

    Raises:
        TarTableError: As `build_tar_table`.
        UserError: If the table must be kept and its folder cannot be written.
    """
    status = tar.stat()
    stamp = np.array([TABLE_VERSION, status.st_size, status.st_mtime_ns], np.int64)
    kept = table_path(tar, cache_dir)
    table = _read_table(kept, stamp)
    if table is None:
        table = build_tar_table(tar)
        try:
            _write_table(kept, stamp, table)
        except OSError as error:
            if must_keep:
                raise UserError(f"{kept}: cannot be written ({error.strerror}); choose another folder") from error
    return table


def _read_table(path: Path, stamp: np.ndarray) -> TarTable | None:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if not np.array_equal(arrays["stamp"], stamp):
                return None
            keys = PackedStrings(arrays["keys"], arrays["key_offsets"])
            return TarTable(keys, arrays["suffix_codes"], arrays["offsets"], arrays["sizes"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # missing, or cut off by a crash: it is made again from the tar


def _write_table(path: Path, stamp: np.ndarray, table: TarTable) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(aside, "wb") as file:
        np.savez(
            file,
            stamp=stamp,
            keys=table.keys.buffer,
            key_offsets=table.keys.offsets,
            suffix_codes=table.suffix_codes,
            offsets=table.offsets,
            sizes=table.sizes,
        )
    os.replace(aside, path)


class TarsSource:
    """Reads images at offsets in tars; files are opened on first use and shared by forked workers without harm.

    Args:
        tars: The tars.
        tar_codes: int32, (N,): position in ``tars``.
        suffix_codes: uint8, (N,): position in `IMAGE_SUFFIXES`.
        offsets: int64, (N, 2): of image and annotation.
        sizes: int64, (N, 2).
    """

    def __init__(
        self,
        tars: list[Path],
        tar_codes: np.ndarray,
        suffix_codes: np.ndarray,
        offsets: np.ndarray,
        sizes: np.ndarray,
    ) -> None:
        self.tars = tars
        self.tar_codes = tar_codes
        self.suffix_codes = suffix_codes
        self.offsets = offsets
        self.sizes = sizes
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_descriptors": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_descriptors", {}).values():
            os.close(descriptor)

    def where(self, index: int, key: str) -> str:
        """The tar and the image in it."""
        return f"{self.tars[self.tar_codes[index]]}:{key}{IMAGE_SUFFIXES[self.suffix_codes[index]]}"

    def read(self, index: int, key: str) -> bytes:
        """The image file's bytes.

        Raises:
            UserError: If the tar is gone or shorter than it was.
        """
        return self._read(index, key, 0)

    def annotation_where(self, index: int, key: str) -> str | None:
        """The tar and the annotation in it; None if the image has none."""
        return f"{self.tars[self.tar_codes[index]]}:{key}.json" if self.offsets[index, 1] >= 0 else None

    def read_annotation(self, index: int, key: str) -> bytes | None:
        """The bytes of the image's annotation file, or None if it has none."""
        return self._read(index, key, 1) if self.offsets[index, 1] >= 0 else None

    def _read(self, index: int, key: str, column: int) -> bytes:
        code = int(self.tar_codes[index])
        size = int(self.sizes[index, column])
        try:
            # A positioned read: the file offset of a descriptor is shared with forked processes.
            content = os.pread(self._descriptor(code), size, int(self.offsets[index, column]))
        except OSError as error:
            raise UserError(
                f"{self.tars[code]}: cannot be read ({error.strerror}); it was there at the start"
            ) from error
        if len(content) != size:
            raise UserError(f"{self.tars[code]}: {key}: read {len(content)} of {size} bytes; the tar has changed")
        return content

    def _descriptor(self, code: int) -> int:
        descriptor = self._descriptors.pop(code, None)
        if descriptor is None:
            descriptor = os.open(self.tars[code], os.O_RDONLY)
            if len(self._descriptors) >= MAX_OPEN_TARS:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors[code] = descriptor
        return descriptor

    def select(self, indices: np.ndarray) -> TarsSource:
        """The same for some positions."""
        return TarsSource(
            self.tars,
            self.tar_codes[indices],
            self.suffix_codes[indices],
            self.offsets[indices],
            self.sizes[indices],
        )


def scan_tars(root: Path, cache_dir: Path | None = None) -> tuple[PackedStrings, TarsSource]:
    """Find the images in all ``*.tar`` of a folder.

    Args:
        root: The folder.
        cache_dir: Where tables are kept; None: beside the tars.

    Returns:
        Keys sorted by their bytes, and the source in the same order.

    Raises:
        UserError: If there is no tar, if tars are damaged (all are named), or an image is in two of them.
    """
    tars = sorted(path for path in root.glob("*.tar") if not path.name.startswith("."))
    if not tars:
        raise UserError(f"{root}: holds no *.tar (data set kind 'sa1b_tar'); data/download_sa1b.py fetches them")
    tables, problems = [], []
    for tar in tars:
        try:
            tables.append(load_tar_table(tar, cache_dir))
        except TarTableError as error:
            problems.append(str(error))
    if problems:
        raise UserError.from_problems(str(root), problems)
    names = np.concatenate([table.keys.to_array() for table in tables])
    order = np.argsort(names, kind="stable")
    names = names[order]
    codes = np.repeat(np.arange(len(tars), dtype=np.int32), [len(table.keys) for table in tables])[order]
    second = first_duplicate(names)
    if second is not None:
        first_tar, second_tar = (tars[codes[i]] for i in (second - 1, second))
        raise UserError(f"{first_tar} and {second_tar} both hold {names[second].decode()!r}: remove one of them")
    suffix_codes, offsets, sizes = (
        np.concatenate([getattr(table, name) for table in tables])[order]
        for name in ("suffix_codes", "offsets", "sizes")
    )
    return PackedStrings.from_array(names), TarsSource(tars, codes, suffix_codes, offsets, sizes)
