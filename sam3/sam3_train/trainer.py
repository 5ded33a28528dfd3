"""The engine behind `sam3_train.loop`: epochs, steps, logging, saving and stopping, for any number of learners."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from sam3_train.checkpoint import CheckpointManager
from sam3_train.data.samplers import ResumableDistributedSampler
from sam3_train.distributed import RunContext, all_gather_object, barrier, broadcast_object
from sam3_train.errors import Interrupted, UserError
from sam3_train.learner import Learner, Member
from sam3_train.log import RunLog
from sam3_train.plan import plan_line, plan_warnings
from sam3_train.prefetch import DeviceBatches
from sam3_train.replicas import check_replicas
from sam3_train.run_lock import RunLock
from sam3_train.stop_signal import StopSignal
from sam3_train.throughput import Throughput, spell_duration
from sam3_train.train_state import (
    BatchLayout,
    Best,
    Position,
    build_state,
    check_resumable,
    find_checkpoints,
    load_state,
    resume_notes,
    resumed_position,
)
from sam3_train.validation import run_validation

PrepareBatch = Callable[[Any], Any]


class Trainer:
    """One call of `sam3_train.loop.fit_many`."""

    def __init__(
        self,
        members: Sequence[Member],
        train_loader: DataLoader[Any],
        val_loader: DataLoader[Any] | None,
        run: RunContext,
        prepare_batch: PrepareBatch | None,
    ) -> None:
        self.run = run
        self.cfg = members[0].cfg
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.prepare_batch = prepare_batch
        self.stop_signal = StopSignal(run.watch)
        sampler = train_loader.sampler
        if not isinstance(sampler, ResumableDistributedSampler):
            raise TypeError(f"the train loader needs a ResumableDistributedSampler, got {type(sampler).__name__}")
        self.sampler = sampler
        accumulation = self.cfg.TRAIN.ACCUMULATION_STEPS
        if accumulation < 1:
            raise UserError(f"TRAIN.ACCUMULATION_STEPS must be at least 1, got {accumulation}")
        self.layout = BatchLayout(int(train_loader.batch_size or 0), accumulation, run.world_size)
        self.num_batches = len(train_loader)
        if not self.num_batches:
            raise UserError(
                f"the training set has {sampler.num_samples} {members[0].task.samples}, too few for one batch of "
                f"{self.layout.micro_batch_size} on each of {run.world_size} processes; lower DATA.BATCH_SIZE"
            )
        self.steps_per_epoch = math.ceil(self.num_batches / accumulation)
        self.learners = [
            Learner(member, run, self.steps_per_epoch, self.layout.global_batch_size, len(members) == 1)
            for member in members
        ]
        self.bests = [Best(member.task.best_metric, member.task.best_mode) for member in members]
        self.metrics: list[dict[str, float]] = [{} for _ in members]
        self.position = Position()
        self.throughput = Throughput(run.device)
        self.managers: list[CheckpointManager] = []
        self.logs: list[RunLog] = []
        self.locks: list[RunLock] = []
        self._rng_to_restore: list[list[dict[str, Any]]] | None = None
        self._pending: _Flags | None = None
        # Only where the host runs ahead of the device is there anything to gain.
        self.reads_flags_late = run.device.type == "cuda"
        self._stop = False
        self._save = False

    def prepare(self) -> None:
        """Find the checkpoint to continue from, load it, synchronise the ranks, and say what will be done."""
        if self.run.is_main:
            self.locks += [RunLock(learner.member.output) for learner in self.learners]
        self.managers, loaded = find_checkpoints([learner.member for learner in self.learners], self.run)
        for i, learner in enumerate(self.learners):
            if loaded is not None:
                path, state = loaded[i]
                check_resumable(learner.member.identity, state, self.layout, self.sampler.state_dict(), path)
                load_state(learner, state, path)
                self.position = resumed_position(state, self.layout, self.num_batches)
                self.bests[i] = Best(**state["best"])
                self.metrics[i] = dict(state["metrics"])
            learner.wrap(is_resumed=loaded is not None)
            step = self.position.step if loaded is not None else None
            log = RunLog(
                learner.member.output,
                self.run.is_main,
                resume_step=step,
                resume_epoch=None if self._is_done() else self.position.epoch,
            )
            self.logs.append(log)
            if loaded is not None:
                log.info(f"continuing from {loaded[i][0]}: epoch {self.position.epoch}, step {step}")
                for note in resume_notes(learner, loaded[i][1], self.layout):
                    log.warn(note)
            log.info(plan_line(learner, self.layout, self.steps_per_epoch, self.sampler.num_samples))
            for warning in plan_warnings(learner, self.layout):
                log.warn(warning)
        if loaded is not None:
            self._require_a_result([path for path, _ in loaded])
            self._rng_to_restore = [state["rng"] for _, state in loaded]
        for learner in self.learners:
            check_replicas(learner.task, self.position.step)

    def _require_a_result(self, resumed: Sequence[Path]) -> None:
        """Refuse to continue a run in another folder when it has ended: nothing would ever be saved there."""
        is_empty = any(not manager.names() for manager in self.managers)  # other ranks than 0 have none
        if broadcast_object(is_empty) and self._is_done():
            train = self.cfg.TRAIN
            raise UserError(
                f"{resumed[0]}: nothing is left to train, {self.position.epoch} epochs and {self.position.step} steps "
                f"are done (TRAIN.EPOCHS {train.EPOCHS}, TRAIN.MAX_STEPS {train.MAX_STEPS}): raise them, or "
                "give the run's own folder as --output instead of --resume"
            )

    def train(self) -> None:
        """Run from the current position to the last epoch or ``TRAIN.MAX_STEPS``."""
        while not self._is_done():
            self._train_epoch()
            self._finish_epoch()

    def _is_done(self) -> bool:
        return self.position.epoch >= self.cfg.TRAIN.EPOCHS or self._is_at_max_steps()

    def _is_at_max_steps(self) -> bool:
        limit = self.cfg.TRAIN.MAX_STEPS
        return bool(limit) and self.position.step >= limit

    def _train_epoch(self) -> None:
        position = self.position
        self.sampler.set_epoch(
            position.epoch, position.batches_done * self.layout.micro_batch_size * self.run.world_size
        )
        # Making the iterator draws from the global generator, so the random streams start after it.
        loader = iter(self.train_loader) if position.batches_done < self.num_batches else iter(())
        batches = DeviceBatches(loader, self.run.device, self.throughput)
        self._start_random_streams()
        for learner in self.learners:
            learner.train_mode()
        self.throughput.reset()
        bar = tqdm(
            total=self.steps_per_epoch,
            initial=math.ceil(position.batches_done / self.layout.accumulation_steps),
            desc=f"epoch {position.epoch}",
            disable=None if self.run.is_main else True,
            mininterval=1.0,
            leave=False,
        )
        with bar:
            while position.batches_done < self.num_batches and not self._is_at_max_steps():
                self._train_step(batches)
                bar.update()
                self._after_step()
        self._settle()

    def _start_random_streams(self) -> None:
        for i, learner in enumerate(self.learners):
            states = self._rng_to_restore[i] if self._rng_to_restore is not None else []
            if self.position.batches_done and self.run.rank < len(states):
                learner.load_rng_state(states[self.run.rank])
            else:
                learner.seed_epoch(self.cfg.SEED, self.position.epoch)
        self._rng_to_restore = None

    def _train_step(self, batches: DeviceBatches) -> None:
        position, accumulation = self.position, self.layout.accumulation_steps
        size = min(accumulation, self.num_batches - position.batches_done)
        for i in range(size):
            batch = self._next_batch(batches)
            if i == 0:
                self.throughput.step_begins()
            for learner in self.learners:
                learner.backward(batch, size, is_last=i == size - 1)
            if position.batches_done + i + 1 < self.num_batches:
                batches.fetch_next()
        self._settle()
        flags = torch.stack([self._due_flags(), *(learner.finish_backward() for learner in self.learners)])
        if self.run.world_size > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        for learner, is_bad in zip(self.learners, flags[1:], strict=True):
            learner.step(is_bad)
        self.throughput.step_ends()
        self._pending = _Flags(flags)
        position.batches_done += size
        position.step += 1
        if not self.reads_flags_late:
            self._settle()

    def _next_batch(self, batches: DeviceBatches) -> Any:
        batch = batches.take()
        self.throughput.num_images += self.learners[0].task.batch_size(batch) * self.run.world_size
        if self.prepare_batch is not None:
            with torch.no_grad():
                batch = self.prepare_batch(batch)
        return batch

    def _due_flags(self) -> Tensor:
        """0: go on, 1: a checkpoint is due, 2: stop. The highest of all ranks counts."""
        minutes = self.cfg.TRAIN.SAVE_EVERY_MINUTES
        due = self.run.is_main and minutes > 0 and self.throughput.minutes_since_save() >= minutes
        level = 2.0 if self.stop_signal.requested else 1.0 if due else 0.0
        return torch.full((), level, device=self.run.device)  # a fill; copying a value would wait for the device

    def _settle(self) -> None:
        """Learn how the last step went; the only place where the host waits for the device between log lines."""
        if self._pending is None:
            return
        level, *bad = self._pending.values()
        self._pending = None
        self._save |= level >= 1
        self._stop |= level >= 2
        for learner, was_bad in zip(self.learners, bad, strict=True):
            learner.settle(was_bad > 0)

    def _after_step(self) -> None:
        """Log, check, save or stop where it is time to."""
        train, step = self.cfg.TRAIN, self.position.step
        if self.cfg.PRINT_FREQ and step % self.cfg.PRINT_FREQ == 0:
            self._log_window()
        if train.REPLICA_CHECK_STEPS and step % train.REPLICA_CHECK_STEPS == 0:
            for learner in self.learners:
                check_replicas(learner.task, step)
        by_step = bool(train.SAVE_EVERY_STEPS) and step % train.SAVE_EVERY_STEPS == 0
        if self._stop or self._save or by_step:
            self._settle()
            self._save_all(is_epoch=False)
        if self._stop:
            self._interrupt()

    def _interrupt(self) -> None:
        barrier()
        name = self.stop_signal.requested or "a signal to another rank"
        raise Interrupted(
            f"stopped by {name} at epoch {self.position.epoch}, step {self.position.step}; everything is saved in "
            f"{self.learners[0].member.output}: start the same command again to continue"
        )

    def _finish_epoch(self) -> None:
        """Validate, pick the best, save, and move to the next epoch (unless ``MAX_STEPS`` ended this one early)."""
        if self.stop_signal_on_any_rank():
            self._save_all(is_epoch=False)
            self._interrupt()
        self._log_window()
        is_best = [False] * len(self.learners)
        if self.val_loader is not None:
            results = self._validate()
            if results is None:
                self._save_all(is_epoch=False)
                self._interrupt()
            else:
                self.metrics = results
                is_best = self._judge(results)
        for learner in self.learners:
            check_replicas(learner.task, self.position.step)
        epoch = self.position.epoch
        is_whole = self.position.batches_done >= self.num_batches
        if is_whole:
            self.position.epoch, self.position.batches_done = epoch + 1, 0
        if self._is_done() or any(is_best) or (self.cfg.SAVE_FREQ and epoch % self.cfg.SAVE_FREQ == 0):
            # Students that share a pass must find each other's checkpoints: a name stands for one position alone.
            self._save_all(is_epoch=is_whole, epoch=epoch, is_best=is_best)

    def stop_signal_on_any_rank(self) -> bool:
        """Whether any rank was asked to stop. Collective."""
        return any(all_gather_object(self.stop_signal.requested is not None))

    def _validate(self) -> list[dict[str, float]] | None:
        assert self.val_loader is not None
        for learner in self.learners:
            learner.optimizer.zero_grad(set_to_none=True)
        with contextlib.ExitStack() as stack:
            for learner in self.learners:
                stack.enter_context(learner.best_weights())
            return run_validation(
                [learner.task for learner in self.learners],
                self.val_loader,
                self.run,
                [learner.dtype for learner in self.learners],
                self.cfg.SEED,
                self.prepare_batch,
                lambda: self.stop_signal.requested is not None,
            )

    def _judge(self, results: list[dict[str, float]]) -> list[bool]:
        is_best = []
        for metrics, best, log in zip(results, self.bests, self.logs, strict=True):
            if not metrics:
                raise UserError("the validation set is empty: no image of it could be used")
            if best.metric not in metrics:
                raise TypeError(f"validate() gives {sorted(metrics)}, not the task's best_metric {best.metric!r}")
            improved = best.improves(metrics)
            if improved:
                best.value, best.epoch = metrics[best.metric], self.position.epoch
            is_best.append(improved)
            log.numbers("val", self.position.epoch, self.position.step, metrics)
            shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            log.info(f"epoch {self.position.epoch} val: {shown}{'  (best)' if improved else ''}")
        return is_best

    def _log_window(self) -> None:
        self._settle()
        if not self.throughput.num_images:
            return
        windows = [learner.window() for learner in self.learners]
        speed = self.throughput.window()
        num_steps = self.cfg.TRAIN.EPOCHS * self.steps_per_epoch
        left_s = (num_steps - self.position.step) * self.layout.global_batch_size / speed["images_per_s"]
        samples = self.learners[0].task.samples
        for window, log in zip(windows, self.logs, strict=True):
            epoch, step = self.position.epoch, self.position.step
            log.numbers("train", epoch, step, {**window, **speed, "global_batch": self.layout.global_batch_size})
            terms = "  ".join(f"{n} {v:.4g}" for n, v in window.items() if n not in _UNSHOWN)
            log.info(
                f"epoch {epoch} step {step}/{num_steps}: {terms}  "
                f"{speed['images_per_s']:.1f} {samples}/s  wait {100 * speed['data_wait_share']:.0f}%  "
                f"{speed['peak_memory_mb']:.0f} MB  {spell_duration(left_s)} left"
            )

    def _save_all(self, is_epoch: bool, epoch: int = 0, is_best: Sequence[bool] = ()) -> None:
        """Write one checkpoint per learner at the current position. Collective (random states of all ranks)."""
        rng = all_gather_object([learner.rng_state() for learner in self.learners])
        self._save = False
        self.throughput.mark_saved()
        if not self.run.is_main:
            return
        position = self.position
        images = position.batches_done * self.layout.micro_batch_size * self.run.world_size
        sampler = {**self.sampler.state_dict(), "epoch": position.epoch, "position": images}
        for i, (learner, manager) in enumerate(zip(self.learners, self.managers, strict=True)):
            state = build_state(
                learner, position, self.layout, self.bests[i], [r[i] for r in rng], sampler, self.metrics[i]
            )
            if is_epoch:
                state["epoch"] = epoch
                path = manager.save_epoch(state, epoch, position.step, is_best=bool(is_best and is_best[i]))
            else:
                path = manager.save_step(state, position.epoch, position.step, is_best=bool(is_best and is_best[i]))
            self.logs[i].info(f"saved {path}")

    def close(self) -> None:
        """Close the logs and let others use the folders."""
        for log in self.logs:
            log.close()
        for lock in self.locks:
            lock.release()


_UNSHOWN = {"skipped_steps", "loss_scale", "clip_fraction"}


class _Flags:
    """A step's flags on their way to the host; reading them waits for that step only."""

    def __init__(self, flags: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if flags.device.type == "cuda":
            self._host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            self._host.copy_(flags, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = flags

    def values(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()
