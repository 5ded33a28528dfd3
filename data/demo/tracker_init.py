"""Where the tiny tracker's training starts: a memory that already says, roughly, where the object was.

A fresh memory this narrow takes long to find that masks are to be kept, that the same place is to be read, and what the
SAM heads understand. All three can be written down.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3.model.sam3_tracker import Sam3Tracker

LOCALITY = 2.0
"""Constant part of queries and keys, which rotary positions turn: the larger, the more a cell reads its own place."""
CONTENT_GAIN = 0.1
"""Scale of what queries and keys read of features and memories, beside that constant."""
PUSH = 2.0
"""How far features move where the object was, in standard deviations of what they are anyway."""
CERTAIN_LOGIT = 10.0


@torch.no_grad()
def init_for_tracking(tracker: Sam3Tracker, coarse_nchw: Tensor, coverage_nhw: Tensor, seed: int) -> None:
    """Set a fresh memory's weights.

    The norm behind the memory attention gets the scale and shift that bring features back to what the SAM heads know.
    In the attention to the memory, queries and keys are constants that rotary positions turn, and little else. The
    first channel of a memory is, by least squares, the mask that it was made from; where it is read, features move
    in the direction in which a mask prompt moves them. A mask prompt starts as the logits of a certain mask.

    Args:
        tracker: With trained SAM heads.
        coarse_nchw: Coarse features of some frames, (N, C, G, G).
        coverage_nhw: Share of each cell that one object covers on each of them, 0..1, (N, 4 G, 4 G).
        seed: Of what is random.
    """
    generator = torch.Generator().manual_seed(seed)
    attention: Any = tracker.transformer.encoder
    seen = coarse_nchw + tracker.no_mem_embed.transpose(1, 2)[..., None]
    tokens = seen.flatten(2).transpose(1, 2).flatten(0, 1)
    _undo_norm(attention.norm, tokens)
    scale = float(tokens.std(dim=1).mean())
    direction = _mask_prompt_direction(tracker, coverage_nhw)
    push = direction * PUSH * (tokens @ direction).std()
    for layer in attention.layers:
        _init_attention(layer.self_attn, 0.7, 0.0, 0.001 * scale, generator)
        _init_attention(layer.cross_attn_image, CONTENT_GAIN, LOCALITY, 0.001 * scale, generator)
        layer.linear2.weight.normal_(0.0, 0.001 * scale, generator=generator)
        # Channel 0 of the memory is the mask; each layer adds its share of the push.
        reader = layer.cross_attn_image
        reader.v_proj.weight[0].zero_()
        reader.v_proj.weight[0, 0] = 1.0
        reader.out_proj.weight[:, 0] = push / len(attention.layers)
    _remember_mask(tracker, coarse_nchw, coverage_nhw, scale, generator)
    tracker.mask_downsample.weight.fill_(2 * CERTAIN_LOGIT / tracker.mask_downsample.weight.numel())
    bias: Any = tracker.mask_downsample.bias
    bias.fill_(-CERTAIN_LOGIT)


def _undo_norm(norm: Any, tokens_nc: Tensor) -> None:
    """Scale and shift of each channel that bring normalised tokens back to themselves, by least squares."""
    normed = F.layer_norm(tokens_nc, tokens_nc.shape[-1:])
    centred, wanted = normed - normed.mean(0), tokens_nc - tokens_nc.mean(0)
    norm.weight.copy_((centred * wanted).sum(0) / centred.square().sum(0))
    norm.bias.copy_(tokens_nc.mean(0) - norm.weight * normed.mean(0))


def _init_attention(attention: Any, gain: float, constant: float, out_std: float, generator: torch.Generator) -> None:
    nn.init.orthogonal_(attention.q_proj.weight, gain=gain, generator=generator)
    attention.k_proj.weight.copy_(attention.q_proj.weight[:, : attention.k_proj.weight.shape[1]])
    attention.q_proj.bias.fill_(constant)
    attention.k_proj.bias.fill_(constant)
    attention.v_proj.bias.zero_()
    attention.out_proj.weight.normal_(0.0, out_std, generator=generator)
    attention.out_proj.bias.zero_()


def _mask_prompt_direction(tracker: Sam3Tracker, coverage_nhw: Tensor) -> Tensor:
    """The direction of what a mask prompt adds inside a mask more than outside of it, a unit vector (C,)."""
    logits = (2 * coverage_nhw[:, None] - 1) * CERTAIN_LOGIT
    dense = tracker.sam_prompt_encoder.embed_masks(logits).permute(0, 2, 3, 1)
    cells = F.adaptive_avg_pool2d(coverage_nhw[:, None], dense.shape[1])[:, 0]
    return F.normalize(dense[cells > 0.9].mean(0) - dense[cells < 0.1].mean(0), dim=0)


def _remember_mask(
    tracker: Sam3Tracker, coarse_nchw: Tensor, coverage_nhw: Tensor, scale: float, generator: torch.Generator
) -> None:
    """Make the first channel of a memory the mask, -1 to 1, by ridge regression; the others are random."""
    encoder: Any = tracker.maskmem_backbone
    encoder.pix_feat_proj.weight.div_(scale)
    for block in encoder.fuser.layers:
        block.gamma.fill_(0.1)
    side = tracker.mask_prompt_size
    masks = F.interpolate(coverage_nhw[:, None], size=(side, side), mode="bilinear", align_corners=False)
    inner = encoder.fuser(
        encoder.pix_feat_proj(coarse_nchw) + encoder.mask_downsampler((2 * masks - 1) * CERTAIN_LOGIT)
    )
    cells = F.adaptive_avg_pool2d(coverage_nhw[:, None], inner.shape[-1]).flatten() * 2 - 1
    inputs = inner.permute(0, 2, 3, 1).flatten(0, 2)
    mean = inputs.mean(0)
    centred = inputs - mean
    gram = centred.T @ centred
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram))
    solution = torch.linalg.solve(gram + ridge, centred.T @ (cells - cells.mean()))
    weight = encoder.out_proj.weight.flatten(1)
    nn.init.xavier_uniform_(weight, generator=generator)
    spread = (centred @ weight.T).std(0)
    weight.div_(spread[:, None])
    encoder.out_proj.bias.copy_(-weight @ mean)
    weight[0] = solution
    encoder.out_proj.bias[0] = cells.mean() - solution @ mean
