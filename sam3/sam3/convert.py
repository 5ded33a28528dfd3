"""Write a checkpoint in another layout, container or precision.

    python -m sam3.convert sam3.pt sam3.safetensors                            # another container
    python -m sam3.convert sam3.pt sam3_fp16.safetensors --dtype fp16          # half the size
    python -m sam3.convert sam3.pt model.safetensors --layout hf               # for transformers' Sam3VideoModel
    python -m sam3.convert models--facebook--sam3/model.safetensors sam3.pt    # and back

Reads what `sam3.load_model` reads. The new file is written aside, opened again and compared tensor by tensor before it
appears. What a layout cannot hold is printed as ``lost``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sam3.cli import run_command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sam3.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="IN", help="a file, an index of shards, a folder, or a model on the Hub")
    parser.add_argument("output", metavar="OUT", type=Path, help="name of the new file: .pt, .pth or .safetensors")
    parser.add_argument(
        "--layout",
        choices=("meta", "hf"),
        default="meta",
        help="whose names the tensors get: those of sam3.pt (default), or those of transformers' Sam3VideoModel",
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), help="of the floating-point tensors; default: as they are"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    return parser


def _convert(argv: list[str] | None) -> int:
    args = build_parser().parse_args(argv)
    from sam3.conversion import ConversionRequest, convert_checkpoint  # torch, only once the flags are right
    from sam3.loading import find_checkpoint

    source = find_checkpoint(args.source)
    result = convert_checkpoint(ConversionRequest(source, args.output, args.layout, args.dtype, args.force))
    print("\n".join(result.lines()))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point; see the module's text."""
    return run_command(_convert, argv)


if __name__ == "__main__":
    sys.exit(main())
