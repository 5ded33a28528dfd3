"""Splice a trained student into a SAM 3 checkpoint, prove that the result works, and say how to load it.

    python stage1/convert_stage1_weights.py --student-ckpt output/stage1/es_rv_m/best.pth \\
        --sam3-ckpt sam3_checkpoints/sam3.pt --output output/merged/es_rv_m.safetensors

The file is written aside, loaded again as a user would load it, and shown one image: its trunk has to give what the
student gave in training. Only then it appears at ``--output``. ``--fuse`` folds BatchNorm and RepViT's branches into
convolutions (smaller, faster, no longer trainable); ``--dtype`` halves the size.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sam3.checkpoint_keys import STUDENT_PREFIX, TRUNK_PREFIX
from sam3_train.config import add_merge_args
from sam3_train.errors import run_cli


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--student-ckpt", required=True, metavar="FILE", help="training checkpoint of train_stage1.py")
    parser.add_argument("--sam3-ckpt", required=True, metavar="FILE", help="sam3.pt, or another file in its layout")
    parser.add_argument("--output", required=True, metavar="FILE", help=".pt, .pth or .safetensors")
    parser.add_argument("--target-prefix", default=STUDENT_PREFIX, metavar="PREFIX", help="where student keys go")
    parser.add_argument("--replace-prefix", default=TRUNK_PREFIX, metavar="PREFIX", help="SAM 3 keys that go")
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="of all floating-point weights"
    )
    parser.add_argument("--fuse", action="store_true", help="fold BatchNorm and parallel branches for deployment")
    return add_merge_args(parser, "of --sam3-ckpt")


def _convert(argv: list[str] | None) -> int:
    args = build_parser().parse_args(argv)
    from stage1.merge import MergeRequest, merge_files  # torch is imported only once the flags are right

    result = merge_files(
        MergeRequest(
            student_path=Path(args.student_ckpt),
            sam3_path=Path(args.sam3_ckpt),
            output=Path(args.output),
            target_prefix=args.target_prefix,
            replace_prefix=args.replace_prefix,
            dtype=args.dtype,
            fuse=args.fuse,
            use_ema=args.use_ema,
            image=Path(args.image) if args.image else None,
            allow_other_teacher=args.allow_other_teacher,
        )
    )
    print("\n".join(result.lines()))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_cli(_convert, argv)


if __name__ == "__main__":
    sys.exit(main())
