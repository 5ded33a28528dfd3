"""Put a trained memory into the file that it was trained in front of, prove that the result tracks, say how to use it.

    python stage2/convert_memory_weights_stage2.py --trained_checkpoint output/stage2/memory/model_final.pth \\
        --sam3_checkpoint sam3_checkpoints/sam3.pt --output_path output/merged/sam3_memory.safetensors

Every trained tensor comes in beside what is there: text encoder, detector and SAM 3's own memory are kept bit for bit,
so the file holds both memories. The new file is written aside, compared tensor by tensor, opened again as a user would
open it, and tracks a generated clip: it has to give what the model gave in training. Only then it appears at
``--output_path``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sam3_train.errors import run_cli


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument(
        "--trained_checkpoint",
        "--trained-checkpoint",
        required=True,
        metavar="FILE",
        help="model_final.pth, best.pth or ckpt_epoch_N.pth of train_memory_stage2.py",
    )
    parser.add_argument(
        "--sam3_checkpoint",
        "--sam3-checkpoint",
        required=True,
        metavar="FILE",
        help="the file that the training began with: sam3.pt, or a student merged into it",
    )
    parser.add_argument(
        "--output_path", "--output-path", required=True, metavar="FILE", help=".pt, .pth or .safetensors"
    )
    parser.add_argument(
        "--use-ema",
        "--use_ema",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="take the averaged weights; default: if the checkpoint has them",
    )
    parser.add_argument(
        "--allow-other-base",
        "--allow_other_base",
        action="store_true",
        help="only warn if the memory was trained behind another backbone or other heads than this file's",
    )
    return parser


def _convert(argv: list[str] | None) -> int:
    args = build_parser().parse_args(argv)
    from stage2.merge import MergeRequest, merge_files  # torch only once the flags are right

    result = merge_files(
        MergeRequest(
            trained_path=Path(args.trained_checkpoint),
            base_path=Path(args.sam3_checkpoint),
            output=Path(args.output_path),
            use_ema=args.use_ema,
            allow_other_base=args.allow_other_base,
        )
    )
    print("\n".join(result.lines()))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_cli(_convert, argv)


if __name__ == "__main__":
    sys.exit(main())
