"""Prompts in, masks out: shapes, coordinates, several prompts, several images, and what malformed prompts are told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden import table
from PIL import Image
from torch import Tensor, nn

from sam3.config import Sam3Config
from sam3.model.sam3_image import Sam3Image
from sam3.model_builder import build_sam3_image_model
from sam3.preprocess import Preprocess
from sam3.sam.heads import SamFeatures
from sam3.sam.interactive_predictor import SAM3InteractiveImagePredictor
from sam3.sam.mask_decoder import MaskDecoder, SamOutput

TINY = Sam3Config.preset("tiny")
LOW = TINY.low_res_mask_size
HEIGHT, WIDTH = 90, 140


@pytest.fixture(scope="module")
def model() -> Sam3Image:
    torch.manual_seed(0)
    options = {"enable_detector": False, "enable_inst_interactivity": True}
    return build_sam3_image_model(load_from_HF=False, config="tiny", device="cpu", **options)


def photo(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def predictor(model: Sam3Image) -> SAM3InteractiveImagePredictor:
    predictor = model.inst_interactive_predictor
    predictor.set_image(photo())
    return predictor


BOX = np.array([10, 20, 100, 70])
CLICK = {"point_coords": np.array([[70, 45]]), "point_labels": np.array([1])}


@pytest.mark.parametrize(("multimask", "k"), [(True, 3), (False, 1)])
def test_shapes_and_types_for_one_prompt(predictor, multimask: bool, k: int) -> None:
    masks, ious, low_res = predictor.predict(**CLICK, multimask_output=multimask)
    assert masks.shape == (k, HEIGHT, WIDTH)
    assert ious.shape == (k,)
    assert low_res.shape == (k, LOW, LOW)
    assert {masks.dtype, ious.dtype, low_res.dtype} == {np.dtype(np.float32)}
    assert set(np.unique(masks)) <= {0.0, 1.0}
    assert np.abs(low_res).max() <= 32


def test_logits_are_the_masks_before_the_threshold(predictor) -> None:
    masks, _, _ = predictor.predict(**CLICK)
    logits, _, _ = predictor.predict(**CLICK, return_logits=True)
    np.testing.assert_array_equal(masks, (logits > 0).astype(np.float32))


def test_a_box_is_two_points_labelled_2_and_3_before_the_clicks(predictor) -> None:
    together = predictor.predict(box=BOX, **CLICK)
    as_points = predictor.predict(
        point_coords=np.array([[10, 20], [100, 70], [70, 45]]), point_labels=np.array([2, 3, 1])
    )
    for a, b in zip(together, as_points, strict=True):
        np.testing.assert_array_equal(a, b)


def test_several_boxes_are_several_prompts(predictor) -> None:
    boxes = np.array([BOX, [0, 0, 30, 30], [50, 10, 139, 89]])
    masks, ious, low_res = predictor.predict(box=boxes, multimask_output=False)
    assert masks.shape == (3, 1, HEIGHT, WIDTH)
    assert ious.shape == (3, 1)
    assert low_res.shape == (3, 1, LOW, LOW)
    for i, box in enumerate(boxes):
        alone = predictor.predict(box=box, multimask_output=False)
        np.testing.assert_allclose(low_res[i], alone[2], atol=1e-5)
        np.testing.assert_allclose(ious[i], alone[1], atol=1e-5)


def test_boxes_with_clicks_of_their_own(predictor) -> None:
    boxes = np.array([BOX, [0, 0, 30, 30]])
    clicks = np.array([[[70, 45]], [[5, 5]]])
    labels = np.array([[1], [0]])
    _, _, low_res = predictor.predict(clicks, labels, boxes)
    _, _, second = predictor.predict(clicks[1], labels[1], boxes[1])
    np.testing.assert_allclose(low_res[1], second, atol=1e-5)


def test_an_earlier_mask_refines_the_next(predictor) -> None:
    _, _, low_res = predictor.predict(**CLICK)
    refined = predictor.predict(**CLICK, mask_input=low_res[:1], multimask_output=False)
    assert refined[0].shape == (1, HEIGHT, WIDTH)
    assert not np.allclose(refined[2], predictor.predict(**CLICK, multimask_output=False)[2], atol=1e-3)
    for shape in ((LOW, LOW), (1, 1, LOW, LOW)):
        again = predictor.predict(**CLICK, mask_input=low_res[:1].reshape(shape), multimask_output=False)
        np.testing.assert_array_equal(again[2], refined[2])
    assert predictor.predict(mask_input=low_res[:1], multimask_output=False)[0].shape == (1, HEIGHT, WIDTH)


def test_fractions_in_place_of_pixels(predictor) -> None:
    fractions = CLICK["point_coords"] / np.array([WIDTH, HEIGHT])
    a = predictor.predict(fractions, CLICK["point_labels"], normalize_coords=False)
    b = predictor.predict(**CLICK)
    np.testing.assert_allclose(a[2], b[2], atol=1e-5)


def test_padding_points_change_nothing_but_their_tokens(predictor) -> None:
    coords, labels = np.array([[70, 45], [0, 0]]), np.array([1, -1])
    moved = np.array([[70, 45], [33, 80]])
    np.testing.assert_array_equal(predictor.predict(coords, labels)[2], predictor.predict(moved, labels)[2])


def test_the_batch_gives_what_single_images_give(model: Sam3Image) -> None:
    predictor = model.inst_interactive_predictor
    images = [photo(), photo(50, 40, seed=1)]
    boxes = [np.array([[10, 20, 100, 70], [0, 0, 20, 20]]), None]
    points, labels = [None, np.array([[20, 20], [5, 5]])], [None, np.array([1, 0])]
    predictor.set_image_batch(images)
    assert predictor.get_image_embedding().shape[0] == 2
    masks, ious, low_res = predictor.predict_batch(points, labels, boxes, multimask_output=False)
    assert [m.shape for m in masks] == [(2, 1, 90, 140), (1, 50, 40)]
    for i, image in enumerate(images):
        predictor.set_image(image)
        alone = predictor.predict(points[i], labels[i], boxes[i], multimask_output=False)
        np.testing.assert_allclose(low_res[i], alone[2], atol=1e-4)
        np.testing.assert_allclose(ious[i], alone[1], atol=1e-4)
        assert (masks[i] != alone[0]).mean() < 1e-3


def test_any_kind_of_image_and_its_size(model: Sam3Image) -> None:
    predictor = model.inst_interactive_predictor
    for image in (
        Image.fromarray(photo()),
        Image.fromarray(photo()).convert("L"),
        torch.from_numpy(photo()).permute(2, 0, 1),
    ):
        predictor.set_image(image)
        assert predictor.predict(**CLICK)[0].shape == (3, HEIGHT, WIDTH)


@pytest.mark.parametrize("mode", ["stretch", "letterbox"])
def test_the_model_sees_exactly_what_preprocess_makes(mode: str) -> None:
    """D-01: deployment has no image pipeline of its own that could differ from the teacher's and the student's."""
    seen: list[Tensor] = []
    features = SamFeatures(torch.zeros(1, 4, 18, 18), torch.zeros(1, 1, LOW, LOW), torch.zeros(1, 1, 36, 36))

    def encode(images: Tensor) -> SamFeatures:
        seen.append(images)
        return features

    preprocess = Preprocess(size_px=TINY.image_size_px, mode=mode, mean=(0.4, 0.5, 0.6))
    predictor = SAM3InteractiveImagePredictor(DiscHeads(), encode, preprocess)
    predictor.set_image(photo())
    predictor.set_image_batch([photo(seed=1), photo(30, 20, seed=2)])
    assert torch.equal(seen[0], preprocess(photo())[None])
    assert torch.equal(seen[1], torch.stack([preprocess(photo(seed=1)), preprocess(photo(30, 20, seed=2))]))


BAD_PROMPTS = {
    "nothing": ({}, "no prompt"),
    "labels missing": ({"point_coords": [[1, 2]]}, "point_labels is missing"),
    "coords missing": ({"point_labels": [1]}, "point_coords is missing"),
    "unknown label": ({"point_coords": [[1, 2]], "point_labels": [4]}, "point_labels holds 4"),
    "fractional label": ({"point_coords": [[1, 2]], "point_labels": [0.5]}, "point_labels holds 0.5"),
    "counts": ({"point_coords": [[1, 2], [3, 4]], "point_labels": [1]}, r"\(2, 2\).*\(1,\)"),
    "three coordinates": ({"point_coords": [[1, 2, 3]], "point_labels": [1]}, "do not fit"),
    "no points": ({"point_coords": np.zeros((0, 2)), "point_labels": np.zeros(0)}, "do not fit"),
    "nan": (
        {"point_coords": [[1, float("nan")]], "point_labels": [1]},
        "point_coords holds values",
    ),
    "words": ({"point_coords": "here", "point_labels": [1]}, "must be an array of numbers"),
    "box shape": ({"box": [1, 2, 3]}, r"box has shape \(3,\)"),
    "box inverted": ({"box": [50, 10, 20, 30]}, "inverted"),
    "box infinite": ({"box": [0, 0, float("inf"), 5]}, "box holds values"),
    "boxes and points": (
        {"box": [[0, 0, 5, 5], [1, 1, 6, 6]], "point_coords": [[1, 2]], "point_labels": [1]},
        "2 boxes and 1 sets",
    ),
    "mask size": ({"mask_input": np.zeros((1, 7, 7))}, f"7x7, expected .* {LOW}x{LOW}"),
    "mask dims": ({"mask_input": np.zeros((2, LOW, LOW))}, "mask_input has shape"),
    "mask count": (
        {"box": [0, 0, 5, 5], "mask_input": np.zeros((2, 1, LOW, LOW))},
        "mask_input is for 2 prompts",
    ),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_malformed_prompts_are_refused(predictor, name: str) -> None:
    arguments, message = BAD_PROMPTS[name]
    with pytest.raises(ValueError, match=message):
        predictor.predict(**arguments)


def test_order_of_calls_is_checked(model: Sam3Image) -> None:
    predictor = model.inst_interactive_predictor
    predictor.reset_predictor()
    with pytest.raises(RuntimeError, match="set_image first"):
        predictor.predict(**CLICK)
    with pytest.raises(RuntimeError, match="set_image first"):
        predictor.get_image_embedding()
    predictor.set_image_batch([photo(), photo(seed=2)])
    with pytest.raises(RuntimeError, match="use predict_batch"):
        predictor.predict(**CLICK)
    with pytest.raises(ValueError, match="box_batch has 1 entries for 2 images"):
        predictor.predict_batch(box_batch=[BOX])
    with pytest.raises(ValueError, match="image 1: no prompt"):
        predictor.predict_batch(box_batch=[BOX, None])
    predictor.set_image(photo())
    with pytest.raises(RuntimeError, match="set_image_batch first"):
        predictor.predict_batch(box_batch=[BOX])
    with pytest.raises(ValueError, match="empty list"):
        predictor.set_image_batch([])


class DiscHeads(nn.Module):
    """Stands in for trained heads: the mask is a disc around the first point, in the model's frame."""

    def __init__(self) -> None:
        super().__init__()
        self.no_mem_embed = nn.Parameter(torch.zeros(1, 1, 4))

    def forward_prompts(self, features: SamFeatures, points: Tensor, labels: Tensor, masks: Tensor | None) -> SamOutput:
        side = features.fine.shape[-1]
        cells = (torch.arange(side) + 0.5) * TINY.image_size_px / side
        x, y = points[:, 0, 0, None, None], points[:, 0, 1, None, None]
        logits = 12.0 - ((cells[None, None, :] - x) ** 2 + (cells[None, :, None] - y) ** 2).sqrt()
        logits = logits[:, None].expand(-1, 4, -1, -1)
        ones = torch.ones(len(points), 4)
        return SamOutput(logits, ones, ones[:, :1], ones[..., None])

    def select(self, output: SamOutput, multimask_output: bool) -> SamOutput:
        return SamOutput(output.mask_logits[:, :1], output.ious[:, :1], output.object_score_logits, output.mask_tokens)


@pytest.mark.parametrize("mode", ["stretch", "letterbox"])
@pytest.mark.parametrize("size_hw", [(90, 140), (300, 120), (64, 64)])
@pytest.mark.parametrize("where", [(0, 0), (1, 1), (0, 1), (1, 0), (0.5, 0.5), (0.3, 0.8)])
def test_the_mask_is_where_the_click_was(mode: str, size_hw: tuple[int, int], where: tuple[float, float]) -> None:
    """Clicks in corners too: coordinates go into the model's frame and masks come back by the same map."""
    preprocess = Preprocess(size_px=TINY.image_size_px, mode=mode)
    features = SamFeatures(torch.zeros(1, 4, 18, 18), torch.zeros(1, 1, LOW, LOW), torch.zeros(1, 1, 36, 36))
    predictor = SAM3InteractiveImagePredictor(DiscHeads(), lambda images: features, preprocess)
    height, width = size_hw
    predictor.set_image(photo(height, width))
    click = np.array([[where[0] * (width - 1), where[1] * (height - 1)]])
    (mask,), _, _ = predictor.predict(click, np.array([1]))
    x, y = np.rint(click[0]).astype(int)
    assert mask[y, x] == 1
    ys, xs = np.nonzero(mask)
    scale_y, scale_x = preprocess.valid_hw(size_hw)
    assert np.abs(ys - y).max() <= 12 / scale_y + 2
    assert np.abs(xs - x).max() <= 12 / scale_x + 2


def make_selector() -> MaskDecoder:
    return MaskDecoder(TINY.hidden_dim, TINY.sam_heads).eval()


def test_an_unstable_single_mask_gives_way_to_the_best_candidate() -> None:
    """Stability is the IoU of the masks at +-0.05; below 0.98 the candidate with the highest IoU is taken."""
    stable = torch.where(torch.arange(100) < 50, 1.0, -1.0).view(10, 10)
    unstable = stable.clone()
    unstable.view(-1)[:2] = 0.01  # 48 / 50 = 0.96
    candidates = [torch.full((10, 10), float(i)) for i in (1, 2, 3)]
    logits = torch.stack([torch.stack([first, *candidates]) for first in (stable, unstable, -torch.ones(10, 10))])
    ious = torch.tensor([0.1, 0.5, 0.9, 0.7]).expand(3, -1)
    output = SamOutput(logits, ious, torch.zeros(3, 1), torch.arange(4.0)[None, :, None].expand(3, -1, 1))
    decoder = make_selector()
    chosen = decoder.select(output, multimask_output=False)
    assert torch.equal(chosen.mask_logits[:, 0], torch.stack([stable, candidates[1], -torch.ones(10, 10)]))
    torch.testing.assert_close(chosen.ious, torch.tensor([[0.1], [0.9], [0.1]]))
    assert chosen.mask_tokens.flatten().tolist() == [0, 0, 0]
    trained = decoder.train().select(output, multimask_output=False)
    assert torch.equal(trained.mask_logits[:, 0], logits[:, 0])
    several = decoder.select(output, multimask_output=True)
    assert torch.equal(several.mask_logits, logits[:, 1:])
    assert several.mask_tokens[0].flatten().tolist() == [1, 2, 3]


def test_forward_prompts_maps_prompts_to_images_with_gradients(model: Sam3Image) -> None:
    images = table("input.image", (2, 3, TINY.image_size_px, TINY.image_size_px))
    points = table("points", (5, 3, 2)) * 126 + 126
    labels = torch.tensor([[1, 0, -1]]).expand(5, -1)
    index = torch.tensor([0, 1, 1, 0, 1])
    features = model.image_features(images)
    output = model.heads.forward_prompts(features, points, labels, image_index=index)
    assert output.mask_logits.shape == (5, 4, LOW, LOW)
    for i in range(5):
        alone = model.heads.forward_prompts(
            model.image_features(images[index[i]][None]), points[i : i + 1], labels[i : i + 1]
        )
        torch.testing.assert_close(alone.mask_logits[0], output.mask_logits[i], atol=1e-4, rtol=0)
    (output.mask_logits.mean() + output.ious.mean() + output.object_score_logits.mean()).backward()
    untouched = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    unread = ("backbone.vision_backbone.convs.", "backbone.vision_backbone.sam2_convs.3.")
    assert {n for n in untouched if n.startswith("backbone")} == {n for n in model.state_dict() if n.startswith(unread)}
    assert {n.rsplit(".", 2)[0].split(".", 2)[2] for n in untouched if not n.startswith("backbone")} == {
        "sam_prompt_encoder.mask_downscaling"
    }
    model.zero_grad(set_to_none=True)


def test_forward_prompts_refuses_what_does_not_fit(model: Sam3Image) -> None:
    features = SamFeatures(torch.zeros(2, 64, 18, 18), torch.zeros(2, 8, LOW, LOW), torch.zeros(2, 16, 36, 36))
    heads = model.heads
    points, labels = torch.zeros(3, 2, 2), torch.ones(3, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="2 images without image_index"):
        heads.forward_prompts(features, points, labels)
    with pytest.raises(ValueError, match="belong together"):
        heads.forward_prompts(features, points)
    with pytest.raises(ValueError, match="needs points"):
        heads.forward_prompts(features)
    with pytest.raises(ValueError, match="do not fit"):
        heads.forward_prompts(features, points, labels[:2], image_index=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"expected \(P, 1, 72, 72\)"):
        heads.forward_prompts(features, mask_logits=torch.zeros(2, 1, 5, 5))
