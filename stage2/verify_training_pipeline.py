"""Run every part of the memory's training once on generated clips, and say what works.

    python stage2/verify_training_pipeline.py                                         # the demo's tiny tracker
    python stage2/verify_training_pipeline.py --sam3_checkpoint sam3_checkpoints/sam3.pt --device cuda

Checked are shapes, tokens, gradients, frozen modes, click coordinates (an object in the corner), one real step, that
the loss falls, saving, resuming, merging and opening the merged file with either memory. A table says what was seen;
the exit code is 0 if all of it is right, and 1 otherwise. Flags may be written with - or _.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sam3_train.errors import run_cli, user_error_types

if TYPE_CHECKING:
    from stage2.verification import Verification

DEFAULT_CHECKPOINT = Path(__file__).resolve().parents[1] / "data/demo/tiny_teacher.safetensors"
EXIT_FAILED = 1


@dataclass(frozen=True)
class Row:
    """What became of a check."""

    name: str
    is_fine: bool
    seen: str
    seconds: float
    trace: str = ""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sam3-checkpoint",
        type=Path,
        default=DEFAULT_CHECKPOINT,
        metavar="FILE",
        help="sam3.pt or a merged student; default: the demo's tiny teacher",
    )
    parser.add_argument("--cfg", type=Path, metavar="FILE", help="settings of the training; default: base_memory.yaml")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="override any config key")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda or mps; default: the best there is")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="keep what is written here; default: nothing")
    parser.add_argument("--traceback", action="store_true", help="show where each failure comes from")
    return parser


def run_checks(verification: Verification) -> Iterator[Row]:
    """Run all checks; one that fails does not keep the others from running."""
    from stage2.verification_checks import CHECKS, CheckError

    for name, check in CHECKS:
        start = time.perf_counter()
        try:
            row = Row(name, True, check(verification), time.perf_counter() - start)
        except Exception as error:
            is_told = isinstance(error, (CheckError, *user_error_types()))
            seen = str(error) if is_told else f"{type(error).__name__}: {error}"
            row = Row(name, False, seen, time.perf_counter() - start, traceback.format_exc())
        yield row


def table_lines(rows: list[Row]) -> list[str]:
    """The rows as a person reads them."""
    width = max(len(row.name) for row in rows)
    return [f"{'ok  ' if r.is_fine else 'FAIL'}  {r.name:{width}}  {r.seconds:5.1f} s  {r.seen}" for r in rows]


@contextlib.contextmanager
def _folder(chosen: Path | None) -> Iterator[Path]:
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
        yield Path(tempfile.mkdtemp(prefix="verify_", dir=chosen))
        return
    with tempfile.TemporaryDirectory(prefix="verify_memory_") as name:
        yield Path(name)


def _verify(argv: list[str] | None) -> int:
    from stage2.train_memory_stage2 import DEFAULT_CONFIG, with_hyphens

    args = build_parser().parse_args(with_hyphens(sys.argv[1:] if argv is None else argv))
    from sam3_train.distributed import training_run
    from stage2.verification import Verification

    with _folder(args.output_dir) as folder, training_run(args.device) as run:
        config = args.cfg or DEFAULT_CONFIG
        verification = Verification(run, folder, args.sam3_checkpoint, config, tuple(args.opts))
        verification.prepared  # noqa: B018 - a wrong flag is an error of its own and no failed check
        print(f"{args.sam3_checkpoint} on {run.device}:", flush=True)
        rows = list(run_checks(verification))
    print("\n".join(table_lines(rows)))
    failed = [row for row in rows if not row.is_fine]
    if args.traceback:
        print("\n".join(row.trace for row in failed), file=sys.stderr)
    print(f"{len(rows) - len(failed)} of {len(rows)} checks passed in {sum(row.seconds for row in rows):.0f} s")
    return EXIT_FAILED if failed else 0


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_cli(_verify, argv)


if __name__ == "__main__":
    sys.exit(main())
