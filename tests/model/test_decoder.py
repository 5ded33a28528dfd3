"""The decoder: golden unit values, invariants, training-only behaviour, initialisation."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from detector_parts import (
    DECODER,
    DIM,
    ENCODER,
    Inputs,
    assert_released,
    build,
    in_bf16,
    make_inputs,
    one_item,
    relative_error,
    with_other_padding,
)
from torch import Tensor, nn

from sam3.config import DecoderConfig
from sam3.model.box_ops import cxcywh_to_xyxy
from sam3.model.decoder import DecoderOutput, TransformerDecoder, TransformerWrapper, init_transformer, log_offsets
from sam3.model.fusion_encoder import TransformerEncoderFusion
from sam3.model.position_encoding import box_sine_embedding

BOX = torch.tensor([0.30, 0.40, 0.20, 0.25])


@pytest.fixture(scope="module")
def decoder() -> TransformerDecoder:
    return build(TransformerDecoder)


def copy_of(decoder: TransformerDecoder, config: DecoderConfig = DECODER, **options: bool) -> TransformerDecoder:
    copy = TransformerDecoder(config, DIM, **options)
    copy.load_state_dict(decoder.state_dict())
    return copy


def run(decoder: TransformerDecoder, inputs: Inputs) -> DecoderOutput:
    return decoder(inputs.tokens, inputs.pos, inputs.prompt, inputs.prompt_mask, inputs.size_hw)


def tensors(out: DecoderOutput) -> dict[str, Tensor]:
    return {name: value for name, value in out._asdict().items() if isinstance(value, Tensor)}


def test_released_names_and_shapes() -> None:
    digest = "3986a5c82e87f275969939ae8d699a43a455990a6e5d1fd6a56c09d4b6338abd"
    assert_released(TransformerDecoder, 175, 11_575_093, digest)


def test_query_positions_are_those_of_the_original() -> None:
    waves = box_sine_embedding(BOX, 256)
    assert waves.shape == (512,)
    expected = torch.tensor([0.5878, -0.8090, 0.8222, 0.9511, -0.3090, 0.9511, 1.0000])
    torch.testing.assert_close(waves[[0, 1, 2, 128, 129, 256, 384]], expected, atol=1e-4, rtol=0)


def test_bias_inputs_are_those_of_the_original() -> None:
    x0, _, x1, _ = cxcywh_to_xyxy(BOX)
    offsets = log_offsets(torch.stack([x0, x1]), 72)
    assert offsets.shape == (72, 2)
    expected = torch.tensor([[-0.45950, -0.69013], [0.58851, 0.28267], [0.95523, 0.83605]])
    torch.testing.assert_close(offsets[[0, 36, 71]], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_bias_is_a_term_of_the_row_plus_a_term_of_the_column(decoder: TransformerDecoder) -> None:
    boxes = BOX.expand(2, 3, 4) + torch.arange(6.0).view(2, 3, 1) / 20
    bias = decoder.box_bias(boxes, (5, 6))
    assert bias.shape == (2, DECODER.num_heads, 1 + 3, 30)
    assert not bias[:, :, 0].any()  # the presence token's
    x0, y0, x1, y1 = cxcywh_to_xyxy(boxes[1, 2])
    column = decoder.boxRPB_embed_x(log_offsets(torch.stack([x0, x1]), 6)[4])
    row = decoder.boxRPB_embed_y(log_offsets(torch.stack([y0, y1]), 5)[3])
    torch.testing.assert_close(bias[1, :, 1 + 2, 3 * 6 + 4], row + column)


@torch.no_grad()
def test_what_it_returns(decoder: TransformerDecoder) -> None:
    out = run(decoder, make_inputs())
    n = DECODER.num_queries
    assert {name: tuple(value.shape) for name, value in tensors(out).items()} == {
        "hs": (1, 2, n, DIM),
        "boxes": (1, 2, n, 4),
        "presence_logits": (1, 1, 2),
        "presence_feats": (1, 2, DIM),
    }
    assert out.num_one_to_one == n
    assert (out.boxes > 0).all()
    assert (out.boxes < 1).all()
    assert out.presence_logits[0, 0, 0] != out.presence_logits[0, 0, 1]


@torch.no_grad()
def test_inference_computes_the_last_layer_of_training(decoder: TransformerDecoder) -> None:
    inputs = make_inputs()
    expected = run(decoder, inputs)
    trained = run(copy_of(decoder, use_dac=False).train(), inputs)
    assert trained.hs.shape[0] == DECODER.num_layers
    for name in ("hs", "boxes", "presence_logits"):
        torch.testing.assert_close(getattr(trained, name)[-1], getattr(expected, name)[0])
    # Each layer starts from the boxes of the one before: a decoder cut after two layers ends there.
    cut = copy_of(decoder)
    del cut.layers[2:]
    torch.testing.assert_close(run(cut.eval(), inputs).boxes[0], trained.boxes[1])


@torch.no_grad()
def test_inference_skips_the_heads_of_inner_layers(decoder: TransformerDecoder) -> None:
    calls: list[str] = []
    hooks = [
        head.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, head in (("presence", decoder.presence_token_head), ("box", decoder.bbox_embed))
    ]
    run(decoder, make_inputs())
    for hook in hooks:
        hook.remove()
    assert calls.count("presence") == 1
    assert calls.count("box") == DECODER.num_layers  # the chain of reference boxes


@torch.no_grad()
def test_no_two_biases_exist_at_once(decoder: TransformerDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 72 x 72 one takes 33 MB per prompt."""
    made: list[weakref.ref] = []
    original = TransformerDecoder.box_bias

    def recorded(self: TransformerDecoder, *args: object) -> Tensor:
        assert not any(ref() is not None for ref in made)
        bias = original(self, *args)
        made.append(weakref.ref(bias))
        return bias

    monkeypatch.setattr(TransformerDecoder, "box_bias", recorded)
    run(decoder, make_inputs())
    assert len(made) == DECODER.num_layers


@torch.no_grad()
def test_padding_changes_nothing(decoder: TransformerDecoder) -> None:
    inputs = make_inputs()
    expected = tensors(run(decoder, inputs))
    for name, value in tensors(run(decoder, with_other_padding(inputs))).items():
        assert torch.equal(value, expected[name]), name
    unmasked = run(decoder, inputs._replace(prompt_mask=None))
    assert (unmasked.hs[:, 1] - expected["hs"][:, 1]).abs().max() > 1e-3


@torch.no_grad()
def test_a_batch_is_its_prompts_one_by_one(decoder: TransformerDecoder) -> None:
    inputs = make_inputs(batch=3)
    together = run(decoder, inputs)
    for i in range(3):
        alone = run(decoder, one_item(inputs, i))
        torch.testing.assert_close(alone.hs[:, 0], together.hs[:, i], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.boxes[:, 0], together.boxes[:, i], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.presence_logits[..., 0], together.presence_logits[..., i], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("size_hw", [(1, 1), (3, 11), (9, 9)])
def test_other_grids(decoder: TransformerDecoder, size_hw: tuple[int, int]) -> None:
    for value in tensors(run(decoder, make_inputs(size_hw))).values():
        assert torch.isfinite(value).all()


def test_a_wrong_grid_is_refused(decoder: TransformerDecoder) -> None:
    with pytest.raises(ValueError, match="30 image tokens are no grid of 6 x 6"):
        run(decoder, make_inputs()._replace(size_hw=(6, 6)))


def test_everything_follows_the_device_of_its_inputs() -> None:
    """The released size on the meta device: a tensor made anywhere else would be refused."""
    with torch.device("meta"):
        decoder = TransformerDecoder(DecoderConfig(), 256).eval()
    memory = torch.empty(72 * 72, 2, 256, device="meta")
    mask = torch.empty(2, 33, dtype=torch.bool, device="meta")
    out = decoder(memory, memory, torch.empty(33, 2, 256, device="meta"), mask, (72, 72))
    assert {value.device.type for value in tensors(out).values()} == {"meta"}
    assert out.boxes.shape == (1, 2, 200, 4)


def test_one_to_many_queries_leave_the_others_alone(decoder: TransformerDecoder) -> None:
    inputs, n = make_inputs(), DECODER.num_queries
    doubled = run(copy_of(decoder).train(), inputs)
    plain = run(copy_of(decoder, use_dac=False).train(), inputs)
    assert doubled.hs.shape == (DECODER.num_layers, 2, 2 * n, DIM)
    assert doubled.num_one_to_one == n
    for name in ("hs", "boxes"):
        torch.testing.assert_close(getattr(doubled, name)[:, :, :n], getattr(plain, name), atol=1e-5, rtol=0)
        assert (getattr(doubled, name)[:, :, n:] - getattr(plain, name)).abs().max() > 1e-3
    torch.testing.assert_close(doubled.presence_logits, plain.presence_logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_one_to_many_queries_do_not_see_each_other(decoder: TransformerDecoder) -> None:
    """What they get is the layer without its self-attention: a decoder of one query, its self-attention silenced."""
    inputs, n, chosen = make_inputs(), DECODER.num_queries, 4
    doubled = run(copy_of(decoder).train(), inputs)
    single = TransformerDecoder(DecoderConfig(3, 1, 4, 48, 0.0), DIM, use_dac=False)
    weights = decoder.state_dict()
    for key in ("query_embed.weight", "reference_points.weight"):
        weights[key] = weights[key][chosen : chosen + 1]
    single.load_state_dict(weights)
    for layer in single.layers:
        nn.init.zeros_(layer.self_attn.out_proj.weight)
        nn.init.zeros_(layer.self_attn.out_proj.bias)
    expected = run(single.train(), inputs)
    torch.testing.assert_close(doubled.hs[:, :, n + chosen], expected.hs[:, :, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(doubled.boxes[:, :, n + chosen], expected.boxes[:, :, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("use_dac", [False, True])
def test_gradients_reach_every_weight(decoder: TransformerDecoder, use_dac: bool) -> None:
    model, inputs = copy_of(decoder, use_dac=use_dac).train(), make_inputs()
    memory = inputs.tokens.clone().requires_grad_()
    prompt = inputs.prompt.clone().requires_grad_()
    out = run(model, inputs._replace(tokens=memory, prompt=prompt))
    (out.hs.square().mean() + out.boxes.square().mean() + out.presence_logits.square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
    assert memory.grad.abs().max() > 0
    padded = inputs.prompt_mask.T
    assert not prompt.grad[padded].any()
    assert prompt.grad[~padded].any(dim=-1).all()


def test_refinement_does_not_propagate_through_earlier_boxes(decoder: TransformerDecoder) -> None:
    """With layers whose output does not depend on their input, later boxes do not depend on the reference points."""
    model = copy_of(decoder, use_dac=False).train()
    for layer in model.layers:
        nn.init.zeros_(layer.norm3.weight)
    boxes = run(model, make_inputs()).boxes
    first = torch.autograd.grad(boxes[0].sum(), model.reference_points.weight, retain_graph=True)[0]
    later = torch.autograd.grad(boxes[1:].sum(), model.reference_points.weight)[0]
    assert first.abs().max() > 0
    assert not later.any()


def test_checkpointing_keeps_results_and_gradients(decoder: TransformerDecoder) -> None:
    config = DecoderConfig(3, DECODER.num_queries, 4, 48, dropout=0.1)
    results = []
    for use_checkpointing in (False, True):
        model = copy_of(decoder, config, use_checkpointing=use_checkpointing).train()
        torch.manual_seed(0)
        out = run(model, make_inputs())
        (out.hs.square().mean() + out.boxes.square().mean() + out.presence_logits.square().mean()).backward()
        results.append([out.hs.detach(), *(p.grad for p in model.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain)


@torch.no_grad()
def test_dropout_acts_in_training_alone(decoder: TransformerDecoder) -> None:
    model = copy_of(decoder, DecoderConfig(3, DECODER.num_queries, 4, 48, dropout=0.1), use_dac=False)
    inputs = make_inputs()
    assert not torch.equal(run(model.train(), inputs).hs, run(model, inputs).hs)
    assert torch.equal(run(model.eval(), inputs).hs, run(decoder, inputs).hs)


@torch.no_grad()
def test_bf16_stays_close(decoder: TransformerDecoder) -> None:
    inputs = make_inputs()
    expected = run(decoder, inputs)
    low = build(TransformerDecoder).to(torch.bfloat16)
    weights_in_bf16 = run(low, in_bf16(inputs))
    assert weights_in_bf16.hs.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = run(decoder, inputs)
    for out in (weights_in_bf16, autocast):
        assert out.boxes.dtype == torch.float32
        assert relative_error(out.hs, expected.hs) < 0.03
        assert (out.boxes - expected.boxes).abs().max() < 0.02
        assert (out.presence_logits - expected.presence_logits).abs().max() < 0.05


@torch.no_grad()
def test_mlp_and_bias_inputs_ignore_autocast(decoder: TransformerDecoder) -> None:
    layer, x = decoder.layers[0], make_inputs().tokens
    expected, offsets = layer._mlp(x), log_offsets(torch.tensor([0.2, 0.4]), 72)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer._mlp(x), expected)
        assert torch.equal(log_offsets(torch.tensor([0.2, 0.4]), 72), offsets)


@torch.no_grad()
def test_mlp_of_bf16_weights_is_computed_in_float32() -> None:
    layer, x = build(TransformerDecoder).to(torch.bfloat16).layers[0], make_inputs().tokens.bfloat16()
    up, down = layer.linear1, layer.linear2
    hidden = (x.double() @ up.weight.double().T + up.bias.double()).relu()
    expected = (hidden @ down.weight.double().T + down.bias.double()).bfloat16()  # rounded once, at the end
    assert (layer._mlp(x) != expected).float().mean() < 1e-3
    assert layer._mlp(x).dtype == torch.bfloat16


@torch.no_grad()
def test_the_float32_mlp_compiles_into_one_graph(decoder: TransformerDecoder) -> None:
    layer, x = decoder.layers[0], make_inputs().tokens
    compiled = torch.compile(layer._mlp, backend="eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(x), layer._mlp(x))


def test_training_under_autocast_with_checkpointing(decoder: TransformerDecoder) -> None:
    """Recomputed layers see the autocast state of the forward pass: the gradients are those without checkpointing."""
    gradients = []
    for use_checkpointing in (False, True):
        model = copy_of(decoder, use_checkpointing=use_checkpointing).train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = run(model, make_inputs())
            loss = out.hs.square().mean() + out.boxes.square().mean() + out.presence_logits.square().mean()
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.isfinite(plain).all()
        torch.testing.assert_close(recomputed, plain)


def test_initialisation() -> None:
    torch.manual_seed(0)
    wrapper = TransformerWrapper(TransformerEncoderFusion(ENCODER, DIM), TransformerDecoder(DECODER, DIM))
    fresh = {name: parameter.clone() for name, parameter in wrapper.named_parameters()}
    for name, parameter in fresh.items():
        assert torch.isfinite(parameter).all(), name
        if name.endswith(("in_proj_bias", "out_proj.bias")):
            assert not parameter.any(), name
        elif "norm" in name:
            assert parameter.eq(1 if name.endswith("weight") else 0).all(), name
        elif parameter.dim() > 1 and not any(word in name for word in ("bbox", "query_embed", "reference_points")):
            bound = math.sqrt(6 / sum(parameter.shape))  # Xavier
            assert 0.75 * bound < parameter.abs().max() <= bound, name
    assert not any(p.any() for p in wrapper.decoder.bbox_embed.layers[-1].parameters())
    assert wrapper.decoder.bbox_embed.layers[0].weight.abs().max() <= DIM**-0.5
    assert fresh["decoder.query_embed.weight"].std().item() == pytest.approx(1, abs=0.2)
    assert fresh["decoder.reference_points.weight"].abs().max() > 1.5

    for parameter in wrapper.parameters():  # what an allocation without initialisation may hold
        nn.init.constant_(parameter, math.nan)
    torch.manual_seed(0)
    init_transformer(wrapper)
    for name, parameter in wrapper.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert fresh[name].std(unbiased=False).item() == pytest.approx(
            parameter.std(unbiased=False).item(), rel=0.5, abs=1e-6
        ), name


@torch.no_grad()
def test_fresh_boxes_are_the_reference_points() -> None:
    decoder = TransformerWrapper(TransformerEncoderFusion(ENCODER, DIM), TransformerDecoder(DECODER, DIM)).decoder
    boxes = run(decoder.eval(), make_inputs()).boxes[0]
    expected = decoder.reference_points.weight.sigmoid().expand_as(boxes)
    torch.testing.assert_close(boxes, expected, atol=1e-5, rtol=0)
