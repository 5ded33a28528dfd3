"""The folders that annotated videos come in, and which one a data set has."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from sam3_train.errors import UserError
from stage2.data.frame_readers import FrameReader
from stage2.data.video_entry import VideoEntry

DEMO_MANIFEST = "world.json"


class MaskReader(Protocol):
    """Masks of one video."""

    def mask(self, row: int, column: int) -> np.ndarray:
        """An object on an annotated frame, by their places in the video's entry: bool (H, W).

        Raises:
            BadVideoError: If it is missing or damaged.
        """


class VideoLayout(ABC):
    """Finds the videos of a data set and reads them; holds no open files.

    Attributes:
        root: The data set's folder.
        description: What decides the entries beside the files: part of the index's identity.
    """

    def __init__(self, root: Path, description: str) -> None:
        self.root = root
        self.description = description

    @abstractmethod
    def find(self) -> dict[str, int]:
        """All videos, good or bad: name to a stamp that changes when files of the video do (see `stamp_of`)."""

    @abstractmethod
    def scan(self, name: str) -> VideoEntry:
        """Read a video's annotation and check that the rest is there; frames are not decoded.

        Raises:
            BadVideoError: If it cannot be used.
        """

    @abstractmethod
    def open_frames(self, name: str) -> FrameReader:
        """Its frames, in colour.

        Raises:
            BadVideoError: If they are missing or damaged.
        """

    @abstractmethod
    def open_masks(self, entry: VideoEntry) -> MaskReader:
        """Its masks.

        Raises:
            BadVideoError: If they are missing or damaged.
        """

    def names_of_split(self, split: str) -> frozenset[str] | None:
        """The videos that the data set itself assigns to a split; None if it leaves that to us."""
        return None


def open_layout(root: str | Path, kind: str = "auto", annotations: str = "any") -> VideoLayout:
    """Recognise a data set's folders.

    Args:
        root: The data set.
        kind: One of `KINDS`.
        annotations: For SA-V: one of `sav_layouts.ANNOTATIONS`.

    Raises:
        UserError: If the folder does not exist, is empty, or has another layout; or is the demo world, and ``kind``
            does not say so.
    """
    from stage2.data.png_layouts import ObjectPngLayout, PalettePngLayout
    from stage2.data.sav_layouts import DemoLayout, SavFramesLayout, SavLayout

    root = Path(root)
    if kind not in KINDS:
        raise UserError(f"video data set kind {kind!r} is not one of {', '.join(KINDS)} (DATA.DATASET)")
    if not root.is_dir():
        raise UserError(f"{root} is {'not a folder' if root.exists() else 'missing'} (DATA.DATA_PATH, --data_path)")
    if kind != "demo" and any((folder / DEMO_MANIFEST).is_file() for folder in (root, *root.absolute().parents[:2])):
        raise UserError(f"{root} holds the generated clips of the demo world: to train on them, say DATA.DATASET demo")
    found = kind if kind != "auto" else _recognise(root)
    if found == "demo":
        return DemoLayout(root)
    if found == "sav":
        return SavLayout(root, annotations)
    if found == "sav_frames":
        return SavFramesLayout(root, annotations)
    if found == "sav_png":
        return ObjectPngLayout(root)
    return PalettePngLayout(root)


_SAV_SUFFIXES = (".mp4", "_manual.json", "_auto.json")
KINDS = ("auto", "sav", "sav_frames", "sav_png", "davis", "mose", "youtube_vos", "lvos", "demo")


def _recognise(root: Path) -> str:
    """The kind of a data set, by its folders."""
    folders = visible_folders(root)
    if {"JPEGImages_24fps", "Annotations_6fps"} <= set(folders):
        return "sav_png"
    if any({"JPEGImages", "Annotations"} <= set(visible_folders(place)) for place in (root, root / "train")):
        return "davis"
    for name in ("", *folders):
        files = [path.name for path in (root / name).iterdir() if path.name.endswith(_SAV_SUFFIXES)]
        if files:
            is_own_folder = all(file.endswith(".json") and file.startswith(f"{name}_") for file in files)
            return "sav_frames" if is_own_folder else "sav"
    if not any(root.iterdir()):
        raise UserError(f"{root} is an empty folder (DATA.DATA_PATH, --data_path)")
    nested = next((path for folder in folders for path in (root / folder).glob("*/*.mp4")), None)
    if nested is not None:
        return "sav"
    raise UserError(
        f"{root} has no layout of annotated videos that is known here. Known are: <video>.mp4 with <video>_manual.json "
        "or _auto.json, at any depth (SA-V as released); <video>/00000.jpg with <video>/<video>_manual.json (extracted "
        "frames); JPEGImages_24fps with Annotations_6fps/<video>/<object> (SA-V val and test); JPEGImages with "
        "Annotations (DAVIS, MOSE, YouTube-VOS, LVOS), also below train"
    )


def visible_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, hidden ones left out; none if it does not exist."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir())


def stamp_of(paths: Iterable[Path]) -> int:
    """A number that changes when one of the files, or the list of a folder's files, does.

    Files that are missing count as such. A file that is rewritten inside a folder is not noticed by the folder.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        try:
            status = path.stat()
            digest.update(f"{path.name}\n{status.st_size}\n{status.st_mtime_ns}\n".encode())
        except FileNotFoundError:
            digest.update(f"{path.name}\nmissing\n".encode())
    return int.from_bytes(digest.digest(), "little") >> 1
