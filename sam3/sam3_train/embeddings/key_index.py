"""Where each key's record is: a sorted hash table in one file that all readers map.

24 bytes per key, shared by every process on the machine through the page cache: a million keys take 24 MB once, not
once per loader worker. The file ``key-index.bin`` is a cache that is rebuilt when the key files change; where the store
is read-only the table is built in memory.

Layout: magic, 16 bytes of fingerprint, number of keys; then three arrays of that length sorted by hash: hash (uint64),
location (rank << 40 | record), start of the key's line in its file.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from sam3_train.embeddings.plan import hash_keys
from sam3_train.embeddings.rank_files import RankPaths
from sam3_train.embeddings.spec import decode_key, encode_key, write_file_atomic

KEY_INDEX_FILE = "key-index.bin"
RECORD_BITS = 40
_HEADER = struct.Struct("<8s16sQ")
_MAGIC = b"ES3KEYS1"


class KeyIndex:
    """Finds (rank, record) of a key. Pickles as paths; maps are opened by whoever uses them."""

    def __init__(self, directory: Path, rank_paths: Sequence[RankPaths], num_records: Sequence[int]) -> None:
        """Open the cached table, or build it.

        Args:
            directory: The store.
            rank_paths: Files of the ranks that belong to it.
            num_records: Records per rank; key lines beyond are ignored.
        """
        self._paths = list(rank_paths)
        self._key_maps = {paths.rank: _map_file(paths.keys) for paths in self._paths}
        fingerprint = _fingerprint(self._paths, num_records)
        table = _read_table(directory / KEY_INDEX_FILE, fingerprint)
        if table is None:
            table = _build_table(self._paths, num_records, self._key_maps)
            _write_table(directory / KEY_INDEX_FILE, fingerprint, table)
        self._hashes, self._locations, self._starts = table

    def __len__(self) -> int:
        return len(self._hashes)

    def find(self, key: str) -> tuple[int, int] | None:
        """(rank, record) of a key, or None. Of a key that stands in several places, the first one."""
        wanted = encode_key(key)
        position = int(np.searchsorted(self._hashes, hash_keys([key])[0]))
        target = self._hashes[position] if position < len(self._hashes) else None
        while target is not None and position < len(self._hashes) and self._hashes[position] == target:
            rank, record = split_location(int(self._locations[position]))
            if self._line_is(rank, int(self._starts[position]), wanted):
                return rank, record
            position += 1
        return None

    def holds(self, keys: Iterable[str]) -> np.ndarray:
        """Which of many keys are there, (N,) bool; by their 64-bit hashes alone, a microsecond each."""
        return np.isin(hash_keys(keys), self._hashes)

    def duplicates(self) -> list[tuple[str, tuple[int, int], tuple[int, int]]]:
        """Keys that have more than one record, with two of their places."""
        found = []
        for position in np.flatnonzero(self._hashes[1:] == self._hashes[:-1]):
            first, second = (split_location(int(self._locations[position + step])) for step in (0, 1))
            keys = [
                self._line(place[0], int(self._starts[position + step])) for step, place in ((0, first), (1, second))
            ]
            if keys[0] == keys[1]:
                found.append((decode_key(keys[0]), first, second))
        return found

    def _line_is(self, rank: int, start: int, wanted: bytes) -> bool:
        lines = self._key_maps[rank]
        end = start + len(wanted)
        return lines[start:end] == wanted and lines[end : end + 1] in (b"\n", b"\r", b"")

    def _line(self, rank: int, start: int) -> bytes:
        lines = self._key_maps[rank]
        end = lines.find(b"\n", start)
        return lines[start : end if end >= 0 else len(lines)].removesuffix(b"\r")


def split_location(location: int) -> tuple[int, int]:
    """(rank, record) of a packed location."""
    return location >> RECORD_BITS, location & ((1 << RECORD_BITS) - 1)


def _map_file(path: Path) -> mmap.mmap | bytes:
    with open(path, "rb") as file:
        # An empty file cannot be mapped.
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""


def _fingerprint(rank_paths: Sequence[RankPaths], num_records: Sequence[int]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for paths, count in zip(rank_paths, num_records, strict=True):
        stat = paths.keys.stat()
        digest.update(struct.pack("<QQQQ", paths.rank, count, stat.st_size, stat.st_mtime_ns))
    return digest.digest()


def _read_table(path: Path, fingerprint: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """The cached arrays, memory-mapped; None if there is no cache or it is of other key files."""
    try:
        with open(path, "rb") as file:
            header = file.read(_HEADER.size)
        size = path.stat().st_size
    except OSError:
        return None
    if len(header) < _HEADER.size:
        return None
    magic, found, count = _HEADER.unpack(header)
    if magic != _MAGIC or found != fingerprint or size != _HEADER.size + 24 * count:
        return None
    if not count:
        return _empty_table()
    table = np.memmap(path, "<u8", "r", offset=_HEADER.size, shape=(3, count))
    return table[0], table[1], table[2]


def _empty_table() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.empty(0, "<u8"), np.empty(0, "<u8"), np.empty(0, "<u8")


def _build_table(
    rank_paths: Sequence[RankPaths], num_records: Sequence[int], key_maps: dict[int, mmap.mmap | bytes]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    parts = [_empty_table()]
    for paths, count in zip(rank_paths, num_records, strict=True):
        lines = bytes(key_maps[paths.rank]).split(b"\n")[:count]
        lengths = np.fromiter((len(line) + 1 for line in lines), "<u8", len(lines))
        starts = np.concatenate([np.zeros(1, "<u8"), np.cumsum(lengths, dtype="<u8")])[: len(lines)]
        digests = (hashlib.blake2b(line.removesuffix(b"\r"), digest_size=8).digest() for line in lines)
        hashes = np.frombuffer(b"".join(digests), "<u8")
        locations = np.arange(len(lines), dtype="<u8") | np.uint64(paths.rank << RECORD_BITS)
        parts.append((hashes, locations, starts))
    hashes, locations, starts = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.lexsort((locations, hashes))
    return hashes[order], locations[order], starts[order]


def _write_table(path: Path, fingerprint: bytes, table: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    header = _HEADER.pack(_MAGIC, fingerprint, len(table[0]))
    try:
        write_file_atomic(path, header + b"".join(np.ascontiguousarray(column).tobytes() for column in table))
    except OSError:
        # A read-only or full disk: this process keeps the table in memory, which costs only time at the next start.
        return
