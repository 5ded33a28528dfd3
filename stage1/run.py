"""A training run from its flags to its end: settings, preflight, plan, training."""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import dataclass
from pathlib import Path

from yacs.config import CfgNode

from sam3_train.config import read_run_config, write_run_record
from sam3_train.distributed import RunContext
from sam3_train.errors import attempt, require_no_problems
from sam3_train.loop import fit_many
from sam3_train.run_lock import RunLock
from sam3_train.training_data import TrainingData, check_data, check_disk
from sam3_train.training_plan import TrainingPlan, build_plan, check_resume
from sam3_train.training_source import build_source
from stage1.config import get_defaults
from stage1.preflight import AGREEMENT_REMEDY, check_settings, check_students, default_output
from stage1.training import build_members


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
    cfgs = [read_run_config(get_defaults(), cfg_file, args) for cfg_file in args.cfg]
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
    val = cfgs[0].VAL
    # Only the main process compares the teacher's file with the store.
    heads_file = cfgs[0].MODEL.SAM3_CHECKPOINT if run.is_main and val.ENABLE and val.MASK_AGREEMENT else ""
    data = check_data(cfgs[0], run.world_size, problems, heads_file, AGREEMENT_REMEDY)
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
