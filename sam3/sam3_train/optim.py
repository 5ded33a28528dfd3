"""Parameter groups and the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from sam3_train.errors import UserError

OPTIMIZERS = ("adamw", "sgd")


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    lr_scale_of: Callable[[str], float] | None = None,
    has_weight_decay: Callable[[str, nn.Parameter], bool] | None = None,
) -> list[dict[str, Any]]:
    """Split the trainable parameters into optimizer groups.

    Args:
        module: Its parameters with ``requires_grad`` each get into exactly one group, the frozen ones into none.
        weight_decay: For the parameters that have it.
        lr_scale_of: Name to a factor on the learning rate; default 1.
        has_weight_decay: Default: vectors, scalars and whatever is called ``bias`` have none.

    Returns:
        Groups for a torch optimizer, with ``(name, parameter)`` pairs under ``params``, and ``lr_scale``.

    Raises:
        UserError: If nothing is trainable.
    """
    decays = has_weight_decay or default_weight_decay
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    # named_parameters lists a parameter that two modules share once, under its first name.
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = float(lr_scale_of(name)) if lr_scale_of else 1.0
        key = (bool(decays(name, parameter)), scale)
        group = groups.setdefault(
            key, {"params": [], "weight_decay": weight_decay if key[0] else 0.0, "lr_scale": scale}
        )
        group["params"].append((name, parameter))
    if not groups:
        raise UserError(f"{type(module).__name__} has no trainable parameter: all are frozen")
    return list(groups.values())


def default_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is decayed: matrices and convolutions are, norms and biases are not."""
    return parameter.ndim > 1 and not name.endswith("bias")


def build_optimizer(groups: list[dict[str, Any]], train: CfgNode, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer that ``TRAIN.OPTIMIZER`` names.

    AdamW is fused where torch has that: it then can leave out a step by a flag on the device (`step_unless`). SGD is
    not: torch's fused SGD leaves its momentum uninitialised if the very first step is left out.

    Raises:
        UserError: If the name is unknown.
    """
    settings = train.OPTIMIZER
    if settings.NAME == "adamw":
        return torch.optim.AdamW(
            groups,
            lr=train.BASE_LR,
            betas=(settings.BETAS[0], settings.BETAS[1]),
            eps=settings.EPS,
            weight_decay=train.WEIGHT_DECAY,
            fused=device.type in ("cuda", "cpu"),
        )
    if settings.NAME == "sgd":
        return torch.optim.SGD(
            groups,
            lr=train.BASE_LR,
            momentum=settings.MOMENTUM,
            weight_decay=train.WEIGHT_DECAY,
            nesterov=settings.MOMENTUM > 0,
        )
    raise UserError(f"TRAIN.OPTIMIZER.NAME {settings.NAME!r} is not one of {', '.join(OPTIMIZERS)}")


def step_unless(optimizer: torch.optim.Optimizer, is_bad: Tensor) -> None:
    """Take a step unless the 0-dim float tensor ``is_bad`` is 1; with a fused optimizer the host need not wait."""
    if not optimizer.defaults.get("fused"):
        if not float(is_bad):
            optimizer.step()
        return
    # The interface that torch's GradScaler uses.
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = is_bad  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group its rate: ``lr`` times the group's ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any], where: str) -> None:
    """Restore moments and counters; rates and other settings stay those of the current config.

    Raises:
        UserError: If the stored groups hold other parameters, or in another order: torch itself matches by position.
    """
    own = [list(group["param_names"]) for group in optimizer.param_groups]
    stored = [list(group.get("param_names", [])) for group in state["param_groups"]]
    if own != stored:
        first = next(
            (
                f"{a} here, {b} there"
                for x, y in zip(own, stored, strict=False)
                for a, b in zip(x, y, strict=False)
                if a != b
            ),
            f"{sum(map(len, own))} in {len(own)} groups here, {sum(map(len, stored))} in {len(stored)} groups there",
        )
        raise UserError(f"the optimizer state of {where} belongs to other parameters ({first}); it cannot be resumed")
    current = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        # Checkpoints store moments in C order; a channels_last kernel needs them in its own. The fused CPU kernel walks
        # through memory and would pair a weight with another one's moments, without an error.
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    for group, settings in zip(optimizer.param_groups, current, strict=True):
        group.update(settings)
