"""One door to the process group: `training_run` opens and closes it, and the helpers answer on a single process too.

Under torchrun (``RANK``, ``WORLD_SIZE``, ... in the environment) it joins gloo for CPU tensors and NCCL for CUDA ones;
without it a run is one process. If any rank fails or dies, all ranks end within seconds and one of them says why: see
`sam3_train.failure_watch`.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sam3_train.errors import Interrupted, UserError, exit_code_of
from sam3_train.failure_watch import FailureWatch
from sam3_train.stop_signal import sigterm_interrupts

T = TypeVar("T")


START_TIMEOUT_S = 300.0
"""How long ranks wait for each other at the start: machines may need minutes to read torch from a network disk."""

_POLL_S = 0.05


@dataclass(frozen=True)
class RunContext:
    """Where this process stands in the run."""

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    watch: FailureWatch | None = field(default=None, compare=False)
    """The connection to the other ranks; None for one process."""

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and prints."""
        return self.rank == 0


@contextlib.contextmanager
def training_run(device: str | None = None, timeout_s: float = 1800.0) -> Iterator[RunContext]:
    """Join the process group for the time of a ``with`` block, whether there are many processes or one.

    An error that leaves the block on any rank ends all ranks with that error's exit code, and one message. So does
    SIGTERM, which raises KeyboardInterrupt unless a `sam3_train.stop_signal.StopSignal` turns it into a request.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; None takes the best there is. Under torchrun with CUDA each
            rank takes the GPU of its local rank.
        timeout_s: A collective operation that takes longer fails. Not how failures are found: that takes seconds.

    Yields:
        This process's `RunContext`.

    Raises:
        UserError: If the device is not there, torchrun's variables are incomplete, or a rank never comes.
    """
    world_size, rank, local_rank = (_env_int(name, value) for name, value in _RANK_DEFAULTS.items())
    chosen = pick_device(device, local_rank, world_size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    run = RunContext(chosen, rank, local_rank, world_size)
    with sigterm_interrupts():
        if world_size == 1:
            yield run
            return
        _join_process_group(run, timeout_s)
        with _watched(FailureWatch.start(run.rank, run.world_size), run.is_main) as watch:
            yield replace(run, watch=watch)


@contextlib.contextmanager
def _watched(watch: FailureWatch, is_main: bool) -> Iterator[FailureWatch]:
    """End all ranks the same way, and close watch and process group."""
    try:
        yield watch
        dist.barrier()
    except Interrupted as stop:
        # All ranks stop in agreement, after saving; one of them says so.
        stop.report_on_this_rank = is_main  # type: ignore[attr-defined]
        watch.close()
        dist.destroy_process_group()
        raise
    except BaseException as error:
        # The group is left as it is: closing it may wait for ranks that sit in a collective operation.
        error.report_on_this_rank = watch.report(exit_code_of(error))  # type: ignore[attr-defined]
        error.exit_code = watch.failure_code  # type: ignore[attr-defined]
        raise
    watch.close()
    dist.destroy_process_group()


_RANK_DEFAULTS = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0}


def pick_device(name: str | None, local_rank: int = 0, world_size: int = 1) -> torch.device:
    """The device that a name (or None: the best there is) stands for on this rank.

    Raises:
        UserError: If the name is unknown, the device is missing, or there are more ranks than devices.
    """
    if name is None or not name.strip():
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if name == "mps" and world_size > 1:
            name = "cpu"
    try:
        device = torch.device(name.strip())
    except RuntimeError:
        raise UserError(f"--device {name!r} is not a device: use cpu, cuda or mps") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {name}: torch {torch.__version__} sees no CUDA device; use --device cpu")
        index = local_rank if world_size > 1 or device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UserError(
                f"--device {name}: local rank {local_rank} needs GPU {index}, this machine has "
                f"{torch.cuda.device_count()}; start at most that many processes per node (GPUS=...)"
            )
        return torch.device("cuda", index)
    if device.type == "mps" and torch.backends.mps.is_available():
        if world_size > 1:
            raise UserError(f"--device mps works with one process, not {world_size}; use --device cpu")
        return device
    raise UserError(f"--device {name}: not available here; use cpu, cuda or mps")


def is_distributed() -> bool:
    """True between the start and the end of a `training_run` that joined a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """How many processes take part, 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """True on rank 0."""
    return rank() == 0


def barrier() -> None:
    """Wait until all ranks are here."""
    if world_size() > 1:
        dist.barrier()


def patient_barrier() -> None:
    """As `barrier` for long waits: signals are handled meanwhile, which a collective operation itself puts off."""
    if world_size() > 1:
        work = dist.barrier(async_op=True)
        while not work.is_completed():
            time.sleep(_POLL_S)
        work.wait()


def all_gather_object(value: T) -> list[T]:
    """The value of each rank, in rank order, on all ranks. The values must pickle."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: T) -> T:
    """Rank 0's value on all ranks; the other ranks' argument is ignored."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def mean_over_ranks(value: Any) -> Any:
    """Average over ranks: a tensor (any shape), a number, or a dict of either.

    Args:
        value: The same structure on each rank; integers become floats.

    Returns:
        The same structure; tensors stay on their device and need no gradient, numbers come back as floats.
    """
    if isinstance(value, Mapping):
        names = sorted(value)
        gathered = mean_over_ranks(torch.tensor([float(value[n]) for n in names], dtype=torch.float64))
        return dict(zip(names, gathered.tolist(), strict=True))
    if not isinstance(value, Tensor):
        return float(mean_over_ranks(torch.tensor(float(value), dtype=torch.float64)))
    mean = value.detach().clone() if value.is_floating_point() else value.detach().float()
    if world_size() > 1:
        dist.all_reduce(mean)
        mean /= world_size()
    return mean


def _join_process_group(run: RunContext, timeout_s: float) -> None:
    """Wait for all ranks at the store, then connect them.

    The wait has a time-out of its own: a rank that fails before it gets here (a bad path on one machine) cannot say so.
    """
    where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    wait = datetime.timedelta(seconds=START_TIMEOUT_S)
    keys = [f"arrived/{rank}" for rank in range(run.world_size)]
    try:
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=wait)))
        store.set(keys[run.rank], "1")
    except (dist.DistError, ValueError) as error:
        raise UserError(
            f"rank {run.rank} did not find the other processes at {where} (MASTER_ADDR, MASTER_PORT): "
            f"{str(error).splitlines()[0]}"
        ) from error
    deadline = time.monotonic() + START_TIMEOUT_S
    while not store.check(keys):  # the store's own wait would put off signals
        if time.monotonic() > deadline:
            absent = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
            raise UserError(
                f"ranks {', '.join(absent)} of {run.world_size} did not come to {where} within {START_TIMEOUT_S:.0f} "
                "s: look at their own messages"
            )
        time.sleep(_POLL_S)
    backend = "cpu:gloo,cuda:nccl" if run.device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=store, rank=run.rank, world_size=run.world_size, timeout=timeout)


def _env_int(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(f"environment variable {name} must be an integer, got {text!r}") from None
