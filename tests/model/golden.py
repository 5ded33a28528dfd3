"""Deterministic values for golden tests: a hash of key and index, the same in any program and on any machine."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_DETECTOR_TABLES = (
    "pos_embed",
    "token_embedding",
    "positional_embedding",
    "label_embed",
    "cls_embed",
    "query_embed",
    "reference_points",
    "presence_token.weight",
)
_TRACKER_TABLES = (
    "_token.weight",
    "mask_tokens",
    "embed",
    "maskmem_tpos_enc",
    "no_mem_pos_enc",
    "no_obj_ptr",
    "gaussian_matrix",
)


def uniform(key: str, shape: Sequence[int]) -> np.ndarray:
    """float64 values in [-0.5, 0.5) that depend on the key and the flat index alone."""
    x = np.arange(math.prod(shape), dtype=np.uint32) * np.uint32(0x9E3779B1) + np.uint32(zlib.crc32(key.encode()))
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
    return (x / 2.0**32 - 0.5).reshape(shape)


def table(key: str, shape: Sequence[int]) -> Tensor:
    """Inputs and embeddings: values in [-1, 1)."""
    return torch.from_numpy(2 * uniform(key, shape)).to(torch.float32)


def weight(key: str, shape: Sequence[int]) -> Tensor:
    """Weights, by kind: norms around 1, biases around 0, matrices that keep the variance."""
    u = uniform(key, shape)
    if len(shape) == 1:
        u = 1 + 0.4 * u if key.endswith(".weight") else 0.2 * u
    else:
        u = u * math.sqrt(12 / (math.prod(shape) / shape[0]))
    return torch.from_numpy(u).to(torch.float32)


def detector_value(key: str, shape: Sequence[int]) -> Tensor:
    """Value of a detector tensor; ``key`` without ``detector.``."""
    return table(key, shape) if any(name in key for name in _DETECTOR_TABLES) else weight(key, shape)


def tracker_value(key: str, shape: Sequence[int]) -> Tensor:
    """Value of a tracker tensor; ``key`` without ``tracker.``."""
    if key == "sam_mask_decoder.pred_obj_score_head.layers.2.bias":
        return torch.full(tuple(shape), 2.0)
    return table(key, shape) if any(name in key for name in _TRACKER_TABLES) else weight(key, shape)
