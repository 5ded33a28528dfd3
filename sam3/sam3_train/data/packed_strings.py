"""Millions of names in two arrays.

Eleven million Python strings take more than a gigabyte, and every data loader worker copies them by touching their
reference counts. Here they lie one after another in one buffer that forked workers share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

_CHUNK = 1 << 18


class PackedStrings:
    """An immutable list of strings without newlines: UTF-8, each followed by a newline, in one buffer.

    Args:
        buffer: uint8, the text.
        offsets: int64, (N + 1,): string i is ``buffer[offsets[i] : offsets[i + 1] - 1]``.
    """

    def __init__(self, buffer: np.ndarray, offsets: np.ndarray) -> None:
        self.buffer = buffer
        self.offsets = offsets

    @classmethod
    def pack(cls, strings: Iterable[str | bytes]) -> PackedStrings:
        """Pack strings in the order given.

        Raises:
            ValueError: If a string holds a newline or is no valid UTF-8.
        """
        encoded = [text if isinstance(text, bytes) else text.encode() for text in strings]
        joined = b"\n".join(encoded) + b"\n" if encoded else b""
        if joined.count(b"\n") != len(encoded):
            bad = next(text for text in encoded if b"\n" in text)
            raise ValueError(f"{bad!r} holds a newline")
        joined.decode()
        lengths = np.fromiter((len(text) + 1 for text in encoded), np.int64, len(encoded))
        return cls(np.frombuffer(joined, np.uint8), _offsets(lengths))

    @classmethod
    def from_array(cls, strings: np.ndarray) -> PackedStrings:
        """Pack a numpy array of byte strings (dtype ``S``) that hold UTF-8 and no newline, in the order given."""
        width = strings.dtype.itemsize
        lengths = np.char.str_len(strings).astype(np.int64)
        offsets = _offsets(lengths + 1)
        buffer = np.empty(offsets[-1], np.uint8)
        for start in range(0, len(strings), _CHUNK):
            part = slice(start, min(start + _CHUNK, len(strings)))
            lines = np.zeros((part.stop - start, width + 1), np.uint8)
            lines[:, :width] = strings[part].view(np.uint8).reshape(-1, width)
            lines[np.arange(len(lines)), lengths[part]] = ord("\n")
            buffer[offsets[start] : offsets[part.stop]] = lines[np.arange(width + 1) <= lengths[part, None]]
        return cls(buffer, offsets)

    def to_array(self) -> np.ndarray:
        """The strings as a numpy array of byte strings (dtype ``S``)."""
        encoded = [text.encode() for text in self]
        return np.array(encoded, dtype=np.bytes_) if encoded else np.empty(0, "S1")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is not in 0..{len(self) - 1}")
        return self.buffer[self.offsets[index] : self.offsets[index + 1] - 1].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _CHUNK):
            stop = min(start + _CHUNK, len(self))
            text = self.buffer[self.offsets[start] : self.offsets[stop]].tobytes().decode()
            yield from text.split("\n")[:-1]

    def find(self, text: str) -> int | None:
        """Position of a string in a list that is sorted by its UTF-8 bytes, or None."""
        wanted, low, high = text.encode(), 0, len(self)
        while low < high:
            middle = (low + high) // 2
            here = self.buffer[self.offsets[middle] : self.offsets[middle + 1] - 1].tobytes()
            if here == wanted:
                return middle
            low, high = (middle + 1, high) if here < wanted else (low, middle)
        return None

    def select(self, indices: np.ndarray | Sequence[int]) -> PackedStrings:
        """The strings at some positions, in that order."""
        picked = np.asarray(indices, np.int64)
        lengths = self.offsets[picked + 1] - self.offsets[picked]
        offsets = _offsets(lengths)
        buffer = np.empty(offsets[-1], np.uint8)
        for start in range(0, len(picked), _CHUNK):
            part = slice(start, start + _CHUNK)
            first = offsets[start]
            shift = self.offsets[picked[part]] - (offsets[:-1][part] - first)
            total = int(lengths[part].sum())
            buffer[first : first + total] = self.buffer[np.repeat(shift, lengths[part]) + np.arange(total)]
        return PackedStrings(buffer, offsets)

    @property
    def sha256(self) -> str:
        """Hash of the strings and their order: sha256 of the text with one string a line."""
        return hashlib.sha256(np.ascontiguousarray(self.buffer).data).hexdigest()


def first_duplicate(sorted_strings: np.ndarray) -> int | None:
    """Position of the first element of a sorted array that equals the one before it, or None."""
    same = np.flatnonzero(sorted_strings[1:] == sorted_strings[:-1])
    return int(same[0]) + 1 if len(same) else None


def _offsets(lengths: np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
