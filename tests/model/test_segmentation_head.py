"""The segmentation head: masks of queries, the semantic mask, and what they do not depend on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detector_parts import (
    DIM,
    SEGMENTATION,
    Inputs,
    assert_released,
    build,
    in_bf16,
    make_inputs,
    one_item,
    relative_error,
    with_other_padding,
)
from golden import table
from torch import Tensor

from sam3.model.segmentation_head import UniversalSegmentationHead

NUM_QUERIES = 7
SIZE_HW = (5, 6)


@pytest.fixture(scope="module")
def head() -> UniversalSegmentationHead:
    return build(UniversalSegmentationHead)


def pyramid(num_images: int, size_hw: tuple[int, int] = SIZE_HW) -> list[Tensor]:
    height, width = size_hw
    return [table(f"input.level{i}", (num_images, DIM, height * s, width * s)) for i, s in enumerate((4, 2, 1))]


def queries(batch: int) -> Tensor:
    return table("input.queries", (batch, NUM_QUERIES, DIM))


def run(
    head: UniversalSegmentationHead, maps: list[Tensor], inputs: Inputs, image_ids: list[int]
) -> dict[str, Tensor | None]:
    batch = len(image_ids)
    return head(maps, queries(batch), torch.tensor(image_ids), inputs.tokens, inputs.prompt, inputs.prompt_mask)


def test_released_names_and_shapes() -> None:
    digest = "d0933bf552a1a37412da053e391728670eaf2c1c454233e63efbeec22d79d156"
    assert_released(UniversalSegmentationHead, 28, 2_298_881, digest)


@torch.no_grad()
def test_masks_step_by_step(head: UniversalSegmentationHead) -> None:
    """The steps as the specification of the original lists them, without our shortcuts."""
    inputs, (fine, middle, coarse) = make_inputs(SIZE_HW), pyramid(1)
    out = run(head, [fine, middle, coarse], inputs, [0, 0])
    tokens, prompt = inputs.tokens.transpose(0, 1), inputs.prompt.transpose(0, 1)
    tokens = tokens + head.cross_attend_prompt(head.cross_attn_norm(tokens), prompt, prompt, inputs.prompt_mask)
    pixels = tokens.transpose(1, 2).reshape(2, DIM, *SIZE_HW)
    for i, level in enumerate((middle, fine)):
        larger = pixels.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        convolved = head.pixel_decoder.conv_layers[i](level + larger)
        pixels = F.relu(head.pixel_decoder.norms[i](convolved))
    instances = head.instance_seg_head(pixels)
    masks = torch.einsum("bnc,bchw->bnhw", head.mask_predictor.mask_embed(queries(2)), instances)
    torch.testing.assert_close(out["pred_masks"], masks, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(out["semantic_seg"], head.semantic_seg_head(pixels), atol=1e-5, rtol=1e-5)
    assert out["presence_logit"] is None
    assert masks.std() > 0.1
    assert out["pred_masks"].shape == (2, NUM_QUERIES, 20, 24)
    assert out["semantic_seg"].shape == (2, 1, 20, 24)


@torch.no_grad()
def test_padding_changes_nothing(head: UniversalSegmentationHead) -> None:
    inputs, maps = make_inputs(SIZE_HW), pyramid(1)
    expected = run(head, maps, inputs, [0, 0])
    other = run(head, maps, with_other_padding(inputs), [0, 0])
    assert torch.equal(other["pred_masks"], expected["pred_masks"])
    assert torch.equal(other["semantic_seg"], expected["semantic_seg"])
    unmasked = run(head, maps, inputs._replace(prompt_mask=None), [0, 0])
    assert (unmasked["pred_masks"] - expected["pred_masks"])[1].abs().max() > 1e-3


@pytest.mark.parametrize("with_gradients", [False, True])
def test_every_prompt_reads_its_own_image(head: UniversalSegmentationHead, with_gradients: bool) -> None:
    inputs, maps, image_ids = make_inputs(SIZE_HW, batch=4), pyramid(3), [2, 0, 2, 1]
    with torch.set_grad_enabled(with_gradients):  # without, each image's part is kept for its next prompt
        together = run(head, maps, inputs, image_ids)
    for i, image in enumerate(image_ids):
        single = one_item(inputs, i)
        own = [m[image : image + 1] for m in maps]
        args = (single.tokens, single.prompt, single.prompt_mask)
        with torch.no_grad():
            alone = head(own, queries(4)[i : i + 1], torch.tensor([0]), *args)
        torch.testing.assert_close(alone["pred_masks"][0], together["pred_masks"][i], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(alone["semantic_seg"][0], together["semantic_seg"][i], atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_inputs_are_left_as_they_are(head: UniversalSegmentationHead) -> None:
    """The original replaces the last of the caller's maps."""
    inputs, maps = make_inputs(SIZE_HW), pyramid(1)
    before = [m.clone() for m in maps]
    tokens = inputs.tokens.clone()
    run(head, maps, inputs, [0, 0])
    assert all(torch.equal(a, b) for a, b in zip(maps, before, strict=True))
    assert torch.equal(inputs.tokens, tokens)


@torch.no_grad()
def test_what_no_mask_depends_on(head: UniversalSegmentationHead) -> None:
    """The coarsest map (the fused tokens take its place) and the last stage of the pixel decoder."""
    inputs, maps = make_inputs(SIZE_HW), pyramid(1)
    expected = run(head, maps, inputs, [0, 0])["pred_masks"]
    other = build(UniversalSegmentationHead)
    for parameter in (*other.pixel_decoder.conv_layers[2].parameters(), *other.pixel_decoder.norms[2].parameters()):
        parameter.fill_(float("nan"))
    maps[-1] = maps[-1] + 1
    assert torch.equal(run(other, maps, inputs, [0, 0])["pred_masks"], expected)


@torch.no_grad()
@pytest.mark.parametrize("size_hw", [(1, 1), (3, 8), (9, 9)])
def test_other_grids(head: UniversalSegmentationHead, size_hw: tuple[int, int]) -> None:
    masks = run(head, pyramid(1, size_hw), make_inputs(size_hw), [0, 0])["pred_masks"]
    assert masks.shape == (2, NUM_QUERIES, 4 * size_hw[0], 4 * size_hw[1])
    assert torch.isfinite(masks).all()


def test_gradients_reach_every_weight_that_is_read(head: UniversalSegmentationHead) -> None:
    model = UniversalSegmentationHead(SEGMENTATION, DIM).train()
    model.load_state_dict(head.state_dict())
    inputs, maps = make_inputs(SIZE_HW), pyramid(1)
    tokens = inputs.tokens.clone().requires_grad_()
    out = run(model, maps, inputs._replace(tokens=tokens), [0, 0])
    (out["pred_masks"].square().mean() + out["semantic_seg"].square().mean()).backward()
    for name, parameter in model.named_parameters():
        if name.startswith(("pixel_decoder.conv_layers.2.", "pixel_decoder.norms.2.")):
            assert parameter.grad is None, name
        else:
            assert parameter.grad.abs().max() > 0, name
    assert tokens.grad.abs().max() > 0


@torch.no_grad()
def test_bf16_stays_close(head: UniversalSegmentationHead) -> None:
    inputs, maps = make_inputs(SIZE_HW), pyramid(1)
    expected = run(head, maps, inputs, [0, 0])
    low, rounded = build(UniversalSegmentationHead).to(torch.bfloat16), in_bf16(inputs)
    halves = [m.bfloat16() for m in maps]
    args = (rounded.tokens, rounded.prompt, rounded.prompt_mask)
    out = low(halves, queries(2).bfloat16(), torch.tensor([0, 0]), *args)
    for name in ("pred_masks", "semantic_seg"):
        assert out[name].dtype == torch.bfloat16
        assert relative_error(out[name], expected[name]) < 0.03
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(run(head, maps, inputs, [0, 0])["pred_masks"], expected["pred_masks"]) < 0.03
