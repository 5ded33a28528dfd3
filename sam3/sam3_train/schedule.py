"""Learning rate as a function of the step: numbers in, number out.

A resumed run computes it again from its step, so changed settings take effect and nothing is restored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from yacs.config import CfgNode

from sam3_train.errors import UserError

SCHEDULES = ("cosine", "linear", "step", "constant")
LR_SCALINGS = ("none", "linear", "sqrt")
_SANE_BASE_LR = {"adamw": (1e-5, 1e-2), "sgd": (1e-4, 10.0)}
"""Effective base rates outside these bounds are rarely meant; they bring a warning."""


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a decay to ``min_lr`` (``constant``: none)."""

    name: str
    base_lr: float
    warmup_lr: float
    min_lr: float
    warmup_steps: int
    total_steps: int
    """Optimizer steps that are not skipped."""
    decay_steps: int = 1
    """``step`` only: steps between two decays."""
    decay_rate: float = 0.1

    def lr(self, step: int) -> float:
        """The rate of the zero-based optimizer step ``step``; after the last step it stays at its final value."""
        if step < self.warmup_steps:
            return self.warmup_lr + (self.base_lr - self.warmup_lr) * step / self.warmup_steps
        if self.name == "constant":
            return self.base_lr
        if self.name == "step":
            return max(self.min_lr, self.base_lr * self.decay_rate ** (step // self.decay_steps))
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        remaining = 1.0 - progress if self.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.min_lr + (self.base_lr - self.min_lr) * remaining


def lr_scale_factor(scaling: str, global_batch_size: int, reference_batch: int) -> float:
    """What the configured rates are multiplied by.

    Args:
        scaling: ``none`` (rates are used as written), ``linear`` or ``sqrt`` in batch over reference.
        global_batch_size: Images per optimizer step over ranks and accumulation.
        reference_batch: The batch that the configured rates were meant for.

    Raises:
        UserError: If the name is unknown or the reference is not positive.
    """
    if scaling not in LR_SCALINGS:
        raise UserError(f"TRAIN.LR_SCALING {scaling!r} is not one of {', '.join(LR_SCALINGS)}")
    if reference_batch < 1:
        raise UserError(f"TRAIN.LR_REFERENCE_BATCH must be positive, got {reference_batch}")
    ratio = global_batch_size / reference_batch
    return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[scaling]


def build_schedule(train: CfgNode, steps_per_epoch: int, global_batch_size: int) -> Schedule:
    """The schedule that a config's TRAIN node describes.

    Args:
        train: The TRAIN node of `sam3_train.config.training_defaults`.
        steps_per_epoch: Optimizer steps per epoch.
        global_batch_size: Images per optimizer step.

    Raises:
        UserError: If a setting is impossible.
    """
    name = train.LR_SCHEDULER.NAME
    if name not in SCHEDULES:
        raise UserError(f"TRAIN.LR_SCHEDULER.NAME {name!r} is not one of {', '.join(SCHEDULES)}")
    factor = lr_scale_factor(train.LR_SCALING, global_batch_size, train.LR_REFERENCE_BATCH)
    for key in ("BASE_LR", "WARMUP_LR", "MIN_LR"):
        if not (math.isfinite(train[key]) and train[key] >= 0):
            raise UserError(f"TRAIN.{key} must be a finite number >= 0, got {train[key]}")
    if train.EPOCHS < 1 or train.WARMUP_EPOCHS < 0:
        raise UserError(
            f"TRAIN.EPOCHS must be at least 1 and WARMUP_EPOCHS 0, got {train.EPOCHS} and {train.WARMUP_EPOCHS}"
        )
    total = train.EPOCHS * steps_per_epoch
    return Schedule(
        name,
        train.BASE_LR * factor,
        train.WARMUP_LR * factor,
        train.MIN_LR * factor,
        # A warm-up longer than the run would never reach the base rate; half the run is the most that makes sense.
        min(round(train.WARMUP_EPOCHS * steps_per_epoch), total // 2),
        total,
        max(1, round(train.LR_SCHEDULER.DECAY_EPOCHS * steps_per_epoch)),
        train.LR_SCHEDULER.DECAY_RATE,
    )


def lr_warning(schedule: Schedule, optimizer_name: str, scaling: str) -> str | None:
    """A line about an effective rate far outside what the optimizer is used with; None if it is sane."""
    low, high = _SANE_BASE_LR[optimizer_name]
    if low <= schedule.base_lr <= high:
        return None
    return (
        f"the effective base learning rate is {schedule.base_lr:.2e} (TRAIN.LR_SCALING {scaling}); {optimizer_name} is "
        f"rarely useful outside {low:.0e}..{high:.0e}: check TRAIN.BASE_LR and TRAIN.LR_SCALING (none, sqrt, linear)"
    )
