"""Deterministic values for golden tests: a hash of key and index, the same in any program and on any machine."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from sam3.config import Sam3Config, TextConfig, TrunkConfig
from sam3.model.sam3_image import Sam3Image
from sam3.model_builder import assemble_image_model
from sam3.released_names import HEADS_PREFIX

SMALL = Sam3Config(
    name="small",
    image_size_px=336,
    trunk=TrunkConfig(
        pretrain_img_size_px=112,
        embed_dim=64,
        depth=4,
        num_heads=2,
        mlp_ratio=4.625,
        window_size=8,
        global_blocks=(1, 3),
    ),
    text=TextConfig(width=64, depth=2, num_heads=4),
)
"""The small model of the golden vectors: a shallow trunk and text encoder, everything else at full size."""

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


def fill(model: Sam3Image) -> Sam3Image:
    """Give every weight of a model its deterministic value; rotary tables keep theirs. Returns it in eval mode."""
    values = {}
    for key, value in model.state_dict().items():
        if key.endswith("freqs_cis"):
            values[key] = value
        elif key.startswith(HEADS_PREFIX):
            values[key] = tracker_value(key.removeprefix(HEADS_PREFIX), value.shape)
        else:
            values[key] = detector_value(key, value.shape)
    model.load_state_dict(values)
    return model.eval()


def small_model() -> Sam3Image:
    """`SMALL` with all parts and deterministic weights."""
    return fill(assemble_image_model(SMALL, enable_inst_interactivity=True, enable_detector=True))


def check(
    tensor: Tensor,
    shape: tuple[int, ...],
    mean: float | None,
    std: float | None,
    samples: dict[tuple[int, ...], float],
    unbiased: bool = False,
) -> None:
    """Compare a tensor with the published numbers: shape, mean, standard deviation, single values."""
    assert tuple(tensor.shape) == shape
    if mean is not None:
        assert tensor.mean().item() == pytest.approx(mean, abs=2e-5)
    if std is not None:
        assert tensor.std(unbiased=unbiased).item() == pytest.approx(std, abs=2e-5)
    for index, expected in samples.items():
        assert tensor[index].item() == pytest.approx(expected, abs=1e-4), index
