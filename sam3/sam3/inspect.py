"""Print what a checkpoint holds: layout, variant, parameters of each part, provenance, and what would be missing.

    python -m sam3.inspect sam3.pt
    python -m sam3.inspect merged.safetensors --json

Takes what `sam3.load_model` takes. Nothing in the file is executed, and no weight is copied: the file is mapped, and
the model it is compared with has no memory. Ends with 0 if the file opens, 2 if it does not.
"""

from __future__ import annotations

import argparse
import json
import sys

from sam3.cli import EXIT_DONE, EXIT_USER_ERROR, run_command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sam3.inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", metavar="FILE", help="a file, an index of shards, a folder, or a model on the Hub")
    parser.add_argument("--json", action="store_true", help="one JSON object, with the whole metadata record")
    parser.add_argument(
        "--values",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="look for NaN and infinity, which reads the whole file; default: in files up to 1 GiB",
    )
    return parser


def _inspect(argv: list[str] | None) -> int:
    args = build_parser().parse_args(argv)
    from sam3.inspection import inspect_checkpoint  # torch, only once the flags are right
    from sam3.loading import find_checkpoint

    result = inspect_checkpoint(find_checkpoint(args.file), args.values)
    print(json.dumps(result.to_dict(), indent=1) if args.json else "\n".join(result.lines()))
    return EXIT_DONE if result.opens else EXIT_USER_ERROR


def main(argv: list[str] | None = None) -> int:
    """Entry point; see the module's text."""
    return run_command(_inspect, argv)


if __name__ == "__main__":
    sys.exit(main())
