"""Masks as COCO run-length encoding, without a compiled package.

The format (as pycocotools writes and reads it): run lengths of zeros and ones in turn, column by column, starting with
the zeros; from the fourth on, the difference to the run two before; each number in groups of five bits, lowest first,
with a bit that says whether more follow, as characters from ``0`` on.
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np

_FIRST_CHARACTER = 48


class Rle(TypedDict):
    """One mask, ready for JSON."""

    size: list[int]
    """Height and width."""
    counts: str


def encode_mask(mask: np.ndarray) -> Rle:
    """Encode a bool mask (H, W).

    Raises:
        ValueError: If the array is not bool or not two-dimensional.
    """
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise ValueError(f"a mask to encode must be a bool array (H, W), got {mask.dtype} {mask.shape}")
    flat = mask.flatten(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts = np.concatenate([[0], changes, [flat.size]]) if flat.size else np.zeros(1, dtype=np.int64)
    runs = np.diff(starts)
    if flat.size and flat[0]:
        runs = np.concatenate([[0], runs])
    numbers = runs.copy()
    numbers[3:] -= runs[1:-2]
    return {"size": [int(side) for side in mask.shape], "counts": "".join(map(_encode_number, numbers.tolist()))}


def decode_mask(rle: Rle) -> np.ndarray:
    """Inverse of `encode_mask`: bool, (H, W).

    Raises:
        ValueError: If the counts do not add up to the size.
    """
    height, width = rle["size"]
    runs = _decode_runs(rle["counts"])
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        raise ValueError(f"the run lengths add up to {sum(runs)}, not to {height} x {width} pixels")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape((height, width), order="F")


def _encode_number(number: int) -> str:
    characters = []
    while True:
        group = number & 0x1F
        number >>= 5  # rounds down, so that a negative number ends at -1
        is_last = number == (-1 if group & 0x10 else 0)
        characters.append(chr(_FIRST_CHARACTER + (group if is_last else group | 0x20)))
        if is_last:
            return "".join(characters)


def _decode_runs(counts: str) -> list[int]:
    runs: list[int] = []
    number = shift = 0
    for character in counts:
        group = ord(character) - _FIRST_CHARACTER
        number |= (group & 0x1F) << shift
        shift += 5
        if group & 0x20:
            continue
        if group & 0x10:
            number -= 1 << shift
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
        number = shift = 0
    return runs
