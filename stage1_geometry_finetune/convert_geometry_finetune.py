"""Put a fine-tuned student into the merged file of stage 1, prove that the result works, and say how to load it.

    python stage1_geometry_finetune/convert_geometry_finetune.py \\
        --finetune-ckpt output/stage1_geometry/es_rv_m/best.pth \\
        --pretrained output/merged/es_rv_m.safetensors --output output/merged/es_rv_m_geometry.safetensors

Exactly the student's weights are replaced (and those of the neck or the mask decoder, if the run trained them), in the
precision and form (folded or not) that the merged file has. The new file is written aside, compared tensor by tensor,
loaded again as a user would load it, and shown one image: its trunk has to give what the student gave in training.
Only then it appears at ``--output``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sam3_train.config import add_merge_args
from sam3_train.errors import run_cli


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument(
        "--finetune-ckpt", required=True, metavar="FILE", help="training checkpoint of train_geometry_finetune.py"
    )
    parser.add_argument("--pretrained", required=True, metavar="FILE", help="the merged file of the same student")
    parser.add_argument(
        "--output", metavar="FILE", help=".pt, .pth or .safetensors; default: the pretrained file's name + _geometry"
    )
    return add_merge_args(parser, "which the merged file's heads belong to")


def _convert(argv: list[str] | None) -> int:
    args = build_parser().parse_args(argv)
    from stage1_geometry_finetune.merge import ConvertRequest, convert_files  # torch only once the flags are right

    pretrained = Path(args.pretrained)
    result = convert_files(
        ConvertRequest(
            finetune_path=Path(args.finetune_ckpt),
            pretrained_path=pretrained,
            output=Path(args.output) if args.output else pretrained.with_stem(f"{pretrained.stem}_geometry"),
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
