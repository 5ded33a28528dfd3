"""Small parts of the detector with deterministic weights, inputs for them, and what their tests have in common."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch
from golden import detector_value, table
from torch import Tensor, nn

from sam3.config import DecoderConfig, FusionEncoderConfig, ScoringConfig, SegmentationHeadConfig
from sam3.model.decoder import TransformerDecoder
from sam3.model.fusion_encoder import TransformerEncoderFusion
from sam3.model.position_encoding import PositionEmbeddingSine
from sam3.model.scoring import DotProductScoring
from sam3.model.segmentation_head import UniversalSegmentationHead

DIM = 32
ENCODER = FusionEncoderConfig(num_layers=2, num_heads=4, mlp_dim=48, dropout=0.0)
DECODER = DecoderConfig(num_layers=3, num_queries=7, num_heads=4, mlp_dim=48, dropout=0.0)
SCORING = ScoringConfig(mlp_dim=48, dropout=0.0)
SEGMENTATION = SegmentationHeadConfig(num_heads=4)
CONFIGS: dict[type[nn.Module], Any] = {
    TransformerEncoderFusion: ENCODER,
    TransformerDecoder: DECODER,
    DotProductScoring: SCORING,
    UniversalSegmentationHead: SEGMENTATION,
}
PREFIXES: dict[type[nn.Module], str] = {
    TransformerEncoderFusion: "transformer.encoder.",
    TransformerDecoder: "transformer.decoder.",
    DotProductScoring: "dot_prod_scoring.",
    UniversalSegmentationHead: "segmentation_head.",
}


def with_golden_weights(module: nn.Module) -> nn.Module:
    """The part in eval mode, its weights a function of their released names."""
    prefix = PREFIXES[type(module)]
    module.load_state_dict({k: detector_value(prefix + k, v.shape) for k, v in module.state_dict().items()})
    return module.eval()


def build(kind: type[nn.Module]) -> nn.Module:
    """A small part of the detector by its class."""
    return with_golden_weights(kind(CONFIGS[kind], DIM))


class Inputs(NamedTuple):
    """What encoder and decoder read. The second prompt has padding in the middle and at the end."""

    tokens: Tensor
    pos: Tensor
    prompt: Tensor
    prompt_mask: Tensor
    size_hw: tuple[int, int]


def make_inputs(size_hw: tuple[int, int] = (5, 6), batch: int = 2, prompt_length: int = 9) -> Inputs:
    height, width = size_hw
    mask = torch.zeros(batch, prompt_length, dtype=torch.bool)
    mask[1::2, 4:6] = True
    mask[1::2, -1] = True
    pos = PositionEmbeddingSine(DIM).encode_map(size_hw).flatten(2).permute(2, 0, 1).expand(-1, batch, -1)
    return Inputs(
        tokens=table("input.tokens", (height * width, batch, DIM)),
        pos=pos,
        prompt=table("input.prompt", (prompt_length, batch, DIM)),
        prompt_mask=mask,
        size_hw=size_hw,
    )


def with_other_padding(inputs: Inputs, value: float = 50.0) -> Inputs:
    """The same inputs with other content in the padded slots of the prompt."""
    padded = inputs.prompt_mask.T[..., None]
    assert padded.any()
    return inputs._replace(prompt=inputs.prompt.masked_fill(padded, value))


def one_item(inputs: Inputs, index: int) -> Inputs:
    """A single prompt of the batch, without its padding."""
    valid = ~inputs.prompt_mask[index]
    return inputs._replace(
        tokens=inputs.tokens[:, index : index + 1],
        pos=inputs.pos[:, index : index + 1],
        prompt=inputs.prompt[valid, index : index + 1],
        prompt_mask=inputs.prompt_mask[index : index + 1, valid],
    )


def in_bf16(inputs: Inputs) -> Inputs:
    """The same inputs, rounded."""
    return inputs._replace(**{key: getattr(inputs, key).bfloat16() for key in ("tokens", "pos", "prompt")})


def assert_released(kind: type[nn.Module], num_keys: int, num_parameters: int, digest: str) -> None:
    """A part at its released size has the released keys and shapes.

    Args:
        kind: The part's class.
        num_keys: Of its state dict.
        num_parameters: Numbers in it.
        digest: SHA-256 of sorted lines "key (shape)" under the released names.
    """
    with torch.device("meta"):
        state = kind(type(CONFIGS[kind])(), 256).state_dict()
    assert (len(state), sum(value.numel() for value in state.values())) == (num_keys, num_parameters)
    lines = sorted(f"detector.{PREFIXES[kind]}{key} {tuple(value.shape)}" for key, value in state.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == digest


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()
