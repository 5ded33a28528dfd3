"""The fusion encoder: released names, what it reads and what it ignores, and its numbers beside another program's."""

from __future__ import annotations

import pytest
import torch
from detector_parts import (
    DIM,
    ENCODER,
    assert_released,
    build,
    in_bf16,
    make_inputs,
    one_item,
    relative_error,
    with_other_padding,
)

from sam3.config import FusionEncoderConfig
from sam3.model.fusion_encoder import EncoderOutput, TransformerEncoderFusion


@pytest.fixture(scope="module")
def encoder() -> TransformerEncoderFusion:
    return build(TransformerEncoderFusion)


def run(encoder: TransformerEncoderFusion, inputs) -> EncoderOutput:
    return encoder(inputs.tokens, inputs.prompt, inputs.pos, inputs.prompt_mask, inputs.size_hw)


def test_released_names_and_shapes() -> None:
    digest = "fab52b0d232258b3e4dcdc5fad7660dddef81854ec4d8045d4b735261f08f61b"
    assert_released(TransformerEncoderFusion, 108, 9_472_512, digest)


@torch.no_grad()
def test_what_it_returns(encoder: TransformerEncoderFusion) -> None:
    inputs = make_inputs()
    out = run(encoder, inputs)
    assert out.memory.shape == inputs.tokens.shape
    assert torch.equal(out.pos_embed, inputs.pos)
    assert out.memory_text is inputs.prompt
    assert out.padding_mask is None
    assert out.spatial_shapes.tolist() == [[5, 6]]
    assert out.level_start_index.tolist() == [0]
    assert out.valid_ratios.shape == (2, 1, 2)
    assert out.valid_ratios.eq(1).all()


@torch.no_grad()
def test_positions_reach_self_attention_alone(encoder: TransformerEncoderFusion) -> None:
    """Swapping two image tokens together with their positions swaps the result; swapping without them does not."""
    inputs = make_inputs()
    order = torch.arange(len(inputs.tokens))
    order[[3, 17]] = order[[17, 3]]
    expected = run(encoder, inputs).memory[order]
    moved = inputs._replace(tokens=inputs.tokens[order], pos=inputs.pos[order])
    torch.testing.assert_close(run(encoder, moved).memory, expected, atol=1e-5, rtol=0)
    stayed = inputs._replace(tokens=inputs.tokens[order])
    assert (run(encoder, stayed).memory - expected).abs().max() > 1e-2
    # The order of the prompt's tokens says nothing: they carry no position here.
    turned = inputs._replace(prompt=inputs.prompt.flip(0), prompt_mask=inputs.prompt_mask.flip(1))
    torch.testing.assert_close(run(encoder, turned).memory[order], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_padding_changes_nothing(encoder: TransformerEncoderFusion) -> None:
    inputs = make_inputs()
    expected = run(encoder, inputs).memory
    assert torch.equal(run(encoder, with_other_padding(inputs)).memory, expected)
    unmasked = inputs._replace(prompt_mask=None)
    assert (run(encoder, unmasked).memory[:, 1] - expected[:, 1]).abs().max() > 1e-3


@torch.no_grad()
def test_a_batch_is_its_prompts_one_by_one(encoder: TransformerEncoderFusion) -> None:
    inputs = make_inputs(batch=3)
    together = run(encoder, inputs).memory
    for i in range(3):
        alone = run(encoder, one_item(inputs, i)).memory
        torch.testing.assert_close(alone[:, 0], together[:, i], atol=1e-5, rtol=0)


@torch.no_grad()
def test_one_position_code_serves_all_prompts(encoder: TransformerEncoderFusion) -> None:
    inputs = make_inputs()
    shared = run(encoder, inputs._replace(pos=inputs.pos[:, :1]))
    assert torch.equal(shared.memory, run(encoder, inputs).memory)
    assert shared.pos_embed.shape == inputs.tokens.shape


@torch.no_grad()
@pytest.mark.parametrize("size_hw", [(1, 1), (3, 11), (8, 8)])
def test_other_grids(encoder: TransformerEncoderFusion, size_hw: tuple[int, int]) -> None:
    out = run(encoder, make_inputs(size_hw))
    assert out.memory.shape == (size_hw[0] * size_hw[1], 2, DIM)
    assert torch.isfinite(out.memory).all()


def test_a_wrong_grid_is_refused(encoder: TransformerEncoderFusion) -> None:
    with pytest.raises(ValueError, match="30 image tokens are no grid of 5 x 5"):
        run(encoder, make_inputs()._replace(size_hw=(5, 5)))


def test_checkpointing_keeps_results_and_gradients(encoder: TransformerEncoderFusion) -> None:
    inputs = make_inputs()
    results = []
    for use_checkpointing in (False, True):
        model = TransformerEncoderFusion(ENCODER, DIM, use_checkpointing=use_checkpointing).train()
        model.load_state_dict(encoder.state_dict())
        prompt = inputs.prompt.clone().requires_grad_()
        memory = run(model, inputs._replace(prompt=prompt)).memory
        memory.square().mean().backward()
        gradients = [p.grad for p in model.parameters()]
        results.append([memory.detach(), prompt.grad, *gradients])
    for plain, recomputed in zip(*results, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(recomputed, plain)


@torch.no_grad()
def test_dropout_acts_in_training_alone() -> None:
    config = FusionEncoderConfig(num_layers=1, num_heads=4, mlp_dim=48)
    model = TransformerEncoderFusion(config, DIM)
    inputs = make_inputs()
    assert not torch.equal(run(model.train(), inputs).memory, run(model, inputs).memory)
    assert torch.equal(run(model.eval(), inputs).memory, run(model, inputs).memory)


@torch.no_grad()
def test_bf16_stays_close(encoder: TransformerEncoderFusion) -> None:
    inputs = make_inputs()
    expected = run(encoder, inputs).memory
    low = build(TransformerEncoderFusion).to(torch.bfloat16)
    memory = run(low, in_bf16(inputs)).memory
    assert memory.dtype == torch.bfloat16
    assert relative_error(memory, expected) < 0.02
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(run(encoder, inputs).memory, expected) < 0.02
