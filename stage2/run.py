"""A training of the memory from its flags to its end: settings, preflight, plan, training, the final file."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from sam3.checkpoint_io import sha256_file
from sam3.model.efficient_sam3_model_builder import save_efficient_sam3_checkpoint
from sam3_train.checkpoint import CheckpointManager, load_common
from sam3_train.config import config_to_dict, read_run_config, write_run_record
from sam3_train.distributed import RunContext, broadcast_object, is_main
from sam3_train.errors import UserError, attempt, require_no_problems
from sam3_train.learner import Member
from sam3_train.loop import fit_many
from sam3_train.rng import seed_everything
from sam3_train.run_lock import RunLock
from sam3_train.training_data import check_disk
from sam3_train.training_plan import resume_refusals, resume_states, resumes
from stage2.base_file import frozen_sha256
from stage2.config import get_defaults
from stage2.feature_cache import FeatureCache
from stage2.plan import MemoryPlan, build_plan, plan_lines
from stage2.preflight import BaseFile, check_cache_room, check_settings, read_base
from stage2.starting_task import build_model, build_task
from stage2.task import Stage2Task
from stage2.trained_memory import STAGE, read_trained_memory
from stage2.training_clips import TrainingClips, build_loaders, clip_sampler, fill_cache, open_clips, trunk_dtype

FINAL_NAME = "model_final.pth"
"""The trained memory with the heads that it was trained with, its description and where it comes from."""


@dataclass(frozen=True)
class PreparedRun:
    """Settings that passed the preflight, and what it opened."""

    cfg: CfgNode
    output: Path
    base: BaseFile
    clips: TrainingClips
    identity: dict[str, Any]
    """What must stay the same for the run to be continued; in each of its checkpoints."""
    plan: MemoryPlan
    run: RunContext
    cache: FeatureCache | None
    """Where the backbone's features are kept, if they are."""

    def lines(self) -> list[str]:
        """The plan as a person reads it."""
        return plan_lines(self.cfg, self.output, self.base, self.clips, self.plan, self.run)


def read_config(args: argparse.Namespace) -> CfgNode:
    """The settings, flags applied.

    Raises:
        UserError: If a file, key or value is wrong.
    """
    return read_run_config(get_defaults(), args.cfg, args, "output/stage2")


def prepare_run(args: argparse.Namespace, run: RunContext) -> PreparedRun:
    """Check everything that can be checked before computing. Collective.

    Raises:
        UserError: With all problems at once.
    """
    cfg = read_config(args)
    output, problems = Path(cfg.OUTPUT), list[str]()
    check_settings(cfg, problems, run.is_main)
    base = attempt(problems, lambda: read_base(cfg))
    clips = open_clips(cfg, problems)
    if base is None or clips is None or problems:
        require_no_problems(problems)
        raise AssertionError("the preflight found no data or no checkpoint, and no problem")
    identity = _identity(base, clips, cfg)
    if run.is_main:  # rank 0 alone reads checkpoints, the others may lack them
        problems += attempt(problems, lambda: _check_resume(cfg, identity, clips, output, run.world_size)) or []
        if cfg.MODEL.PRETRAINED:
            attempt(problems, lambda: _require_same_memory(cfg, base))
    cache = feature_cache(cfg, base, identity, run)
    plan = attempt(problems, lambda: build_plan(cfg, base, clips, run, cache))
    if plan is not None:
        check_disk(output, plan.disk_bytes, "the checkpoints", problems)
        if cache is not None and run.is_main:
            check_cache_room(cache.folder, plan.cache_bytes, problems)
    require_no_problems(problems)
    assert plan is not None
    return PreparedRun(cfg, output, base, clips, identity, plan, run, cache)


def _identity(base: BaseFile, clips: TrainingClips, cfg: CfgNode) -> dict[str, Any]:
    # Hashed once: the released file has 3.4 GB, and the ranks of a node would read it all at the same time.
    frozen = broadcast_object(frozen_sha256(base.recognised) if is_main() else "")
    return {
        "stage": STAGE,
        "model": base.model.to_dict(),
        "preprocess": base.preprocess.to_dict(),
        "frozen_sha256": frozen,
        **clips.identity(),
    }


def _check_resume(
    cfg: CfgNode, identity: dict[str, Any], clips: TrainingClips, output: Path, world_size: int
) -> list[str]:
    num_samples = clip_sampler(cfg, clips, 0, world_size).num_samples
    return [
        problem
        for path, state in resume_states(cfg, [output])
        for problem in resume_refusals(path, state, cfg, identity, num_samples, world_size)
    ]


def _require_same_memory(cfg: CfgNode, base: BaseFile) -> None:
    path = Path(cfg.MODEL.PRETRAINED)
    theirs, ours = read_trained_memory(path).model.efficient_memory, base.model.efficient_memory
    if theirs != ours:
        raise UserError(f"MODEL.PRETRAINED {path} holds another memory ({theirs}) than MODEL.MEMORY asks for ({ours})")


def train(prepared: PreparedRun) -> None:
    """Train a prepared run. Collective.

    Raises:
        UserError: If another run writes to its folder; nothing of that run is touched.
    """
    lock = RunLock(prepared.output) if prepared.run.is_main else None
    try:
        _train_locked(prepared)
    finally:
        if lock is not None:
            lock.release()


def _train_locked(prepared: PreparedRun) -> None:
    cfg, run, clips = prepared.cfg, prepared.run, prepared.clips
    is_resumed = broadcast_object(resumes(cfg, prepared.output))
    seed_everything(cfg.SEED)
    model = build_model(prepared.cfg, prepared.base, run)
    if prepared.cache is not None:
        fill_cache(cfg, clips, prepared.cache, model, run)
    mask_side = 4 * prepared.base.model.grid_size
    loaders = build_loaders(cfg, clips, prepared.base.preprocess, mask_side, run, prepared.output, prepared.cache)
    task, start_error = build_task(cfg, prepared.base, model, loaders[0], run, is_resumed)
    start = start_record(prepared.base) if run.is_main else {}
    resume = Path(cfg.MODEL.RESUME) if cfg.MODEL.RESUME else None
    member = Member(task, cfg, prepared.output, prepared.identity, resume, {"start": start})

    def write_records() -> None:
        if run.is_main:
            clips.write_left_out(prepared.output)
            facts = {
                "identity": prepared.identity,
                "start": start,
                "world_size": run.world_size,
                "num_train_videos": len(clips.train),
                "num_val_videos": 0 if clips.val is None else len(clips.val),
                "num_left_out_videos": len(clips.left_out()),
                "num_images": 0 if clips.images is None else len(clips.images),
                "feature_scale": task.options.feature_scale,
                "start_error": start_error,
            }
            write_run_record(prepared.output, cfg, facts)

    fit_many([member], loaders[0], loaders[1], run, on_ready=write_records)
    if run.is_main:
        write_final(prepared, task, start)


def feature_cache(cfg: CfgNode, base: BaseFile, identity: dict[str, Any], run: RunContext) -> FeatureCache | None:
    """Where the backbone's features are kept; None if they are not."""
    if not cfg.DATA.FEATURE_CACHE:
        return None
    sha256, dtype = identity["frozen_sha256"], trunk_dtype(cfg, run)
    return FeatureCache(cfg.DATA.FEATURE_CACHE, base.model, base.preprocess, sha256, dtype)


def start_record(base: BaseFile) -> dict[str, str]:
    """Which file a memory was trained with."""
    if not base.path.is_file():  # a folder of shards
        return {"file": base.path.name}
    return {"file": base.path.name, "sha256": sha256_file(base.path)}


def write_final(prepared: PreparedRun, task: Stage2Task, start: dict[str, str]) -> Path:
    """Write what the run's newest checkpoint holds, averaged weights if there are any, as the memory to use.

    Args:
        prepared: The run.
        task: Takes the weights.
        start: From `start_record`.

    Returns:
        The file.
    """
    found = load_common([CheckpointManager(prepared.output)])
    assert found is not None, "a run that has ended has saved"
    path, state = found[0]
    is_ema = "ema" in state
    task.load_saved_state(state["ema"] if is_ema else state["model"], str(path))
    final = prepared.output / FINAL_NAME
    save_efficient_sam3_checkpoint(
        task.model,
        final,
        epoch=state["epoch"],
        step=state["step"],
        metrics=state["metrics"],
        config=config_to_dict(prepared.cfg),
        identity=prepared.identity,
        start=start,
        is_ema=is_ema,
    )
    print(f"wrote {final}: the memory after epoch {state['epoch']}, step {state['step']}", flush=True)
    return final
