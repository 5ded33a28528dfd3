"""Masks as COCO run-length encoding, without a compiled package.

The format (as pycocotools writes and reads it): run lengths of zeros and ones in turn, column by column, starting with
the zeros; from the fourth on, the difference to the run two before; each number in groups of five bits, lowest first,
with a bit that says whether more follow, as characters from ``0`` on.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        ValueError: If the counts are no run lengths, or do not add up to the size.
    """
    height, width = rle["size"]
    runs, _ = decode_runs([rle["counts"]])
    if runs.min(initial=0) < 0 or runs.sum() != height * width:
        raise ValueError(f"the run lengths add up to {runs.sum()}, not to {height} x {width} pixels")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape((height, width), order="F")


def decode_runs(counts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The run lengths of many masks at once, which costs little more than those of one.

    Returns:
        int64 run lengths of all masks one after another, zeros first in each (damaged ones may be negative), and the
        offsets, (N + 1,): those of mask i are ``runs[offsets[i] : offsets[i + 1]]``.

    Raises:
        ValueError: If a string holds a character that the format does not have, or ends inside a number; the message
            says which string.
    """
    ends = np.cumsum([len(text) for text in counts], dtype=np.int64)
    digits = np.frombuffer("".join(counts).encode("ascii", "replace"), np.uint8).astype(np.int64) - _FIRST_CHARACTER
    wrong = np.flatnonzero((digits < 0) | (digits > 63))
    if len(wrong):
        owner = int(np.searchsorted(ends, wrong[0], side="right"))
        raise ValueError(f"string {owner} holds the character {chr(int(digits[wrong[0]]) + _FIRST_CHARACTER)!r}")
    is_last = digits & 0x20 == 0
    for i, end in enumerate(ends):
        if len(counts[i]) and not is_last[end - 1]:
            raise ValueError(f"string {i} ends inside a number")
    stops = np.flatnonzero(is_last) + 1
    starts = np.concatenate([np.zeros(1, np.int64), stops[:-1]])
    if not len(stops):
        return np.zeros(0, np.int64), np.zeros(len(counts) + 1, np.int64)
    place = np.arange(len(digits)) - np.repeat(starts, stops - starts)
    numbers = np.add.reduceat((digits & 0x1F) << (5 * np.minimum(place, 11)), starts)
    is_negative = digits[stops - 1] & 0x10 != 0
    numbers[is_negative] -= np.int64(1) << (5 * np.minimum(stops - starts, 12))[is_negative]
    offsets = np.concatenate([np.zeros(1, np.int64), np.searchsorted(stops, ends, side="right")])
    return _undo_differences(numbers, offsets), offsets


def _undo_differences(numbers: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """From the fourth on, a number is the difference to the run two before: sum up odd and even places apart."""
    position = np.arange(len(numbers)) - np.repeat(offsets[:-1], np.diff(offsets))
    runs = numbers.copy()
    for chosen in (position % 2 == 1, (position % 2 == 0) & (position > 0)):
        total = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.where(chosen, numbers, 0))])
        summed = total[1:] - np.repeat(total[offsets[:-1]], np.diff(offsets))
        runs[chosen] = summed[chosen]
    return runs


def _encode_number(number: int) -> str:
    characters = []
    while True:
        group = number & 0x1F
        number >>= 5  # rounds down, so that a negative number ends at -1
        is_last = number == (-1 if group & 0x10 else 0)
        characters.append(chr(_FIRST_CHARACTER + (group if is_last else group | 0x20)))
        if is_last:
            return "".join(characters)
