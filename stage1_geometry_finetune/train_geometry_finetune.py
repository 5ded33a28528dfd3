"""Fine-tune a stage-1 student through SAM 3's frozen heads, with prompts in the loop.

    torchrun --nproc_per_node 8 stage1_geometry_finetune/train_geometry_finetune.py \\
        --cfg stage1_geometry_finetune/configs/es_rv_m.yaml --data-path data/sa-1b \\
        --pretrained output/merged/es_rv_m.safetensors --sam3-checkpoint sam3_checkpoints/sam3.pt
    python stage1_geometry_finetune/train_geometry_finetune.py --cfg ... --dry-run    # check everything, print the plan

Embeddings of stage 1 are reused as they are; ``--online-teacher`` needs none. The same command again resumes. The run's
folder is ``--output``, else ``OUTPUT``, else ``output/stage1_geometry/<name of the config>``; it holds ``config.json``,
``log_rank0.txt``, ``metrics.jsonl``, ``ckpt_epoch_N.pth`` and ``best.pth``. What comes out is merged by
``convert_geometry_finetune.py``.
"""

from __future__ import annotations

import argparse
import sys

from sam3_train.config import add_common_args, add_distillation_args
from sam3_train.errors import run_cli


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_args(parser)
    parser.add_argument("--sam3-checkpoint", metavar="FILE", help="MODEL.SAM3_CHECKPOINT: frozen heads, e.g. sam3.pt")
    return add_distillation_args(parser)


def _train(argv: list[str] | None) -> int:
    args = build_parser().parse_args(argv)
    # torch is imported only once the flags are right.
    from sam3_train.distributed import training_run
    from stage1_geometry_finetune.run import prepare_run, train

    with training_run(args.device) as run:
        prepared = prepare_run(args, run)
        if run.is_main:
            print("\n".join(prepared.lines()), flush=True)
        if not args.dry_run:
            train(prepared, run)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_cli(_train, argv)


if __name__ == "__main__":
    sys.exit(main())
