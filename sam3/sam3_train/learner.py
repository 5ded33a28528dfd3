"""One student in the loop: its task, optimizer, schedule, average, random numbers and counters.

Several learners can share one pass over the data. Each has its own optimizer, clipping, schedule and random stream, so
what it becomes does not depend on the others.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

from sam3_train.distributed import RunContext
from sam3_train.ema import Ema
from sam3_train.errors import UserError
from sam3_train.metrics import RunningMean
from sam3_train.optim import build_optimizer, parameter_groups, set_lr, step_unless
from sam3_train.precision import autocast, pick_dtype
from sam3_train.replicas import SYNCHRONIZED, BatchNormStatistics, convert_sync_batchnorm
from sam3_train.rng import load_rng_state_dict, mix_seed, rng_state_dict, seed_everything
from sam3_train.schedule import Schedule, build_schedule, lr_warning
from sam3_train.task import Task, is_frozen, names_of, trainable_modules


@dataclass
class Member:
    """One student to train: what `sam3_train.loop.fit` takes, for `sam3_train.loop.fit_many`."""

    task: Task
    cfg: CfgNode
    output: Path
    """The student's own run folder."""
    identity: dict[str, Any] = field(default_factory=dict)
    """What must be the same for a run to be continued (model and preprocessing descriptions, hash of the image list);
    stored in each checkpoint under ``identity``."""
    resume: Path | None = None
    """Continue from this file instead of the folder's newest checkpoint."""
    record: dict[str, Any] = field(default_factory=dict)
    """Plain values that each checkpoint holds beside the rest and nothing compares, e.g. where the weights began."""


@dataclass
class Counters:
    """Where a learner stands."""

    updates: int = 0
    """Optimizer steps that changed the weights: the schedule's clock."""
    skipped: int = 0
    """Steps left out because loss or gradient was not finite."""
    skipped_in_row: int = 0


class Learner:
    """See the module's docstring. Made by the loop."""

    def __init__(
        self, member: Member, run: RunContext, steps_per_epoch: int, global_batch_size: int, is_alone: bool = True
    ) -> None:
        self.member = member
        self.is_alone = is_alone
        self.cfg = member.cfg
        self.run = run
        self.task = member.task.to(run.device)
        train = self.cfg.TRAIN
        if train.USE_SYNC_BN and run.world_size > 1:
            convert_sync_batchnorm(self.task, run.device)
        self.schedule: Schedule = build_schedule(train, steps_per_epoch, global_batch_size)
        groups = parameter_groups(self.task, train.WEIGHT_DECAY, self.task.lr_scale, self.task.has_weight_decay)
        self.optimizer = build_optimizer(groups, train, run.device)
        self._parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.dtype = pick_dtype(self.cfg, run.device)
        self.scaler = torch.amp.GradScaler(run.device.type) if self.dtype == torch.float16 else None
        self.ema = Ema(self.task, _ema_decay(train.EMA_DECAY)) if train.EMA_DECAY else None
        self.counters = Counters()
        self.terms = RunningMean()
        self._norms = RunningMean()
        self._batch_norms = BatchNormStatistics(self.task)
        self._rng: dict[str, Any] | None = None
        self._loss: Tensor | None = None
        self._seen = ""  # the newest batch, by name
        self._stepped_on = ""  # the last batch of the step that `settle` judges
        self._wrapped: nn.Module = self.task

    def wrap(self, is_resumed: bool = False) -> None:
        """Take rank 0's weights and synchronise with the other ranks from now on. Collective.

        Args:
            is_resumed: A checkpoint has been loaded, so all ranks have its average already.
        """
        if self.run.world_size > 1:
            for buffer in self.task.buffers():
                # As bytes: not every backend knows every type.
                value = buffer.detach().contiguous().clone()
                dist.broadcast(value.view(-1).view(torch.uint8), 0)
                buffer.copy_(value)
            for parameter in self._parameters:
                parameter.register_hook(_in_layout_of(parameter))
            # BatchNorm statistics are averaged by BatchNormStatistics, which also sees ranks other than 0.
            self._wrapped = DistributedDataParallel(
                self.task,
                broadcast_buffers=False,
                find_unused_parameters=self.cfg.TRAIN.FIND_UNUSED_PARAMETERS,
            )
        self._batch_norms.take()
        if self.ema is not None and not is_resumed:
            self.ema.reset_to_live()

    def lr_warning(self) -> str | None:
        """A line if the learning rate looks wrong."""
        return lr_warning(self.schedule, self.cfg.TRAIN.OPTIMIZER.NAME, self.cfg.TRAIN.LR_SCALING)

    def train_mode(self) -> None:
        """Training mode, but for frozen modules and (``EVAL_BN_WHEN_TRAINING``) BatchNorm."""
        self._wrapped.train()
        self.task.train()
        if self.cfg.TRAIN.EVAL_BN_WHEN_TRAINING:
            for module in self.task.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def seed_epoch(self, seed: int, epoch: int) -> None:
        """Start the epoch's random stream: dropout and prompts depend on (seed, epoch, rank) and what is drawn."""
        seed_everything(mix_seed(seed, epoch, self.run.rank))
        self._rng = None if self.is_alone else rng_state_dict(self.run.device)

    def rng_state(self) -> dict[str, Any]:
        """State of this learner's random stream."""
        return rng_state_dict(self.run.device) if self._rng is None else self._rng

    def load_rng_state(self, state: dict[str, Any]) -> None:
        """Continue a random stream."""
        load_rng_state_dict(state, self.run.device)
        self._rng = None if self.is_alone else state

    @contextlib.contextmanager
    def _random_stream(self) -> Iterator[None]:
        """Learners that share the loop swap their streams in and out; a single one simply owns the global stream."""
        if self._rng is None:
            yield
            return
        load_rng_state_dict(self._rng, self.run.device)
        yield
        self._rng = rng_state_dict(self.run.device)

    def backward(self, batch: Any, num_micro_batches: int, is_last: bool) -> None:
        """Forward and backward of one micro-batch; gradients are synchronised at the last one of a step only."""
        wrapped = self._wrapped
        waits = isinstance(wrapped, DistributedDataParallel) and not is_last
        sync = wrapped.no_sync() if waits else contextlib.nullcontext()  # type: ignore[operator]
        self._seen = names_of(batch)
        with self.task.watching(batch), self._random_stream(), sync:
            with autocast(self.run.device, self.dtype):
                terms = wrapped(batch)
            loss = terms["loss"]
            scaled = loss / num_micro_batches
            (self.scaler.scale(scaled) if self.scaler else scaled).backward()
        values = {name: value.detach().float() for name, value in terms.items()}
        # Non-finite terms are counted as skipped steps and kept out of the means.
        self.terms.add({n: torch.where(v.isfinite(), v, math.nan).reshape(1) for n, v in values.items()})
        self._loss = values["loss"] if self._loss is None else self._loss + values["loss"]

    def finish_backward(self) -> Tensor:
        """Unscale and clip the gradients.

        Returns:
            0-dim float tensor: 1 if loss or gradient is not finite on this rank.
        """
        assert self._loss is not None
        self._stepped_on = self._seen
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        clip = self.cfg.TRAIN.CLIP_GRAD
        norm = nn.utils.clip_grad_norm_(self._parameters, clip if clip > 0 else math.inf)
        is_finite = norm.isfinite() & self._loss.isfinite()
        clipped = (norm > clip).float() if clip > 0 else torch.zeros_like(norm)
        self._norms.add({"grad_norm": torch.where(is_finite, norm, math.nan).reshape(1), "clip_fraction": clipped})
        self._loss = None
        return 1.0 - is_finite.float()

    def step(self, is_bad: Tensor) -> None:
        """Update the weights unless the 0-dim tensor ``is_bad`` (the same on all ranks) is positive."""
        set_lr(self.optimizer, self.schedule.lr(self.counters.updates))
        idle = self.task.idle_prefixes()
        for name, parameter in self.task.named_parameters() if idle else ():
            if name.startswith(idle):
                parameter.grad = None
        step_unless(self.optimizer, is_bad)
        if self.scaler is not None:
            self.scaler.update()
        self._batch_norms.settle(is_bad)
        if self.ema is not None:
            self.ema.update(self.counters.updates + 1, is_bad)
        self.optimizer.zero_grad(set_to_none=True)

    def settle(self, was_bad: bool) -> None:
        """Count the step once its outcome is known, before the next one changes the weights.

        Raises:
            UserError: If too many steps in a row were skipped.
        """
        counters = self.counters
        if not was_bad:
            counters.updates += 1
            counters.skipped_in_row = 0
            return
        counters.skipped += 1
        counters.skipped_in_row += 1
        limit = self.cfg.TRAIN.MAX_NONFINITE_STEPS
        if limit and counters.skipped_in_row >= limit:
            where = f", last on {self._stepped_on} where this process is concerned" if self._stepped_on else ""
            raise UserError(
                f"{counters.skipped_in_row} steps in a row had a loss or gradient that is not finite (after "
                f"{counters.updates} good ones, learning rate {self.lr:.2e}, output {self.member.output}{where}); "
                "the weights are those of the last good step. Lower TRAIN.BASE_LR, use AMP_DTYPE bf16 or fp32, or find "
                "bad data."
            )

    @property
    def lr(self) -> float:
        """The rate of the next step."""
        return self.schedule.lr(self.counters.updates)

    def window(self) -> dict[str, float]:
        """Means over ranks since the last call: loss terms, gradient norm, clip fraction. Collective."""
        means = self.terms.means_over_ranks()
        means.update(self._norms.means())  # gradients, and so their norms, are the same on all ranks
        means["lr"] = self.lr
        means["skipped_steps"] = float(self.counters.skipped)
        if self.scaler is not None:
            means["loss_scale"] = self.scaler.get_scale()
        self.terms.reset()
        self._norms.reset()
        return means

    @contextlib.contextmanager
    def best_weights(self) -> Iterator[None]:
        """Inside the block the task holds the weights to validate and to deploy: the average if there is one."""
        with self.ema.applied() if self.ema is not None else contextlib.nullcontext():
            yield

    def num_trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(parameter.numel() for parameter in self._parameters)

    def has_batchnorm(self) -> bool:
        """Whether per-rank BatchNorm statistics play a role."""
        return any(
            isinstance(part, nn.modules.batchnorm._BatchNorm)
            and not isinstance(part, SYNCHRONIZED)
            and not is_frozen(part)
            for part in trainable_modules(self.task)
        )


def _ema_decay(decay: float) -> float:
    if not 0.0 < decay < 1.0:
        raise UserError(f"TRAIN.EMA_DECAY must lie between 0 (off) and 1, got {decay}")
    return decay


def _in_layout_of(parameter: Tensor) -> Callable[[Tensor | None], Tensor | None]:
    """A hook that gives a gradient the strides of its parameter.

    Gradients of depthwise kernels may have others along their dimension of one, which torch takes for the same layout;
    DDP does not, warns about it in every run, and copies. Under DDP there is no gradient at all, None, for what only a
    logged term reads.
    """

    def hook(gradient: Tensor | None) -> Tensor | None:
        if gradient is None or gradient.stride() == parameter.stride():
            return gradient
        return torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)

    return hook
