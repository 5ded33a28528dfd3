"""All videos of a data set in a few arrays on disk: built once, shared by ranks and workers.

SA-V's 50,000 annotations are some 12 GB of JSON. What choosing clips needs of them - which frames are annotated and
how large each object is there - takes one byte per mask: about 60 MB, which every process maps into its memory and none
loads. An index is kept in a folder whose name is a hash of what it depends on; where some files changed, only their
videos are read again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sam3_train.data.packed_strings import PackedStrings
from sam3_train.data.process_pool import run_in_processes
from sam3_train.distributed import broadcast_object, is_main, patient_barrier, rank
from sam3_train.errors import UserError
from stage2.data.layouts import VideoLayout
from stage2.data.video_entry import BadVideoError, VideoEntry

INDEX_VERSION = 1
_DESCRIPTION = "index.json"
_ARRAYS = (
    *("names", "name_offsets", "reasons", "reason_offsets", "stamps", "sizes", "num_frames"),
    *("frame_numbers", "frame_offsets", "objects", "object_offsets", "area_codes", "area_offsets"),
)
_log = logging.getLogger(__name__)


class ClipIndex:
    """The videos of a data set, sorted by name.

    Args:
        folder: From `build_clip_index`.

    Attributes:
        names: Of all videos.
        reasons: Why a video cannot be used; empty for good ones.
        sha256: What the index depends on: layout, names and stamps of files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sha256 = str(json.loads((folder / _DESCRIPTION).read_text())["sha256"])
        self._arrays: dict[str, np.ndarray] = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        self.names = PackedStrings(self._arrays["names"], self._arrays["name_offsets"])
        self.reasons = PackedStrings(self._arrays["reasons"], self._arrays["reason_offsets"])

    def __reduce__(self) -> tuple[Any, ...]:
        return ClipIndex, (self.folder,)

    def __len__(self) -> int:
        return len(self.names)

    def stamp(self, position: int) -> int:
        """Of a video's files."""
        return int(self._arrays["stamps"][position])

    def entry(self, position: int) -> VideoEntry:
        """What is known of a video; empty arrays for one that cannot be used."""
        arrays = self._arrays
        frames = self._slice("frame", "frame_numbers", position)
        objects = self._slice("object", "objects", position)
        codes = self._slice("area", "area_codes", position).reshape(len(frames), len(objects))
        height, width = (int(side) for side in arrays["sizes"][position])
        num_frames = int(arrays["num_frames"][position])
        stamp = self.stamp(position)
        return VideoEntry(self.names[position], (height, width), num_frames, frames, objects, codes, stamp)

    def _slice(self, kind: str, name: str, position: int) -> np.ndarray:
        offsets = self._arrays[f"{kind}_offsets"]
        return self._arrays[name][offsets[position] : offsets[position + 1]]

    def good(self) -> np.ndarray:
        """Positions of the videos that can be used, ascending."""
        return np.flatnonzero(np.diff(self._arrays["reason_offsets"]) == 1)

    def bad(self) -> list[tuple[str, str]]:
        """Name and reason of the others."""
        positions = np.flatnonzero(np.diff(self._arrays["reason_offsets"]) > 1)
        return [(self.names[int(i)], self.reasons[int(i)]) for i in positions]


def build_clip_index(layout: VideoLayout, cache_dir: str | Path | None = None, num_workers: int = 1) -> ClipIndex:
    """Open the index of a data set, and make or renew it first where that is needed. Collective over ranks.

    Args:
        layout: The data set.
        cache_dir: Where indices are kept; None: in ``.clip_index`` in the data set's folder.
        num_workers: Processes that read annotations.

    Raises:
        UserError: If the data set holds no video, or the index cannot be written.
    """
    outcome: tuple[str, str] = ("", "")
    if is_main():
        try:
            outcome = (str(_current_folder(layout, cache_dir, num_workers)), "")
        except UserError as error:
            outcome = ("", str(error))
    patient_barrier()
    folder, problem = broadcast_object(outcome)
    if not problem and not (Path(folder) / _DESCRIPTION).is_file():
        problem = (
            f"{folder}: rank 0 keeps the index there, but rank {rank()} sees none; name a folder that all machines "
        )
        problem += "share (DATA.INDEX_CACHE)"
    if problem:
        raise UserError(problem)
    return ClipIndex(Path(folder))


def _current_folder(layout: VideoLayout, cache_dir: str | Path | None, num_workers: int) -> Path:
    stamps = layout.find()
    if not stamps:
        raise UserError(f"{layout.root} holds no annotated video (DATA.DATA_PATH, --data_path)")
    cache = layout.root / ".clip_index" if cache_dir is None else Path(cache_dir)
    place = hashlib.sha256(f"{layout.root.resolve()}\n{layout.description}".encode()).hexdigest()[:12]
    sha256 = _sha256(layout, stamps)
    folder = cache / f"{place}-{sha256[:16]}"
    if (folder / _DESCRIPTION).is_file():
        return folder
    older = [path for path in cache.glob(f"{place}-*") if (path / _DESCRIPTION).is_file()]
    known = _known_entries(older, stamps)
    todo = [name for name in stamps if name not in known]
    _log.info("%s: reading the annotations of %d of %d videos", layout.root, len(todo), len(stamps))
    jobs = run_in_processes(partial(_scan, layout), todo, num_workers)
    for name, result in tqdm(jobs, total=len(todo), desc="video index", unit="video", disable=None):
        known[name] = result
    try:
        _write(folder, sha256, stamps, known)
        for path in older:
            shutil.rmtree(path)
    except OSError as error:
        raise UserError(
            f"{folder}: the index of videos cannot be written ({error.strerror}); name another folder "
            "(DATA.INDEX_CACHE)"
        ) from error
    return folder


def _sha256(layout: VideoLayout, stamps: dict[str, int]) -> str:
    digest = hashlib.sha256(f"{INDEX_VERSION}\n{layout.description}\n".encode())
    for name, stamp in stamps.items():
        digest.update(f"{name}\n{stamp}\n".encode())
    return digest.hexdigest()


def _scan(layout: VideoLayout, name: str) -> VideoEntry | str:
    try:
        return layout.scan(name)
    except BadVideoError as error:
        return " ".join(str(error).split())


def _known_entries(folders: Iterable[Path], stamps: dict[str, int]) -> dict[str, VideoEntry | str]:
    """What older indices say of videos whose files have not changed since."""
    known: dict[str, VideoEntry | str] = {}
    for folder in folders:
        try:
            index = ClipIndex(folder)
        except (OSError, ValueError, KeyError):
            continue  # cut off by a crash, or of an older version
        for position, name in enumerate(index.names):
            if stamps.get(name) == index.stamp(position):
                known[name] = index.reasons[position] or _copied(index.entry(position))
    return known


def _copied(entry: VideoEntry) -> VideoEntry:
    """Without a hold on the file."""
    return dataclasses.replace(
        entry,
        frame_numbers=np.array(entry.frame_numbers),
        objects=np.array(entry.objects),
        area_codes=np.array(entry.area_codes),
    )


def _write(folder: Path, sha256: str, stamps: dict[str, int], results: dict[str, VideoEntry | str]) -> None:
    """Write an index aside and rename it, so that it appears whole or not at all."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name, array in _pack(stamps, results).items():
        np.save(aside / f"{name}.npy", array)
    (aside / _DESCRIPTION).write_text(json.dumps({"version": INDEX_VERSION, "sha256": sha256, "videos": len(stamps)}))
    shutil.rmtree(folder, ignore_errors=True)
    try:
        aside.rename(folder)
    except OSError:
        if not (folder / _DESCRIPTION).is_file():  # another run may have made the same one meanwhile
            raise
        shutil.rmtree(aside)


def _pack(stamps: dict[str, int], results: dict[str, VideoEntry | str]) -> dict[str, np.ndarray]:
    none = VideoEntry("", (0, 0), 0, np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros((0, 0), np.uint8))
    ordered = [results[name] for name in stamps]
    entries = [none if isinstance(each, str) else each for each in ordered]
    names = PackedStrings.pack(stamps)
    reasons = PackedStrings.pack(each if isinstance(each, str) else "" for each in ordered)
    frame_numbers, frame_offsets = _joined([each.frame_numbers for each in entries], np.int32)
    objects, object_offsets = _joined([each.objects for each in entries], np.int32)
    area_codes, area_offsets = _joined([each.area_codes.ravel() for each in entries], np.uint8)
    return {
        "names": names.buffer,
        "name_offsets": names.offsets,
        "reasons": reasons.buffer,
        "reason_offsets": reasons.offsets,
        "stamps": np.array(list(stamps.values()), np.int64),
        "sizes": np.array([each.size_hw for each in entries], np.int32),
        "num_frames": np.array([each.num_frames for each in entries], np.int64),
        "frame_numbers": frame_numbers,
        "frame_offsets": frame_offsets,
        "objects": objects,
        "object_offsets": object_offsets,
        "area_codes": area_codes,
        "area_offsets": area_offsets,
    }


def _joined(parts: Sequence[np.ndarray], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Arrays one after another, and where each begins."""
    offsets = np.zeros(len(parts) + 1, np.int64)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    return np.concatenate(parts).astype(dtype), offsets
