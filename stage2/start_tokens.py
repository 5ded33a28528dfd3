"""How tokens of a compressed memory start: as averages of the dense memory around their places."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3.model.efficient_sam3_train import EfficientSam3Train
from sam3.model.grid_tables import SineTable
from sam3.model.perceiver import PerceiverResampler

QUIET = 0.1
"""Share that is left of random weights where nothing is known."""
_KEPT_PLACE = 0.5
"""Share of its place that a token keeps which has no position code."""
_RIDGE = 1e-3


def start_resampler(resampler: PerceiverResampler, dense_nchw: Tensor) -> None:
    """Make tokens averages of dense memories around their places.

    Args:
        resampler: Changed in place.
        dense_nchw: Memories of the full tracker.
    """
    config, code = resampler.config, resampler.position_code
    grids = [(resampler.latents, _side(config.num_latents)), (resampler.latents_2d, config.window_grid)]
    for latents, side in grids:
        if latents is not None:
            codes = _spread(_codes(code, side), len(latents))
            has_code = latents is resampler.latents_2d and config.position_on_latents_2d
            # The codes of what is read come in with the values, and are taken out again.
            kept = 0.0 if has_code else _KEPT_PLACE
            latents.copy_(codes * (kept - 1.0 if config.position_on_keys else 1.0))
    side = max(side for _, side in grids)
    for i, layer in enumerate(resampler.layers):
        _start_perceiver_layer(layer, resampler, side, is_first=i == 0)
    tokens = resampler(dense_nchw).flatten(0, 1)
    undo_norm(resampler.norm, tokens, _pooled(resampler, dense_nchw).flatten(0, 1))


def _start_perceiver_layer(layer: Any, resampler: PerceiverResampler, side: int, is_first: bool) -> None:
    attention, dim = layer.attn, layer.attn.to_out.weight.shape[0]
    inner = attention.to_out.weight.shape[1]
    for out in (layer.ff[3], layer.self_ff[3], layer.self_attn.to_out):
        out.weight.mul_(QUIET)
    if not is_first:
        attention.to_out.weight.mul_(QUIET)
        return
    embed = torch.eye(inner, dim).to(attention.to_out.weight)
    attention.to_kv.weight[:inner].mul_(QUIET)
    attention.to_kv.weight[inner:].copy_(embed)
    attention.to_out.weight.copy_(embed.T)
    if isinstance(attention.to_pos, nn.Linear):
        attention.to_pos.weight.copy_(embed)
    codes = _codes(resampler.position_code, side)
    read = F.layer_norm(-codes, (dim,))
    back = _fit_through_zero(read, codes)  # queries have no bias
    attention.to_q.weight.copy_(_anchor_gain(resampler, side, inner) * embed @ back)


def _codes(code: SineTable, side: int) -> Tensor:
    """Position codes of the middles of side x side windows, (side^2, C)."""
    table = code.table.T.unflatten(1, code.size_hw)[None]
    return F.interpolate(table, (side, side), mode="bilinear", align_corners=False)[0].flatten(1).T


def _anchor_gain(resampler: PerceiverResampler, side: int, inner: int) -> float:
    """Factor on a code that makes attention to other codes a Gaussian of half the distance between places."""
    steps = 64
    codes = resampler.position_code.compute((steps, steps), torch.device("cpu"))
    middle, aside = codes[(steps // 2) * (steps + 1)], codes[(steps // 2) * (steps + 1) + 1]
    drop = float((middle * middle).sum() - (middle * aside).sum()) / math.sqrt(inner)
    return (2 * side) ** 2 / (2 * drop * steps**2)


def _pooled(resampler: PerceiverResampler, dense_nchw: Tensor) -> Tensor:
    """What tokens should be, (N, tokens, C)."""
    config, parts = resampler.config, []
    if config.num_latents:
        side = _side(config.num_latents)
        places = _spread(grid_places((side, side)), config.num_latents)
        cells = grid_places((dense_nchw.shape[-2], dense_nchw.shape[-1]))
        shares = (-torch.cdist(places, cells).square() * 2 * side**2).softmax(-1).to(dense_nchw)
        parts.append(shares @ dense_nchw.flatten(2).transpose(1, 2))
    if config.num_latents_2d:
        parts.append(F.adaptive_avg_pool2d(dense_nchw, config.window_grid).flatten(2).transpose(1, 2))
    return torch.cat(parts, dim=1)


def token_places(model: EfficientSam3Train) -> Tensor:
    """Where tokens are, from the image's middle: (tokens, 2), x before y."""
    config, parts = model.memory, []
    if not config.is_compressed:
        return grid_places((model.config.grid_size, model.config.grid_size))
    if config.num_latents:
        side = _side(config.num_latents)
        parts.append(_spread(grid_places((side, side)), config.num_latents))
    if config.num_latents_2d:
        parts.append(grid_places((config.window_grid, config.window_grid)))
    return torch.cat(parts)


def grid_places(size_hw: tuple[int, int]) -> Tensor:
    """Middles of a grid's cells in shares of the side, from the image's middle: (H * W, 2), x before y."""
    y, x = ((torch.arange(side) + 0.5) / side - 0.5 for side in size_hw)
    return torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1).flatten(0, 1)


def _side(count: int) -> int:
    return math.isqrt(max(count, 1) - 1) + 1


def _spread(rows: Tensor, count: int) -> Tensor:
    """So many of the rows, evenly."""
    return rows[torch.linspace(0, len(rows) - 1, count).round().long()]


def fit(inputs_nd: Tensor, targets_nt: Tensor) -> tuple[Tensor, Tensor]:
    """Ridge regression: weight (T, D) and bias (T,)."""
    inputs, targets = inputs_nd.double(), targets_nt.double()
    centre, level = inputs.mean(0), targets.mean(0)
    gram = (inputs - centre).T @ (inputs - centre)
    ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(gram + ridge, (inputs - centre).T @ (targets - level)).T
    return weight.to(inputs_nd.dtype), (level - weight @ centre).to(inputs_nd.dtype)


def _fit_through_zero(inputs_nd: Tensor, targets_nt: Tensor) -> Tensor:
    """Ridge regression without a bias: weight (T, D)."""
    inputs, targets = inputs_nd.double(), targets_nt.double()
    gram = inputs.T @ inputs
    ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge, inputs.T @ targets).T.to(inputs_nd.dtype)


def undo_norm(norm: nn.LayerNorm, normed_nc: Tensor, wanted_nc: Tensor) -> None:
    """Scale and shift of each channel that bring a fresh norm's outputs to what is wanted, by least squares."""
    centred, goal = normed_nc - normed_nc.mean(0), wanted_nc - wanted_nc.mean(0)
    norm.weight.copy_((centred * goal).sum(0) / centred.square().sum(0).clamp(min=1e-12))
    norm.bias.copy_(wanted_nc.mean(0) - norm.weight * normed_nc.mean(0))
