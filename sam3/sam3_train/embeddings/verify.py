"""Check an embedding store on the disk, without a GPU, a teacher or the images.

    python -m sam3_train.embeddings.verify output/stage1_teacher/embeddings                  # every record
    python -m sam3_train.embeddings.verify output/stage1_teacher/embeddings --sample 1000    # a quick look
    python -m sam3_train.embeddings.verify DIR --shape 1024 72 72                            # files of the public tool

Looks at file sizes, key lines, CRCs, values that are not finite, keys that stand twice and keys that are missing. Exit
code 0 if all is well, 2 with a list of what is wrong otherwise. ``stage1/save_embedding_stage1.py --check-saved-embed``
compares the stored values with the teacher.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sam3_train.embeddings.codecs import Shape, count_nonfinite
from sam3_train.embeddings.crc import crc32
from sam3_train.embeddings.plan import hash_keys
from sam3_train.embeddings.rank_files import RankPaths, read_index, read_keys
from sam3_train.embeddings.reader import EmbeddingStore, damaged_message
from sam3_train.embeddings.spec import (
    EXPECTED_KEYS_FILE,
    StoreError,
    StoreInfo,
    decode_key,
    encode_key,
    key_order_sha256,
    read_expected_keys,
)
from sam3_train.errors import EXIT_USER_ERROR, UserError, run_cli

MAX_NAMED = 20  # problems of one kind that are named one by one


@dataclass
class VerifyReport:
    """What a check found."""

    num_records: int = 0
    num_checked: int = 0
    num_bytes_checked: int = 0
    num_quarantined: int = 0
    problems: list[str] = field(default_factory=list)


def verify_store(
    directory: str | Path,
    *,
    shape: Shape | None = None,
    sample: int | None = None,
    wanted_keys: Iterable[str] | None = None,
    show_progress: bool = False,
) -> VerifyReport:
    """Check a store.

    Args:
        directory: The store.
        shape: (C, H, W), for a store without ``store.json``.
        sample: Records whose bytes are checked, evenly spread; None checks all.
        wanted_keys: Keys that must be there; None takes the list that the export left in the store.
        show_progress: Draw a progress bar.

    Returns:
        The report; ``problems`` is empty if all is well.
    """
    report = VerifyReport()
    try:
        store = EmbeddingStore(directory, shape, check_crc=False)
    except StoreError as error:
        report.problems.append(str(error))
        return report
    report.num_records = len(store)
    report.num_quarantined = len(store.quarantined)
    if store.info is not None:
        for rank in range(store.info.ranks):
            report.problems += _check_key_lines(RankPaths(store.directory, rank), store.info)
    for key, first, second in store.duplicate_keys()[:MAX_NAMED]:
        report.problems.append(
            f"{store.directory}: key {key!r} stands twice: rank {first[0]} record {first[1]} and rank {second[0]} "
            f"record {second[1]}; readers take the first"
        )
    report.problems += _check_coverage(store, wanted_keys)
    _check_records(store, sample, report, show_progress)
    return report


def _check_key_lines(paths: RankPaths, info: StoreInfo) -> list[str]:
    """Every key line against its CRC and its place in the index."""
    entries = read_index(paths, info.export_id)
    keys, position = read_keys(paths), 0
    if len(keys) != len(entries):
        return [f"{paths.keys}: {len(keys)} lines, its index has {len(entries)}; copy the file again"]
    for record, key in enumerate(keys):
        line = encode_key(key) if key else b""
        position += len(line) + 1
        if crc32(line) != entries["key_crc"][record] or position != entries["key_end"][record]:
            return [
                f"{paths.keys}: line {record + 1} ({decode_key(line)!r}) is not what was written; copy the file again"
            ]
    return []


def _check_coverage(store: EmbeddingStore, wanted_keys: Iterable[str] | None) -> list[str]:
    keys: Sequence[str] | None = None if wanted_keys is None else list(wanted_keys)
    problems = []
    if keys is None and store.info is not None and store.info.phases:
        keys = read_expected_keys(store.directory)
        if keys is None or key_order_sha256(keys) != store.info.key_order_sha256:
            return [f"{store.directory / EXPECTED_KEYS_FILE}: missing or changed; run the export again to rewrite it"]
    if not keys:
        return []
    known = hash_keys([*store.keys(), *store.quarantined])
    missing = [keys[int(i)] for i in np.flatnonzero(~np.isin(hash_keys(keys), known))]
    if missing:
        problems.append(
            f"{store.directory}: {len(missing)} of {len(keys)} keys have no record (first: {', '.join(missing[:5])}); "
            "run the export again: it adds what is missing"
        )
    return problems


def _check_records(store: EmbeddingStore, sample: int | None, report: VerifyReport, show_progress: bool) -> None:
    num_checked = len(store) if sample is None else min(sample, len(store))
    chosen = set(np.linspace(0, len(store) - 1, num_checked).astype(np.int64).tolist()) if num_checked else set()
    places = [place for number, place in enumerate(store.locations()) if number in chosen]
    damaged = not_finite = 0
    for key, rank, record in tqdm(places, unit="record", disable=not show_progress, mininterval=0.5):
        report.num_checked += 1
        report.num_bytes_checked += store.spec.record_bytes
        if not store.record_ok(rank, record):
            damaged += 1
            if damaged <= MAX_NAMED:
                report.problems.append(damaged_message(store.values_path(rank), key, record, store.spec.record_bytes))
            continue
        num_bad = count_nonfinite(store.read_at(rank, record)[1])
        if num_bad:
            not_finite += 1
            if not_finite <= MAX_NAMED:
                report.problems.append(
                    f"{store.values_path(rank)}: record {record} (key {key!r}) has {num_bad} values that are not finite"
                    "; leave the key out, or export it again in bf16"
                )
    for count, what in ((damaged, "damaged"), (not_finite, "not finite")):
        if count > MAX_NAMED:
            report.problems.append(f"{store.directory}: {count} records are {what} in all")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sam3_train.embeddings.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="DIR", help="the store: the folder of rank0-values.bin")
    how_many = parser.add_mutually_exclusive_group()
    how_many.add_argument("--all", action="store_true", help="check the bytes of every record (the default)")
    how_many.add_argument("--sample", type=int, metavar="N", help="check the bytes of N records, evenly spread")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("C", "H", "W"), help="for files without store.json")
    parser.add_argument("--keys", metavar="FILE", help="keys that must be there, one per line")
    return parser


def _main(argv: list[str] | None) -> int:
    args = build_parser().parse_args(argv)
    if args.sample is not None and args.sample < 0:
        raise UserError(f"--sample {args.sample} must not be negative")
    wanted = None
    if args.keys:
        try:
            wanted = [decode_key(line) for line in Path(args.keys).read_bytes().splitlines() if line]
        except OSError as error:
            raise UserError(f"--keys {args.keys}: cannot be read ({error.strerror})") from None
    report = verify_store(
        args.directory,
        shape=tuple(args.shape) if args.shape else None,
        sample=args.sample,
        wanted_keys=wanted,
        show_progress=sys.stderr.isatty(),
    )
    print(
        f"{args.directory}: {report.num_records} records, {report.num_checked} of them checked "
        f"({report.num_bytes_checked / 1e9:.2f} GB), {report.num_quarantined} keys in quarantine"
    )
    if report.problems:
        print(
            f"error: {len(report.problems)} problems\n" + "\n".join(f"  - {p}" for p in report.problems),
            file=sys.stderr,
        )
        return EXIT_USER_ERROR
    print("ok")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point; see the module's text."""
    return run_cli(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
