"""What a training run is about to do and whether it may continue an earlier one, known before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

from sam3.config import Sam3Config
from sam3.model.student_encoder import build_student
from sam3.preprocess import Preprocess
from sam3_train.checkpoint import CheckpointManager, load_checkpoint, load_common
from sam3_train.data.image_index import ImageIndex
from sam3_train.distributed import RunContext
from sam3_train.schedule import Schedule, build_schedule, lr_warning
from sam3_train.train_state import BatchLayout, resume_problems
from sam3_train.training_data import TrainingData

FLOAT_BYTES = 4


@dataclass(frozen=True)
class TrainingPlan:
    """What a run is about to do, before it does it."""

    names: list[str]
    parameters: list[int]
    """Trainable parameters of each student, and of what is trained with it."""
    outputs: list[Path]
    num_train: int
    num_val: int
    source: str
    batch: str
    num_epochs: int
    steps_per_epoch: int
    num_steps: int
    schedule: Schedule
    warning: str | None
    checkpoint_bytes: int
    """Of one checkpoint of each student, together."""
    disk_bytes: int
    """Of all checkpoints that stay on disk, and the one being written."""

    def lines(self) -> list[str]:
        """The plan as a person reads it."""
        students = [
            f"student   {name}: {parameters / 1e6:.2f} M parameters, {output}"
            for name, parameters, output in zip(self.names, self.parameters, self.outputs, strict=True)
        ]
        lr = self.schedule
        return [
            *students,
            f"images    {self.num_train:,} train, {self.num_val:,} val",
            f"teacher   {self.source}",
            f"batch     {self.batch}",
            f"steps     {self.num_steps:,} ({self.num_epochs} epochs of {self.steps_per_epoch:,})",
            f"rate      {lr.warmup_lr:.2e} to {lr.base_lr:.2e} in {lr.warmup_steps:,} steps, {lr.name} to "
            f"{lr.min_lr:.2e}",
            *([f"warning: {self.warning}"] if self.warning else []),
            f"disk      {self.checkpoint_bytes / 1e6:.1f} MB per checkpoint, {self.disk_bytes / 1e6:.1f} MB in all",
        ]


def run_identity(
    model: Sam3Config, preprocess: Preprocess, train: ImageIndex, teacher: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """What must stay the same for a run to be continued; stored in its checkpoints.

    Args:
        model: The student's model.
        preprocess: Pixels to tensor.
        train: The training images.
        teacher: What is known about the teacher.
        more: What else a stage depends on, as plain values.
    """
    return {
        "model": model.to_dict(),
        "preprocess": preprocess.to_dict(),
        "teacher": teacher,
        "train_images_sha256": train.sha256,
        **more,
    }


def check_resume(
    cfgs: list[CfgNode],
    models: list[Sam3Config],
    data: TrainingData,
    outputs: list[Path],
    world_size: int,
    more_identity: dict[str, Any] | None = None,
) -> list[str]:
    """Compare the checkpoints that a run would continue from with its settings (D-43, D-44, D-47).

    A damaged newest checkpoint is passed over here as it is in the run.

    Args:
        cfgs: Of each student.
        models: Of each student.
        data: What the run reads.
        outputs: Run folder of each student.
        world_size: Processes of this run.
        more_identity: What the stage adds to `run_identity`.

    Returns:
        What speaks against continuing; empty if nothing does, or the run is a new one.

    Raises:
        UserError: If there is a run that cannot be continued.
    """
    problems = []
    for (path, state), cfg, model in zip(resume_states(cfgs[0], outputs), cfgs, models, strict=False):
        # An online teacher is not loaded yet; the loop compares it when it is.
        online = state.get("identity", {}).get("teacher", {})
        teacher = online if data.store is None else data.store.spec.teacher
        identity = run_identity(model, data.preprocess, data.train, teacher, **(more_identity or {}))
        problems += resume_refusals(path, state, cfg, identity, len(data.train), world_size)
    return problems


def resume_states(cfg: CfgNode, outputs: list[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """The checkpoints that a run would continue from, one for each folder; none for a new run.

    Args:
        cfg: Settings, of which ``MODEL.RESUME`` is read.
        outputs: Run folders.

    Raises:
        UserError: If there is a run that cannot be continued.
    """
    if cfg.MODEL.RESUME:
        return [(Path(cfg.MODEL.RESUME), load_checkpoint(cfg.MODEL.RESUME))]
    if not all(output.is_dir() for output in outputs):
        return []
    return load_common([CheckpointManager(output, warn=lambda line: None) for output in outputs]) or []


def resume_refusals(
    path: Path, state: dict[str, Any], cfg: CfgNode, identity: dict[str, Any], num_samples: int, world_size: int
) -> list[str]:
    """What speaks against continuing from a checkpoint.

    Args:
        path: The checkpoint.
        state: Its content.
        cfg: The settings of the run.
        identity: What must be the same.
        num_samples: Of an epoch, as the sampler counts them.
        world_size: Processes of this run.
    """
    layout = BatchLayout(cfg.DATA.BATCH_SIZE, cfg.TRAIN.ACCUMULATION_STEPS, world_size)
    listed = resume_problems(identity, state, layout, {"num_samples": num_samples, "seed": cfg.SEED, "shuffle": True})
    if not cfg.TRAIN.AUTO_RESUME and not cfg.MODEL.RESUME:
        listed = ["TRAIN.AUTO_RESUME is off"]
    return [
        f"{path} belongs to another run: {each} (choose another --output, or restore the settings)" for each in listed
    ]


def resumes(cfg: CfgNode, output: Path) -> bool:
    """Whether a run would continue from a checkpoint, so that its initial weights need not be read."""
    if cfg.MODEL.RESUME:
        return True
    # After a crash in the first save there is a pointer that names no checkpoint.
    return bool(cfg.TRAIN.AUTO_RESUME and output.is_dir() and CheckpointManager(output).newest is not None)


def build_plan(
    cfgs: list[CfgNode],
    models: list[Sam3Config],
    outputs: list[Path],
    data: TrainingData,
    run: RunContext,
    more_parameters: int = 0,
) -> TrainingPlan:
    """Count what a run will do.

    Args:
        cfgs: Of each student.
        models: Of each student.
        outputs: Run folder of each student.
        data: What the run reads.
        run: This process.
        more_parameters: Trained beside each student.

    Raises:
        UserError: If a setting of the schedule is impossible.
    """
    cfg, train = cfgs[0], cfgs[0].TRAIN
    parameters, state_sizes = [], []
    with torch.device("meta"):
        for model in models:
            student = build_student(model)
            parameters.append(sum(p.numel() for p in student.parameters()) + more_parameters)
            state_sizes.append(sum(value.numel() for value in student.state_dict().values()) + more_parameters)
    global_batch = cfg.DATA.BATCH_SIZE * run.world_size * train.ACCUMULATION_STEPS
    num_batches = len(data.train) // run.world_size // cfg.DATA.BATCH_SIZE
    per_epoch = math.ceil(num_batches / max(1, train.ACCUMULATION_STEPS))
    schedule = build_schedule(train, per_epoch, global_batch)
    num_steps = train.EPOCHS * per_epoch
    checkpoint_bytes = FLOAT_BYTES * sum(
        state * (2 if train.EMA_DECAY else 1) + 2 * trained
        for state, trained in zip(state_sizes, parameters, strict=True)
    )
    return TrainingPlan(
        names=[c.MODEL.NAME for c in cfgs],
        parameters=parameters,
        outputs=outputs,
        num_train=len(data.train),
        num_val=len(data.val) if data.val is not None else 0,
        source=_describe_source(cfg, data),
        batch=(
            f"{global_batch} images per step: {cfg.DATA.BATCH_SIZE} x {train.ACCUMULATION_STEPS} accumulated x "
            f"{run.world_size} processes on {run.device.type}"
        ),
        num_epochs=train.EPOCHS,
        steps_per_epoch=per_epoch,
        num_steps=min(num_steps, train.MAX_STEPS) if train.MAX_STEPS else num_steps,
        schedule=schedule,
        warning=lr_warning(schedule, train.OPTIMIZER.NAME, train.LR_SCALING),
        checkpoint_bytes=checkpoint_bytes,
        disk_bytes=checkpoint_bytes * num_kept_checkpoints(train),
    )


def num_kept_checkpoints(train: CfgNode) -> int:
    """The last ones, the best one, every n-th, and one that is being written."""
    return max(2, train.KEEP_LAST) + 2 + (train.EPOCHS // train.KEEP_EVERY if train.KEEP_EVERY else 0)


def _describe_source(cfg: CfgNode, data: TrainingData) -> str:
    if data.store is None:
        return f"in the loop, weights {cfg.MODEL.SAM3_CHECKPOINT or 'from the hub'}"
    gigabytes = len(data.train) * data.store.spec.record_bytes / 1e9
    left_out = [f"{count} {split} images" for split, count in data.num_quarantined.items()]
    return f"stored embeddings {data.store.directory} ({data.store.spec.codec}, {gigabytes:.2f} GB read per epoch)" + (
        f"; {' and '.join(left_out)} that the export quarantined are left out" if left_out else ""
    )
