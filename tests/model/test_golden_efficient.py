"""Numbers of the published stage-2 modules (fp32, CPU, eval) on deterministic weights."""

from __future__ import annotations

import pytest
import torch
from golden import check, table, weight
from torch import Tensor, nn

from sam3.config import Sam3Config
from sam3.efficient_memory_config import EfficientMemoryConfig
from sam3.model.efficient_memory_attention import EfficientMemoryAttention
from sam3.model.memory_attention import MemoryTokens
from sam3.model.perceiver import PerceiverResampler

CONFIG = Sam3Config()
PUBLISHED = EfficientMemoryConfig().published()
TOKENS, DIM = 5184, 256


def filled(module: nn.Module, name: str) -> nn.Module:
    """The module with deterministic weights, named as in a published checkpoint, in eval mode."""
    values = {
        key: (table if key.startswith("latents") else weight)(f"{name}.{key}", value.shape)
        for key, value in module.state_dict().items()
    }
    module.load_state_dict(values)
    return module.eval()


@torch.no_grad()
def test_perceiver() -> None:
    perceiver = filled(PerceiverResampler(64, CONFIG.grid_size, PUBLISHED), "spatial_perceiver")
    tokens = perceiver(table("input.x", (1, 64, 72, 72)))
    samples = {
        (0, 0, 0): 0.48773,
        (0, 63, 63): -0.39550,
        (0, 64, 0): 0.87546,
        (0, 200, 10): 0.59136,
        (0, 319, 63): -1.48585,
    }
    check(tokens, (1, 320, 64), -0.01206, 0.99395, samples, unbiased=True)
    assert not perceiver.latent_codes().any() and perceiver.latent_codes().shape == (320, 64)


def memories(name: str, num_tokens: int, num_spatial: int) -> MemoryTokens:
    """The published inputs, which have no frames: all spatial tokens as one."""
    values, codes = (table(f"input.{kind}", (num_tokens, 1, DIM)) for kind in (name, name.replace("mem", "mempos")))
    spatial, pointers = values.transpose(0, 1).split((num_spatial, num_tokens - num_spatial), dim=1)
    spatial_codes, pointer_codes = codes[:, 0].split((num_spatial, num_tokens - num_spatial))
    return MemoryTokens(spatial[:, None], spatial_codes[None], pointers, pointer_codes)


ATTENDED = (
    (1, "mem", 648, 640, -0.00094, 1.02001, (-0.05370, -0.38213, 1.25520)),
    (2, "mem2", 5192, 5184, -0.00044, 1.01970, (-0.13558, -0.34726, 1.35056)),
)


@torch.no_grad()
@pytest.mark.parametrize(("pool_size", "name", "num_tokens", "num_spatial", "mean", "std", "samples"), ATTENDED)
def test_memory_attention(
    pool_size: int, name: str, num_tokens: int, num_spatial: int, mean: float, std: float, samples: tuple
) -> None:
    memory = EfficientMemoryConfig(num_latents=0, pool_size=pool_size)
    attention = filled(EfficientMemoryAttention(CONFIG, memory), "memory_attention")
    frame: Tensor = table("input.curr", (TOKENS, 1, DIM)).permute(1, 2, 0).unflatten(-1, (72, 72))
    seen = attention(frame, memories(name, num_tokens, num_spatial)).flatten(2).transpose(1, 2)
    expected = {(0, 0, 0): samples[0], (0, 2600, 128): samples[1], (0, 5183, 255): samples[2]}
    check(seen, (1, TOKENS, DIM), mean, std, expected, unbiased=True)
