"""Train the compressed memory of a tracker on annotated videos.

    python stage2/train_memory_stage2.py --sam3_checkpoint sam3_checkpoints/sam3.pt --data_path data/sa-v \\
        --output_dir output/stage2/memory --batch_size 1 --subset_fraction 0.01
    torchrun --nproc_per_node 8 stage2/train_memory_stage2.py --sam3_checkpoint output/merged/es_rv_m.safetensors ...
    python stage2/train_memory_stage2.py ... --dry-run    # check everything, print the plan

The checkpoint is SAM 3's, or a student's of the earlier stages merged into it: the memory learns to work with its
backbone. The same command again resumes. The run's folder is ``--output_dir``, else ``OUTPUT``, else
``output/stage2/<name of the config>``; it holds ``config.json``, ``log_rank0.txt``, ``metrics.jsonl``,
``ckpt_epoch_N.pth``, ``best.pth`` and, at the end, ``model_final.pth``, which ``convert_memory_weights_stage2.py``
merges. Flags may be written with - or _.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sam3_train.config import add_common_args
from sam3_train.errors import run_cli

DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "base_memory.yaml"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_args(parser, cfg_required=False)
    parser.set_defaults(cfg=str(DEFAULT_CONFIG))
    parser.add_argument("--sam3-checkpoint", metavar="FILE", help="MODEL.SAM3_CHECKPOINT: sam3.pt or a merged student")
    parser.add_argument("--output-dir", dest="output", metavar="DIR", help="the same as --output")
    parser.add_argument("--subset-fraction", type=float, metavar="F", help="DATA.SUBSET_FRACTION: share of the videos")
    return parser


def with_hyphens(argv: list[str]) -> list[str]:
    """The words of a command line with ``--data_path`` written as ``--data-path``; values stay as they are."""
    words = []
    for word in argv:
        flag, equals, value = word.partition("=")
        words.append(flag.replace("_", "-") + equals + value if flag.startswith("--") else word)
    return words


def _train(argv: list[str] | None) -> int:
    args = build_parser().parse_args(with_hyphens(sys.argv[1:] if argv is None else argv))
    # torch is imported only once the flags are right.
    from sam3_train.distributed import training_run
    from stage2.run import prepare_run, train

    with training_run(args.device) as run:
        prepared = prepare_run(args, run)
        if run.is_main:
            print("\n".join(prepared.lines()), flush=True)
        if not args.dry_run:
            train(prepared)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_cli(_train, argv)


if __name__ == "__main__":
    sys.exit(main())
