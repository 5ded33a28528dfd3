"""Train the detector side of the tiny teacher: text, geometry encoder, fusion, decoder, scores and masks.

    python -m sam3_train.torchrun --nproc_per_node 2 data/demo/train_tiny_detector.py --device cpu --batch-size 2
    python data/demo/train_tiny_detector.py --device cuda --batch-size 16 --opts DATA.NUM_WORKERS 8
    python data/demo/train_tiny_detector.py --export-only                  # only write the weights of the newest run

The image trunk and the SAM heads come from ``--pretrained``, which ``train_tiny_names.py`` makes, and stay as they are,
bit for bit. The same command again resumes. The result is what the project ships, `data/demo/tiny_teacher.safetensors`;
``tiny_teacher.json`` says how it was made and what was measured on held-out scenes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from train_tiny_names import WEIGHTS as NAMED
from train_tiny_teacher import FIRST_SCENES, TRAINING_NOTE, build_parser, load_tiny, newest_checkpoint, run_recipe
from yacs.config import CfgNode

from sam3_train.config import training_defaults
from sam3_train.errors import run_cli
from sam3_train.run_record import package_versions

SCRIPT = "data/demo/train_tiny_detector.py"
PROMPTABLE_PARTS = (
    "backbone.vision_backbone.trunk.",
    "backbone.vision_backbone.sam2_convs.",
    "inst_interactive_predictor.",
)
"""Where the weights that are kept live in the model."""


def get_defaults() -> CfgNode:
    """The recipe: what made the shipped weights."""
    cfg = training_defaults()
    cfg.OUTPUT = "output/demo/teacher_detector"
    cfg.SAVE_FREQ = 1
    cfg.PRINT_FREQ = 25
    cfg.DATA = CfgNode({"BATCH_SIZE": 4, "LINEUPS": 3000, "SCENES": 4500, "VAL_SCENES": 120, "NUM_WORKERS": 2})
    cfg.MODEL = CfgNode({"PRETRAINED": str(NAMED)})
    cfg.PROMPTS = CfgNode({"PER_IMAGE": 5, "MASKED": 1, "ONE_TO_MANY": 3, "HINT_EPOCHS": 0.1})
    train = cfg.TRAIN
    train.EPOCHS = 2
    train.BASE_LR, train.MIN_LR, train.WARMUP_LR = 1.5e-3, 1e-5, 1e-5
    train.WARMUP_EPOCHS = 0.05
    train.OPTIMIZER.BETAS = [0.9, 0.98]
    train.WEIGHT_DECAY = 0.01
    train.CLIP_GRAD = 5.0
    train.EMA_DECAY = 0.998
    train.SAVE_EVERY_MINUTES = 5.0
    train.FIND_UNUSED_PARAMETERS = True  # not every batch has a point or a box among its prompts
    return cfg


def _main(argv: list[str] | None) -> int:
    return run_recipe(build_parser(__doc__).parse_args(argv), get_defaults(), SCRIPT, _train, _export)


def build_model(pretrained: Path, seed: int) -> Any:
    """The whole tiny model: trunk, SAM heads and tracker, if there is one, from a file, the detector fresh."""
    from sam3.config import Sam3Config
    from sam3.model_builder import build_sam3_image_model
    from sam3_train.rng import seed_everything

    trained = load_tiny(pretrained, "--pretrained")
    seed_everything(seed)
    model = build_sam3_image_model(
        load_from_HF=False,
        device="cpu",
        eval_mode=False,
        enable_inst_interactivity=True,
        enable_detector=True,
        enable_tracker=trained.has_tracker,
        config=Sam3Config.preset("tiny"),
    )
    kept = {name: value for name, value in trained.state_dict().items() if name.startswith(PROMPTABLE_PARTS)}
    model.load_state_dict(model.state_dict() | kept)
    return model


def _train(cfg: CfgNode, run: Any, args: argparse.Namespace) -> None:
    from teacher_data import build_pools
    from teacher_detector import DetectorTask, init_for_training
    from torch.utils.data import ConcatDataset, DataLoader

    from sam3_train.data.samplers import PartitionSampler, ResumableDistributedSampler
    from sam3_train.loop import fit

    model = build_model(Path(cfg.MODEL.PRETRAINED), cfg.SEED)
    output = Path(cfg.OUTPUT)
    init_for_training(model, cfg.SEED)
    num_scenes = cfg.DATA.LINEUPS + cfg.DATA.SCENES
    hint_steps = int(cfg.PROMPTS.HINT_EPOCHS * (num_scenes // (cfg.DATA.BATCH_SIZE * run.world_size)))
    prompts = cfg.PROMPTS
    task = DetectorTask(model, prompts.PER_IMAGE, prompts.MASKED, prompts.ONE_TO_MANY, hint_steps)
    if args.dry_run:
        trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
        print(f"{trained / 1e6:.2f} M parameters to train; scenes would go to {output}")
        return
    pools = build_pools(output, model.config, cfg, run.is_main, ("lineup", "alike", "val"))
    train_set: ConcatDataset[Any] = ConcatDataset([pools["lineup"], pools["alike"]])
    val_set = pools["val"]
    sampler = ResumableDistributedSampler(len(train_set), cfg.SEED, run.rank, run.world_size)
    fit(
        task,
        DataLoader(train_set, cfg.DATA.BATCH_SIZE, sampler=sampler, drop_last=True),
        DataLoader(val_set, 8, sampler=PartitionSampler(len(val_set), run.rank, run.world_size)),
        cfg,
        run,
        output,
        identity={"model": model.config.to_dict(), "preprocess": model.preprocess.to_dict()},
        resume=args.resume,
    )


def _export(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Write the whole teacher with the newest detector, and measure it on held-out scenes."""
    import torch
    from demo_eval import generate_test_scenes
    from detector_eval import evaluate_detector, evaluate_forms
    from teacher_detector import DetectorTask

    from sam3 import load_model
    from sam3.checkpoint_io import read_state_dict, sha256_file, write_merged
    from sam3.released_names import released_state_dict
    from sam3_train.checkpoint import load_checkpoint

    path = newest_checkpoint(cfg)
    state = load_checkpoint(path)
    pretrained = Path(cfg.MODEL.PRETRAINED)
    model = build_model(pretrained, cfg.SEED)
    DetectorTask(model).load_saved_state(state.get("ema") or state["model"], str(path))
    metadata = read_state_dict(pretrained)[1]
    provenance = {**metadata.get("provenance", {}), "detector_epoch": state["epoch"], "detector_step": state["step"]}
    metadata = {**metadata, "model": model.config.to_dict(), "provenance": provenance}
    write_merged(args.weights, released_state_dict(model), metadata, dtype=torch.float16)
    shipped, scenes = load_model(args.weights, device="cpu"), generate_test_scenes(args.test_scenes)
    scores = evaluate_detector(shipped, scenes)
    note, before = Path(cfg.OUTPUT) / TRAINING_NOTE, pretrained.with_suffix(".json")
    record = json.loads(before.read_text()) if before.is_file() else {}
    record["detector"] = {
        **(json.loads(note.read_text()) if note.is_file() else {}),
        "seed": cfg.SEED,
        "steps": state["step"],
        "test_scenes": args.test_scenes,
        "scores": scores,
        "scores_by_form": evaluate_forms(shipped, scenes),
        "scores_first_scenes": evaluate_detector(shipped, scenes[:FIRST_SCENES]),
        "versions": package_versions(("torch", "numpy", "pillow", "scikit-image")),
    }
    record["weights_sha256"] = sha256_file(args.weights)
    args.weights.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(scores))


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_cli(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
