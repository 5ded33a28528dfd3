"""Who exports which key, in which batch: exact, without duplicates, and the same again after a kill.

The keys that the store lacks when a phase begins are dealt to the ranks in turn and cut into batches; the cut depends
on nothing else. A resumed rank therefore meets the same images in the same batches, which matters because a matrix
product rounds differently when its batch size changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from sam3_train.embeddings.rank_files import RankPaths, find_ranks, read_keys, read_quarantine, recover_rank
from sam3_train.embeddings.spec import (
    Phase,
    StoreError,
    StoreInfo,
    StoreSpec,
    encode_key,
    key_order_sha256,
    new_export_id,
    read_store_info,
    write_expected_keys,
    write_store_info,
)


class KeyList(Protocol):
    """An ordered list of keys: a list, or `sam3_train.data.packed_strings.PackedStrings` for millions of them."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> str: ...

    def __iter__(self) -> Iterator[str]: ...


@dataclass(frozen=True)
class StoreState:
    """What `begin_export` found and prepared."""

    info: StoreInfo
    num_records: int
    """Records of all ranks that exist."""
    num_cut: int
    """Index entries of an interrupted append that were cut."""


@dataclass(frozen=True)
class RankPlan:
    """The work of one rank."""

    batches: list[list[int]]
    """Positions in the key list, batch by batch; only batches with at least one missing record."""
    done_keys: frozenset[str]
    """Keys inside those batches that are stored or quarantined: computed again with their batch, not written."""

    @property
    def num_missing(self) -> int:
        """Records this rank still has to make."""
        return sum(len(batch) for batch in self.batches) - len(self.done_keys)


def begin_export(
    directory: str | Path, spec: StoreSpec, keys: KeyList, world_size: int = 1, batch_size: int = 1
) -> StoreState:
    """Prepare a store for an export by ``world_size`` ranks: create it, or repair it and decide what continues.

    One process calls this (the main one) before any rank plans or writes.

    Args:
        directory: The store; created if missing.
        spec: What the records will be.
        keys: All keys the store shall hold in the end, in order; keys it already holds are not exported again.
        world_size: Ranks that will write.
        batch_size: Images per teacher batch.

    Raises:
        StoreError: If the directory holds a store that ``spec`` does not fit, files of another export, or a key occurs
            twice.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    require_unique(keys)
    info = _open_or_create(directory, spec, world_size)
    counts, cuts, skipped = [], [], []
    for rank in range(info.ranks):
        paths = RankPaths(directory, rank)
        num_records, num_cut = recover_rank(paths, spec, info.export_id)
        counts.append(num_records)
        cuts.append(num_cut)
        skipped.append(len(read_quarantine(paths)))
    order = key_order_sha256(keys)
    wanted = Phase(order, len(keys), world_size, batch_size, tuple(counts), tuple(skipped))
    if not _continues(info, wanted) and _missing(directory, info, keys).any():
        write_expected_keys(directory, keys)
        info = replace(info, phases=(*info.phases, wanted))
        write_store_info(directory, info)
    return StoreState(info, sum(counts), sum(cuts))


def plan_rank(directory: str | Path, keys: KeyList, rank: int = 0, world_size: int = 1) -> RankPlan:
    """What one rank has to do; every rank calls this after `begin_export`, with the same keys.

    Raises:
        StoreError: If the keys are not those that the phase began with: this rank sees other images than the main one.
    """
    directory = Path(directory)
    info = _require_info(directory)
    if not _missing(directory, info, keys).any():
        return RankPlan([], frozenset())
    phase = info.phases[-1]
    if phase.key_order_sha256 != key_order_sha256(keys) or phase.world_size != world_size:
        raise StoreError(
            f"{directory}: rank {rank} of {world_size} sees {len(keys)} images with order hash "
            f"{key_order_sha256(keys)[:12]}, the export was begun for {phase.num_keys} images with "
            f"{phase.key_order_sha256[:12]} over {phase.world_size} ranks: all ranks need the same data set"
        )
    before = _known_hashes(directory, phase.records_before, phase.skipped_before)
    todo = np.flatnonzero(~np.isin(hash_keys(keys), before))[rank::world_size]
    done_keys = _done_in_phase(RankPaths(directory, rank), phase)
    batches = []
    for start in range(0, len(todo), phase.batch_size):
        batch = [int(position) for position in todo[start : start + phase.batch_size]]
        if any(keys[position] not in done_keys for position in batch):
            batches.append(batch)
    kept = frozenset(keys[position] for batch in batches for position in batch if keys[position] in done_keys)
    return RankPlan(batches, kept)


def count_missing(directory: str | Path, keys: KeyList) -> int:
    """How many keys a store lacks; all of them if there is no store yet. Nothing is written."""
    directory = Path(directory)
    info = read_store_info(directory) if directory.is_dir() else None
    return len(keys) if info is None else int(_missing(directory, info, keys).sum())


def require_unique(keys: KeyList) -> None:
    """Check that no key occurs twice.

    Raises:
        StoreError: Naming a key that does.
    """
    hashes = hash_keys(keys)
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    for position in same:
        first, second = (keys[int(order[position + step])] for step in (0, 1))
        if first == second:
            raise StoreError(f"key {first!r} occurs twice in the data set; image names must be unique over all splits")
        raise StoreError(f"keys {first!r} and {second!r} have the same 64-bit hash; rename one of the images")


def hash_keys(keys: Iterable[str]) -> np.ndarray:
    """64-bit hashes of keys, (N,) uint64: what large key sets are compared and searched by."""
    digests = b"".join(hashlib.blake2b(encode_key(key), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, "<u8")


def _open_or_create(directory: Path, spec: StoreSpec, world_size: int) -> StoreInfo:
    info = require_continuable(directory, spec)
    if info is None:
        info = StoreInfo(spec, new_export_id(), world_size, ())
        write_store_info(directory, info)
    elif world_size > info.ranks:
        info = replace(info, ranks=world_size)
        write_store_info(directory, info)
    return info


def require_continuable(directory: Path, spec: StoreSpec) -> StoreInfo | None:
    """Check that an export of ``spec`` may write to a folder. Nothing is written.

    Returns:
        What the store in the folder says about itself, or None if there is none yet.

    Raises:
        StoreError: If the folder holds a store that ``spec`` does not fit, or files of another export.
    """
    info = read_store_info(directory) if directory.is_dir() else None
    if info is None:
        present = find_ranks(directory) if directory.is_dir() else []
        if present:
            raise StoreError(
                f"{directory}: holds rank files ({', '.join(f'rank{rank}' for rank in present[:4])}) without a "
                "store.json, so what made them is unknown; use another output folder or move them away"
            )
        return None
    differences = info.spec.differences(spec)
    if differences:
        raise StoreError(
            f"{directory}: the store was begun with other settings (store != now):\n  "
            + "\n  ".join(differences)
            + "\nUse the store's settings, or another output folder."
        )
    require_no_stale_ranks(directory, info)
    return info


def require_no_stale_ranks(directory: Path, info: StoreInfo) -> None:
    """Check that there is no rank file that ``store.json`` does not list.

    Raises:
        StoreError: Naming the first such rank.
    """
    stale = [rank for rank in find_ranks(directory) if rank >= info.ranks]
    if stale:
        raise StoreError(
            f"{directory}: rank{stale[0]}-values.bin is there, but store.json lists only ranks 0..{info.ranks - 1} of "
            f"export {info.export_id}: a stale file of another export; remove rank{stale[0]}-*"
        )


def _require_info(directory: Path) -> StoreInfo:
    info = read_store_info(directory)
    if info is None:
        raise StoreError(
            f"{directory}: store.json, which the main rank wrote, is not visible to this rank: the output folder must "
            "be on storage that all nodes share"
        )
    return info


def _continues(info: StoreInfo, wanted: Phase) -> bool:
    if not info.phases or not info.phases[-1].is_same_plan(wanted):
        return False
    newest = info.phases[-1]
    pairs = [*zip(newest.records_before, wanted.records_before, strict=False)]
    pairs += zip(newest.skipped_before, wanted.skipped_before, strict=False)
    return all(before <= now for before, now in pairs)


def _missing(directory: Path, info: StoreInfo, keys: KeyList) -> np.ndarray:
    """True for every key that has neither a record nor a quarantine entry, (N,) bool."""
    known = _known_hashes(directory, (None,) * info.ranks, (None,) * info.ranks)
    return ~np.isin(hash_keys(keys), known)


def _known_hashes(directory: Path, num_records: Sequence[int | None], num_skipped: Sequence[int | None]) -> np.ndarray:
    """Hashes of the first so many records and quarantine entries of each rank; None takes all."""
    parts = [np.empty(0, "<u8")]
    for rank, (records, skipped) in enumerate(zip(num_records, num_skipped, strict=True)):
        paths = RankPaths(directory, rank)
        if paths.keys.exists():
            parts.append(hash_keys(read_keys(paths)[:records]))
        parts.append(hash_keys(list(read_quarantine(paths))[:skipped]))
    return np.concatenate(parts)


def _done_in_phase(paths: RankPaths, phase: Phase) -> set[str]:
    before = phase.records_before[paths.rank] if paths.rank < len(phase.records_before) else 0
    skipped = phase.skipped_before[paths.rank] if paths.rank < len(phase.skipped_before) else 0
    return {*read_keys(paths)[before:], *list(read_quarantine(paths))[skipped:]}
