"""The processor gives what the model computes, under the released keys, and runs the model no more than needed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import fill
from torch import Tensor

from sam3.model import detections as detections_module
from sam3.model.data_misc import FindStage
from sam3.model.processor_state import State
from sam3.model.sam3_image import Sam3Image
from sam3.model.sam3_image_processor import Sam3Processor
from sam3.model_builder import build_sam3_image_model
from sam3.preprocess import Preprocess
from sam3.sam.prompts import PromptError

HEIGHT, WIDTH = 90, 140
BOX = [0.4, 0.5, 0.3, 0.2]
THRESHOLD = 0.31
"""Between the scores that the golden weights give."""


def build(**options) -> Sam3Image:
    """The tiny model with the golden vectors' weights: with fresh ones every query gives nearly the same."""
    model = build_sam3_image_model(load_from_HF=False, config="tiny", device="cpu", enable_detector=True, **options)
    return fill(model)


@pytest.fixture(scope="module")
def model() -> Sam3Image:
    return build(enable_inst_interactivity=True)


def photo(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def processor(model: Sam3Image) -> Sam3Processor:
    return Sam3Processor(model, confidence_threshold=THRESHOLD, return_logits=True)


@pytest.fixture
def calls(model: Sam3Image, monkeypatch) -> Counter[str]:
    """How often the parts of the model ran."""
    counter: Counter[str] = Counter()

    def count(owner, name):
        original = getattr(owner, name)

        def counting(*args, **kwargs):
            counter[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    count(model, "forward_grounding")
    count(model.backbone, "forward_image")
    return counter


def assert_same_results(a: State, b: State, atol: float = 1e-5) -> None:
    assert len(a["scores"]) > 0
    for key in ("boxes", "scores", "mask_logits"):
        torch.testing.assert_close(a[key], b[key], atol=atol * (100 if key == "boxes" else 1), rtol=1e-4)


def reference(model: Sam3Image, image: np.ndarray, text: str, threshold: float) -> dict[str, Tensor]:
    """The released processor's arithmetic, written down a second time from the specification."""
    with torch.no_grad():
        backbone_out = model.backbone.forward_image(model.preprocess(image)[None])
        backbone_out |= model.backbone.forward_text([text])
        out = model.forward_grounding(backbone_out, FindStage.of([0], [0]), None, model._get_dummy_prompt())
    scores = (out["pred_logits"].sigmoid() * out["presence_logit_dec"].sigmoid()[:, None])[0, :, 0]
    keep = scores > threshold
    cx, cy, w, h = out["pred_boxes"][0, keep].unbind(-1)
    boxes = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], dim=-1)
    size = image.shape[:2]
    probabilities = F.interpolate(out["pred_masks"][0, keep][:, None], size, mode="bilinear").sigmoid()
    return {
        "scores": scores[keep],
        "boxes": boxes * torch.tensor([size[1], size[0], size[1], size[0]]),
        "masks_logits": probabilities,
        "masks": probabilities > 0.5,
    }


def test_results_are_those_of_the_released_processor(model, processor) -> None:
    state = processor.set_text_prompt("a cat", processor.set_image(photo()))
    assert (state["original_height"], state["original_width"]) == (HEIGHT, WIDTH)
    expected = reference(model, photo(), "a cat", THRESHOLD)
    assert 0 < len(expected["scores"]) < len(state["raw_outputs"]["pred_logits"][0])
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, atol=1e-5, rtol=1e-5)
        assert state[key].dtype == value.dtype
    assert torch.equal(state["mask_logits"].sigmoid(), state["masks_logits"])
    assert torch.equal(state["mask_logits"] > 0, state["masks"])
    (result,) = state["results"]
    assert result["text"] == "a cat" and result["image_index"] == 0 and result["boxes"] is state["boxes"]


def test_no_result_has_the_right_shapes(processor) -> None:
    processor.set_confidence_threshold(1.0)
    state = processor.set_text_prompt("a cat", processor.set_image(photo()))
    assert {key: tuple(state[key].shape) for key in ("boxes", "scores", "masks", "masks_logits")} == {
        "boxes": (0, 4),
        "scores": (0,),
        "masks": (0, 1, HEIGHT, WIDTH),
        "masks_logits": (0, 1, HEIGHT, WIDTH),
    }


def test_another_threshold_or_filter_does_not_run_the_model(processor, calls) -> None:
    state = processor.set_text_prompt("a cat", processor.set_image(photo()))
    assert calls == {"forward_image": 1, "forward_grounding": 1}
    many = len(state["scores"])
    scores = state["scores"]
    middle = float(scores.median())
    state = processor.set_confidence_threshold(middle, state)
    assert processor.confidence_threshold == middle
    assert torch.equal(state["scores"], scores[scores > middle]) and len(state["masks"]) == len(state["scores"]) < many
    state = processor.set_filter(state, confidence_threshold=0.0, top_k=3, sort_by_score=True)
    assert torch.equal(state["scores"], scores.sort(descending=True)[0][:3])
    assert calls == {"forward_image": 1, "forward_grounding": 1}


def test_repeated_prompts_read_the_image_once_and_texts_are_remembered(model, processor, calls) -> None:
    state = processor.set_image(photo())
    encoder_calls = []
    handle = model.backbone.language_backbone.encoder.register_forward_hook(lambda *args: encoder_calls.append(1))
    try:
        for text in ("a cat", "a dog", "a cat"):
            processor.set_text_prompt(text, state)
        processor.add_geometric_prompt(BOX, True, state)
    finally:
        handle.remove()
    assert calls == {"forward_image": 1, "forward_grounding": 4}
    assert len(encoder_calls) <= 2


def test_several_texts_are_what_each_text_gives(model) -> None:
    texts = ["a cat", "yellow school bus", "кошка"]
    for chunk in (1, 2, 8):
        processor = Sam3Processor(model, confidence_threshold=0.1, return_logits=True, max_prompts_per_pass=chunk)
        state = processor.set_text_prompt(texts, processor.set_image(photo()))
        assert [result["text"] for result in state["results"]] == state["texts"] == texts
        assert len(state["boxes"]) == len(state["masks"]) == 3
        for text, result in zip(texts, state["results"], strict=True):
            alone = processor.set_text_prompt(text, processor.set_image(photo()))
            assert_same_results(result, alone)


def test_prompts_on_a_batch_of_images_are_what_each_image_gives(processor) -> None:
    images = [photo(0), photo(1, 60, 50)]
    state = processor.set_text_prompt(["a cat", "a dog"], processor.set_image_batch(images))
    assert state["original_heights"] == [HEIGHT, 60] and state["original_widths"] == [WIDTH, 50]
    assert [(r["image_index"], r["text"]) for r in state["results"]] == [
        (0, "a cat"),
        (0, "a dog"),
        (1, "a cat"),
        (1, "a dog"),
    ]
    state = processor.add_geometric_prompt(BOX, True, state, image_index=1)
    for result in state["results"]:
        alone = processor.set_text_prompt(result["text"], processor.set_image(images[result["image_index"]]))
        if result["image_index"] == 1:
            alone = processor.add_geometric_prompt(BOX, True, alone)
        assert_same_results(result, alone)


def test_a_batch_of_one_gives_lists_too(processor) -> None:
    state = processor.set_text_prompt("a cat", processor.set_image_batch([photo()]))
    assert isinstance(state["boxes"], list) and len(state["boxes"]) == 1
    assert_same_results(state["results"][0], processor.set_text_prompt("a cat", processor.set_image(photo())))


def test_boxes_work_at_once_one_by_one_and_in_every_format(processor) -> None:
    boxes, labels = [BOX, [0.7, 0.3, 0.1, 0.4]], [True, False]
    at_once = processor.add_geometric_prompt(boxes, labels, processor.set_image(photo()))
    assert at_once["texts"] == ["visual"]
    one_by_one = processor.set_image(photo())
    for box, label in zip(boxes, labels, strict=True):
        processor.add_geometric_prompt(box, label, one_by_one)
    assert_same_results(at_once, one_by_one)
    cx, cy, w, h = (np.array(boxes) * [WIDTH, HEIGHT, WIDTH, HEIGHT]).T
    for box_format, in_pixels in (
        ("xyxy_px", np.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1)),
        ("xywh_px", np.stack([cx - w / 2, cy - h / 2, w, h], -1)),
    ):
        state = processor.add_geometric_prompt(in_pixels, labels, processor.set_image(photo()), box_format=box_format)
        assert_same_results(at_once, state, atol=1e-4)
    with_text = processor.set_text_prompt("a cat", at_once)
    assert with_text["geometric_prompt"].box_embeddings.shape == (2, 1, 4)
    assert (with_text["raw_outputs"]["pred_logits"] - one_by_one["raw_outputs"]["pred_logits"]).abs().max() > 1e-4


def test_points_change_the_result_and_come_in_pixels_too(processor) -> None:
    state = processor.set_text_prompt("a cat", processor.set_image(photo()))
    before = state["raw_outputs"]["pred_logits"]
    state = processor.add_point_prompt([0.25, 0.5], 1, state)
    assert (state["raw_outputs"]["pred_logits"] - before).abs().max() > 1e-4
    other = processor.set_text_prompt("a cat", processor.set_image(photo()))
    other = processor.add_point_prompt([[WIDTH / 4, HEIGHT / 2]], True, other, point_format="xy_px")
    assert_same_results(state, other)
    negative = processor.set_prompts(processor.set_image(photo()), text="a cat", points=[0.25, 0.5], point_labels=0)
    assert (state["raw_outputs"]["pred_logits"] - negative["raw_outputs"]["pred_logits"]).abs().max() > 1e-4


def test_prompts_given_together_run_once(processor, calls) -> None:
    state = processor.set_text_prompt("a dog", processor.set_image(photo()))
    processor.add_geometric_prompt([0.2, 0.2, 0.1, 0.1], True, state)
    calls.clear()
    together = processor.set_prompts(
        state, text="a cat", boxes=BOX, box_labels=False, points=[[0.1, 0.2], [0.5, 0.6]], point_labels=[1, 0]
    )
    assert calls == {"forward_grounding": 1}
    step_by_step = processor.set_text_prompt("a cat", processor.set_image(photo()))
    processor.add_geometric_prompt(BOX, False, step_by_step)
    processor.add_point_prompt([[0.1, 0.2], [0.5, 0.6]], [1, 0], step_by_step)
    assert_same_results(together, step_by_step)


def test_reset_forgets_prompts_and_keeps_the_image(processor, calls) -> None:
    state = processor.add_geometric_prompt(BOX, True, processor.set_image(photo()))
    processor.reset_all_prompts(state)
    assert set(state) == {"original_height", "original_width", "backbone_out"}
    assert not [key for key in state["backbone_out"] if key.startswith("language")]
    again = processor.set_text_prompt("a cat", state)
    assert_same_results(again, processor.set_text_prompt("a cat", processor.set_image(photo())))


def test_a_state_used_for_another_image_forgets_the_first(processor) -> None:
    state = processor.add_geometric_prompt(BOX, True, processor.set_image_batch([photo(), photo(1)]), image_index=0)
    state["mine"] = 1
    assert processor.set_image(photo(1), state) is state
    assert set(state) == {"original_height", "original_width", "backbone_out", "mine"}


def test_a_refused_prompt_changes_nothing(processor) -> None:
    state = processor.set_text_prompt("a cat", processor.set_image(photo()))
    before = {**state, "backbone_out": dict(state["backbone_out"])}
    for refused in (
        lambda: processor.set_text_prompt("", state),
        lambda: processor.add_geometric_prompt([2, 2, 0.1, 0.1], True, state),
        lambda: processor.add_point_prompt([[0.1, 0.1], [0.1, 1.1]], 1, state),
        lambda: processor.set_prompts(state, text="a dog", boxes=BOX, box_labels=7),
    ):
        with pytest.raises(PromptError):
            refused()
    assert state.keys() == before.keys() and state["backbone_out"].keys() == before["backbone_out"].keys()
    assert all(state[key] is before[key] for key in before if key != "backbone_out")
    assert state["geometric_prompt"].box_embeddings.shape[0] == 0


def test_large_masks_are_enlarged_some_at_a_time(processor, monkeypatch) -> None:
    whole = processor.set_text_prompt("a cat", processor.set_image(photo()))
    assert len(whole["masks"]) > 3
    sizes = []
    original = Preprocess.masks_to_image

    def recording(self, logits, original_hw):
        sizes.append(len(logits))
        return original(self, logits, original_hw)

    monkeypatch.setattr(Preprocess, "masks_to_image", recording)
    monkeypatch.setattr(detections_module, "PIXELS_PER_CHUNK", 2 * HEIGHT * WIDTH + 1)
    pieces = processor.set_text_prompt("a cat", processor.set_image(photo()))
    assert set(sizes) <= {1, 2} and sum(sizes) == len(whole["masks"])
    for key in ("masks", "masks_logits", "mask_logits"):
        torch.testing.assert_close(pieces[key], whole[key], atol=1e-6, rtol=1e-6)


def test_only_the_forms_of_masks_that_were_asked_for(model) -> None:
    processor = Sam3Processor(model, confidence_threshold=THRESHOLD, return_probabilities=False)
    state = processor.set_text_prompt("a cat", processor.set_image(photo()))
    assert "masks" in state and "masks_logits" not in state and "mask_logits" not in state


def test_boxes_alone_without_a_segmentation_head() -> None:
    processor = Sam3Processor(build(enable_segmentation=False), confidence_threshold=THRESHOLD, nms_iou=0.9)
    state = processor.add_geometric_prompt(BOX, True, processor.set_image(photo()))
    assert len(state["boxes"]) > 0 and "masks" not in state and "masks_logits" not in state
    processor.set_text_prompt("a cat", state)
    processor.set_confidence_threshold(0.1, state)
    assert len(state["scores"]) == len(state["boxes"])


def test_another_resolution_works_and_gives_up_clicks(model) -> None:
    processor = Sam3Processor(model, resolution=168, confidence_threshold=0.1)
    state = processor.set_text_prompt("a cat", processor.set_image(photo()))
    assert state["backbone_out"]["backbone_fpn"][-1].shape[-1] == 168 // 14
    assert state["backbone_out"]["sam2_backbone_out"] is None
    assert state["masks"].shape[1:] == (1, HEIGHT, WIDTH)


def test_clicks_read_the_same_state(model, processor) -> None:
    state = processor.set_text_prompt("a cat", processor.set_image(photo()))
    click = {"point_coords": np.array([[70, 45]]), "point_labels": np.array([1])}
    masks, ious, low_res = model.predict_inst(state, **click)
    model.inst_interactive_predictor.set_image(photo())
    for mine, theirs in zip((masks, ious, low_res), model.inst_interactive_predictor.predict(**click), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-3)
    batch = processor.set_image_batch([photo(1, 60, 50), photo()])
    lists = model.predict_inst_batch(
        batch, [None, click["point_coords"]], [None, click["point_labels"]], [[1, 2, 9, 9], None]
    )
    np.testing.assert_allclose(lists[2][1], low_res, atol=1e-3)


def test_a_letterboxed_model_gives_pixels_of_the_image(model) -> None:
    """The corners of the image are not those of the model's input, in boxes in, boxes out and masks."""
    preprocess = Preprocess.letterbox_imagenet(252)
    low_res = torch.full((1, 1, 72, 72), -9.0)
    low_res[..., :23, 36:] = 9.0  # the upper half of the image, its right half
    raw = {
        "pred_logits": torch.full((1, 1, 1), 9.0),
        "presence_logit_dec": torch.full((1, 1), 9.0),
        "pred_boxes": torch.tensor([[[0.75, 90 / 280 / 2, 0.5, 90 / 280]]]),
        "pred_masks": low_res,
    }
    result = detections_module.detections(
        raw, 0, (180, 280), preprocess, detections_module.ResultFilter(), detections_module.MaskOptions()
    )
    torch.testing.assert_close(result["boxes"], torch.tensor([[140.0, 0.0, 280.0, 90.0]]), atol=0.6, rtol=0)
    expected = torch.zeros(180, 280, dtype=torch.bool)
    expected[:90, 140:] = True
    assert (result["masks"][0, 0] == expected).float().mean() > 0.97


def test_scores_that_are_not_finite_are_an_error_and_not_an_empty_result(processor) -> None:
    state = processor.set_text_prompt("a cat", processor.set_image(photo()))
    state["raw_outputs"]["pred_logits"] = state["raw_outputs"]["pred_logits"] * torch.nan
    with pytest.raises(ValueError, match=r"not finite \(NaN\) in torch.float32"):
        processor.set_confidence_threshold(0.3, state)


def test_a_long_text_is_cut_with_a_warning(processor, caplog) -> None:
    state = processor.set_image(photo())
    processor.set_text_prompt("dog " * 30, state)
    assert not caplog.records
    processor.set_text_prompt("dog " * 31, state)
    assert "'dog dog" in caplog.text and "reads its first 30 tokens" in caplog.text


def test_a_model_in_training_mode_is_refused(model, processor) -> None:
    state = processor.set_image(photo())
    model.train()
    try:
        for call in (lambda: processor.set_text_prompt("a cat", state), lambda: processor.set_image(photo())):
            with pytest.raises(RuntimeError, match=r"training mode.*model.eval"):
                call()
    finally:
        model.eval()


def moved(*args, **kwargs) -> tuple[State, tuple]:
    """All scores and masks of some prompts, from a model moved to a device or dtype."""
    model = build(enable_inst_interactivity=True).to(*args, **kwargs)
    processor = Sam3Processor(model, confidence_threshold=0.0, return_logits=True)
    state = processor.set_image(photo())
    state = processor.set_prompts(state, text="a cat", boxes=BOX, points=[[0.2, 0.3]], point_labels=0)
    return state, model.predict_inst(state, box=np.array([10, 20, 60, 70]), multimask_output=False)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_half_precision_gives_float32_results_near_the_same(dtype: torch.dtype, atol: float) -> None:
    (whole, whole_clicks), (half, half_clicks) = moved(torch.float32), moved(dtype)
    assert half["backbone_out"]["backbone_fpn"][0].dtype == half["raw_outputs"]["pred_masks"].dtype == dtype
    for key, scale in (("scores", 1), ("boxes", 100), ("mask_logits", 30)):
        assert half[key].dtype == torch.float32
        torch.testing.assert_close(half[key], whole[key], atol=atol * scale, rtol=0)
    np.testing.assert_allclose(half_clicks[1], whole_clicks[1], atol=atol)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_what_the_cpu_gives() -> None:
    (cpu, cpu_clicks), (gpu, gpu_clicks) = moved("cpu"), moved("cuda")
    for key in ("scores", "boxes", "mask_logits"):
        assert gpu[key].device.type == "cuda"
        torch.testing.assert_close(gpu[key].cpu(), cpu[key], atol=1e-2, rtol=1e-3)  # the resize rounds differently
    np.testing.assert_allclose(gpu_clicks[1], cpu_clicks[1], atol=1e-3)
