"""What a run is about to do, as a person reads it before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from yacs.config import CfgNode

from sam3.efficient_keys import OWN_PREFIXES
from sam3_train.distributed import RunContext
from sam3_train.schedule import Schedule, build_schedule, lr_warning
from sam3_train.training_plan import FLOAT_BYTES, num_kept_checkpoints
from stage2.feature_cache import FeatureCache
from stage2.preflight import BaseFile
from stage2.settings import curriculum, distill_weights, loss_weights, prompting, task_options
from stage2.trained_memory import tracker_on_meta
from stage2.training_clips import TrainingClips, clip_sampler

_SHOWN_REASONS = 3


@dataclass(frozen=True)
class MemoryPlan:
    """Counts of a run."""

    num_trained: int
    """Trained values."""
    num_tokens: int
    """That are stored of a frame."""
    num_dense: int
    """That SAM 3's own memory stores."""
    steps_per_epoch: int
    num_steps: int
    global_batch: int
    schedule: Schedule
    warning: str | None
    disk_bytes: int
    """Of all checkpoints that stay on disk, and the one being written."""
    cache_bytes: int
    """Of the features that the cache still lacks."""
    forced_steps: int
    """First steps in which the features of the full memory alone are learnt."""


def build_plan(
    cfg: CfgNode, base: BaseFile, clips: TrainingClips, run: RunContext, cache: FeatureCache | None = None
) -> MemoryPlan:
    """Count what a run will do.

    Args:
        cfg: The settings.
        base: The file that it starts with.
        clips: What it reads.
        run: This process.
        cache: Of the backbone's features, if there is one.

    Raises:
        UserError: If a setting of the schedule is impossible.
    """
    train, memory = cfg.TRAIN, base.model.efficient_memory
    assert memory is not None
    sampler = clip_sampler(cfg, clips, run.rank, run.world_size)
    steps_per_epoch = math.ceil(len(sampler) // cfg.DATA.BATCH_SIZE / max(1, train.ACCUMULATION_STEPS))
    global_batch = cfg.DATA.BATCH_SIZE * run.world_size * train.ACCUMULATION_STEPS
    schedule = build_schedule(train, steps_per_epoch, global_batch)
    num_steps = train.EPOCHS * steps_per_epoch
    state = tracker_on_meta(base.model).state_dict()
    trained = sum(value.numel() for name, value in state.items() if name.startswith(OWN_PREFIXES))
    checkpoint_bytes = FLOAT_BYTES * trained * (4 if train.EMA_DECAY else 3)
    final_bytes = FLOAT_BYTES * sum(value.numel() for value in state.values())
    dense = base.model.grid_size**2
    return MemoryPlan(
        num_trained=trained,
        num_tokens=memory.num_tokens or dense,
        num_dense=dense,
        steps_per_epoch=steps_per_epoch,
        num_steps=min(num_steps, train.MAX_STEPS) if train.MAX_STEPS else num_steps,
        global_batch=global_batch,
        schedule=schedule,
        warning=lr_warning(schedule, train.OPTIMIZER.NAME, train.LR_SCALING),
        disk_bytes=checkpoint_bytes * num_kept_checkpoints(train) + final_bytes,
        cache_bytes=0 if cache is None else sum(cache.bytes_to_write(v) for v in (clips.train, clips.val) if v),
        forced_steps=task_options(cfg, num_steps).forced_batches,
    )


def plan_lines(
    cfg: CfgNode, output: Path, base: BaseFile, clips: TrainingClips, plan: MemoryPlan, run: RunContext
) -> list[str]:
    """The plan as a person reads it."""
    lr = plan.schedule
    return [
        f"memory    {cfg.MODEL.NAME}: {plan.num_tokens} tokens of a frame instead of {plan.num_dense} "
        f"({plan.num_dense / plan.num_tokens:.0f}x), {plan.num_trained / 1e6:.2f} M parameters, {output}",
        f"start     {_describe_start(cfg, base)}; backbone {base.backbone} of {base.path}",
        *_clip_lines(cfg, clips, plan),
        *_learning_lines(cfg, plan),
        f"batch     {plan.global_batch} clips per step: {cfg.DATA.BATCH_SIZE} x {cfg.TRAIN.ACCUMULATION_STEPS} "
        f"accumulated x {run.world_size} processes on {run.device.type}",
        f"steps     {plan.num_steps:,} ({cfg.TRAIN.EPOCHS} epochs of {plan.steps_per_epoch:,})",
        f"rate      {lr.warmup_lr:.2e} to {lr.base_lr:.2e} in {lr.warmup_steps:,} steps, {lr.name} to {lr.min_lr:.2e}",
        *([f"warning: {plan.warning}"] if plan.warning else []),
        f"disk      {plan.disk_bytes / 1e6:.1f} MB of checkpoints",
    ]


def _clip_lines(cfg: CfgNode, clips: TrainingClips, plan: MemoryPlan) -> list[str]:
    lengths = [f"{length} frames" + (f" from epoch {first}" if first else "") for first, length in curriculum(cfg)]
    held_out = f"{len(clips.val):,} held out" if clips.val is not None else "no validation"
    images = ""
    if clips.images is not None:
        images = f"; {len(clips.images):,} images in {100 * cfg.DATA.IMAGE_SHARE:.0f}% of the batches"
    share = f" ({cfg.DATA.SUBSET_FRACTION:g} of the data set)" if cfg.DATA.SUBSET_FRACTION < 1 else ""
    features = "computed in every step"
    if cfg.DATA.FEATURE_CACHE:
        features = f"cached in {cfg.DATA.FEATURE_CACHE}, {plan.cache_bytes / 1e9:.2f} GB to compute"
    left_out = list(clips.left_out().values())
    return [
        f"videos    {len(clips.train):,} train{share}, {held_out}{images}",
        *([f"warning: {len(left_out)} videos cannot be used and are left out: {_first(left_out)}"] if left_out else []),
        f"clips     {', '.join(lengths)}, up to {cfg.CLIPS.MAX_OBJECTS} objects",
        f"features  {features}",
    ]


def _learning_lines(cfg: CfgNode, plan: MemoryPlan) -> list[str]:
    prompts, losses, distill = prompting(cfg), dict(vars(loss_weights(cfg))), vars(distill_weights(cfg))
    click_share = 1.0 - prompts.mask_share - prompts.box_share
    shape = f"; focal alpha {losses.pop('focal_alpha'):g}, gamma {losses.pop('focal_gamma'):g}"
    taught = " + ".join(f"{weight:g} {name}" for name, weight in distill.items() if weight)
    forced = f"; of the first {plan.forced_steps:,} steps the features alone" if plan.forced_steps else ""
    return [
        f"prompts   mask : box : click = {prompts.mask_share:g} : {prompts.box_share:g} : {click_share:g} on "
        f"{_range(prompts.num_prompted)} frames, {prompts.clicks_per_frame} corrections on "
        f"{_range(prompts.num_corrected)} frames",
        "loss      " + " + ".join(f"{weight:g} {name}" for name, weight in losses.items() if weight) + shape,
        *([f"teacher   the full memory: {taught}{forced}"] if taught else []),
    ]


def _describe_start(cfg: CfgNode, base: BaseFile) -> str:
    if cfg.MODEL.PRETRAINED:
        return f"the memory of {cfg.MODEL.PRETRAINED}"
    if not base.is_new:
        return "the file's own compressed memory"
    return "near the full memory of the file" if cfg.MODEL.START == "full" else "fresh weights"


def _first(reasons: list[str]) -> str:
    shown = "; ".join(reasons[:_SHOWN_REASONS])
    return shown + (f"; and {len(reasons) - _SHOWN_REASONS} more" if len(reasons) > _SHOWN_REASONS else "")


def _range(least_most: tuple[int, int]) -> str:
    least, most = least_most
    return f"{least}" if least == most else f"{least} to {most}"
