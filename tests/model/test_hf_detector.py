"""The whole detector beside Hugging Face's `Sam3Model` on the same random weights (tiny configuration).

Point prompts are missing there; for them see the golden vectors.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from golden import fill, table
from torch import Tensor, nn

from sam3.config import Sam3Config
from sam3.model.data_misc import FindStage
from sam3.model.prompt import Prompt
from sam3.model.sam3_image import Sam3Image
from sam3.model_builder import assemble_image_model

transformers = pytest.importorskip("transformers")
from hf_models import build_hf_image_model  # noqa: E402 (needs transformers)

TINY = Sam3Config.preset("tiny")
TEXTS = ["red circle", "a striped blue square behind the tall lamp", "x"]
BOXES = torch.tensor(
    [[[0.30, 0.40, 0.20, 0.25], [0.70, 0.30, 0.15, 0.35]], [[0.60, 0.55, 0.30, 0.20], [0.5, 0.5, 0.9, 0.8]]]
)
TOLERANCE = 1e-4
HF_PADDING_LABEL = -10


@pytest.fixture(scope="module")
def model() -> Sam3Image:
    return fill(assemble_image_model(TINY, enable_detector=True))


@pytest.fixture(scope="module")
def hf(model: Sam3Image) -> nn.Module:
    return build_hf_image_model(model)


def make_images(count: int) -> Tensor:
    return table("input.image", (count, 3, TINY.image_size_px, TINY.image_size_px))


def run_ours(
    model: Sam3Image, images: Tensor, img_ids: list[int], texts: list[str], prompt: Prompt | None
) -> dict[str, Any]:
    """Prompt i: text i on image ``img_ids[i]``, with row i of the boxes."""
    weight = next(model.parameters())
    backbone_out = model.backbone.forward_image(images.to(weight.device, weight.dtype))
    backbone_out |= model.backbone.forward_text(texts)
    stage = FindStage.of(img_ids, list(range(len(texts))), weight.device)
    return model.forward_grounding(backbone_out, stage, geometric_prompt=prompt)


def run_theirs(
    hf: nn.Module, model: Sam3Image, images: Tensor, img_ids: list[int], texts: list[str], prompt: Prompt | None
) -> Any:
    """Their batch axis is images, so an image is repeated for each of its prompts.

    Without boxes they leave out the geometry encoder and the token that it always adds, which the original keeps
    (golden case A). A box that is padding keeps it.
    """
    ids = model.backbone.language_backbone.tokenize(texts)
    if prompt is None:
        prompt = Prompt(
            box_embeddings=torch.zeros(1, len(texts), 4), box_mask=torch.ones(len(texts), 1, dtype=torch.bool)
        )
    return hf(
        pixel_values=images[img_ids],
        input_ids=ids,
        attention_mask=(ids != 0).long(),
        input_boxes=prompt.box_embeddings.transpose(0, 1),
        input_boxes_labels=prompt.box_labels.T.masked_fill(prompt.box_mask, HF_PADDING_LABEL),
    )


def assert_same(ours: dict[str, Any], theirs: Any) -> None:
    pairs = {
        "masks": (ours["pred_masks"], theirs.pred_masks),
        "semantic": (ours["semantic_seg"], theirs.semantic_seg),
        "boxes": (ours["pred_boxes_xyxy"], theirs.pred_boxes),
        "logits": (ours["pred_logits"].squeeze(-1), theirs.pred_logits),
        "presence": (ours["presence_logit_dec"], theirs.presence_logits),
    }
    for name, (mine, other) in pairs.items():
        assert mine.shape == other.shape, name
        assert mine.numel() < 10 or mine.std() > 1e-3, name
        assert (mine - other).abs().max().item() <= TOLERANCE, name


def boxes_of(slots: int, items: list[int], labels: list[list[int]], mask: list[list[bool]] | None = None) -> Prompt:
    """``slots`` boxes for each of the prompts ``items``; labels (slots, B), mask (B, slots)."""
    return Prompt(
        box_embeddings=BOXES[:slots, items],
        box_labels=torch.tensor(labels),
        box_mask=torch.zeros(len(items), slots, dtype=torch.bool) if mask is None else torch.tensor(mask),
    )


def move(prompt: Prompt | None, device: str) -> Prompt | None:
    """The same boxes on another device."""
    if prompt is None:
        return None
    return Prompt(
        box_embeddings=prompt.box_embeddings.to(device),
        box_labels=prompt.box_labels.to(device),
        box_mask=prompt.box_mask.to(device),
    )


CASES: dict[str, tuple[list[int], list[str], Prompt | None]] = {
    "text": ([0], TEXTS[:1], None),
    "box": ([0], ["visual"], boxes_of(1, [0], [[1]])),
    "text and box": ([0], TEXTS[:1], boxes_of(1, [1], [[1]])),
    "positive and negative box": ([0], TEXTS[1:2], boxes_of(2, [0], [[1], [0]])),
    "several prompts on one image": ([0, 0, 0], TEXTS, None),
    "several prompts on one image, with boxes": ([0, 0], TEXTS[:2], boxes_of(2, [0, 1], [[1, 1], [0, 1]])),
    "padded boxes": ([0, 0], TEXTS[:2], boxes_of(2, [1, 0], [[1, 0], [1, 1]], [[False, False], [False, True]])),
    "several images": ([0, 1, 1], TEXTS, None),
    "several images, with padded boxes": (
        [1, 0],
        TEXTS[1:],
        boxes_of(2, [0, 1], [[0, 1], [1, 1]], [[False, True], [False, False]]),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_same_results(model: Sam3Image, hf: nn.Module, name: str) -> None:
    img_ids, texts, prompt = CASES[name]
    images = make_images(max(img_ids) + 1)
    assert_same(run_ours(model, images, img_ids, texts, prompt), run_theirs(hf, model, images, img_ids, texts, prompt))


class WithoutTokens(nn.Module):
    """In the geometry encoder's place: no tokens at all, not even its own."""

    def forward(self, prompt: Prompt, img_feats: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
        features = img_feats[-1]
        return features[:0], torch.zeros(features.shape[1], 0, dtype=torch.bool)


@torch.no_grad()
def test_their_call_without_boxes_lacks_one_token_of_the_prompt(model: Sam3Image, hf: nn.Module) -> None:
    """Not a difference of the weights or of anything else: without that token the numbers agree again."""
    images, texts = make_images(1), TEXTS[:1]
    ids = model.backbone.language_backbone.tokenize(texts)
    theirs = hf(pixel_values=images, input_ids=ids, attention_mask=(ids != 0).long())
    ours = run_ours(model, images, [0], texts, None)
    assert (ours["pred_masks"] - theirs.pred_masks).abs().max() > 0.01
    without = copy.deepcopy(model)
    without.geometry_encoder = WithoutTokens()
    assert_same(run_ours(without, images, [0], texts, None), theirs)


# Largest difference from float32 with all weights and activations in bfloat16, as logits or as fractions of the image.
# Means are below a third of it.
BF16_BOUNDS = {
    "pred_logits": 0.05,
    "pred_boxes": 0.01,
    "presence_logit_dec": 0.03,
    "pred_masks": 0.6,
    "semantic_seg": 0.08,
}


@torch.no_grad()
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16_stays_within_bounds(model: Sam3Image, how: str) -> None:
    img_ids, texts, prompt = CASES["several images, with padded boxes"]
    exact = run_ours(model, make_images(2), img_ids, texts, prompt)
    if how == "weights":
        low = run_ours(copy.deepcopy(model).to(torch.bfloat16), make_images(2), img_ids, texts, prompt)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            low = run_ours(model, make_images(2), img_ids, texts, prompt)
    assert low["pred_masks"].dtype == torch.bfloat16 and low["pred_boxes"].dtype == torch.float32
    for name, bound in BF16_BOUNDS.items():
        difference = (low[name].float() - exact[name]).abs()
        assert 0 < difference.max().item() <= bound, name
        assert difference.mean().item() <= bound / 3, name
    flipped = (low["pred_masks"] > 0) != (exact["pred_masks"] > 0)
    assert flipped.float().mean().item() < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_same_results_on_a_gpu(model: Sam3Image, hf: nn.Module, name: str) -> None:
    """Our CUDA results against their CPU results, with TF32 off, as it is unless somebody switches it on."""
    assert not torch.backends.cuda.matmul.allow_tf32
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    img_ids, texts, prompt = CASES[name]
    images = make_images(max(img_ids) + 1)
    try:
        ours = run_ours(copy.deepcopy(model).to("cuda"), images, img_ids, texts, move(prompt, "cuda"))
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    ours = {key: value.cpu() for key, value in ours.items() if isinstance(value, Tensor)}
    assert_same(ours, run_theirs(hf, model, images, img_ids, texts, prompt))
