"""A training on generated clips that ``verify_training_pipeline.py`` looks into: its parts, and whole runs of it."""

from __future__ import annotations

import contextlib
import io
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sam3.model.clip_forward import ClipPlan, ClipPrompting, ClipResult, forward_clip
from sam3.model.efficient_sam3_train import EfficientSam3Train, features_of_objects
from sam3_train.distributed import RunContext
from sam3_train.optim import build_optimizer, parameter_groups, set_lr
from sam3_train.task import to_device
from stage2.data.clip_batch import ClipBatch
from stage2.generated_clips import write_videos
from stage2.run import PreparedRun, prepare_run, train
from stage2.starting_task import build_model, build_task
from stage2.task import Stage2Task
from stage2.train_memory_stage2 import build_parser
from stage2.training_clips import build_loaders

NUM_FRAMES, NUM_CLIPS, NUM_OBJECTS = 3, 2, 2
VIDEO_NAMES = tuple(f"generated_{i}" for i in range(4))


class Verification:
    """A training on generated clips, looked at step by step.

    Args:
        run: This process, alone.
        folder: Takes videos, runs and the merged file.
        base: The checkpoint to train in front of.
        config: The YAML to take other settings from.
        opts: More settings, as ``--opts`` takes them.
    """

    def __init__(self, run: RunContext, folder: Path, base: Path, config: Path, opts: tuple[str, ...] = ()) -> None:
        self.run, self.folder, self.base, self.config, self.opts = run, folder, base, config, opts
        self.printed = io.StringIO()
        """What the runs would have said."""

    def prepare(self, output: str, *more: str) -> PreparedRun:
        """A run through the preflight of the command: four clips of three frames in two steps."""
        videos = self.folder / "videos"
        if not videos.is_dir():
            write_videos(videos, VIDEO_NAMES)
        settings = {
            "DATA.DATASET": "sav_frames",
            "DATA.VAL_FRACTION": 0.0,
            "DATA.NUM_WORKERS": 0,
            "CLIPS.LENGTHS": [NUM_FRAMES],
            "CLIPS.MAX_OBJECTS": NUM_OBJECTS,
            "PROMPTS.NUM_PROMPTED": [1, 1],
            "PROMPTS.NUM_CORRECTED": [1, 1],
            "PROMPTS.CLICKS_PER_FRAME": 2,
            "FORWARD.PRESENCE_STEPS": 1000,
            "AUGMENT.FLIP_SHARE": 0.0,
            "MODEL.START_CLIPS": 2,
            "DISTILL.FORCED_SHARE": 0,  # masks and memories are what is checked
            "VAL.ENABLE": False,
            "TRAIN.EPOCHS": 1,
            "TRAIN.WARMUP_EPOCHS": 0.0,
            "TRAIN.LR_SCALING": "none",
            "TRAIN.BASE_LR": 3e-3,
            "TRAIN.WEIGHT_DECAY": 0.0,
        }
        words = [str(word) for pair in settings.items() for word in pair]
        flags: dict[str, object] = {"--cfg": self.config, "--sam3-checkpoint": self.base, "--data-path": videos}
        flags |= {"--output": self.folder / output, "--batch-size": NUM_CLIPS}
        argv = [str(word) for pair in flags.items() for word in pair]
        return prepare_run(build_parser().parse_args([*argv, *more, "--opts", *words, *self.opts]), self.run)

    @cached_property
    def prepared(self) -> PreparedRun:
        """The run whose parts are looked at; nothing is written."""
        return self.prepare("parts")

    @cached_property
    def task(self) -> Stage2Task:
        """Model and losses."""
        prepared = self.prepared
        torch.manual_seed(0)
        return build_task(prepared.cfg, prepared.base, self.model, self._loader, self.run, False)[0].to(self.run.device)

    @cached_property
    def model(self) -> EfficientSam3Train:
        """As a run starts."""
        torch.manual_seed(0)
        return build_model(self.prepared.cfg, self.prepared.base, self.run)

    @cached_property
    def _loader(self) -> Any:
        side = 4 * self.model.config.grid_size
        prepared = self.prepared
        return build_loaders(prepared.cfg, prepared.clips, prepared.base.preprocess, side, self.run, self.folder)[0]

    @cached_property
    def batch(self) -> dict[str, Any]:
        """The first one of an epoch."""
        return to_device(next(iter(self._loader)), self.run.device)

    @property
    def clips(self) -> ClipBatch:
        """Its clips."""
        return self.batch["clips"]

    def play(self, plan: ClipPlan) -> ClipResult:
        """Track the batch's objects."""
        model = self.model
        features = model.clip_features(self.clips.images(model.preprocess), 1)
        rows = features_of_objects(features, self.clips.clip_of_object)
        generator, prompting = torch.Generator().manual_seed(0), ClipPrompting(clicks_per_frame=2)
        coverage = self.clips.coverage_tbhw()
        return forward_clip(model, rows, coverage, plan, prompting, generator=generator, force_presence=True)

    def optimizer(self) -> torch.optim.Optimizer:
        """A new one for the task, at the base rate."""
        train, task = self.prepared.cfg.TRAIN, self.task
        groups = parameter_groups(task, train.WEIGHT_DECAY, task.lr_scale, task.has_weight_decay)
        optimizer = build_optimizer(groups, train, self.run.device)
        set_lr(optimizer, train.BASE_LR)
        return optimizer

    def step(self, optimizer: torch.optim.Optimizer) -> float:
        """One step on the batch, always with the same prompts; the loss before it."""
        self.task.train()
        torch.manual_seed(0)
        optimizer.zero_grad(set_to_none=True)
        loss = self.task(self.batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.task.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    def train(self, output: str, *more: str) -> Path:
        """A run through the loop, or what is left of it; its folder."""
        with contextlib.redirect_stdout(self.printed), contextlib.redirect_stderr(self.printed):
            train(self.prepare(output, *more))
        return self.folder / output

    @property
    def merged(self) -> Path:
        """Where the merged file goes."""
        return self.folder / "merged.safetensors"
