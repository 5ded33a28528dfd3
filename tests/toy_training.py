"""A training run small enough to start hundreds of times, and a way to start it in several processes.

Processes come from a fork server that has torch loaded already, so that one costs a tenth of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from yacs.config import CfgNode

from sam3_train.checkpoint import CheckpointManager, load_checkpoint, load_common, state_dict_sha256
from sam3_train.config import load_config, training_defaults
from sam3_train.data.samplers import PartitionSampler, ResumableDistributedSampler
from sam3_train.distributed import RunContext, training_run
from sam3_train.errors import run_cli
from sam3_train.loop import FitResult, Member, fit, fit_many
from sam3_train.rng import mix_seed, seed_everything
from sam3_train.task import Task, freeze

FAST = ["PRINT_FREQ", "4", "TRAIN.WARMUP_EPOCHS", "1", "TRAIN.SAVE_EVERY_MINUTES", "0", "TRAIN.EPOCHS", "2"]


class ToyData(Dataset[dict[str, Tensor]]):
    """Random images whose noise is a function of (seed, index); ``poison`` images are NaN; reading may be slow."""

    def __init__(self, num_images: int, poison: Sequence[int] = (), delay_s: float = 0.0) -> None:
        self.images = torch.randn(num_images, 3, 6, 6, generator=torch.Generator().manual_seed(0))
        self.images[list(poison)] = float("nan")
        self.delay_s = delay_s

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if self.delay_s:
            time.sleep(self.delay_s)
        noise = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(mix_seed(0, 0, index)))
        return {"image": self.images[index] + 0.1 * noise, "index": torch.tensor(index)}


class ToyTask(Task):
    """Imitates a frozen network. ``norm`` puts BatchNorm and dropout into the student."""

    best_metric, best_mode = "loss", "min"

    def __init__(self, norm: bool = True, width: int = 6, teacher_norm: bool = False) -> None:
        super().__init__()
        middle = [nn.BatchNorm2d(width), nn.Dropout(0.2)] if norm else [nn.Identity()]
        self.student = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), *middle, nn.ReLU(), nn.Conv2d(width, 4, 1))
        with torch.random.fork_rng():
            torch.manual_seed(7)
            layers = [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)] if teacher_norm else [nn.Conv2d(3, 4, 1)]
            self.teacher = freeze(nn.Sequential(*layers))

    def errors(self, batch: dict[str, Tensor]) -> Tensor:
        target = self.teacher(batch["image"])
        return (self.student(batch["image"]) - target).square().mean((1, 2, 3))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        loss = self.errors(batch).mean()
        return {"loss": loss, "mse": loss}

    def validate(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": self.errors(batch), "index_mean": batch["index"].float()}


def toy_config(opts: Sequence[str] = ()) -> CfgNode:
    return load_config(training_defaults(), None, [*FAST, *opts])


def newest(folder: Path) -> dict[str, Any]:
    """What a run would continue from."""
    loaded = load_common([CheckpointManager(folder)])
    assert loaded is not None
    return loaded[0][1]


def toy_loaders(
    run: RunContext, num_images: int = 48, batch_size: int = 4, **data: Any
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    train = ToyData(num_images, **data)
    sampler = ResumableDistributedSampler(num_images, 0, run.rank, run.world_size)
    val_sampler = PartitionSampler(11, run.rank, run.world_size)
    return DataLoader(train, batch_size, sampler=sampler, drop_last=True), DataLoader(
        ToyData(11), batch_size, sampler=val_sampler
    )


def train_toy(
    output: str | Path,
    opts: Sequence[str] = (),
    *,
    task: Callable[[], Task] = ToyTask,
    identity: dict[str, Any] | None = None,
    resume: Path | None = None,
    **data: Any,
) -> FitResult:
    """One run of `fit`, whatever number of processes the environment asks for."""
    with training_run("cpu") as run:
        seed_everything(0)
        train, val = toy_loaders(run, **data)
        return fit(task(), train, val, toy_config(opts), run, output, identity=identity, resume=resume)


def train_toys(outputs: Sequence[Path], opts: Sequence[str] = (), widths: Sequence[int] = (6, 8)) -> list[FitResult]:
    """One run of `fit_many`; every student is built as if it were alone."""
    with training_run("cpu") as run:
        members = []
        for output, width in zip(outputs, widths, strict=True):
            seed_everything(0)
            members.append(Member(ToyTask(width=width), toy_config(opts), Path(output)))
        return fit_many(members, *toy_loaders(run), run)


@dataclass
class Ended:
    """How a group of processes ended."""

    codes: list[int | None]
    text: str
    """What all of them wrote to stdout and stderr."""
    seconds: float


class Group:
    """Processes that run one function as the ranks of a run."""

    def __init__(
        self, body: Callable[..., Any], world_size: int, folder: Path, args: tuple[Any, ...] = (), **kwargs: Any
    ):
        context = multiprocessing.get_context("forkserver")
        # torch imports _dynamo (and that triton) when the first optimizer is made, which takes seconds.
        context.set_forkserver_preload(["sam3_train.loop", "torch.utils.tensorboard", "torch._dynamo", "triton"])
        self.log = folder / f"output-{time.monotonic_ns()}.txt"
        port = free_port()
        self.start = time.monotonic()
        self.processes = [
            context.Process(target=_run_rank, args=(body, rank, world_size, port, str(self.log), args, kwargs))
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def wait(self, timeout_s: float = 60.0) -> Ended:
        """Wait for all; a process that is still there after the time-out is ended and has the code None."""
        deadline = time.monotonic() + timeout_s
        codes: list[int | None] = []
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
            codes.append(process.exitcode)
            if process.exitcode is None:
                process.kill()
                process.join()
        seconds = time.monotonic() - self.start
        return Ended(codes, self.log.read_text() if self.log.exists() else "", seconds)


def run_group(body: Callable[..., Any], world_size: int, folder: Path, *args: Any, **kwargs: Any) -> Ended:
    """Start a `Group` and wait for it."""
    return Group(body, world_size, folder, args, **kwargs).wait()


def kill_9_inside_an_epoch(body: Callable[..., Any], folder: Path, cfg: Path, run: Path) -> None:
    """Start ``body(cfg, run)`` in two processes and kill both once ``run`` holds two checkpoints."""
    group = Group(body, 2, folder, (cfg, run))
    deadline = time.monotonic() + 90
    while not (run / "last.json").exists() or len(CheckpointManager(run).names()) < 2:
        assert time.monotonic() < deadline and all(p.is_alive() for p in group.processes), group.log.read_text()
        time.sleep(0.01)
    for process in group.processes:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    assert group.wait().codes == [-signal.SIGKILL] * 2


def learnt(checkpoint: Path) -> dict[str, str]:
    """Hashes of the weights and of the optimizer's moments in a checkpoint."""
    state = load_checkpoint(checkpoint)
    moments = {f"{i}.{k}": torch.as_tensor(v) for i, s in state["optimizer"]["state"].items() for k, v in s.items()}
    return {"model": state_dict_sha256(state["model"]), "moments": state_dict_sha256(moments)}


def _run_rank(
    body: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    log: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    def main_body(argv: list[str] | None) -> int:
        body(*args, **kwargs)
        return 0

    code = run_cli(main_body, [])
    os._exit(code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
