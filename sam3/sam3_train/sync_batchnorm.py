"""BatchNorm over the global batch: with few images per process, each process's own statistics are noise.

torch's SyncBatchNorm exists for accelerators only; `GlobalBatchNorm2d` does the same arithmetic on any backend, gloo on
the CPU included, so that two processes can be shown to train like one at the same global batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sam3_train.distributed import world_size


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks whose gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose batch statistics are those of all ranks together; same parameters, buffers and eval mode."""

    def forward(self, x_bchw: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W). Collective in training: every rank calls it equally often."""
        if not self.training or world_size() == 1:
            return super().forward(x_bchw)
        x = x_bchw.float() if x_bchw.dtype in (torch.float16, torch.bfloat16) else x_bchw
        count_and_sum = torch.cat([x.new_full((1,), x.numel() / x.shape[1]), x.sum((0, 2, 3))])
        totals = _SumOverRanks.apply(count_and_sum)
        count = totals[0].detach()
        mean_c = totals[1:] / count
        centered = x - mean_c[:, None, None]
        # A second sum over ranks, of squared deviations: E[x^2] - E[x]^2 loses digits where the mean is large.
        var_c = _SumOverRanks.apply(centered.square().sum((0, 2, 3))) / count
        self._update_running(mean_c.detach(), var_c.detach(), count)
        scale_c = torch.rsqrt(var_c + self.eps)
        if self.affine:
            scale_c = scale_c * self.weight
        normalized = centered * scale_c[:, None, None]
        if self.affine:
            normalized = normalized + self.bias[:, None, None]
        return normalized.to(x_bchw.dtype)

    def _update_running(self, mean_c: Tensor, var_c: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        rate = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        unbiased = var_c * (count / (count - 1).clamp(min=1))
        self.running_mean.lerp_(mean_c.to(self.running_mean.dtype), rate)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), rate)


def synchronized(norm: nn.Module, device: torch.device) -> nn.Module:
    """A BatchNorm that does what ``norm`` does with statistics over all ranks; parameters and buffers are shared.

    Args:
        norm: Any BatchNorm on CUDA, where torch's own fused version is taken; elsewhere a BatchNorm2d.
        device: Where it will train.

    Raises:
        ValueError: If it is of a kind whose extra work would be lost.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(norm)
    if type(norm) is not nn.BatchNorm2d:
        raise ValueError(f"{type(norm).__name__} cannot be synchronised on {device}, only BatchNorm2d")
    norm.__class__ = GlobalBatchNorm2d
    return norm
