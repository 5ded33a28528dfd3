"""Each part of the detector beside Hugging Face's, on the same random weights (tiny configurations, fp32, CPU)."""

from __future__ import annotations

import pytest
import torch
from detector_parts import (
    DECODER,
    DIM,
    ENCODER,
    PREFIXES,
    SCORING,
    SEGMENTATION,
    Inputs,
    build,
    make_inputs,
)
from golden import table
from torch import Tensor, nn

from sam3.hf_keys import released_to_hf
from sam3.model.decoder import TransformerDecoder
from sam3.model.fusion_encoder import TransformerEncoderFusion
from sam3.model.scoring import DotProductScoring
from sam3.model.segmentation_head import UniversalSegmentationHead

transformers = pytest.importorskip("transformers")
hf_modules = pytest.importorskip("transformers.models.sam3.modeling_sam3")

EPS = {"layer_norm_eps": 1e-5}  # their default is 1e-6, the original's is 1e-5


def load_ours(hf: nn.Module, ours: nn.Module, prefix: str) -> nn.Module:
    """Their part with our weights; strict."""
    released = {f"detector.{PREFIXES[type(ours)]}{key}": value for key, value in ours.state_dict().items()}
    renamed = {key.removeprefix(f"detector_model.{prefix}."): value for key, value in released_to_hf(released).items()}
    hf.load_state_dict(renamed)
    for module in hf.modules():  # some of their norms have an epsilon that no configuration sets
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-5
    return hf.eval()


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert 0.01 < theirs.std() < 100
    assert (ours - theirs).abs().max().item() <= 1e-4


def batch_first(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, prompt, positions, and their mask, which is True for what is valid."""
    tokens, prompt, pos = (x.transpose(0, 1) for x in (inputs.tokens, inputs.prompt, inputs.pos))
    return tokens, prompt, pos, ~inputs.prompt_mask


@pytest.fixture(params=[((5, 6), 2), ((8, 8), 3)], ids=["5x6, two prompts", "8x8, three prompts"])
def inputs(request: pytest.FixtureRequest) -> Inputs:
    size_hw, batch = request.param
    return make_inputs(size_hw, batch)


@torch.no_grad()
def test_fusion_encoder(inputs: Inputs) -> None:
    encoder = build(TransformerEncoderFusion)
    config = transformers.Sam3DETREncoderConfig(
        hidden_size=DIM,
        num_layers=ENCODER.num_layers,
        num_attention_heads=ENCODER.num_heads,
        intermediate_size=ENCODER.mlp_dim,
        **EPS,
    )
    hf = load_ours(hf_modules.Sam3DetrEncoder(config), encoder, "detr_encoder")
    tokens, prompt, pos, valid = batch_first(inputs)

    def as_map(x: Tensor) -> Tensor:
        return x.transpose(1, 2).unflatten(-1, inputs.size_hw)

    expected = hf([as_map(tokens)], prompt, [as_map(pos)], valid)
    out = encoder(inputs.tokens, inputs.prompt, inputs.pos, inputs.prompt_mask, inputs.size_hw)
    assert_same(out.memory.transpose(0, 1), expected.last_hidden_state)
    assert torch.equal(out.spatial_shapes, expected.spatial_shapes)


@torch.no_grad()
def test_decoder(inputs: Inputs) -> None:
    decoder = build(TransformerDecoder)
    config = transformers.Sam3DETRDecoderConfig(
        hidden_size=DIM,
        num_layers=DECODER.num_layers,
        num_queries=DECODER.num_queries,
        num_attention_heads=DECODER.num_heads,
        intermediate_size=DECODER.mlp_dim,
        **EPS,
    )
    hf = load_ours(hf_modules.Sam3DetrDecoder(config), decoder, "detr_decoder")
    tokens, prompt, pos, valid = batch_first(inputs)
    shapes = torch.tensor([inputs.size_hw])
    expected = hf(tokens, prompt, pos, valid, shapes)
    args = (inputs.tokens, inputs.pos, inputs.prompt, inputs.prompt_mask, inputs.size_hw)
    out = decoder(*args)
    assert_same(out.hs[0], expected.intermediate_hidden_states[-1])
    assert_same(out.presence_logits[0].T, expected.presence_logits[-1])
    every_layer = TransformerDecoder(DECODER, DIM, use_dac=False)
    every_layer.load_state_dict(decoder.state_dict())
    trained = every_layer.train()(*args)
    assert_same(trained.hs, expected.intermediate_hidden_states)
    # Theirs are the boxes that each layer starts from.
    assert_same(trained.boxes[:-1], expected.reference_boxes[1:])


@torch.no_grad()
def test_scoring(inputs: Inputs) -> None:
    scoring = build(DotProductScoring)
    config = transformers.Sam3Config(
        detr_decoder_config={"hidden_size": DIM, "intermediate_size": SCORING.mlp_dim, **EPS}
    )
    hf = load_ours(hf_modules.Sam3DotProductScoring(config), scoring, "dot_product_scoring")
    _, prompt, _, valid = batch_first(inputs)
    hs = table("input.queries", (3, prompt.shape[0], 7, DIM))
    assert_same(scoring(hs, inputs.prompt, inputs.prompt_mask), hf(hs, prompt, valid))


@torch.no_grad()
def test_segmentation_head(inputs: Inputs) -> None:
    head = build(UniversalSegmentationHead)
    config = transformers.Sam3MaskDecoderConfig(
        hidden_size=DIM, num_attention_heads=SEGMENTATION.num_heads, num_upsampling_stages=3, **EPS
    )
    hf = load_ours(hf_modules.Sam3MaskDecoder(config), head, "mask_decoder")
    tokens, prompt, _, valid = batch_first(inputs)
    (height, width), batch = inputs.size_hw, prompt.shape[0]
    maps = [table(f"input.level{i}", (batch, DIM, height * s, width * s)) for i, s in enumerate((4, 2, 1))]
    queries = table("input.queries", (batch, 7, DIM))
    expected = hf(queries, maps, tokens, prompt, valid)
    out = head(maps, queries, torch.arange(batch), inputs.tokens, inputs.prompt, inputs.prompt_mask)
    assert_same(out["pred_masks"], expected.pred_masks)
    assert_same(out["semantic_seg"], expected.semantic_seg)
