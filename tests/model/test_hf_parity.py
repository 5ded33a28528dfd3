"""The same random weights in Hugging Face's implementation give the same numbers (tiny configurations, fp32, CPU)."""

from __future__ import annotations

import pytest
import torch
from golden import fill, table
from torch import Tensor

from sam3.config import Sam3Config
from sam3.hf_keys import released_from_hf, released_to_hf
from sam3.model.sam3_image import Sam3Image
from sam3.model_builder import assemble_image_model
from sam3.released_names import released_state_dict

transformers = pytest.importorskip("transformers")
from hf_models import hf_vision_config  # noqa: E402 (needs transformers)

TINY = Sam3Config.preset("tiny")
TRACKER_VIEW = {
    "tracker_model.": "",
    "tracker_neck.": "vision_encoder.neck.",
    "detector_model.vision_encoder.backbone.": "vision_encoder.backbone.",
}


@pytest.fixture(scope="module")
def model() -> Sam3Image:
    return fill(assemble_image_model(TINY, enable_inst_interactivity=True, enable_detector=False))


@pytest.fixture(scope="module")
def hf_weights(model: Sam3Image) -> dict[str, Tensor]:
    return released_to_hf(released_state_dict(model))


@pytest.fixture(scope="module")
def hf_tracker(hf_weights: dict[str, Tensor]):
    config = transformers.Sam3TrackerConfig(
        vision_config=hf_vision_config(TINY),
        prompt_encoder_config={
            "hidden_size": TINY.hidden_dim,
            "image_size": TINY.image_size_px,
            "patch_size": TINY.trunk.patch_size_px,
        },
        mask_decoder_config={
            "hidden_size": TINY.hidden_dim,
            "mlp_dim": TINY.sam_heads.transformer_mlp_dim,
            "num_hidden_layers": TINY.sam_heads.transformer_depth,
            "num_attention_heads": TINY.sam_heads.transformer_num_heads,
            "attention_downsample_rate": TINY.sam_heads.attention_downsample_rate,
            "iou_head_hidden_dim": TINY.sam_heads.head_hidden_dim,
        },
    )
    hf = transformers.Sam3TrackerModel(config).eval()
    weights = {}
    for key, value in hf_weights.items():
        for prefix, replacement in TRACKER_VIEW.items():
            if key.startswith(prefix):
                weights[replacement + key.removeprefix(prefix)] = value
    hf.load_state_dict(weights)
    return hf


@pytest.fixture(scope="module")
def images() -> Tensor:
    return table("input.image", (2, 3, TINY.image_size_px, TINY.image_size_px))


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max().item() <= 1e-4 * max(1.0, ours.abs().mean().item())


@torch.no_grad()
def test_trunk_and_detector_neck(model: Sam3Image, hf_weights: dict[str, Tensor], images: Tensor) -> None:
    hf = transformers.Sam3VisionModel(hf_vision_config(TINY)).eval()
    prefix = "detector_model.vision_encoder."
    hf.load_state_dict({k.removeprefix(prefix): v for k, v in hf_weights.items() if k.startswith(prefix)})
    expected = hf(pixel_values=images)
    (features,) = model.backbone.vision_backbone.trunk(images)
    assert_same(features.flatten(2).transpose(1, 2), expected.last_hidden_state)
    out = model.backbone.forward_image(images, need_sam2=False)
    for ours, theirs in zip(out["backbone_fpn"], expected.fpn_hidden_states[:3], strict=True):
        assert 0.1 < ours.std() < 10
        assert_same(ours, theirs)
    for ours, theirs in zip(out["vision_pos_enc"], expected.fpn_position_encoding[:3], strict=True):
        assert_same(ours, theirs.expand_as(ours))


@torch.no_grad()
def test_second_neck_and_skip_maps(model: Sam3Image, hf_tracker, images: Tensor) -> None:
    """From pixels; their image model leaves out ``no_mem_embed``, which the original adds (golden vectors)."""
    fine, middle, coarse = hf_tracker.get_image_embeddings(images)
    features = model.image_features(images)
    assert_same(features.fine, fine)
    assert_same(features.middle, middle)
    assert_same(features.embedding, coarse + model.heads.no_mem_embed.transpose(1, 2)[..., None])


PROMPTS = {
    "one click": ([[[100.0, 60.0]]], [[1]]),
    "clicks": ([[[30.5, 200.0], [120.0, 77.0], [1.0, 250.0]]], [[1, 0, 1]]),
    "box as corners, then a click": ([[[20.0, 30.0], [200.0, 180.0], [100.0, 90.0]]], [[2, 3, 0]]),
}


@torch.no_grad()
@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("multimask", [False, True])
def test_sam_heads(model: Sam3Image, hf_tracker, images: Tensor, name: str, with_mask: bool, multimask: bool) -> None:
    points, labels = (torch.tensor(x) for x in PROMPTS[name])
    side = TINY.low_res_mask_size
    mask = 8 * table("input.mask", (1, 1, side, side)) if with_mask else None
    features = model.image_features(images[:1])
    expected = hf_tracker(
        image_embeddings=[features.fine, features.middle, features.embedding],
        input_points=points[None],
        input_labels=labels[None],
        input_masks=mask,
        multimask_output=multimask,
    )
    output = model.heads.select(model.heads.forward_prompts(features, points, labels, mask), multimask)
    assert_same(output.mask_logits[None], expected.pred_masks)
    assert_same(output.ious[None], expected.iou_scores)
    assert_same(output.object_score_logits[None], expected.object_score_logits)


@torch.no_grad()
def test_prompt_encoder(model: Sam3Image, hf_tracker) -> None:
    points = table("input.points", (3, 5, 2)) * 126 + 126
    labels = torch.tensor([[1, 0, 1, -1, -1], [2, 3, 0, 1, -1], [0, 0, 0, 0, 0]])
    expected, _ = hf_tracker.prompt_encoder(points[None], labels[None], None, None)
    encoder = model.heads.sam_prompt_encoder
    assert_same(encoder.embed_points(points, labels, TINY.image_size_px)[None], expected)
    dense = encoder.get_dense_pe(TINY.grid_size)
    assert_same(dense, hf_tracker.get_image_wide_positional_embeddings())


def test_hf_names_and_back(model: Sam3Image, hf_weights: dict[str, Tensor]) -> None:
    released = released_state_dict(model)
    back = released_from_hf(hf_weights)
    assert back.keys() == {key for key in released if not key.endswith("freqs_cis")}
    for key, value in back.items():
        if key.endswith("pos_embed"):  # the class token's row is not in their file, and nothing reads it
            assert not value[:, 0].any()
            value, released[key] = value[:, 1:], released[key][:, 1:]
        assert torch.equal(value, released[key]), key
