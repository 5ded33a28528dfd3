"""Distil the teacher's image features into a student.

    torchrun --nproc_per_node 8 stage1/train_stage1.py --cfg stage1/configs/es_rv_m.yaml --data-path data/sa-1b
    python stage1/train_stage1.py --cfg stage1/configs/es_rv_m.yaml --dry-run      # check everything, print the plan

The same command again resumes. The run's folder is ``--output``, else ``OUTPUT``, else ``output/stage1/<name of the
config>``; it holds ``config.json``, ``log_rank0.txt``, ``metrics.jsonl`` and ``ckpt_epoch_N.pth``. ``--cfg`` more than
once trains several students in one pass over the embeddings; each then has its own folder below ``--output``.
"""

from __future__ import annotations

import argparse
import sys

from sam3_train.config import add_common_args, add_distillation_args
from sam3_train.errors import run_cli


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, conflict_handler="resolve"
    )
    add_common_args(parser)
    parser.add_argument("--cfg", action="append", required=True, metavar="FILE", help="YAML config; one per student")
    return add_distillation_args(parser)


def _train(argv: list[str] | None) -> int:
    args = build_parser().parse_args(argv)
    # torch is imported only once the flags are right.
    from sam3_train.distributed import training_run
    from stage1.run import prepare_run, train

    with training_run(args.device) as run:
        prepared = prepare_run(args, run)
        if run.is_main:
            print("\n".join(prepared.plan.lines()), flush=True)
        if not args.dry_run:
            train(prepared, run)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_cli(_train, argv)


if __name__ == "__main__":
    sys.exit(main())
