"""Reading a store: random access by key, whatever number of ranks wrote it.

A reader pickles as its path, and every process opens files of its own, so that one object serves all loader workers,
forked or spawned. A directory of the public tool (no ``store.json``) opens when the caller states the shape.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from sam3_train.embeddings.codecs import Codec, Shape
from sam3_train.embeddings.key_index import KeyIndex
from sam3_train.embeddings.plan import KeyList, require_no_stale_ranks
from sam3_train.embeddings.rank_files import RankPaths, find_ranks, read_index, read_keys, read_quarantine
from sam3_train.embeddings.spec import SEED_BYTES, StoreError, StoreInfo, StoreSpec, read_store_info
from sam3_train.embeddings.values_file import ValuesFile


@dataclass(frozen=True)
class Coverage:
    """Which of the wanted keys a store can serve."""

    num_wanted: int
    missing: list[str]
    """Keys without a record and without a reason."""
    quarantined: dict[str, str]
    """Wanted keys that the export skipped, with the reason; training skips them too."""

    @property
    def num_present(self) -> int:
        """Wanted keys that have a record."""
        return self.num_wanted - len(self.missing) - len(self.quarantined)


class EmbeddingStore:
    """A store opened for reading.

    Args:
        directory: Folder with the rank files.
        shape: (C, H, W); needed for a store without ``store.json``, checked against it otherwise.
        check_crc: Compare each record that is read with its CRC-32 (`sam3_train.embeddings.crc` has the cost).

    Raises:
        StoreError: If files are missing, truncated, stale or do not fit together.
    """

    def __init__(self, directory: str | Path, shape: Shape | None = None, check_crc: bool = True) -> None:
        self.directory = Path(directory)
        self.check_crc = check_crc
        self._asked_shape = shape
        self._open()

    def _open(self) -> None:
        if not self.directory.is_dir():
            raise StoreError(
                f"{self.directory}: no such folder; export the teacher's embeddings first, or correct the path"
            )
        self.info: StoreInfo | None = read_store_info(self.directory)
        if self.info is None:
            self.spec = _public_spec(self.directory, self._asked_shape)
            self._paths = [RankPaths(self.directory, rank) for rank in find_ranks(self.directory)]
            self._crcs: dict[int, np.ndarray] = {}
        else:
            self.spec = self.info.spec
            require_shape(self.directory, self.spec.shape, self._asked_shape)
            require_no_stale_ranks(self.directory, self.info)
            self._paths = [RankPaths(self.directory, rank) for rank in range(self.info.ranks)]
        self._num_records = self._check_sizes()
        self._files: dict[int, ValuesFile] = {}
        self._files_process = os.getpid()
        self._index = KeyIndex(self.directory, self._paths, self._num_records)
        self.quarantined: dict[str, str] = {}
        for paths in self._paths:
            self.quarantined.update(read_quarantine(paths))

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory, "shape": self._asked_shape, "check_crc": self.check_crc}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.directory, self.check_crc = state["directory"], state["check_crc"]
        self._asked_shape = state["shape"]
        self._open()

    def __enter__(self) -> EmbeddingStore:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files of the values; a later read opens them again."""
        files, self._files = self._files, {}
        for values in files.values():
            values.close()

    def __len__(self) -> int:
        return sum(self._num_records)

    def __contains__(self, key: str) -> bool:
        return self._index.find(key) is not None

    @property
    def codec(self) -> Codec:
        """How the payloads are stored."""
        return self.spec.codec_object

    def keys(self) -> Iterator[str]:
        """All keys, rank by rank in record order, read from the key files."""
        for paths, count in zip(self._paths, self._num_records, strict=True):
            yield from read_keys(paths)[:count]

    def read(self, key: str) -> tuple[int, np.ndarray]:
        """Seed and embedding of a key.

        Returns:
            The int32 seed, and a float16 array of its own, (C, H, W).

        Raises:
            StoreError: If the key is not there, or its record is damaged.
        """
        seed, parts = self.read_raw(key)
        return seed, self.codec.to_half(parts)

    def read_raw(self, key: str) -> tuple[int, dict[str, np.ndarray]]:
        """Seed and stored parts of a key, in new arrays: for ``codec.to_float`` on the training device.

        Returns:
            The int32 seed, and ``{"values": float16 (C, H, W)}`` for fp16 or ``{"scale": float32 (C,), "values": int8
            (C, H, W)}`` for int8.

        Raises:
            StoreError: If the key is not there, or its record is damaged.
        """
        parts = self.codec.empty_parts(self.spec.shape)
        return self.read_into(key, parts), parts

    def read_into(self, key: str, parts: Mapping[str, np.ndarray]) -> int:
        """`read_raw` into arrays that are there already; the disk's bytes are copied once, to where they are wanted.

        Args:
            key: The record.
            parts: Arrays as ``codec.empty_parts`` makes them, e.g. rows of a batch.

        Returns:
            The int32 seed.

        Raises:
            StoreError: If the key is not there, or its record is damaged; the arrays then hold what was read.
            ValueError: If an array is missing or does not fit.
        """
        rank, record = self._locate(key)
        crcs = self._rank_crcs(rank) if self.check_crc else None
        seed_bytes = bytearray(SEED_BYTES)
        buffers = [memoryview(seed_bytes), *self._as_buffers(parts)]
        crc = self._file(rank).read(record, buffers, check=crcs is not None)
        if crcs is not None and crc != crcs[record]:
            raise StoreError(damaged_message(self.values_path(rank), key, record, self.spec.record_bytes))
        return int(struct.unpack("<i", seed_bytes)[0])

    def prefetch(self, keys: Iterable[str]) -> None:
        """Ask the operating system to load some records in the background; keys that are not there are ignored."""
        for key in keys:
            place = self._index.find(key)
            if place is not None:
                self._file(place[0]).announce(place[1])

    def read_at(self, rank: int, record: int) -> tuple[int, np.ndarray]:
        """`read` by place instead of key, without a CRC check."""
        seed_bytes, parts = bytearray(SEED_BYTES), self.codec.empty_parts(self.spec.shape)
        self._file(rank).read(record, [memoryview(seed_bytes), *self._as_buffers(parts)], check=False)
        return struct.unpack("<i", seed_bytes)[0], self.codec.to_half(parts)

    def read_seed(self, key: str) -> int:
        """The seed alone."""
        rank, record = self._locate(key)
        seed_bytes = bytearray(SEED_BYTES)
        self._file(rank).read(record, [memoryview(seed_bytes)], check=False)
        return int(struct.unpack("<i", seed_bytes)[0])

    def check_coverage(self, keys: KeyList) -> Coverage:
        """Which of ``keys`` have a record; to be called before any compute."""
        missing: list[str] = []
        quarantined: dict[str, str] = {}
        is_there = self._index.holds(keys)
        for key, found in zip(keys, is_there, strict=True):
            if found:
                continue
            if key in self.quarantined:
                quarantined[key] = self.quarantined[key]
            else:
                missing.append(key)
        return Coverage(len(is_there), missing, quarantined)

    def require_coverage(self, keys: KeyList) -> Coverage:
        """`check_coverage`, with an error if a key is missing without a reason.

        Raises:
            StoreError: With the count and the first missing keys.
        """
        coverage = self.check_coverage(keys)
        if coverage.missing:
            raise StoreError(
                f"{self.directory}: {len(coverage.missing)} of {coverage.num_wanted} keys have no embedding (first: "
                f"{', '.join(coverage.missing[:5])}); run the export again with this data set: it adds what is missing"
            )
        return coverage

    def record_ok(self, rank: int, record: int) -> bool:
        """Whether a record's bytes fit its CRC; True where the store has no CRCs."""
        crcs = self._rank_crcs(rank)
        buffer = np.empty(self.spec.record_bytes, np.uint8).data
        return crcs is None or self._file(rank).read(record, [buffer]) == crcs[record]

    def locations(self) -> Iterator[tuple[str, int, int]]:
        """(key, rank, record) of every record, rank by rank."""
        for paths, count in zip(self._paths, self._num_records, strict=True):
            for record, key in enumerate(read_keys(paths)[:count]):
                yield key, paths.rank, record

    def duplicate_keys(self) -> list[tuple[str, tuple[int, int], tuple[int, int]]]:
        """Keys that stand in more than one place, with two of the places."""
        return self._index.duplicates()

    def values_path(self, rank: int) -> Path:
        """The file that holds a rank's records."""
        return RankPaths(self.directory, rank).values

    def _as_buffers(self, parts: Mapping[str, np.ndarray]) -> list[memoryview]:
        """The parts' memory in the order of the disk."""
        buffers = []
        for name, (dtype, shape) in self.codec.layout(self.spec.shape).items():
            part = parts.get(name)
            if part is None or part.dtype != dtype or part.shape != shape or not part.flags.c_contiguous:
                found = "missing" if part is None else f"{part.dtype}, {part.shape}, strides {part.strides}"
                raise ValueError(f"part {name!r} of a record must be {dtype}, {shape}, contiguous; it is {found}")
            buffers.append(part.reshape(-1).view(np.uint8).data)
        return buffers

    def _locate(self, key: str) -> tuple[int, int]:
        place = self._index.find(key)
        if place is None:
            reason = self.quarantined.get(key)
            detail = f"it was quarantined: {reason}" if reason else "run the export again: it adds what is missing"
            raise StoreError(f"{self.directory}: no embedding for key {key!r}; {detail}")
        return place

    def _file(self, rank: int) -> ValuesFile:
        if self._files_process != os.getpid():
            # A forked process would share the read-ahead state of its parent's files.
            self._files, self._files_process = {}, os.getpid()
        values = self._files.get(rank)
        if values is None:
            values = self._files[rank] = ValuesFile(self.values_path(rank), self.spec.record_bytes)
        return values

    def _rank_crcs(self, rank: int) -> np.ndarray | None:
        if self.info is None:
            return None
        crcs = self._crcs.get(rank)
        if crcs is None:
            crcs = self._crcs[rank] = read_index(RankPaths(self.directory, rank), self.info.export_id)["record_crc"]
        return crcs

    def _check_sizes(self) -> list[int]:
        counts, problems = [], []
        self._crcs = {}
        for paths in self._paths:
            missing = [path for path in (paths.values, paths.keys) if not path.exists()]
            if missing:
                problems.append(
                    f"{missing[0]}: missing: rank {paths.rank} of {len(self._paths)} ranks is not complete; copy all "
                    "rank files of the store here"
                )
                continue
            count = self._expected_records(paths)
            size, expected = paths.values.stat().st_size, count * self.spec.record_bytes
            if size != expected:
                problems.append(size_message(paths.values, size, count, self.spec))
            counts.append(count)
        if problems:
            raise StoreError.from_problems(f"{self.directory} cannot be read", problems)
        return counts

    def _expected_records(self, paths: RankPaths) -> int:
        if self.info is None:
            return len(read_keys(paths))
        entries = read_index(paths, self.info.export_id)
        keys_end = int(entries["key_end"][-1]) if len(entries) else 0
        if paths.keys.stat().st_size != keys_end:
            raise StoreError(
                f"{paths.keys}: {paths.keys.stat().st_size:,} bytes, its index says {keys_end:,} ({len(entries)} keys)"
                ": truncated, or an export was interrupted; run the export again to repair it, or copy the file again"
            )
        return len(entries)


def require_shape(directory: Path, found: Shape, asked: Shape | None) -> None:
    """Check the shape a caller expects against the store's.

    Raises:
        StoreError: If they differ.
    """
    if asked is not None and tuple(asked) != tuple(found):
        raise StoreError(
            f"{directory}: embeddings have shape {tuple(found)}, {tuple(asked)} is wanted; choose the model preset the "
            "store was exported with, or export again"
        )


def size_message(path: Path, size: int, num_records: int, spec: StoreSpec) -> str:
    """One line about a values file whose size does not fit its records."""
    kind = "truncated" if size < num_records * spec.record_bytes else "longer than its index (an interrupted append)"
    return (
        f"{path}: {size:,} bytes, but {num_records} records of {spec.record_bytes:,} bytes (shape {spec.shape}, codec "
        f"{spec.codec}) take {num_records * spec.record_bytes:,}: {kind}; run the export again to repair it, copy the "
        "file again, or correct the shape"
    )


def damaged_message(path: Path, key: str, record: int, record_bytes: int) -> str:
    """One line about a record whose CRC does not fit."""
    return (
        f"{path}: record {record} (key {key!r}, bytes {record * record_bytes:,} and on) is damaged: its CRC-32 does "
        "not fit; copy the file again from a good copy, or export it again into another folder"
    )


def _public_spec(directory: Path, shape: Shape | None) -> StoreSpec:
    present = find_ranks(directory)
    if not present:
        raise StoreError(
            f"{directory}: no rankN-values.bin here; export the teacher's embeddings first, or correct the path"
        )
    if shape is None:
        raise StoreError(
            f"{directory}: rank files without store.json (the public tool's layout): state the shape (C, H, W) of one "
            "embedding"
        )
    absent = sorted(set(range(present[-1])) - set(present))
    if absent:
        raise StoreError(
            f"{directory}: rank{absent[0]}-values.bin is missing, though rank {present[-1]} is there; copy all "
            "rank files"
        )
    return StoreSpec(shape)
