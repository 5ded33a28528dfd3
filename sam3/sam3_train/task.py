"""What a stage hands to the loop: a task is a module that maps a batch to a dict with ``loss``.

A new objective is one small file::

    class Distil(Task):
        best_metric, best_mode = "cosine", "min"

        def __init__(self, student, teacher):
            super().__init__()
            self.student = student
            self.neck = freeze(neck)                # used by the loss, never trained, always in eval mode

        def forward(self, batch):
            features = self.student(batch["image"])
            mse = masked_mse(features, batch["target"], batch["valid"])
            cosine = masked_cosine(features, batch["target"], batch["valid"])
            return {"loss": mse + cosine, "mse": mse, "cosine": cosine}

A large frozen teacher that only makes targets does not belong into the task at all: pass it to the loop in
``prepare_batch``, which runs once per batch for all students.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from sam3_train.checkpoint import load_strict
from sam3_train.optim import default_weight_decay

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Task(nn.Module):
    """A student (or whatever is trained) together with its loss."""

    best_metric: ClassVar[str] = "loss"
    """The validation metric that picks ``best.pth``."""
    best_mode: ClassVar[str] = "min"
    """``min`` or ``max``."""
    samples: ClassVar[str] = "images"
    """What logs call the samples."""

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """The loss of one batch.

        Args:
            batch: What the loader yields, on the run's device.

        Returns:
            ``loss``, a scalar with a gradient, and any further named scalars to log. Called under autocast.
        """
        raise NotImplementedError

    def validate(self, batch: Any) -> dict[str, Tensor]:
        """Metrics of one validation batch (eval mode, no gradient, EMA weights if there are any).

        Returns:
            Name to values per image, (B,), NaN where a metric does not apply to an image; a scalar counts as the mean
            over the batch's images. Default: the terms of `forward`.
        """
        return self(batch)

    def batch_size(self, batch: Any) -> int:
        """Number of images in a batch; default: the length of the first tensor found in it."""
        for tensor in _tensors(batch):
            return int(tensor.shape[0])
        raise TypeError(f"{type(self).__name__}.batch_size must be overridden: a {type(batch).__name__} has no tensor")

    def saved_state(self) -> dict[str, Tensor]:
        """What a checkpoint stores under ``model`` (and ``ema``): everything but frozen modules.

        A stage overrides this pair to store published names.
        """
        frozen = frozen_prefixes(self)
        return {name: value for name, value in self.state_dict().items() if not name.startswith(frozen)}

    def load_saved_state(self, state_dict: Mapping[str, Tensor], where: str) -> None:
        """Load what `saved_state` stored.

        Args:
            state_dict: Name to tensor.
            where: The file, for the message.

        Raises:
            UserError: If names or shapes differ.
        """
        frozen = frozen_prefixes(self)
        absent = [name for name in self.state_dict() if frozen and name.startswith(frozen)]
        load_strict(self, state_dict, where, allow_missing=absent)

    def lr_scale(self, name: str) -> float:
        """Factor on the learning rate of the parameter called ``name``."""
        return 1.0

    def has_weight_decay(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether a parameter is decayed."""
        return default_weight_decay(name, parameter)

    def watching(self, batch: Any) -> AbstractContextManager[None]:
        """A context in which a training batch passes forward and backward: what fails there can be told with it."""
        return nullcontext()

    def idle_prefixes(self) -> tuple[str, ...]:
        """Names, or their beginnings, of parameters that had no part in the last batch, on any rank.

        The optimizer leaves them alone: a gradient of 0 would still decay them and let their moments fade.
        """
        return ()

    def train(self, mode: bool = True) -> Task:
        """Switch to training mode, frozen modules excepted: their BatchNorm statistics must not move."""
        super().train(mode)
        for module in self.modules():
            if is_frozen(module):
                module.train(False)
        return self


def names_of(batch: Any, num_shown: int = 4) -> str:
    """The first samples of a batch by name, where it has names (``key``), for messages."""
    names = list(dict.fromkeys(batch.get("key", ()))) if isinstance(batch, Mapping) else []
    more = f" and {len(names) - num_shown} more" if len(names) > num_shown else ""
    return ", ".join(map(str, names[:num_shown])) + more


def freeze(module: ModuleT) -> ModuleT:
    """Take a module out of training for good: no gradients, eval mode also under `Task.train`, not in checkpoints."""
    module.requires_grad_(False)
    module.eval()
    module.is_frozen = True  # type: ignore[assignment]
    return module


def is_frozen(module: nn.Module) -> bool:
    """Whether `freeze` was called on this very module."""
    return module.__dict__.get("is_frozen") is True


def frozen_prefixes(module: nn.Module) -> tuple[str, ...]:
    """State dict prefixes (with the dot) of the frozen modules inside ``module``."""
    return tuple(f"{name}." for name, child in module.named_modules() if name and is_frozen(child))


def trainable_modules(module: nn.Module) -> Iterator[nn.Module]:
    """``module`` and what is inside it, frozen parts left out."""
    if is_frozen(module):
        return
    yield module
    for child in module.children():
        yield from trainable_modules(child)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with all its tensors on a device; dicts, lists and tuples keep their kind, other values pass through.

    The copy does not wait if the tensors are pinned.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    if hasattr(batch, "to"):
        return batch.to(device)
    return batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _tensors(value)
