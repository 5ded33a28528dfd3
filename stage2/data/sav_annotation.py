"""SA-V's annotation files: one JSON per video, a row of masks for every fourth frame of 24 a second.

https://ai.meta.com/datasets/segment-anything-video/ describes the fields. An entry of a row is COCO run-length
encoding, or null where nobody annotated the object; an object that is not there has an empty mask.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sam3.coco_rle import decode_mask, decode_runs
from stage2.data.video_entry import BadVideoError

ANNOTATED_EVERY = 4
"""Frames of the video from one row of masks to the next."""


@dataclass(frozen=True)
class SavAnnotation:
    """A parsed file."""

    where: str
    size_hw: tuple[int, int]
    num_frames: int
    """Of the video, by what the file says."""
    rows: list[list[Any]]
    """Per annotated frame and object: an encoded mask or None."""

    @property
    def num_objects(self) -> int:
        """K."""
        return len(self.rows[0])

    def areas(self) -> np.ndarray:
        """Area of each mask, without decoding them: int64 (A, K), -1 where there is none.

        Raises:
            BadVideoError: If a mask is damaged.
        """
        cells = [(row, column) for row, masks in enumerate(self.rows) for column, mask in enumerate(masks) if mask]
        areas = np.full((len(self.rows), self.num_objects), -1, np.int64)
        if not cells:
            return areas
        try:
            runs, offsets = decode_runs([self.rows[row][column]["counts"] for row, column in cells])
        except ValueError as error:
            raise BadVideoError(f"{self.where}: a mask is damaged: {error}") from None
        is_inside = (np.arange(len(runs)) - np.repeat(offsets[:-1], np.diff(offsets))) % 2 == 1
        sums = np.zeros((3, len(runs) + 1), np.int64)
        np.cumsum([runs, np.where(is_inside, runs, 0), runs < 0], axis=1, out=sums[:, 1:])
        total, inside, negative = np.diff(sums[:, offsets])
        wrong = np.flatnonzero((total != self.size_hw[0] * self.size_hw[1]) | (negative > 0))
        if len(wrong):
            row, column = cells[wrong[0]]
            raise BadVideoError(
                f"{self.where}: row {row}, object {column}: the runs of the mask add up to {total[wrong[0]]}, not to "
                f"{self.size_hw[0]} x {self.size_hw[1]} pixels"
            )
        areas[tuple(np.array(cells).T)] = inside
        return areas

    def mask(self, row: int, column: int) -> np.ndarray:
        """A mask, bool (H, W); empty where there is none.

        Raises:
            BadVideoError: If it is damaged.
        """
        mask = self.rows[row][column]
        if mask is None:
            return np.zeros(self.size_hw, bool)
        try:
            return decode_mask(mask)
        except ValueError as error:
            raise BadVideoError(f"{self.where}: row {row}, object {column}: {error}") from None


def read_sav_annotation(path: Path) -> SavAnnotation:
    """Read and check an annotation file; masks are not decoded yet.

    Raises:
        BadVideoError: If the file cannot be read, is no such JSON, has no object, or its rows do not fit the numbers of
            frames or objects, or a mask the video's size.
    """
    try:
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise BadVideoError(f"{path}: the annotation cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise BadVideoError(f"{path}: not valid JSON ({error}); unpack it again") from None
    try:
        size_hw = (int(record["video_height"]), int(record["video_width"]))
        num_frames, rows = int(record["video_frame_count"]), record["masklet"]
        num_objects = len(rows[0])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise BadVideoError(
            f"{path}: not an SA-V annotation ({type(error).__name__}: {error}); expected video_height, video_width, "
            "video_frame_count and masklet"
        ) from None
    if not num_objects:
        raise BadVideoError(f"{path}: the annotation has no object")
    wanted = -(-num_frames // ANNOTATED_EVERY)
    if len(rows) != wanted:
        raise BadVideoError(
            f"{path}: {len(rows)} rows of masks for {num_frames} frames; every fourth frame makes {wanted}"
        )
    for index, row in enumerate(rows):
        _check_row(row, num_objects, size_hw, f"{path}: row {index}")
    return SavAnnotation(str(path), size_hw, num_frames, rows)


def _check_row(row: Any, num_objects: int, size_hw: tuple[int, int], where: str) -> None:
    if not isinstance(row, list) or len(row) != num_objects:
        found = len(row) if isinstance(row, list) else type(row).__name__
        raise BadVideoError(f"{where}: has {found} objects, row 0 has {num_objects}")
    for column, mask in enumerate(row):
        if mask is None:
            continue
        try:
            found_hw, counts = tuple(mask["size"]), mask["counts"]
        except (KeyError, TypeError):
            found_hw, counts = (), None
        if not isinstance(counts, str):
            raise BadVideoError(f"{where}, object {column}: not a run-length encoded mask (size and counts)")
        if found_hw != size_hw:
            raise BadVideoError(
                f"{where}, object {column}: the mask is {_size(found_hw)} pixels, the video {_size(size_hw)}"
            )


def _size(size_hw: tuple[Any, ...]) -> str:
    return " x ".join(str(side) for side in reversed(size_hw))
