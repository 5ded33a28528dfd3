"""What `data/reorg_sa1b.py` has done with each tar, and whether what it unpacked is still there.

The output folder holds ``reorg_manifest.json``, which is replaced whole, and for each tar ``.reorg/<tar>.names``: eight
bytes per unpacked file, the hash of its name. With it, files that were deleted since are noticed without opening tars.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from sam3_train.errors import UserError

MANIFEST_FILE = "reorg_manifest.json"
MANIFEST_VERSION = 1
NAMES_FOLDER = ".reorg"


@dataclass
class TarResult:
    """What became of one tar; the manifest's record."""

    size: int
    status: str = "done"
    """``done``, ``damaged`` (fetch it again), ``refused`` (dangerous members) or ``failed`` (disk)."""
    train: int = 0
    """Images."""
    val: int = 0
    images_without_annotation: int = 0
    annotations_without_image: int = 0
    other_members: int = 0
    """Regular files that are neither image nor annotation; not unpacked."""
    unpacked_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    deleted_from: str = ""
    """Folder that ``--delete-tars`` removed the tar from; empty if it was kept."""


class Manifest:
    """What has been done to each tar, in a file that is replaced whole."""

    def __init__(self, path: Path, val_ratio: float, folder_per_tar: bool, results: dict[str, TarResult]) -> None:
        self.path = path
        self.val_ratio = val_ratio
        self.folder_per_tar = folder_per_tar
        self.results = results

    @classmethod
    def load(cls, output: Path, val_ratio: float, folder_per_tar: bool) -> Manifest:
        """The manifest of an output folder, empty if it has none.

        Raises:
            UserError: If it is damaged, or was made with other settings.
        """
        path = output / MANIFEST_FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            settings = {name: data[name] for name in ("version", "val_ratio", "folder_per_tar")}
            results = {name: TarResult(**record) for name, record in data["tars"].items()}
        except FileNotFoundError:
            return cls(path, val_ratio, folder_per_tar, {})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not a manifest of this program ({error!r}); restore it or choose another --output"
            ) from None
        wanted = {"version": MANIFEST_VERSION, "val_ratio": val_ratio, "folder_per_tar": folder_per_tar}
        if settings != wanted:
            raise UserError(
                f"{path}: the folder was begun with {settings}, this run asks for {wanted}: images would change sides; "
                "use the same settings or another --output"
            )
        return cls(path, val_ratio, folder_per_tar, results)

    def is_done(self, tar: Path, lost: Mapping[str, int]) -> bool:
        """Whether a tar of this name and size is unpacked, and nothing of it is ``lost`` (`count_lost`)."""
        result = self.results.get(tar.name)
        if result is None or result.status != "done" or result.size != tar.stat().st_size:
            return False
        return tar.name not in lost and _names_path(self.path.parent, tar.name).exists()

    def deleted_from(self, source: Path) -> list[str]:
        """Names of the tars that were unpacked from a folder, deleted there, and have not come back."""
        folder = str(source.resolve())
        return [
            name
            for name, result in self.results.items()
            if result.deleted_from == folder and not (source / name).exists()
        ]

    def count_lost(self) -> dict[str, int]:
        """Files that were unpacked and are gone from the output: number by tar, for tars that lost any."""
        output = self.path.parent
        done = [name for name, result in self.results.items() if result.status == "done"]
        unpacked = {name: read_names(output, name) for name in done}
        present = hash_names(_files_below(output)) if done else np.empty(0, "<u8")
        lost = {name: len(names) - int(np.isin(names, present).sum()) for name, names in unpacked.items()}
        return {name: count for name, count in lost.items() if count}

    def save(self) -> None:
        """Write the file aside and rename it."""
        data = {
            "version": MANIFEST_VERSION,
            "val_ratio": self.val_ratio,
            "folder_per_tar": self.folder_per_tar,
            "tars": {name: asdict(result) for name, result in sorted(self.results.items())},
        }
        write_json(self.path, data)


def save_names(output: Path, tar: str, names: Iterable[str]) -> None:
    """Remember what a tar was unpacked to: hashes of its files' names relative to the output."""
    path = _names_path(output, tar)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(hash_names(names).tobytes())
    os.replace(aside, path)


def read_names(output: Path, tar: str) -> np.ndarray:
    """What `save_names` wrote, (N,) uint64; empty if it wrote nothing."""
    path = _names_path(output, tar)
    return np.frombuffer(path.read_bytes(), "<u8") if path.exists() else np.empty(0, "<u8")


def hash_names(names: Iterable[str]) -> np.ndarray:
    """64-bit hashes of file names, (N,) uint64."""
    return np.frombuffer(b"".join(blake2b(os.fsencode(name), digest_size=8).digest() for name in names), "<u8")


def _names_path(output: Path, tar: str) -> Path:
    return output / NAMES_FOLDER / f"{tar}.names"


def _files_below(output: Path) -> Iterator[str]:
    """Images and annotations in an output folder, relative to it."""
    for kind in ("images", "annotations"):
        for folder, _, names in os.walk(output / kind):
            relative = os.path.relpath(folder, output)
            yield from (f"{relative}{os.sep}{name}" for name in names)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a file aside, make it durable and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
