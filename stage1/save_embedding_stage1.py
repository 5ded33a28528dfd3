"""Export the teacher's embeddings of a data set.

    torchrun --nproc_per_node 8 stage1/save_embedding_stage1.py \\
        --cfg stage1/configs/teacher/sam_vit_huge_sa1b.yaml --data-path data/sa-1b --output output/stage1_teacher
    python stage1/save_embedding_stage1.py --cfg ... --dry-run                # what it would write, and whether it fits
    python stage1/save_embedding_stage1.py --cfg ... --check-saved-embed 32   # compare stored ones with the teacher

The folder ``--output`` then holds ``config.json``, ``log_rank0.txt`` and ``embeddings/`` with ``rankN-keys.txt`` and
``rankN-values.bin``, for all splits together. The same command again resumes, after a kill too, and exports images that
were added; the number of processes may change. SIGTERM and SIGINT store what is computed and end with exit code 130.
"""

from __future__ import annotations

import argparse
import sys

from sam3_train.config import add_common_args
from sam3_train.errors import run_cli

DEFAULT_CHECKED = 16


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_args(parser)
    parser.add_argument(
        "--split", metavar="NAMES", help="splits to export, e.g. train,val; default train and, if there is one, val"
    )
    parser.add_argument("--codec", metavar="NAME", help="DISTILL.CODEC: fp16 (public layout) or int8 (half the bytes)")
    parser.add_argument(
        "--check-saved-embed",
        type=int,
        nargs="?",
        const=DEFAULT_CHECKED,
        metavar="N",
        help=f"instead of exporting, compare N stored embeddings with the teacher (default {DEFAULT_CHECKED})",
    )
    parser.add_argument(
        "--check-tolerance", type=float, metavar="X", help="largest relative RMS error that passes the check"
    )
    return parser


def _main(argv: list[str] | None) -> int:
    args = build_parser().parse_args(argv)
    # torch is imported only once the flags are right.
    from sam3_train.distributed import training_run
    from stage1.check_embeddings import check_saved_embeddings
    from stage1.export_run import run_export

    with training_run(args.device) as run:
        if args.check_saved_embed is not None:
            check_saved_embeddings(args, run)
        else:
            run_export(args, run)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point; see the module's text."""
    return run_cli(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
