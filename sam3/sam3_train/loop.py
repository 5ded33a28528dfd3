"""The one training loop.

How to use it (a stage's ``main``)::

    cfg = load_config(get_defaults(), args.cfg, args.opts)      # defaults extend sam3_train.config.training_defaults()
    apply_flags(cfg, args)
    with training_run(args.device) as run:
        seed_everything(cfg.SEED)                               # before the student is built
        sampler = ResumableDistributedSampler(len(train_set), cfg.SEED, run.rank, run.world_size)
        train_loader = DataLoader(train_set, cfg.DATA.BATCH_SIZE, sampler=sampler, drop_last=True, ...)
        val_sampler = PartitionSampler(len(val_set), run.rank, run.world_size)
        val_loader = DataLoader(val_set, cfg.DATA.BATCH_SIZE, sampler=val_sampler, ...)
        result = fit(MyTask(student), train_loader, val_loader, cfg, run, cfg.OUTPUT,
                     identity={"model": config.to_dict(), "preprocess": preprocess.to_dict()})

The task is a `sam3_train.task.Task`: ``forward(batch) -> {"loss": ..., "named terms": ...}``, ``validate(batch)`` ->
values per image. A frozen teacher goes into ``prepare_batch``: a function of a batch on the device that returns the
batch with targets; it runs once per batch under no_grad. Several students: `fit_many` with one `Member` each; every one
gets its own run folder and ends bit for bit (on the CPU) where it would end alone.

Rules a stage must keep so that a resumed run is exact: what is random about an image comes from
`sam3_train.rng.mix_seed` of seed, epoch and image, and not from a worker's generator; what is random in the task comes
from the global generators (or one seeded from them); the train loader's sampler is a `ResumableDistributedSampler`.

What the loop does at a step: forward and backward of ``TRAIN.ACCUMULATION_STEPS`` micro-batches (the last step of an
epoch may have fewer), gradients synchronised at the last one, clipping, a collective exchange of three flags (a rank
was asked to stop; a checkpoint is due; a rank's loss or gradient is not finite), and the update, unless the last flag
is set. On CUDA the host reads these flags one step late, so it never waits for the step it has just queued.

Files in the run folder: see `sam3_train.checkpoint` and `sam3_train.log`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from yacs.config import CfgNode

from sam3_train.distributed import RunContext
from sam3_train.errors import UserError
from sam3_train.learner import Member
from sam3_train.rng import set_deterministic
from sam3_train.task import Task
from sam3_train.train_state import Best
from sam3_train.trainer import PrepareBatch, Trainer

__all__ = ["FitResult", "Member", "fit", "fit_many"]


@dataclass
class FitResult:
    """How a run ended."""

    output: Path
    step: int
    """Optimizer steps tried since the start of the run."""
    epochs_done: int
    metrics: dict[str, float]
    """Of the last validation; empty without one."""
    best: Best
    is_finished: bool
    """False if ``TRAIN.MAX_STEPS`` ended it before the last epoch."""


def fit(
    task: Task,
    train_loader: DataLoader[Any],
    val_loader: DataLoader[Any] | None,
    cfg: CfgNode,
    run: RunContext,
    output: str | Path,
    *,
    identity: dict[str, Any] | None = None,
    prepare_batch: PrepareBatch | None = None,
    resume: str | Path | None = None,
) -> FitResult:
    """Train one task. Collective over the run's ranks.

    Args:
        task: Built the same on all ranks (rank 0's weights win); moved to the run's device.
        train_loader: Its sampler is a `ResumableDistributedSampler` of this rank, its ``batch_size`` the micro-batch.
        val_loader: This rank's part of the val split, or None.
        cfg: Has the keys of `sam3_train.config.training_defaults`.
        run: From `sam3_train.distributed.training_run`.
        output: The run's folder, of this task alone.
        identity: Plain values that must not change when a run is continued, e.g. descriptions of model and
            preprocessing; stored in each checkpoint.
        prepare_batch: Runs once per batch on the device under no_grad, e.g. an online teacher.
        resume: Continue from this file; None continues from the folder's newest checkpoint if there is one
            (``TRAIN.AUTO_RESUME``).

    Raises:
        UserError: If settings are impossible, a checkpoint does not fit, files cannot be written, or
            ``TRAIN.MAX_NONFINITE_STEPS`` steps in a row were not finite.
        Interrupted: After SIGTERM or SIGINT, with everything saved.
    """
    member = Member(task, cfg, Path(output), identity or {}, Path(resume) if resume else None)
    return fit_many([member], train_loader, val_loader, run, prepare_batch=prepare_batch)[0]


def fit_many(
    members: Sequence[Member],
    train_loader: DataLoader[Any],
    val_loader: DataLoader[Any] | None,
    run: RunContext,
    *,
    prepare_batch: PrepareBatch | None = None,
    on_ready: Callable[[], None] | None = None,
) -> list[FitResult]:
    """Train several tasks on one pass over the data; see `fit`. The members share ``SEED`` and what `_SHARED` lists.

    ``on_ready`` is called once nothing speaks against the run any more, before the first step.

    Raises:
        UserError: As `fit`, or if members share a folder or differ in a shared setting.
    """
    _check_members(members)
    set_deterministic(members[0].cfg.DETERMINISTIC)
    trainer = Trainer(members, train_loader, val_loader, run, prepare_batch)
    with trainer.stop_signal:
        try:
            trainer.prepare()
            if on_ready is not None:
                on_ready()
            trainer.train()
        finally:
            trainer.close()
    is_finished = trainer.position.epoch >= trainer.cfg.TRAIN.EPOCHS
    return [
        FitResult(member.output, trainer.position.step, trainer.position.epoch, metrics, best, is_finished)
        for member, metrics, best in zip(members, trainer.metrics, trainer.bests, strict=True)
    ]


_SHARED = ("EPOCHS", "MAX_STEPS", "ACCUMULATION_STEPS", "SAVE_EVERY_STEPS", "SAVE_EVERY_MINUTES", "REPLICA_CHECK_STEPS")


def _check_members(members: Sequence[Member]) -> None:
    folders = [member.output.resolve() for member in members]
    if len(set(folders)) != len(folders):
        raise UserError(f"each student needs an output folder of its own, got {', '.join(map(str, folders))}")
    first = members[0].cfg
    for member in members[1:]:
        for key in _SHARED:
            if member.cfg.TRAIN[key] != first.TRAIN[key]:
                raise UserError(
                    f"students that share a pass over the data must agree on TRAIN.{key}: {first.TRAIN[key]} in "
                    f"{members[0].output}, {member.cfg.TRAIN[key]} in {member.output}"
                )
        for key in ("SEED", "DETERMINISTIC"):
            if member.cfg[key] != first[key]:
                raise UserError(f"students that share a pass must agree on {key}: {first[key]} and {member.cfg[key]}")
