"""What a training checkpoint holds, and whether a run may continue from one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sam3_train.checkpoint import CheckpointManager, load_checkpoint, load_common
from sam3_train.config import config_changes, config_to_dict, package_versions
from sam3_train.distributed import RunContext, broadcast_object
from sam3_train.errors import UserError
from sam3_train.learner import Counters, Learner, Member
from sam3_train.optim import load_optimizer_state

FORMAT_VERSION = 1


@dataclass
class Position:
    """Where the run stands in the data; the same for all learners."""

    epoch: int = 0
    batches_done: int = 0
    """Micro-batches of this epoch that each rank has consumed."""
    step: int = 0
    """Optimizer steps tried since the start, skipped ones included."""


@dataclass(frozen=True)
class BatchLayout:
    """How a step's images are spread."""

    micro_batch_size: int
    accumulation_steps: int
    world_size: int

    @property
    def global_batch_size(self) -> int:
        """Images per optimizer step."""
        return self.micro_batch_size * self.accumulation_steps * self.world_size


def find_checkpoints(
    members: Sequence[Member], run: RunContext
) -> tuple[list[CheckpointManager], list[tuple[Path, dict[str, Any]]] | None]:
    """Find what to continue from. Collective.

    Rank 0 looks and reads, the others get its answer: a folder that only rank 0's machine has is enough.

    Returns:
        The members' checkpoint managers (rank 0 only), and (path, content) for each member or None for a new run.

    Raises:
        UserError: If there is a run that may not be continued, or no checkpoint of it can be read.
    """
    if not run.is_main:
        return [], broadcast_object(None)
    explicit = [member.resume for member in members if member.resume is not None]
    managers = [
        CheckpointManager(m.output, m.cfg.TRAIN.KEEP_LAST, m.cfg.TRAIN.KEEP_EVERY, reads_pointer=not explicit)
        for m in members
    ]
    found: list[tuple[Path, dict[str, Any]]] | None = None
    if explicit:
        if len(explicit) != len(members):
            raise UserError("--resume must name a checkpoint for each student, or for none")
        found = [(path, load_checkpoint(path)) for path in explicit]
        for manager, (path, state) in zip(managers, found, strict=True):
            manager.adopt(path, state)
    elif members[0].cfg.TRAIN.AUTO_RESUME:
        found = load_common(managers)
    else:
        for manager in managers:
            if manager.newest is not None:
                raise UserError(
                    f"{manager.folder} already holds a run ({manager.newest['file']}) and TRAIN.AUTO_RESUME is off: "
                    "choose another --output, or continue it"
                )
    return managers, broadcast_object(found)


@dataclass
class Best:
    """The best validation result so far."""

    metric: str
    mode: str
    value: float | None = None
    epoch: int = -1

    def improves(self, metrics: dict[str, float]) -> bool:
        """Whether metrics hold a better value; one that is not finite never is."""
        value = metrics.get(self.metric, math.nan)
        if not math.isfinite(value):
            return False
        return self.value is None or (value < self.value if self.mode == "min" else value > self.value)


def build_state(
    learner: Learner,
    position: Position,
    layout: BatchLayout,
    best: Best,
    rng_by_rank: list[dict[str, Any]],
    sampler_state: dict[str, Any],
    metrics: dict[str, float],
) -> dict[str, Any]:
    """The content of a checkpoint: plain types and tensors.

    ``model`` holds the live weights under the task's saved names, ``ema`` the average (if on) under the same names:
    deploy ``ema`` where it exists.
    """
    state: dict[str, Any] = {
        **learner.member.record,
        "format_version": FORMAT_VERSION,
        "epoch": position.epoch,
        "step": position.step,
        "model": _copied(learner.task.saved_state()),
        "optimizer": learner.optimizer.state_dict(),
        "counters": asdict(learner.counters),
        "position": asdict(position),
        "batch": asdict(layout),
        "sampler": sampler_state,
        "rng": rng_by_rank,
        "best": asdict(best),
        "metrics": {name: float(value) for name, value in metrics.items()},
        "config": config_to_dict(learner.cfg),
        "identity": learner.member.identity,
        "versions": package_versions(("torch", "torchvision", "timm", "numpy", "efficientsam3")),
    }
    if learner.scaler is not None:
        state["scaler"] = learner.scaler.state_dict()
    if learner.ema is not None:
        with learner.ema.applied():
            state["ema"] = _copied(learner.task.saved_state())
    return state


def load_state(learner: Learner, state: dict[str, Any], where: Path) -> None:
    """Put a checkpoint's weights, optimizer, average, scaler and counters into a learner."""
    if learner.ema is not None:
        learner.task.load_saved_state(state.get("ema", state["model"]), str(where))
        learner.ema.reset_to_live()
    learner.task.load_saved_state(state["model"], str(where))
    load_optimizer_state(learner.optimizer, state["optimizer"], str(where))
    if learner.scaler is not None and "scaler" in state:
        learner.scaler.load_state_dict(state["scaler"])
    learner.counters = Counters(**state["counters"])


def resume_problems(
    identity: dict[str, Any], state: dict[str, Any], layout: BatchLayout, order: Mapping[str, Any]
) -> list[str]:
    """Why a run must not continue from a checkpoint; empty if it may.

    Args:
        identity: The run's, see `sam3_train.learner.Member`.
        state: The checkpoint.
        layout: The run's batches.
        order: What decides the run's data order: ``num_samples``, ``seed``, ``shuffle``.
    """
    if state.get("format_version") != FORMAT_VERSION or "position" not in state:
        return ["it is not a training checkpoint of this format (only weights? then use --pretrained)"]
    problems = [
        f"{name} is {now!r} now and was {then!r}"
        for name, (now, then) in config_changes(identity, state["identity"]).items()
    ]
    stored = BatchLayout(**state["batch"])
    if stored.global_batch_size != layout.global_batch_size:
        problems.append(
            f"the global batch is {_spell(layout)} now and was {_spell(stored)}: choose DATA.BATCH_SIZE and "
            f"TRAIN.ACCUMULATION_STEPS so that it is {stored.global_batch_size}"
        )
    elif state["position"]["batches_done"] % max(1, stored.accumulation_steps) and stored != layout:
        problems.append("it lies inside the last, partial step of an epoch; resume with the old batch layout")
    stored_order = {**order, **state["sampler"]}
    if stored_order["num_samples"] != order["num_samples"]:
        problems.append(f"the training set has {order['num_samples']} images now and had {stored_order['num_samples']}")
    for name, setting in (("seed", "SEED"), ("shuffle", "shuffling")):
        if stored_order[name] != order[name]:
            problems.append(
                f"{setting} is {order[name]} now and was {stored_order[name]}: some images of the epoch would come "
                "twice and others never"
            )
    return problems


def resumed_position(state: dict[str, Any], layout: BatchLayout, num_batches: int) -> Position:
    """The stored position in this run's micro-batches, also if the images are spread over another number of ranks."""
    position = Position(**state["position"])
    stored = BatchLayout(**state["batch"])
    if stored != layout:
        images = position.batches_done * stored.micro_batch_size * stored.world_size
        position.batches_done = min(num_batches, images // (layout.micro_batch_size * layout.world_size))
    return position


def resume_notes(learner: Learner, state: dict[str, Any], layout: BatchLayout) -> list[str]:
    """What differs from the checkpoint's run and is allowed to."""
    changes = config_changes(config_to_dict(learner.cfg), state["config"])
    notes = [f"{key} was {then!r} and is {now!r} now" for key, (now, then) in changes.items() if key not in _SILENT]
    stored = BatchLayout(**state["batch"])
    if stored != layout:
        notes.append(f"the global batch is {_spell(layout)} now and was {_spell(stored)}: the data order is the same")
    if ("ema" in state) != (learner.ema is not None):
        notes.append("EMA was " + ("on and is off now" if "ema" in state else "off: it starts from the live weights"))
    return notes


_SILENT = {"MODEL.RESUME", "OUTPUT"}


def check_resumable(
    identity: dict[str, Any], state: dict[str, Any], layout: BatchLayout, order: Mapping[str, Any], path: Path
) -> None:
    """Raise a UserError that lists all `resume_problems`."""
    problems = resume_problems(identity, state, layout, order)
    if problems:
        raise UserError.from_problems(
            f"cannot continue from {path} (choose another --output for a new run, or restore the settings)", problems
        )


def _copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # On the CPU a state dict shares memory with the weights, which the EMA swap would change underneath it.
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _spell(layout: BatchLayout) -> str:
    return (
        f"{layout.global_batch_size} ({layout.micro_batch_size} x {layout.accumulation_steps} accumulated x "
        f"{layout.world_size} processes)"
    )
