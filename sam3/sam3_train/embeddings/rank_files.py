"""The files of one rank: layout, opening, and cutting a torn tail.

::

    rankN-values.bin       records back to back: int32 little-endian seed, then the codec's payload      (public layout)
    rankN-keys.txt         one key per line, line i describes record i                                   (public layout)
    rankN-index.bin        header, then per record: end of its key line, CRC-32 of the record, CRC-32 of the key
    rankN-quarantine.txt   key, tab, reason: images that have no record and why

A record exists when its index entry does: values, key and index entry are written in this order, and synced in this
order. What stands behind the last index entry is the tail of an interrupted append and is cut by `recover_rank`.
"""

from __future__ import annotations

import errno
import os
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sam3_train.embeddings.crc import crc32
from sam3_train.embeddings.spec import StoreError, StoreSpec, decode_key, fsync_directory

try:
    import fcntl
except ImportError:  # Windows: a store can be read there, but not written
    fcntl = None  # type: ignore[assignment]

INDEX_MAGIC = b"ES3RECS1"
INDEX_HEADER = struct.Struct("<8s16sII")  # magic, export id, rank, bytes per entry
ENTRY_DTYPE = np.dtype([("key_end", "<u8"), ("record_crc", "<u4"), ("key_crc", "<u4")])
TAIL_RECORDS_CHECKED = 64
"""Records at the end whose CRC is checked on resume; a writer syncs at least this often, so older ones are durable."""

_VALUES_NAME = re.compile(r"rank(\d+)-values\.bin")


@dataclass(frozen=True)
class RankPaths:
    """Paths of one rank's files."""

    directory: Path
    rank: int

    @property
    def values(self) -> Path:
        """The records."""
        return self.directory / f"rank{self.rank}-values.bin"

    @property
    def keys(self) -> Path:
        """The keys, one per line."""
        return self.directory / f"rank{self.rank}-keys.txt"

    @property
    def index(self) -> Path:
        """Index entries with the CRCs."""
        return self.directory / f"rank{self.rank}-index.bin"

    @property
    def quarantine(self) -> Path:
        """Keys without a record."""
        return self.directory / f"rank{self.rank}-quarantine.txt"


def find_ranks(directory: Path) -> list[int]:
    """Sorted numbers of the ranks that have a values file."""
    matches = (_VALUES_NAME.fullmatch(path.name) for path in directory.iterdir())
    return sorted(int(match.group(1)) for match in matches if match)


def create_rank(paths: RankPaths, export_id: str) -> None:
    """Create the files of a rank that has none, empty; the index header comes first and is durable before the rest."""
    with open(paths.index, "wb") as file:
        file.write(INDEX_HEADER.pack(INDEX_MAGIC, bytes.fromhex(export_id), paths.rank, ENTRY_DTYPE.itemsize))
        file.flush()
        os.fsync(file.fileno())
    for path in (paths.keys, paths.values):
        path.touch()
    fsync_directory(paths.directory)


def read_index(paths: RankPaths, export_id: str) -> np.ndarray:
    """All whole entries of a rank's index.

    Args:
        paths: The rank's files.
        export_id: The id in ``store.json``.

    Returns:
        Structured array of `ENTRY_DTYPE`, one element per record; memory-mapped where it is not empty.

    Raises:
        StoreError: If the file is missing, no index, or of another export.
    """
    try:
        size = paths.index.stat().st_size
        with open(paths.index, "rb") as file:
            header = file.read(INDEX_HEADER.size)
    except FileNotFoundError:
        raise StoreError(
            f"{paths.index}: missing, though store.json lists rank {paths.rank}; copy all files of the store here, "
            "or export again into an empty folder"
        ) from None
    if len(header) < INDEX_HEADER.size:
        raise StoreError(f"{paths.index}: {size} bytes, too short for its header; run the export again to resume it")
    magic, found_id, rank, entry_bytes = INDEX_HEADER.unpack(header)
    if magic != INDEX_MAGIC or rank != paths.rank or entry_bytes != ENTRY_DTYPE.itemsize:
        raise StoreError(
            f"{paths.index}: no index of rank {paths.rank} (magic {magic!r}, rank {rank}, {entry_bytes} bytes per "
            "entry); copy the file again"
        )
    if found_id.hex() != export_id:
        raise StoreError(
            f"{paths.index}: belongs to export {found_id.hex()}, store.json to {export_id}: a stale file of another "
            f"export; remove rank{paths.rank}-* or use a separate output folder"
        )
    num_entries = (size - INDEX_HEADER.size) // ENTRY_DTYPE.itemsize
    if not num_entries:
        return np.empty(0, ENTRY_DTYPE)
    return np.memmap(paths.index, ENTRY_DTYPE, "r", offset=INDEX_HEADER.size, shape=(num_entries,))


def recover_rank(paths: RankPaths, spec: StoreSpec, export_id: str) -> tuple[int, int]:
    """Cut what an interrupted append left behind, so that the files agree and the next append continues them.

    Records behind a damaged one in the checked tail are cut with it: the export makes them again.

    Args:
        paths: The rank's files; created if the rank has none.
        spec: The store's description.
        export_id: The id in ``store.json``.

    Returns:
        Number of records that exist, and number of index entries that were cut.

    Raises:
        StoreError: If the files are not this export's.
    """
    if not paths.index.exists() or paths.index.stat().st_size < INDEX_HEADER.size:
        if any(path.exists() and path.stat().st_size for path in (paths.values, paths.keys)):
            raise StoreError(
                f"{paths.values}: has records but no index ({paths.index.name}); it was not written by this export: "
                "move it away or choose another output folder"
            )
        create_rank(paths, export_id)
    with open(paths.index, "r+b") as index:
        lock_for_writing(index.fileno(), paths.index)
        return _cut_torn_tail(paths, spec, export_id)


def _cut_torn_tail(paths: RankPaths, spec: StoreSpec, export_id: str) -> tuple[int, int]:
    for path in (paths.keys, paths.values):
        path.touch()
    entries = read_index(paths, export_id)
    num_records = _last_intact(paths, spec, entries)
    keys_end = int(entries["key_end"][num_records - 1]) if num_records else 0
    num_cut = len(entries) - num_records
    del entries  # the map must not outlive the cut
    _truncate(paths.index, INDEX_HEADER.size + num_records * ENTRY_DTYPE.itemsize)
    _truncate(paths.keys, keys_end)
    _truncate(paths.values, num_records * spec.record_bytes)
    _cut_partial_line(paths.quarantine)
    return num_records, num_cut


def _last_intact(paths: RankPaths, spec: StoreSpec, entries: np.ndarray) -> int:
    """How many leading records are whole, by size for all of them and by CRC for the newest ones."""
    num_whole = min(len(entries), paths.values.stat().st_size // spec.record_bytes)
    keys_size = paths.keys.stat().st_size
    num_whole = int(np.searchsorted(entries["key_end"][:num_whole], keys_size, side="right"))
    with open(paths.values, "rb") as values, open(paths.keys, "rb") as keys:
        for record in range(max(0, num_whole - TAIL_RECORDS_CHECKED), num_whole):
            start = int(entries["key_end"][record - 1]) if record else 0
            end = int(entries["key_end"][record])
            values.seek(record * spec.record_bytes)
            keys.seek(start)
            key_line = keys.read(max(0, end - start))
            if (
                not key_line.endswith(b"\n")
                or crc32(key_line[:-1]) != entries["key_crc"][record]
                or crc32(values.read(spec.record_bytes)) != entries["record_crc"][record]
            ):
                return record
    return num_whole


def lock_for_writing(fd: int, path: Path) -> None:
    """Refuse a second writer of the same rank; the lock ends with the process, also with a killed one.

    Raises:
        StoreError: If another process holds it, or the operating system has no such locks.
    """
    if fcntl is None:
        raise StoreError(
            f"{path}: writing a store needs the file locks of Linux or macOS; on Windows export inside WSL (reading "
            "works everywhere)"
        )
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StoreError(f"{path}: another process is writing this store; wait for it or end it") from None
    except OSError as error:
        # Some network file systems have no locks; the export then goes on without this guard.
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise


def _truncate(path: Path, size: int) -> None:
    if path.stat().st_size != size:
        with open(path, "r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())


def _cut_partial_line(path: Path) -> None:
    if path.exists():
        content = path.read_bytes()
        _truncate(path, content.rfind(b"\n") + 1)


def read_quarantine(paths: RankPaths) -> dict[str, str]:
    """Keys of one rank that have no record, with the reason, in the order they were met."""
    try:
        lines = paths.quarantine.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return {}
    pairs = (decode_key(line).partition("\t") for line in lines)
    return {key: reason for key, _, reason in pairs}


def read_keys(paths: RankPaths) -> list[str]:
    """All keys of a rank in record order; a last line without a newline counts too, as public files end that way."""
    lines = paths.keys.read_bytes().split(b"\n")
    if lines and not lines[-1]:
        lines.pop()
    return [decode_key(line.removesuffix(b"\r")) for line in lines]


def total_bytes(paths: Iterable[Path]) -> int:
    """Sum of the sizes of the files that exist."""
    return sum(path.stat().st_size for path in paths if path.exists())
