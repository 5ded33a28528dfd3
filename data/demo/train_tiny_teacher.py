"""Train the tiny teacher of the demo: preset `tiny`, image path and SAM heads, on generated scenes.

    python -m sam3_train.torchrun --nproc_per_node 2 data/demo/train_tiny_teacher.py --device cpu --batch-size 2
    python data/demo/train_tiny_teacher.py --device cuda --batch-size 16   # one GPU
    python data/demo/train_tiny_teacher.py --export-only                   # only write the weights of the newest run

The first line is for two CPU cores: ``--batch-size`` counts scenes per process, and two times two are the four scenes
per step that the recipe's schedule was made for.
The same command again resumes. The run's folder (default ``output/demo/teacher``) holds the generated scenes, the
checkpoints and ``log_rank0.txt``. The result is ``output/demo/teacher/promptable.safetensors`` (fp16, the released
layout) and a JSON file beside it: command, seed, time, device, and mIoU on the held-out test scenes of the demo world.
It is the first of the steps that make the shipped file, ``data/demo/tiny_teacher.safetensors``; `train_tiny_names.py`
and `train_tiny_detector.py` follow.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from sam3_train.config import add_common_args, apply_flags, load_config, training_defaults
from sam3_train.errors import UserError, run_cli
from sam3_train.run_record import package_versions

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE / "tiny_teacher.safetensors"
RECORD = HERE / "tiny_teacher.json"
PROMPTABLE = Path("output/demo/teacher/promptable.safetensors")
TRAINING_NOTE = "training.json"
SCRIPT = "data/demo/train_tiny_teacher.py"
FIRST_SCENES = 6
"""So many of the test scenes are scored apart, for a quick check of the shipped file."""


def get_defaults() -> CfgNode:
    """The recipe: what made the shipped weights."""
    cfg = training_defaults()
    cfg.OUTPUT = "output/demo/teacher"
    cfg.SAVE_FREQ = 1
    cfg.PRINT_FREQ = 25
    cfg.DATA = CfgNode({"BATCH_SIZE": 4, "TRAIN_SCENES": 4500, "VAL_SCENES": 120, "NUM_WORKERS": 1})
    cfg.PROMPTS = CfgNode({"PER_IMAGE": 8, "CORRECTIONS": 1, "BALANCED_EPOCHS": 0.4, "MORE_CORRECTIONS_FROM": 0.8})
    train = cfg.TRAIN
    train.EPOCHS = 3
    train.BASE_LR, train.MIN_LR, train.WARMUP_LR = 1.5e-3, 1e-5, 1e-5
    train.WARMUP_EPOCHS = 0.1
    train.OPTIMIZER.BETAS = [0.9, 0.95]
    train.WEIGHT_DECAY = 0.05
    train.CLIP_GRAD = 1.0
    train.EMA_DECAY = 0.998
    train.SAVE_EVERY_MINUTES = 5.0
    train.FIND_UNUSED_PARAMETERS = True  # the first steps have no corrections, so nothing reads a mask prompt
    return cfg


def build_parser(description: str | None = __doc__) -> argparse.ArgumentParser:
    """The command line of both halves of the tiny teacher's training."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, conflict_handler="resolve"
    )
    add_common_args(parser, cfg_required=False)
    parser.add_argument(
        "--export-only", action="store_true", help="write the weights of the newest checkpoint and stop"
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, metavar="FILE", help="where the weights go")
    parser.add_argument("--test-scenes", type=int, default=60, metavar="N", help="held-out scenes in the record")
    return parser


def run_recipe(
    args: argparse.Namespace,
    defaults: CfgNode,
    script: str,
    train: Callable[[CfgNode, Any, argparse.Namespace], None],
    export: Callable[[CfgNode, argparse.Namespace], None],
) -> int:
    """Train and export one part of the tiny teacher; returns the exit code.

    Args:
        args: From `build_parser`.
        defaults: The part's settings, before ``--cfg`` and flags.
        script: The part's own file, for the record.
        train: Called with the settings, the run and the flags, unless only an export is wanted.
        export: Called on the main process afterwards.
    """
    cfg = load_config(defaults, args.cfg, args.opts or [])
    apply_flags(cfg, args)
    # torch is imported only once the flags are right.
    from sam3_train.distributed import training_run

    with training_run(args.device) as run:
        if not args.export_only:
            started = time.time()
            train(cfg, run, args)
            if run.is_main and not args.dry_run:
                note_training(Path(cfg.OUTPUT) / TRAINING_NOTE, script, time.time() - started, run)
        if run.is_main and not args.dry_run:
            export(cfg, args)
    return 0


def _main(argv: list[str] | None) -> int:
    parser = build_parser()
    parser.set_defaults(weights=PROMPTABLE)
    return run_recipe(parser.parse_args(argv), get_defaults(), SCRIPT, _train, _export)


def _train(cfg: CfgNode, run: Any, args: argparse.Namespace) -> None:
    from teacher_data import PoolSpec, ScenePool, build_pool
    from teacher_task import PromptableTask, init_for_training
    from torch.utils.data import DataLoader

    from sam3.config import Sam3Config
    from sam3_train.data.samplers import PartitionSampler, ResumableDistributedSampler
    from sam3_train.distributed import barrier
    from sam3_train.loop import fit
    from sam3_train.rng import seed_everything

    seed_everything(cfg.SEED)
    config = Sam3Config.preset("tiny")
    output = Path(cfg.OUTPUT)
    pools = {
        split: (output / f"pool_{split}", PoolSpec.for_model(config, split, count, cfg.SEED))
        for split, count in (("train", cfg.DATA.TRAIN_SCENES), ("val", cfg.DATA.VAL_SCENES))
    }
    if run.is_main and not args.dry_run:
        for folder, spec in pools.values():
            build_pool(folder, spec, cfg.DATA.NUM_WORKERS)
    barrier()
    model = build_promptable_model(config)
    init_for_training(model, cfg.SEED)
    if args.dry_run:
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; scenes would go to {output}")
        return
    train_set, val_set = (ScenePool(folder) for folder, _ in pools.values())
    batch_size = cfg.DATA.BATCH_SIZE
    sampler = ResumableDistributedSampler(len(train_set), cfg.SEED, run.rank, run.world_size)
    steps_per_epoch = len(train_set) // (batch_size * run.world_size)
    task = PromptableTask(
        model,
        cfg.PROMPTS.PER_IMAGE,
        cfg.PROMPTS.CORRECTIONS,
        int(cfg.PROMPTS.BALANCED_EPOCHS * steps_per_epoch),
        int(cfg.PROMPTS.MORE_CORRECTIONS_FROM * cfg.TRAIN.EPOCHS * steps_per_epoch),
    )
    fit(
        task,
        DataLoader(train_set, batch_size, sampler=sampler, drop_last=True),
        DataLoader(val_set, 8, sampler=PartitionSampler(len(val_set), run.rank, run.world_size)),
        cfg,
        run,
        output,
        identity={"model": config.to_dict(), "preprocess": model.preprocess.to_dict()},
        resume=args.resume,
    )


def build_promptable_model(config: Any) -> Any:
    """Trunk, both necks and SAM heads with fresh weights; `train_tiny_detector.py` adds the rest."""
    from sam3.model_builder import build_sam3_image_model

    return build_sam3_image_model(
        load_from_HF=False,
        device="cpu",
        eval_mode=False,
        enable_inst_interactivity=True,
        enable_detector=False,
        config=config,
    )


def load_tiny(path: Path, setting: str) -> Any:
    """A tiny teacher from a file, in eval mode on the CPU, with whatever parts it has.

    Raises:
        UserError: If the file holds another model; ``setting`` is where its name came from.
    """
    from sam3 import load_model
    from sam3.config import Sam3Config

    trained = load_model(path, device="cpu")
    if trained.config.trunk != Sam3Config.preset("tiny").trunk or trained.config.student is not None:
        raise UserError(f"{setting} {path}: holds {trained.config.name!r}, not the tiny teacher")
    return trained


def newest_checkpoint(cfg: CfgNode) -> Path:
    """The run's newest verified checkpoint.

    Raises:
        UserError: If there is none.
    """
    from sam3_train.checkpoint import CheckpointManager

    newest = CheckpointManager(Path(cfg.OUTPUT), cfg.TRAIN.KEEP_LAST, cfg.TRAIN.KEEP_EVERY).newest
    if newest is None:
        raise UserError(f"{cfg.OUTPUT} holds no checkpoint: train first, without --export-only")
    return Path(cfg.OUTPUT) / newest["file"]


def note_training(path: Path, script: str, seconds: float, run: Any) -> None:
    """Keep what the record will say about the training; the seconds of a resumed run add up."""
    before = json.loads(path.read_text()) if path.is_file() else {}
    note = {
        "command": " ".join(["python", script, *sys.argv[1:]]),
        "training_seconds": round(before.get("training_seconds", 0) + seconds),
        "training_device": f"{run.world_size} x {run.device}, {torch_threads()} threads each",
    }
    path.write_text(json.dumps({**before, **note}, indent=2))


def torch_threads() -> int:
    """Threads that torch computes with."""
    import torch

    return torch.get_num_threads()


def _export(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Write the weights of the newest checkpoint and measure them on held-out scenes, through the predictor."""
    import torch
    from teacher_task import PromptableTask

    from sam3.checkpoint_io import write_merged
    from sam3.config import Sam3Config
    from sam3.released_names import to_released
    from sam3_train.checkpoint import load_checkpoint

    path = newest_checkpoint(cfg)
    state = load_checkpoint(path)
    config = Sam3Config.preset("tiny")
    model = build_promptable_model(config)
    task = PromptableTask(model)
    task.load_saved_state(state.get("ema") or state["model"], str(path))
    metadata = {
        "variant": "tiny",
        "model": config.to_dict(),
        "preprocess": model.preprocess.to_dict(),
        "provenance": {"epoch": state["epoch"], "step": state["step"], "seed": cfg.SEED},
    }
    write_merged(args.weights, to_released(model.state_dict(), config), metadata, dtype=torch.float16)
    record = promptable_record(cfg, args, state)
    args.weights.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["miou"]))


def promptable_record(cfg: CfgNode, args: argparse.Namespace, state: dict[str, Any]) -> dict[str, Any]:
    """What is noted beside written weights: how they were made, and the masks of prompts on held-out scenes."""
    from demo_eval import evaluate_promptable, generate_test_scenes

    from sam3 import load_model
    from sam3.checkpoint_io import sha256_file

    shipped = load_model(args.weights, device="cpu")
    scenes = generate_test_scenes(args.test_scenes)
    note = Path(cfg.OUTPUT) / TRAINING_NOTE
    return {
        **(json.loads(note.read_text()) if note.is_file() else {}),
        "seed": cfg.SEED,
        "steps": state["step"],
        "test_scenes": args.test_scenes,
        "miou": evaluate_promptable(shipped, scenes),
        "miou_first_scenes": evaluate_promptable(shipped, scenes[:FIRST_SCENES]),
        "weights_sha256": sha256_file(args.weights),
        "versions": package_versions(("torch", "numpy", "pillow", "scikit-image")),
    }


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_cli(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
