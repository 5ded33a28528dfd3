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
LIKENESS = 1.5
"""Scale of the part that compares what is there: the larger, the more a cell reads what looks like it."""
NOISE_GAIN = 0.05
PUSH = 4.0
"""How far features move where the object was, in standard deviations of what they are anyway."""
CERTAIN_LOGIT = 10.0


@torch.no_grad()
def init_for_tracking(tracker: Sam3Tracker, coarse_nchw: Tensor, coverage_nhw: Tensor, seed: int) -> None:
    """Set a fresh memory's weights.

    The norm behind the memory attention gets the scale and shift that bring features back to what the SAM heads know.
    The first channel of a memory is, by least squares, the mask that it was made from; where it is read, features move
    in the direction in which a mask prompt moves them. The other channels are what tells objects apart best, by linear
    discriminants; queries and keys compare them, and places beside: a constant that fast rotary positions turn. A mask
    prompt starts as the logits of a certain mask.

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
    features = coarse_nchw.permute(0, 2, 3, 1) / scale
    likeness = _discriminants(features, coverage_nhw, tracker.settings.mem_dim - 1)
    for layer in attention.layers:
        _init_attention(layer.self_attn, 0.7, 0.001 * scale, generator)
        _init_attention(layer.cross_attn_image, NOISE_GAIN, 0.001 * scale, generator)
        layer.linear2.weight.normal_(0.0, 0.001 * scale, generator=generator)
        # Channel 0 of the memory is the mask; each layer adds its share of the push.
        reader = layer.cross_attn_image
        reader.v_proj.weight[0].zero_()
        reader.v_proj.weight[0, 0] = 1.0
        reader.out_proj.weight[:, 0] = push / len(attention.layers)
        _compare(reader, likeness)
    _remember_mask(tracker, coarse_nchw, coverage_nhw, scale, likeness)
    tracker.mask_downsample.weight.fill_(2 * CERTAIN_LOGIT / tracker.mask_downsample.weight.numel())
    bias: Any = tracker.mask_downsample.bias
    bias.fill_(-CERTAIN_LOGIT)


def _undo_norm(norm: Any, tokens_nc: Tensor) -> None:
    """Scale and shift of each channel that bring normalised tokens back to themselves, by least squares."""
    normed = F.layer_norm(tokens_nc, tokens_nc.shape[-1:])
    centred, wanted = normed - normed.mean(0), tokens_nc - tokens_nc.mean(0)
    norm.weight.copy_((centred * wanted).sum(0) / centred.square().sum(0))
    norm.bias.copy_(tokens_nc.mean(0) - norm.weight * normed.mean(0))


def _init_attention(attention: Any, gain: float, out_std: float, generator: torch.Generator) -> None:
    nn.init.orthogonal_(attention.q_proj.weight, gain=gain, generator=generator)
    attention.k_proj.weight.copy_(attention.q_proj.weight[:, : attention.k_proj.weight.shape[1]])
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj):
        projection.bias.zero_()
    attention.out_proj.weight.normal_(0.0, out_std, generator=generator)


def _compare(reader: Any, likeness: Tensor) -> None:
    """Let queries and keys compare places in the fast half of each axis' rotary pairs, likeness in the slow halves."""
    dim = len(reader.q_proj.weight)
    fast = torch.arange(dim) % (dim // 2) < dim // 4
    for projection in (reader.q_proj, reader.k_proj):
        projection.bias[fast] = LOCALITY
    slow = (~fast).nonzero()[: len(likeness), 0]
    reader.q_proj.weight[slow] = LIKENESS * likeness
    reader.k_proj.weight[slow] = LIKENESS * torch.eye(len(likeness) + 1)[1:]


def _discriminants(features_nhwc: Tensor, coverage_nhw: Tensor, count: int) -> Tensor:
    """Directions of unit variance along which cells of one object differ least, compared with all: (count, C)."""
    cells = F.adaptive_avg_pool2d(coverage_nhw[:, None], features_nhwc.shape[1])[:, 0]
    tokens = features_nhwc.flatten(0, 2)
    inside = [features[cell > 0.9] for features, cell in zip(features_nhwc, cells, strict=True)]
    within = torch.cat([group - group.mean(0) for group in inside if len(group) > 1])
    total = torch.cov(tokens.T)
    spread = torch.cov(within.T) + 0.1 * total.diagonal().mean() * torch.eye(len(total))
    values, vectors = torch.linalg.eigh(spread)
    whiten = vectors / values.sqrt()
    directions = (whiten @ torch.linalg.eigh(whiten.T @ total @ whiten).eigenvectors[:, -count:]).T
    return directions / (tokens @ directions.T).std(0)[:, None]


def _mask_prompt_direction(tracker: Sam3Tracker, coverage_nhw: Tensor) -> Tensor:
    """The direction of what a mask prompt adds inside a mask more than outside of it, a unit vector (C,)."""
    logits = (2 * coverage_nhw[:, None] - 1) * CERTAIN_LOGIT
    dense = tracker.sam_prompt_encoder.embed_masks(logits).permute(0, 2, 3, 1)
    cells = F.adaptive_avg_pool2d(coverage_nhw[:, None], dense.shape[1])[:, 0]
    return F.normalize(dense[cells > 0.9].mean(0) - dense[cells < 0.1].mean(0), dim=0)


def _remember_mask(
    tracker: Sam3Tracker, coarse_nchw: Tensor, coverage_nhw: Tensor, scale: float, likeness: Tensor
) -> None:
    """Make the first channel of a memory the mask, -1 to 1, by ridge regression, and the others the likeness."""
    encoder: Any = tracker.maskmem_backbone
    encoder.pix_feat_proj.weight.copy_(torch.eye(len(encoder.pix_feat_proj.weight))[..., None, None] / scale)
    encoder.pix_feat_proj.bias.zero_()
    basis = torch.linalg.qr(likeness.T).Q
    last = encoder.mask_downsampler.encoder[-1]  # what the mask adds must not look like another object
    last.weight.copy_(last.weight - torch.einsum("ij,kj,kchw->ichw", basis, basis, last.weight))
    last.bias.copy_(last.bias - basis @ (basis.T @ last.bias))
    for block in encoder.fuser.layers:
        block.gamma.fill_(0.03)
    side = tracker.mask_prompt_size
    masks = F.interpolate(coverage_nhw[:, None], size=(side, side), mode="bilinear", align_corners=False)
    marks = encoder.mask_downsampler((2 * masks - 1) * CERTAIN_LOGIT)
    inner = encoder.fuser(encoder.pix_feat_proj(coarse_nchw) + marks)
    cells = F.adaptive_avg_pool2d(coverage_nhw[:, None], inner.shape[-1]).flatten() * 2 - 1
    inputs = inner.permute(0, 2, 3, 1).flatten(0, 2)
    centred = inputs - inputs.mean(0)
    gram = centred.T @ centred
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram))
    solution = torch.linalg.solve(gram + ridge, centred.T @ (cells - cells.mean()))
    weight = torch.cat([solution[None], likeness])
    encoder.out_proj.weight.copy_(weight[..., None, None])
    encoder.out_proj.bias.copy_(-weight @ inputs.mean(0))
    encoder.out_proj.bias[0] += cells.mean()
