"""What the detector keeps of an image for its next prompt: the same results, and never those of another image."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator

import pytest
import torch
from detector_parts import DIM, Inputs, build, make_inputs
from golden import table
from torch import Tensor, nn

from sam3.model.fusion_encoder import TransformerEncoderFusion
from sam3.model.pixel_decoder import PixelDecoder
from sam3.model.segmentation_head import UniversalSegmentationHead

SIZE_HW = (5, 6)


@pytest.fixture
def encoder() -> TransformerEncoderFusion:
    return build(TransformerEncoderFusion)


@pytest.fixture
def decoder() -> PixelDecoder:
    return build(UniversalSegmentationHead).pixel_decoder


@pytest.fixture(params=[torch.no_grad, torch.inference_mode])
def without_gradients(request: pytest.FixtureRequest) -> Iterator[None]:
    with request.param():
        yield


def calls_of(module: nn.Module) -> list[int]:
    """Grows by one with every forward pass of the module."""
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def encode(encoder: TransformerEncoderFusion, inputs: Inputs) -> Tensor:
    return encoder(inputs.tokens, inputs.prompt, inputs.pos, inputs.prompt_mask, inputs.size_hw).memory


def other_prompt(inputs: Inputs) -> Inputs:
    return inputs._replace(prompt=inputs.prompt.flip(0), prompt_mask=inputs.prompt_mask.flip(1))


def maps(num_images: int = 1) -> tuple[Tensor, list[Tensor]]:
    """A fused map and the two finer maps of the images."""
    height, width = SIZE_HW
    finer = [table(f"input.level{s}", (num_images, DIM, height * s, width * s)) for s in (4, 2)]
    return table("input.fused", (1, DIM, height, width)), finer


def plain(decoder: PixelDecoder, fused: Tensor, finer: list[Tensor], image_id: int = 0) -> Tensor:
    return PixelDecoder.forward(decoder, fused, finer, torch.tensor([image_id]))


# --- fusion encoder ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_gradients")
def test_an_image_reads_itself_once_for_all_prompts(encoder: TransformerEncoderFusion) -> None:
    inputs = make_inputs()
    inputs = inputs._replace(tokens=inputs.tokens[:, :1].repeat(1, 2, 1))  # two prompts on one image
    first, second = (calls_of(layer.self_attn) for layer in encoder.layers[:2])
    for i, case in enumerate((inputs, other_prompt(inputs), inputs)):
        kept = encode(encoder, case)
        assert torch.equal(kept, encode(build(TransformerEncoderFusion), case))
        assert len(first) == 1
        assert len(second) == i + 1


def test_with_gradients_nothing_is_kept(encoder: TransformerEncoderFusion) -> None:
    calls, inputs = calls_of(encoder.layers[0].self_attn), make_inputs()
    with_gradients = encode(encoder, inputs)
    with torch.no_grad():
        torch.testing.assert_close(encode(encoder, inputs), with_gradients.detach(), atol=1e-5, rtol=0)
    encode(encoder, inputs)
    assert len(calls) == 1 + 2 + 1  # without gradients once for each of the two images


@pytest.mark.usefixtures("without_gradients")
def test_a_changed_image_is_another_image(encoder: TransformerEncoderFusion) -> None:
    inputs = make_inputs()
    before = encode(encoder, inputs)
    inputs.tokens[3, 0, 5] += 1  # in place
    after = encode(encoder, inputs)
    assert torch.equal(after, encode(copy.deepcopy(encoder), inputs))
    assert not torch.equal(after[:, 0], before[:, 0])
    moved = inputs._replace(pos=inputs.pos.flip(0))
    assert torch.equal(encode(encoder, moved), encode(copy.deepcopy(encoder), moved))


@torch.no_grad()
def test_changed_weights_make_another_result(encoder: TransformerEncoderFusion) -> None:
    inputs = make_inputs()
    before = encode(encoder, inputs)
    encoder.layers[0].self_attn.out_proj.weight.mul_(1.5)
    assert not torch.equal(encode(encoder, inputs), before)
    halved = {key: value / 2 for key, value in encoder.state_dict().items()}
    for assign in (False, True):
        encoder.load_state_dict(halved, assign=assign)
        assert torch.equal(encode(encoder, inputs), encode(copy.deepcopy(encoder), inputs))


@torch.no_grad()
def test_autocast_and_dropout_are_not_mixed_with_what_is_kept() -> None:
    inputs = make_inputs()
    encoder = build(TransformerEncoderFusion)
    for layer in encoder.layers:
        layer.dropout.p = 0.5
    expected = encode(encoder, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(encode(encoder, inputs), expected)
    assert torch.equal(encode(encoder, inputs), expected)
    encoder.train()
    assert not torch.equal(encode(encoder, inputs), encode(encoder, inputs))


@torch.no_grad()
def test_few_images_are_kept_and_none_in_a_copy(encoder: TransformerEncoderFusion) -> None:
    encode(encoder, make_inputs(batch=4))
    assert len(encoder._starts) == 2
    assert not copy.deepcopy(encoder)._starts
    assert not pickle.loads(pickle.dumps(encoder))._starts
    assert not encoder.to(torch.bfloat16)._starts


@torch.no_grad()
def test_nothing_is_kept_while_compiling(
    encoder: TransformerEncoderFusion, decoder: PixelDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph cannot hold it."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    encode(encoder, make_inputs())
    assert not encoder._starts
    assert not decoder.reuses_images(*maps())


# --- pixel decoder ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_gradients")
def test_convolutions_of_an_image_are_computed_once(decoder: PixelDecoder) -> None:
    fused, finer = maps()
    calls = [calls_of(conv) for conv in decoder.conv_layers[:2]]
    assert decoder.reuses_images(fused, finer)
    for scale in (1.0, -2.0):
        pixels = decoder.decode_one(scale * fused, finer, 0)
        assert [len(c) for c in calls] == [1, 1]
        assert torch.equal(pixels, decoder.decode_one(scale * fused, finer, 0))
        expected = plain(build(UniversalSegmentationHead).pixel_decoder, scale * fused, finer)
        torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("without_gradients")
def test_images_do_not_get_each_others_pixels(decoder: PixelDecoder) -> None:
    fused, finer = maps(num_images=3)
    for image_id in (0, 0, 2, 1, 2):
        pixels = decoder.decode_one(fused, finer, image_id)
        torch.testing.assert_close(pixels, plain(decoder, fused, finer, image_id), atol=1e-5, rtol=0)
    other = [m.flip(0) for m in finer]
    torch.testing.assert_close(decoder.decode_one(fused, other, 2), plain(decoder, fused, finer), atol=1e-5, rtol=0)


@pytest.mark.usefixtures("without_gradients")
def test_changed_maps_and_weights_are_noticed(decoder: PixelDecoder) -> None:
    fused, finer = maps()
    before = decoder.decode_one(fused, finer, 0)
    finer[0][0, 0, 0, 0] += 1  # in place
    changed = decoder.decode_one(fused, finer, 0)
    assert not torch.equal(changed, before)
    torch.testing.assert_close(changed, plain(decoder, fused, finer), atol=1e-5, rtol=0)
    decoder.conv_layers[1].bias += 1
    torch.testing.assert_close(decoder.decode_one(fused, finer, 0), plain(decoder, fused, finer), atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_is_kept_goes_with_the_image(decoder: PixelDecoder) -> None:
    """At 1008 px it takes 106 MB."""
    fused, finer = maps()
    decoder.decode_one(fused, finer, 0)
    assert len(decoder._laterals) == 2
    assert not copy.deepcopy(decoder)._laterals
    assert not pickle.loads(pickle.dumps(decoder))._laterals
    finer.clear()
    gc.collect()
    assert not decoder._laterals
    decoder.decode_one(*maps(), 0)
    assert not decoder.to(torch.float64)._laterals


def test_where_the_plain_way_is_taken(decoder: PixelDecoder) -> None:
    fused, finer = maps()
    assert not decoder.reuses_images(fused, finer)  # gradients
    with torch.no_grad():
        assert decoder.reuses_images(fused, finer)
        assert not decoder.reuses_images(fused[..., 1:], finer)  # not twice the size
        assert not decoder.reuses_images(fused.double(), [m.double() for m in finer])
        assert not decoder.reuses_images(fused.to("meta"), [m.to("meta") for m in finer])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not decoder.reuses_images(fused, finer)
