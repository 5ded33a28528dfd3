"""Photos that lie in folders: finding them, and reading one."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sam3_train.data.decode import IMAGE_SUFFIXES, UnreadableImageError
from sam3_train.data.packed_strings import PackedStrings, first_duplicate
from sam3_train.errors import UserError


@dataclass
class FoldersSource:
    """Where the image files of an index lie; a file's name is the last part of its key plus its suffix.

    Attributes:
        folders: The distinct folders, relative to ``root`` with forward slashes.
        suffixes: The distinct suffixes, dot included.
        folder_codes: int32, (N,): position in ``folders``.
        suffix_codes: uint8, (N,): position in ``suffixes``.
        annotation_root: Folder with one ``<name>.json`` per image in the same relative folders, if the layout has one.
    """

    root: Path
    folders: list[str]
    suffixes: list[str]
    folder_codes: np.ndarray
    suffix_codes: np.ndarray
    annotation_root: Path | None = None

    def path(self, index: int, key: str) -> Path:
        """The image file."""
        name = key.rpartition("/")[2] + self.suffixes[self.suffix_codes[index]]
        return self.root / self.folders[self.folder_codes[index]] / name

    def where(self, index: int, key: str) -> str:
        """What messages call the image."""
        return str(self.path(index, key))

    def read(self, index: int, key: str) -> bytes:
        """The file's bytes.

        Raises:
            UnreadableImageError: If the file is gone.
            UserError: If the disk fails; that is no property of this photo.
        """
        path = self.path(index, key)
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise UnreadableImageError(f"{path}: unreadable image: the file is gone") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}): check the disk and the permissions") from error

    def annotation_where(self, index: int, key: str) -> str | None:
        """Path of the image's annotation file, whether it exists or not; None if the layout has none."""
        if self.annotation_root is None:
            return None
        name = key.rpartition("/")[2] + ".json"
        return str(self.annotation_root / self.folders[self.folder_codes[index]] / name)

    def read_annotation(self, index: int, key: str) -> bytes | None:
        """The bytes of the image's annotation file, or None if it has none."""
        where = self.annotation_where(index, key)
        if where is None:
            return None
        try:
            return Path(where).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{where}: cannot be read ({error.strerror})") from error

    def select(self, indices: np.ndarray) -> FoldersSource:
        """The same for some positions."""
        return FoldersSource(
            self.root,
            self.folders,
            self.suffixes,
            self.folder_codes[indices],
            self.suffix_codes[indices],
            self.annotation_root,
        )


_FLUSH = 1 << 20


@dataclass
class _Found:
    """What a scan has seen; names move into compact arrays from time to time."""

    folders: list[str] = field(default_factory=list)
    suffixes: dict[str, int] = field(default_factory=dict)
    names: list[bytes] = field(default_factory=list)
    codes: list[tuple[int, int]] = field(default_factory=list)
    name_arrays: list[np.ndarray] = field(default_factory=list)
    code_arrays: list[np.ndarray] = field(default_factory=list)

    def flush(self) -> None:
        if self.names:
            self.name_arrays.append(np.array(self.names, dtype=np.bytes_))
            self.code_arrays.append(np.array(self.codes, np.int32))
            self.names, self.codes = [], []


def scan_folder(root: Path, key_has_folder: bool) -> tuple[PackedStrings, FoldersSource]:
    """Find all images below a folder, whatever the order in which the file system lists them.

    Hidden files and folders are skipped. Links to folders are followed, each folder once.

    Args:
        root: Where to start.
        key_has_folder: Keys are paths below ``root`` without suffix (any photos), or bare file stems (data sets whose
            names are unique and whose folders are only shards).

    Returns:
        Keys sorted by their bytes, and the source in the same order.

    Raises:
        UserError: If the folder cannot be listed, a name cannot be a key, or two files have the same key.
    """
    found = _Found()
    visited: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            status = os.stat(root / folder)
            if (status.st_dev, status.st_ino) not in visited:
                visited.add((status.st_dev, status.st_ino))
                pending += _scan_one(root, folder, key_has_folder, found)
        except OSError as error:
            raise UserError(f"{root / folder}: cannot be listed ({error.strerror}); check its permissions") from error
    found.flush()
    if not found.name_arrays:
        return PackedStrings.pack([]), FoldersSource(root, [], [], np.empty(0, np.int32), np.empty(0, np.uint8))
    names, codes = np.concatenate(found.name_arrays), np.concatenate(found.code_arrays)
    order = np.argsort(names, kind="stable")
    names, codes = names[order], codes[order]
    source = FoldersSource(root, found.folders, list(found.suffixes), codes[:, 0], codes[:, 1].astype(np.uint8))
    second = first_duplicate(names)
    if second is not None:
        key = names[second].decode()
        first, other = sorted((source.where(second - 1, key), source.where(second, key)))
        raise UserError(f"{first} and {other} have the same key {key!r}: rename or remove one")
    return PackedStrings.from_array(names), source


def _scan_one(root: Path, folder: str, key_has_folder: bool, found: _Found) -> list[str]:
    """Add one folder's images to ``found``; return its sub-folders."""
    prefix = f"{folder}/" if folder else ""
    sub_folders = []
    code = len(found.folders)
    has_images = False
    with os.scandir(root / folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            stem, suffix = os.path.splitext(entry.name)
            if suffix.lower() in IMAGE_SUFFIXES:
                if entry.is_dir():
                    continue
                key = prefix + stem if key_has_folder else stem
                found.names.append(_key_bytes(key, root / folder / entry.name))
                found.codes.append((code, found.suffixes.setdefault(suffix, len(found.suffixes))))
                has_images = True
                if len(found.names) >= _FLUSH:
                    found.flush()
            elif entry.is_dir():
                sub_folders.append(prefix + entry.name)
    if has_images:
        found.folders.append(folder)
    return sub_folders


def _key_bytes(key: str, path: Path) -> bytes:
    try:
        encoded = key.encode()
    except UnicodeEncodeError:
        raise UserError(f"{os.fsencode(path)!r}: the name is not valid UTF-8: rename the file") from None
    if any(mark in encoded for mark in b"\n\r\t"):
        raise UserError(f"{str(path)!r}: the name holds a line break or a tab: rename the file")
    return encoded
