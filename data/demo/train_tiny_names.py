"""Teach the trunk of the tiny teacher what shapes are called; the step between its promptable half and its detector.

    python -m sam3_train.torchrun --nproc_per_node 2 data/demo/train_tiny_names.py --device cpu --batch-size 4
    python data/demo/train_tiny_names.py --device cuda --batch-size 32 --opts DATA.NUM_WORKERS 8
    python data/demo/train_tiny_names.py --export-only                  # only write the weights of the newest run

Starts from ``--pretrained``, which ``train_tiny_teacher.py`` makes. At first the trunk alone learns names, from scenes
where they are easiest to tell; then trunk and SAM heads learn names and masks together. The same command again resumes.
The result has the layout of the file that it started from; by default it goes to
``output/demo/teacher_names/named.safetensors``, where ``train_tiny_detector.py`` expects it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from train_tiny_teacher import (
    PROMPTABLE,
    build_parser,
    build_promptable_model,
    load_tiny,
    newest_checkpoint,
    promptable_record,
    run_recipe,
)
from yacs.config import CfgNode

from sam3_train.config import training_defaults
from sam3_train.errors import run_cli

SCRIPT = "data/demo/train_tiny_names.py"
OUTPUT = Path("output/demo/teacher_names")
WEIGHTS = OUTPUT / "named.safetensors"


def get_defaults() -> CfgNode:
    """The recipe: what made the shipped weights."""
    cfg = training_defaults()
    cfg.OUTPUT = str(OUTPUT)
    cfg.SAVE_FREQ = 1
    cfg.PRINT_FREQ = 25
    cfg.DATA = CfgNode(
        {"BATCH_SIZE": 8, "PARADES": 2500, "LINEUPS": 3000, "SCENES": 4500, "VAL_SCENES": 120, "NUM_WORKERS": 2}
    )
    cfg.MODEL = CfgNode({"PRETRAINED": str(PROMPTABLE)})
    cfg.PROMPTS = CfgNode({"SCENES": 1, "PER_SCENE": 5})
    train = cfg.TRAIN
    train.PARADE_EPOCHS = 3  # the first stage
    train.EPOCHS = 3
    train.BASE_LR, train.MIN_LR, train.WARMUP_LR = 1.5e-3, 1e-5, 1e-5
    train.WARMUP_EPOCHS = 0.1
    train.OPTIMIZER.BETAS = [0.9, 0.95]
    train.WEIGHT_DECAY = 0.02
    train.CLIP_GRAD = 5.0
    train.EMA_DECAY = 0.998
    train.SAVE_EVERY_MINUTES = 5.0
    train.FIND_UNUSED_PARAMETERS = True
    return cfg


def _main(argv: list[str] | None) -> int:
    parser = build_parser(__doc__)
    parser.set_defaults(weights=WEIGHTS)
    return run_recipe(parser.parse_args(argv), get_defaults(), SCRIPT, _train, _export)


def load_promptable(path: Path) -> Any:
    """Trunk and SAM heads from a file, ready to be trained.

    Raises:
        UserError: If the file holds another model.
    """
    from sam3.config import Sam3Config

    model = build_promptable_model(Sam3Config.preset("tiny"))
    values = load_tiny(path, "MODEL.PRETRAINED").state_dict()
    model.load_state_dict({name: values[name] for name in model.state_dict()})
    return model


def _train(cfg: CfgNode, run: Any, args: argparse.Namespace) -> None:
    from teacher_data import build_pools
    from teacher_names import NamesTask
    from torch.utils.data import ConcatDataset, DataLoader

    from sam3_train.data.samplers import PartitionSampler, ResumableDistributedSampler
    from sam3_train.loop import fit
    from sam3_train.rng import seed_everything

    seed_everything(cfg.SEED)
    model = load_promptable(Path(cfg.MODEL.PRETRAINED))
    output = Path(cfg.OUTPUT)
    task = NamesTask(model, cfg.PROMPTS.SCENES, cfg.PROMPTS.PER_SCENE)
    if args.dry_run:
        trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
        print(f"{trained / 1e6:.2f} M parameters to train; scenes would go to {output}")
        return
    pools = build_pools(output, model.config, cfg, run.is_main, ("parade", "lineup", "alike", "val"))
    # First names alone, where they are easiest to tell; then everything, in scenes like those of the demo world.
    stages: tuple[tuple[str, Any, int, int, int], ...] = (
        ("parade", pools["parade"], cfg.DATA.BATCH_SIZE // 2, 0, cfg.TRAIN.PARADE_EPOCHS),
        (
            "scenes",
            ConcatDataset([pools["lineup"], pools["alike"]]),
            cfg.DATA.BATCH_SIZE,
            cfg.PROMPTS.SCENES,
            cfg.TRAIN.EPOCHS,
        ),
    )
    for name, train_set, batch_size, task.prompted_scenes, epochs in stages:
        stage = cfg.clone()
        stage.TRAIN.EPOCHS = epochs
        sampler = ResumableDistributedSampler(len(train_set), cfg.SEED, run.rank, run.world_size)
        fit(
            task,
            DataLoader(train_set, batch_size, sampler=sampler, drop_last=True),
            DataLoader(pools["val"], 8, sampler=PartitionSampler(len(pools["val"]), run.rank, run.world_size)),
            stage,
            run,
            output / name,
            identity={"model": model.config.to_dict(), "preprocess": model.preprocess.to_dict()},
        )


def _export(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Write the weights of the newest checkpoint and measure them on held-out scenes."""
    import torch
    from teacher_names import NamesTask

    from sam3.checkpoint_io import read_state_dict, write_merged
    from sam3.released_names import to_released
    from sam3_train.checkpoint import load_checkpoint

    pretrained = Path(cfg.MODEL.PRETRAINED)
    last_stage = cfg.clone()
    last_stage.OUTPUT = str(Path(cfg.OUTPUT) / "scenes")
    path = newest_checkpoint(last_stage)
    state = load_checkpoint(path)
    model = load_promptable(pretrained)
    NamesTask(model).load_saved_state(state.get("ema") or state["model"], str(path))
    metadata = read_state_dict(pretrained)[1]
    provenance = {**metadata.get("provenance", {}), "names_epoch": state["epoch"], "names_step": state["step"]}
    metadata = {**metadata, "provenance": provenance}
    write_merged(args.weights, to_released(model.state_dict(), model.config), metadata, dtype=torch.float16)
    record = promptable_record(cfg, args, state)
    before = pretrained.with_suffix(".json")
    if before.is_file():
        record["before"] = json.loads(before.read_text())
    args.weights.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["miou"]))


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_cli(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
