"""A training run from its flags to its end: settings, preflight, plan, training."""

from __future__ import annotations

import argparse
import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

from sam3.config import Sam3Config
from sam3.model.student_encoder import build_student
from sam3_train.checkpoint import CheckpointManager, load_checkpoint, load_common
from sam3_train.config import apply_flags, load_config, set_key, write_run_record
from sam3_train.distributed import RunContext
from sam3_train.errors import attempt, require_no_problems
from sam3_train.loop import fit_many
from sam3_train.run_lock import RunLock
from sam3_train.schedule import Schedule, build_schedule, lr_warning
from sam3_train.train_state import BatchLayout, resume_problems
from stage1.config import get_defaults
from stage1.preflight import (
    TrainingData,
    check_data,
    check_disk,
    check_settings,
    check_students,
    default_output,
)
from stage1.training import build_members, build_source, run_identity

FLOAT_BYTES = 4


@dataclass(frozen=True)
class TrainingPlan:
    """What a run is about to do, before it does it."""

    names: list[str]
    parameters: list[int]
    """Trainable parameters of each student."""
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


@dataclass(frozen=True)
class PreparedRun:
    """Settings that passed the preflight, and what it opened."""

    cfgs: list[CfgNode]
    outputs: list[Path]
    data: TrainingData
    plan: TrainingPlan


def read_configs(args: argparse.Namespace) -> tuple[list[CfgNode], list[Path]]:
    """The config of each student, flags applied, and its run folder.

    Raises:
        UserError: If a file, key or value is wrong.
    """
    cfgs = []
    for cfg_file in args.cfg:
        cfg = load_config(get_defaults(), cfg_file, args.opts)
        apply_flags(cfg, args)
        for flag, key in (
            ("teacher_embed_path", "DISTILL.TEACHER_EMBED_PATH"),
            ("accumulation_steps", "TRAIN.ACCUMULATION_STEPS"),
            ("use_sync_bn", "TRAIN.USE_SYNC_BN"),
            ("online_teacher", "DISTILL.ONLINE_TEACHER"),
        ):
            value = getattr(args, flag)
            if value not in (None, False):
                set_key(cfg, key, value, "--" + flag.replace("_", "-"))
        cfg.MODEL.NAME = cfg.MODEL.NAME or Path(cfg_file).stem
        cfgs.append(cfg)
    return cfgs, _choose_outputs(cfgs, args.cfg)


def _choose_outputs(cfgs: list[CfgNode], cfg_files: list[str]) -> list[Path]:
    if len(cfgs) == 1:
        cfgs[0].OUTPUT = cfgs[0].OUTPUT or default_output(cfg_files)
        return [Path(cfgs[0].OUTPUT)]
    for cfg in cfgs:
        cfg.OUTPUT = str(Path(cfg.OUTPUT or "output/stage1") / cfg.MODEL.NAME)
    return [Path(cfg.OUTPUT) for cfg in cfgs]


def prepare_run(args: argparse.Namespace, run: RunContext) -> PreparedRun:
    """Check everything that can be checked before computing.

    Raises:
        UserError: With all problems at once.
    """
    cfgs, outputs = read_configs(args)
    problems: list[str] = []
    if len(cfgs) > 1 and args.resume:
        problems.append("--resume names one checkpoint, but several students train; each resumes from its own folder")
    models = check_students(cfgs, problems)
    check_settings(cfgs[0], problems, run.is_main)
    data = check_data(cfgs[0], run.world_size, problems, run.is_main)
    if data is None or len(models) < len(cfgs):
        require_no_problems(problems)
        raise AssertionError("the preflight found no data and no problem")
    if run.is_main and not (len(cfgs) > 1 and args.resume):  # rank 0 alone reads checkpoints, the others may lack them
        problems += attempt(problems, lambda: check_resume(cfgs, models, data, outputs, run.world_size)) or []
    plan = attempt(problems, lambda: build_plan(cfgs, models, outputs, data, run))
    if plan is not None:
        check_disk(outputs[0], plan.disk_bytes, "the checkpoints", problems)
    require_no_problems(problems)
    assert plan is not None
    return PreparedRun(cfgs, outputs, data, plan)


def check_resume(
    cfgs: list[CfgNode], models: list[Sam3Config], data: TrainingData, outputs: list[Path], world_size: int
) -> list[str]:
    """Compare the checkpoints that a run would continue from with its settings (D-43, D-44, D-47).

    A damaged newest checkpoint is passed over here as it is in the run.

    Returns:
        What speaks against continuing; empty if nothing does, or the run is a new one.

    Raises:
        UserError: If there is a run that cannot be continued.
    """
    cfg = cfgs[0]
    found: list[tuple[Path, dict[str, Any]]] = []
    if cfg.MODEL.RESUME:
        found = [(Path(cfg.MODEL.RESUME), load_checkpoint(cfg.MODEL.RESUME))]
    elif all(output.is_dir() for output in outputs):
        managers = [CheckpointManager(output, warn=lambda line: None) for output in outputs]
        found = load_common(managers) or []
    problems = []
    for (path, state), cfg, model in zip(found, cfgs, models, strict=False):
        # An online teacher is not loaded yet; the loop compares it when it is.
        online = state.get("identity", {}).get("teacher", {})
        identity = run_identity(
            model, data.preprocess, data.train, online if data.store is None else data.store.spec.teacher
        )
        layout = BatchLayout(cfg.DATA.BATCH_SIZE, cfg.TRAIN.ACCUMULATION_STEPS, world_size)
        order = {"num_samples": len(data.train), "seed": cfg.SEED, "shuffle": True}
        listed = resume_problems(identity, state, layout, order)
        if not cfg.TRAIN.AUTO_RESUME and not cfg.MODEL.RESUME:
            listed = ["TRAIN.AUTO_RESUME is off"]
        problems += [f"{path} belongs to another run: {problem}" for problem in listed]
    return [f"{problem} (choose another --output, or restore the settings)" for problem in problems]


def build_plan(
    cfgs: list[CfgNode], models: list[Sam3Config], outputs: list[Path], data: TrainingData, run: RunContext
) -> TrainingPlan:
    """Count what a run will do.

    Raises:
        UserError: If a setting of the schedule is impossible.
    """
    cfg, train = cfgs[0], cfgs[0].TRAIN
    parameters, state_sizes = [], []
    with torch.device("meta"):
        for model in models:
            student = build_student(model)
            parameters.append(sum(p.numel() for p in student.parameters()))
            state_sizes.append(sum(value.numel() for value in student.state_dict().values()))
    global_batch = cfg.DATA.BATCH_SIZE * run.world_size * train.ACCUMULATION_STEPS
    num_batches = len(data.train) // run.world_size // cfg.DATA.BATCH_SIZE
    per_epoch = math.ceil(num_batches / max(1, train.ACCUMULATION_STEPS))
    schedule = build_schedule(train, per_epoch, global_batch)
    num_steps = train.EPOCHS * per_epoch
    checkpoint_bytes = FLOAT_BYTES * sum(
        state * (2 if train.EMA_DECAY else 1) + 2 * trained
        for state, trained in zip(state_sizes, parameters, strict=True)
    )
    # The last ones, the best one, every n-th, and one that is being written.
    kept = max(2, train.KEEP_LAST) + 2 + (train.EPOCHS // train.KEEP_EVERY if train.KEEP_EVERY else 0)
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
        disk_bytes=checkpoint_bytes * kept,
    )


def _describe_source(cfg: CfgNode, data: TrainingData) -> str:
    if data.store is None:
        return f"in the loop, weights {cfg.MODEL.SAM3_CHECKPOINT or 'from the hub'}"
    gigabytes = len(data.train) * data.store.spec.record_bytes / 1e9
    return f"stored embeddings {data.store.directory} ({data.store.spec.codec}, {gigabytes:.2f} GB read per epoch)"


def train(prepared: PreparedRun, run: RunContext) -> None:
    """Train the students of a prepared run. Collective.

    Raises:
        UserError: If another run writes to a folder of this one; nothing of that run is touched.
    """
    with contextlib.ExitStack() as stack:
        for output in prepared.outputs if run.is_main else ():
            stack.callback(RunLock(output).release)
        _train_locked(prepared, run)


def _train_locked(prepared: PreparedRun, run: RunContext) -> None:
    def log(message: str) -> None:
        if run.is_main:
            print(message, flush=True)

    cfg = prepared.cfgs[0]
    source = build_source(cfg, prepared.data, run, prepared.outputs[0])
    scale = source.variance_c
    variance = {"min": float(scale.min()), "mean": float(scale.mean()), "max": float(scale.max())}
    log(
        f"teacher features: variance per channel {variance['min']:.3g} .. {variance['max']:.3g}, mean "
        f"{variance['mean']:.3g}; squared error in units of {cfg.DISTILL.NORMALIZE} variance"
    )
    members = build_members(prepared.cfgs, prepared.outputs, prepared.data, source, run, log)

    def write_records() -> None:
        for member in members if run.is_main else ():
            facts = {
                "identity": member.identity,
                "world_size": run.world_size,
                "num_train_images": len(prepared.data.train),
                "num_val_images": prepared.plan.num_val,
                "train_keys_sha256": prepared.data.train.sha256,
                "teacher_variance": variance,
            }
            write_run_record(member.output, member.cfg, facts)

    fit_many(members, source.train, source.val, run, prepare_batch=source.prepare_batch, on_ready=write_records)
