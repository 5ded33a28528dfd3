"""What a tracked clip costs in stage 2, beyond the losses that every tracker's training has.

total = focal * Focal + dice * Dice + iou * L1 + object_score * BCE     (`sam3_train.tracking_losses`)
      + absent * BCE over absent objects + temporal * change of masks + reconstruction * dense memory
      + the terms of `stage2.distill`
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3.model.clip_forward import ClipResult, is_present
from sam3.model.efficient_sam3_tracker import EfficientSam3Tracker
from sam3.model.grid_tables import SineTable
from sam3.sam.mask_decoder import SamOutput
from sam3_train.tracking_losses import TrackingLossWeights


@dataclass(frozen=True)
class Stage2LossWeights(TrackingLossWeights):
    """How much each term counts; the first ones are SAM 2's."""

    absent: float = 0.0
    """Cross entropy of the object score over absent objects alone. They are few, and a tracker for which everything is
    always there does well without them."""
    temporal: float = 0.0
    """From frame to frame, masks should change as the truth does: `temporal_loss`."""
    reconstruction: float = 0.0
    """The dense memory should be found again in the tokens that were made of it: `MemoryDecoder`."""


def temporal_loss(result: ClipResult, coverage_tbhw: Tensor) -> Tensor:
    """Squared error of how masks change between neighbouring frames, relative to the object's area.

    A mask that flickers costs, one that is wrong in the same way on both frames does not: the other terms see to that.

    Args:
        result: Of `forward_clip`.
        coverage_tbhw: What it was given, (T, B, h, w).

    Returns:
        Mean over pairs of frames that both have an answer and show the object; 0 where there is none.
    """
    shown = {t: _best_probabilities(sam) for t, sam in result.answers}
    present = is_present(coverage_tbhw)
    total = coverage_tbhw.new_zeros(())
    count = coverage_tbhw.new_zeros(())
    for t in range(1, len(coverage_tbhw)):
        if t not in shown or t - 1 not in shown:
            continue
        before, after = coverage_tbhw[t - 1].float(), coverage_tbhw[t].float()
        error = (shown[t] - shown[t - 1]) - (after - before)
        area = torch.maximum(before, after).flatten(1).sum(1).clamp(min=1.0)
        both = (present[t] & present[t - 1]).float()
        total = total + (error.square().flatten(1).sum(1) / area * both).sum()
        count = count + both.sum()
    return total / count.clamp(min=1.0)


def _best_probabilities(sam: SamOutput) -> Tensor:
    """Of the candidate that would be shown, float32 (B, h, w)."""
    best = sam.ious.argmax(dim=1)
    return sam.mask_logits[torch.arange(len(best), device=best.device), best].float().sigmoid()


class Compression(NamedTuple):
    """What the resampler read and what it made of it."""

    dense_bchw: Tensor
    tokens_bnc: Tensor


@contextmanager
def watched_compressions(tracker: EfficientSam3Tracker) -> Iterator[list[Compression]]:
    """Collects what the resampler does inside the block; nothing, where memory is not compressed."""
    found: list[Compression] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(Compression(inputs[0], output))

    resampler = tracker.spatial_perceiver
    hook = resampler.register_forward_hook(keep) if resampler is not None else None
    try:
        yield found
    finally:
        if hook is not None:
            hook.remove()


class MemoryDecoder(nn.Module):
    """Finds a dense memory again in its tokens. Used in training alone: no file that a tracker reads holds it.

    Each cell of the grid asks with its position code what the tokens know of it.

    Args:
        dim: Channels of the memory.
        grid_size: Side of the model's own grid.
        num_heads: Of the attention; they divide ``dim``.
    """

    def __init__(self, dim: int, grid_size: int, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.position_code = SineTable(dim, grid_size)
        self.query = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.norm = nn.LayerNorm(dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.answer = nn.Sequential(nn.Linear(2 * dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, tokens_bnc: Tensor, size_hw: tuple[int, int]) -> Tensor:
        """(B, N, C) and a grid of (H, W) cells -> (B, C, H, W)."""
        codes = self.position_code(size_hw).to(self.key_value.weight.dtype)
        query = self.query(codes).expand(len(tokens_bnc), -1, -1)
        key, value = self.key_value(self.norm(tokens_bnc)).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value))
        read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        decoded = self.answer(torch.cat([read, query], dim=-1))
        return decoded.transpose(1, 2).unflatten(-1, size_hw)


def reconstruction_loss(decoder: MemoryDecoder, compressions: Sequence[Compression]) -> Tensor:
    """Squared error of decoded memories in units of the dense memory's variance: 1 is what its mean costs.

    The dense memory is the goal, which has no gradient: it could otherwise become a constant, which is easily found
    again. What writes it is reached through the tokens alone, and may learn to write what they can hold.

    Raises:
        ValueError: If there is no compression.
    """
    if not compressions:
        raise ValueError("there is no compressed memory to reconstruct")
    losses = []
    for dense, tokens in compressions:
        wanted = dense.detach().float()
        decoded = decoder(tokens, (dense.shape[-2], dense.shape[-1])).float()
        variance = wanted.var(dim=(0, 2, 3), unbiased=False).clamp(min=1e-6)
        losses.append(((decoded - wanted).square().mean(dim=(0, 2, 3)) / variance).mean())
    return torch.stack(losses).mean()
