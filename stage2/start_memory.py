"""Where the training of a compressed memory starts: as near to the full memory of the same file as can be written down.

A fresh memory attention takes long to find what the frozen heads understand, and the full one knows it. Everything here
is copied from it, or fitted to it in closed form on a few clips that it has played:

- Tokens start as averages of what the full memory stores around their places: a window, or the surroundings of an
  anchor. The norm behind the resampler gets the scale and shift that bring them back to what was stored.
- Layers start as layers of the full attention: values, outputs, MLPs and norms are copied. The full attention compares
  contents in one wide head and turns them by rotary positions; here each head gets the strongest directions of that
  comparison, and three channels that prefer what lies near: a Gaussian of the distance, whose width is found by trying.

Training then removes what such a copy gets wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3.model.clip_forward import ClipPlan, ClipResult, forward_clip
from sam3.model.efficient_memory_attention import EfficientMemoryAttentionLayer
from sam3.model.efficient_sam3_train import EfficientSam3Train
from sam3.model.memory_attention import MemoryAttentionLayer, RotaryAttention
from sam3.model.memory_bank import FrameRecord
from sam3.model.sam3_tracker import Sam3Tracker
from sam3.model.tracker_memory import TrackerFeatures, temporal_code
from stage2.distill import forced_features
from stage2.start_tokens import QUIET, fit, grid_places, start_resampler, token_places

WIDTHS = (0.05, 0.08, 0.13, 0.2, 0.4, 2.0)
"""Standard deviations of the Gaussian that are tried, as shares of the image's side."""
_PLACES = 3
"""Channels of a head, and of the keys, that say where something is."""
_VIDEO_FRAMES = 16
_TOKENS_PER_FRAME = 324


class Seen(NamedTuple):
    """Inputs of the full attention's parts at some tokens, and the places of those; (N, C) each, by layer."""

    by_frame: list[Tensor]
    """Behind ``norm1``."""
    by_memory: list[Tensor]
    """Behind ``norm2``."""
    tokens_by_frame: list[Tensor]
    """Which token of the grid each row is, (N,)."""
    tokens_by_memory: list[Tensor]


class PlayedClips(NamedTuple):
    """Clips that the full tracker has played from masks on their first frames."""

    features: list[TrackerFeatures]
    result: ClipResult
    seen: Seen


@torch.no_grad()
def play_clips(full: Sam3Tracker, features: list[TrackerFeatures], coverage_tbhw: Tensor) -> PlayedClips:
    """Let the full tracker follow objects from their masks on the first frame, and watch its attention.

    Args:
        full: The full tracker.
        features: Of each frame, a row for each object.
        coverage_tbhw: Masks of the objects, as `sam3.model.clip_forward.forward_clip` takes them.
    """
    plan, generator = ClipPlan("mask", (0,)), torch.Generator().manual_seed(0)
    with _watched(full) as seen:
        result = forward_clip(full, features, coverage_tbhw, plan, video_frames=_VIDEO_FRAMES, generator=generator)
    # Only what is read later: at full size the finer maps and the answers of a few clips fill gigabytes.
    coarse = [frame._replace(fine=frame.fine[:0], middle=frame.middle[:0]) for frame in features]
    result.answers.clear()
    result.outputs.clear()
    return PlayedClips(coarse, result, seen())


@torch.no_grad()
def start_from_full(model: EfficientSam3Train, full: Sam3Tracker, played: Sequence[PlayedClips]) -> float:
    """Set a compressed memory's weights from those of the full one.

    Args:
        model: With a fresh compressed memory.
        full: The full tracker of the same file.
        played: From `play_clips`.

    Returns:
        Squared error of the features behind the memory attention, in units of the variance of each channel (1 is what
        their means cost), if the memory stores the masks that the full tracker has found on these clips.

    Raises:
        ValueError: If no frame of the clips reads a memory.
    """
    played = [clips for clips in played if clips.result.conditioned]
    if not played:
        raise ValueError("a memory cannot start from the full one on clips of which no frame reads a memory")
    records = [record for clips in played for record in _records(clips).values()]
    dense = torch.cat([_dense(record) for record in records])
    if model.spatial_perceiver is not None:
        start_resampler(model.spatial_perceiver, dense)
    pointers = torch.cat([record.obj_ptr for record in records])
    _start_projections(model, dense, pointers)
    parts = zip(*(clips.seen for clips in played), strict=True)
    seen = Seen(*([torch.cat(rows) for rows in zip(*layers, strict=True)] for layers in parts))

    def error_with(width: float) -> float:
        _start_layers(model, full, seen, width)
        return _error(model, played)

    return error_with(min(WIDTHS, key=error_with))


def _error(model: EfficientSam3Train, played: Sequence[PlayedClips]) -> float:
    """Squared error of the features behind the compressed memory, if it stores what the full tracker has stored."""
    errors, variances = [], []
    for clips in played:
        found = forced_features(model, clips.features, clips.result, _VIDEO_FRAMES)
        for t, wanted in clips.result.conditioned.items():
            errors.append((found[t] - wanted).square().mean(dim=(0, 2, 3)))
            variances.append(wanted.var(dim=(0, 2, 3), unbiased=False))
    return float((torch.stack(errors).mean(0) / torch.stack(variances).mean(0)).mean())


# --- attention --------------------------------------------------------------------------------------------------------


def _start_projections(model: EfficientSam3Train, dense_nchw: Tensor, pointers_nc: Tensor) -> None:
    """Bring memories to the width of features: as they are, and three channels that say where they are."""
    tokens = model.compress(dense_nchw)
    num, _, mem_dim = tokens.shape
    tables = model.maskmem_tpos_enc[:, 0]
    grid_hw = (dense_nchw.shape[-2], dense_nchw.shape[-1])
    codes = (model.token_codes(grid_hw) + tables[torch.arange(num) % len(tables)]).to(tokens.dtype)
    places = _place_features(token_places(model)).to(tokens).expand(num, -1, -1)
    times = temporal_code(torch.linspace(0, 1, _VIDEO_FRAMES, device=tokens.device), model.config.hidden_dim)
    pointer_codes = model.obj_ptr_tpos_proj(times.to(tokens.dtype))
    pointer_tokens = pointers_nc.unflatten(-1, (-1, mem_dim)).flatten(0, 1)
    pointer_codes = pointer_codes[torch.arange(len(pointer_tokens)) % len(times)]
    nowhere = places.mean(dim=(0, 1)).expand(len(pointer_tokens), -1)
    rows = [torch.cat([tokens, codes], -1).flatten(0, 1), torch.cat([pointer_tokens, pointer_codes], -1)]
    weight, bias = fit(torch.cat(rows), torch.cat([places.flatten(0, 1), nowhere]))
    where = slice(mem_dim, mem_dim + _PLACES)
    for i, projection in enumerate((model.mem_proj, model.mem_pos_proj)):
        projection.weight[:mem_dim] = torch.eye(mem_dim)
        projection.weight[where] = weight[:, i * mem_dim : (i + 1) * mem_dim]
        projection.bias.zero_()
    model.mem_proj.bias[where] = bias


def _start_layers(model: EfficientSam3Train, full: Sam3Tracker, seen: Seen, width: float) -> None:
    """Copy layers of the full attention, evenly chosen, with a Gaussian of some width in place of rotary positions."""
    theirs, own = full.transformer.encoder, model.memory_attention
    last = max(1, len(own.layers) - 1)
    for i, layer in enumerate(own.layers):
        k = round(i * (len(theirs.layers) - 1) / last)
        _start_layer(layer, theirs.layers[k], model, theirs.rotary.table, k, seen, width)  # type: ignore[arg-type]


def _start_layer(
    layer: EfficientMemoryAttentionLayer,
    full: MemoryAttentionLayer,
    model: EfficientSam3Train,
    rotary: Tensor,
    k: int,
    seen: Seen,
    width: float,
) -> None:
    for name in ("norm1", "norm2", "norm3"):
        getattr(layer, name).load_state_dict(getattr(full, name).state_dict())
    strength = full.linear1.weight.norm(dim=1) * full.linear2.weight.norm(dim=0)
    units = strength.topk(min(len(strength), layer.linear1.out_features)).indices
    layer.linear1.weight[: len(units)], layer.linear1.bias[: len(units)] = (
        full.linear1.weight[units],
        full.linear1.bias[units],
    )
    layer.linear2.weight.mul_(QUIET)
    layer.linear2.weight[:, : len(units)] = full.linear2.weight[:, units]
    layer.linear2.bias.copy_(full.linear2.bias)
    position = model.memory_attention.position_code.table.to(layer.linear1.weight)
    cells = grid_places(model.memory_attention.position_code.size_hw).to(position)
    heads, head_dim = layer.cross_attn.num_heads, model.config.hidden_dim // layer.cross_attn.num_heads
    reader = full.cross_attn_image
    query, key = _content(reader, rotary, width, cells, head_dim)
    rows, tokens = seen.by_memory[k], seen.tokens_by_memory[k]
    scale = _place_scale(width, head_dim)
    q_weight, q_bias = _head_rows(*fit(rows + position[tokens], _wanted_queries(query, rows, cells[tokens])), scale)
    mem_dim = key.shape[1]
    k_weight = torch.zeros(head_dim, model.config.hidden_dim).to(key)
    k_weight[: len(key), :mem_dim] = key
    k_weight[len(key) :, mem_dim : mem_dim + _PLACES] = scale * torch.eye(_PLACES)
    own = layer.cross_attn
    _set(own.q_proj, q_weight.repeat(heads, 1), q_bias.repeat(heads))
    _set(own.k_proj, k_weight.repeat(heads, 1), torch.zeros_like(own.k_proj.bias))
    own.v_proj.weight.zero_()
    own.v_proj.weight[:, :mem_dim] = reader.v_proj.weight
    own.v_proj.bias.copy_(reader.v_proj.bias)
    own.out_proj.load_state_dict(reader.out_proj.state_dict())
    _start_self_attention(
        layer, full.self_attn, rotary, cells, position, (seen.by_frame[k], seen.tokens_by_frame[k]), width
    )


def _start_self_attention(
    layer: EfficientMemoryAttentionLayer,
    full: RotaryAttention,
    rotary: Tensor,
    cells: Tensor,
    position: Tensor,
    seen: tuple[Tensor, Tensor],
    width: float,
) -> None:
    own, (rows, tokens) = layer.self_attn, seen
    dim = rows.shape[1]
    head_dim = dim // own.num_heads
    query, key = _content(full, rotary, width, cells, head_dim)
    scale = _place_scale(width, head_dim)
    q_weight, q_bias = _head_rows(*fit(rows + position[tokens], _wanted_queries(query, rows, cells[tokens])), scale)
    wanted = torch.cat([rows @ key.T, _place_features(cells[tokens])], 1)
    k_weight, k_bias = _head_rows(*fit(rows + position[tokens], wanted), scale)
    own.in_proj_weight[:dim], own.in_proj_bias[:dim] = q_weight.repeat(own.num_heads, 1), q_bias.repeat(own.num_heads)
    own.in_proj_weight[dim : 2 * dim] = k_weight.repeat(own.num_heads, 1)
    own.in_proj_bias[dim : 2 * dim] = k_bias.repeat(own.num_heads)
    own.in_proj_weight[2 * dim :], own.in_proj_bias[2 * dim :] = full.v_proj.weight, full.v_proj.bias
    own.out_proj.load_state_dict(full.out_proj.state_dict())


def _content(
    full: RotaryAttention, rotary: Tensor, width: float, cells: Tensor, head_dim: int
) -> tuple[Tensor, Tensor]:
    """The strongest directions of how an attention compares contents, turned positions averaged over the Gaussian.

    Returns:
        Of queries, (R, C + 1) with a constant at the end, and of keys, (R, Ck): logits are their products over
        sqrt(``head_dim``).
    """
    middle = cells.square().sum(1).argmin()
    near = (-(cells - cells[middle]).square().sum(1) / (2 * width**2)).softmax(0)
    turned = (rotary * rotary[middle]).sum(-1)  # cosines of the angles between the middle and each cell
    shares = (near[:, None] * turned).sum(0).repeat_interleave(2).repeat(full.num_heads)
    query = torch.cat([full.q_proj.weight, full.q_proj.bias[:, None]], 1)
    product = (query * shares[:, None]).T @ full.k_proj.weight / math.sqrt(len(query) / full.num_heads)
    left, values, right = torch.linalg.svd(product, full_matrices=False)
    kept = min(head_dim - _PLACES, len(values))
    root = (values[:kept] * math.sqrt(head_dim)).sqrt()[:, None]
    padding = head_dim - _PLACES - kept
    return F.pad(root * left[:, :kept].T, (0, 0, 0, padding)), F.pad(root * right[:kept], (0, 0, 0, padding))


def _wanted_queries(content_rc: Tensor, rows_nc: Tensor, places_n2: Tensor) -> Tensor:
    """Contents, x and y, and 1 for the square that keys bring."""
    contents = rows_nc @ content_rc[:, :-1].T + content_rc[:, -1]
    return torch.cat([contents, places_n2, torch.ones_like(places_n2[:, :1])], 1)


def _head_rows(weight: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """A head's rows with the last ones, which say where, scaled."""
    scales = torch.ones_like(bias)
    scales[-_PLACES:] = scale
    return weight * scales[:, None], bias * scales


def _place_scale(width: float, head_dim: int) -> float:
    """Of places in queries and in keys: their products over sqrt(``head_dim``) are then a Gaussian's exponents."""
    return head_dim**0.25 / width


# --- small things -----------------------------------------------------------------------------------------------------


def _place_features(places_n2: Tensor) -> Tensor:
    """x, y and what completes the square: times (x', y', 1), that is -|p - p'|^2 / 2 but for what p' decides."""
    return torch.cat([places_n2, -0.5 * places_n2.square().sum(-1, keepdim=True)], -1)


def _set(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)


def _records(clips: PlayedClips) -> dict[int, FrameRecord]:
    return {**clips.result.bank.cond, **clips.result.bank.non_cond}


def _dense(record: FrameRecord) -> Tensor:
    assert record.maskmem_features is not None, "clips are played with their memories"
    return record.maskmem_features.float()


@contextmanager
def _watched(full: Sam3Tracker) -> Iterator[Any]:
    """Collects inputs of the full attention's parts at some tokens of every frame."""
    layers = full.transformer.encoder.layers
    found: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {
        (name, k): [] for name in ("norm1", "norm2") for k in range(len(layers))
    }
    generator = torch.Generator().manual_seed(0)

    def keep(key: tuple[str, int], output: Tensor) -> None:
        rows = output.flatten(0, 1)
        which = torch.randperm(len(rows), generator=generator)[:_TOKENS_PER_FRAME].to(rows.device)
        found[key].append((rows[which], which % output.shape[1]))

    hooks = [
        getattr(layer, name).register_forward_hook(lambda module, inputs, output, key=(name, k): keep(key, output))
        for name, k in found
        for layer in [layers[k]]
    ]

    def seen() -> Seen:
        parts = {key: [torch.cat(each) for each in zip(*pairs, strict=True)] for key, pairs in found.items() if pairs}
        return Seen(
            *(
                [parts[name, k][i] for k in range(len(layers)) if (name, k) in parts]
                for i in (0, 1)
                for name in ("norm1", "norm2")
            )
        )

    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
