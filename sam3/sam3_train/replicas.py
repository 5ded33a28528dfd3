"""Keeping the copies of a model on several ranks the same, and finding out when they are not."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sam3_train.distributed import world_size
from sam3_train.errors import UserError
from sam3_train.sync_batchnorm import GlobalBatchNorm2d, synchronized
from sam3_train.task import is_frozen, trainable_modules

SYNCHRONIZED = (nn.SyncBatchNorm, GlobalBatchNorm2d)
"""BatchNorms whose statistics span all ranks already."""


def convert_sync_batchnorm(module: nn.Module, device: torch.device) -> int:
    """Replace BatchNorm inside trainable parts by one whose statistics span all ranks.

    Returns:
        How many were replaced.
    """
    replaced = 0
    for name, child in module.named_children():
        if is_frozen(child):
            continue
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, SYNCHRONIZED):
            setattr(module, name, synchronized(child, device))
            replaced += 1
        else:
            replaced += convert_sync_batchnorm(child, device)
    return replaced


class BatchNormStatistics:
    """The running statistics of the BatchNorms that train.

    Once per optimizer step they are averaged over ranks (each rank sees other images, and DDP alone would keep rank
    0's), and a step that is skipped puts the former ones back: one batch with NaN would otherwise stay in them.
    """

    def __init__(self, module: nn.Module) -> None:
        self._buffers: list[Tensor] = []
        for part in trainable_modules(module):
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
                assert part.running_var is not None
                self._buffers += [part.running_mean, part.running_var]
        self._before = self._flat()

    def take(self) -> None:
        """Remember the statistics as they are, e.g. after loading weights."""
        self._before = self._flat()

    @torch.no_grad()
    def settle(self, is_bad: Tensor) -> None:
        """Average over ranks, or put the former statistics back where the 0-dim tensor ``is_bad`` is positive."""
        if self._before is None:
            return
        flat = self._flat()
        assert flat is not None
        if world_size() > 1:
            dist.all_reduce(flat)
            flat /= world_size()
        flat = torch.where(is_bad > 0, self._before, flat)
        pieces = flat.split([buffer.numel() for buffer in self._buffers])
        torch._foreach_copy_(self._buffers, [p.view_as(b) for p, b in zip(pieces, self._buffers, strict=True)])
        self._before = flat

    def _flat(self) -> Tensor | None:
        return torch.cat([buffer.flatten() for buffer in self._buffers]) if self._buffers else None


def check_replicas(module: nn.Module, step: int) -> None:
    """Compare all parameters and buffers bit by bit over ranks. Collective.

    Raises:
        UserError: If a rank differs; the message names the first tensor that does.
    """
    if world_size() == 1:
        return
    state = {name: tensor for name, tensor in module.state_dict().items() if tensor.numel()}
    sums = torch.stack([_checksum(tensor) for tensor in state.values()])
    low, high = sums.clone(), sums.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    differs = (low != high).any(1).tolist()
    if any(differs):
        first = next(name for name, differ in zip(state, differs, strict=True) if differ)
        raise UserError(
            f"the ranks hold different weights at step {step}: {sum(differs)} of {len(differs)} tensors, the first is "
            f"{first}. Gradients were not synchronised or a GPU computes wrongly; continue from the last checkpoint."
        )


def _checksum(tensor: Tensor) -> Tensor:
    bits = tensor.detach().contiguous().flatten().view(torch.uint8)
    pad = -bits.numel() % 4
    if pad:
        bits = torch.cat([bits, bits.new_zeros(pad)])
    words = bits.view(torch.int32).to(torch.int64)
    return torch.stack([words.sum(), (words * words).sum()])
