"""`PostProcessImage`: a batch of prompts gives what `Sam3Processor` gives one by one, gathered by image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from golden import fill

from sam3.coco_rle import decode_mask
from sam3.eval.postprocessors import PostProcessImage
from sam3.finite import NonFiniteError
from sam3.model.data_misc import BatchedDatapoint, FindMetadata, FindStage, SAM3Output
from sam3.model.sam3_image import Sam3Image
from sam3.model.sam3_image_processor import Sam3Processor
from sam3.model_builder import build_sam3_image_model
from sam3.preprocess import Preprocess

TEXTS = ["a cat", "a dog"]
IN_PIXELS: dict[str, Any] = {"use_original_sizes_box": True, "use_original_sizes_mask": True}
THRESHOLD = 0.31


def photo(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


PHOTOS = [photo(0, 40, 60), photo(1, 50, 30)]
# Prompts in this order: both texts on the first photo, the second text on the second photo.
IMAGES, TEXT_IDS = [0, 0, 1], [0, 1, 1]
METADATA = FindMetadata([7, 7, 9], [100, 100, 200], [3, 18, 18], [PHOTOS[i].shape[:2] for i in IMAGES])


@pytest.fixture(scope="module")
def model() -> Sam3Image:
    return fill(build_sam3_image_model(load_from_HF=False, config="tiny", device="cpu"))


def run(model: Sam3Image) -> SAM3Output:
    images, _ = model.preprocess.prepare(PHOTOS)
    with torch.inference_mode():
        return model(BatchedDatapoint(images, TEXTS, [FindStage.of(IMAGES, TEXT_IDS)], [], [METADATA]))


@pytest.fixture(scope="module")
def output(model) -> SAM3Output:
    return run(model)


@pytest.mark.parametrize("preprocess", [None, Preprocess.letterbox_imagenet(252)], ids=["stretch", "letterbox"])
def test_results_are_those_of_the_processor(model: Sam3Image, preprocess: Preprocess | None) -> None:
    if preprocess is not None:
        options = {"load_from_HF": False, "config": "tiny", "device": "cpu"}
        model = fill(build_sam3_image_model(preprocess=preprocess, **options))
    process = PostProcessImage(-1, "segm", detection_threshold=THRESHOLD, preprocess=preprocess, **IN_PIXELS)
    results = process.process_results(run(model), [METADATA])
    assert list(results) == [7, 9]
    processor = Sam3Processor(model, confidence_threshold=THRESHOLD)
    for image_id, photo_index, texts in ((7, 0, TEXTS), (9, 1, TEXTS[1:])):
        state = processor.set_text_prompt(texts, processor.set_image(PHOTOS[photo_index]))
        expected = state["results"]
        assert len(results[image_id]["scores"]) == sum(len(result["scores"]) for result in expected) > 0
        for key, atol in (("scores", 1e-5), ("boxes", 1e-3)):
            wanted = torch.cat([result[key] for result in expected])
            torch.testing.assert_close(results[image_id][key], wanted, atol=atol, rtol=1e-5)
        masks = torch.cat([result["masks"] for result in expected])
        assert results[image_id]["masks"].shape == masks.shape
        assert (results[image_id]["masks"] != masks).float().mean() < 1e-4


def test_the_best_of_each_image_under_the_numbers_of_the_data_set(output: SAM3Output) -> None:
    everything = PostProcessImage(0, use_original_ids=True, **IN_PIXELS).process_results(output, [METADATA])
    assert list(everything) == [100, 200]
    assert everything[100]["labels"].tolist() == [3] * 24 + [18] * 24
    assert "masks" not in everything[100]
    best = PostProcessImage(5, use_original_ids=True, **IN_PIXELS).process_results(output, [METADATA])
    for image_id, result in best.items():
        wanted = everything[image_id]["scores"].sort(descending=True).values[:5]
        assert torch.equal(result["scores"].sort(descending=True).values, wanted)
        rows = [everything[image_id]["boxes"].tolist().index(box) for box in result["boxes"].tolist()]
        assert rows == sorted(rows)
        assert torch.equal(result["labels"], everything[image_id]["labels"][rows])


def test_fractions_and_small_masks_without_sizes(output: SAM3Output) -> None:
    (stage,) = output
    first, second, _ = PostProcessImage(3, "segm")(stage, forced_labels=[4, 5, 6])
    rows = [stage["pred_boxes_xyxy"][0].tolist().index(box) for box in first["boxes"].tolist()]
    assert torch.equal(first["masks"], stage["pred_masks"][0, rows][:, None] > 0)
    assert second["labels"].tolist() == [5, 5, 5]
    assert first["scores"].dtype == first["boxes"].dtype == torch.float32


def test_run_lengths_hold_the_same_masks(output: SAM3Output) -> None:
    sizes = METADATA.original_size
    plain = PostProcessImage(2, "segm", **IN_PIXELS)(next(iter(output)), sizes, sizes)
    (together, _) = (
        PostProcessImage(2, "segm", convert_mask_to_rle=True, **IN_PIXELS).process_results(output, [METADATA]).values()
    )
    masks = [mask[0].numpy() for result in plain[:2] for mask in result["masks"]]
    assert len(together["masks_rle"]) == 2 and "masks" not in together
    assert all(any(np.array_equal(decode_mask(rle), mask) for mask in masks) for rle in together["masks_rle"])


def test_the_presence_counts_once(model: Sam3Image, output: SAM3Output) -> None:
    model.supervise_joint_box_scores = True
    try:
        joint = run(model)
    finally:
        model.supervise_joint_box_scores = False
    plain = PostProcessImage(0)(next(iter(output)))
    for ours, theirs in zip(PostProcessImage(0, use_presence=False)(next(iter(joint))), plain, strict=True):
        torch.testing.assert_close(ours["scores"], theirs["scores"], atol=1e-3, rtol=0)


def test_nothing_above_the_threshold_has_the_right_shapes(output: SAM3Output) -> None:
    result = PostProcessImage(5, "segm", detection_threshold=1.0, **IN_PIXELS).process_results(output, [METADATA])[9]
    shapes = {key: tuple(value.shape) for key, value in result.items()}
    assert shapes == {"scores": (0,), "labels": (0,), "boxes": (0, 4), "masks": (0, 1, 50, 30)}


BAD: dict[str, tuple[Callable[[SAM3Output], object], type[Exception], str]] = {
    "unknown type": (lambda out: PostProcessImage(1, "mask"), ValueError, "iou_type 'mask' is not one of"),
    "letterboxed without sizes": (
        lambda out: PostProcessImage(1, preprocess=Preprocess.letterbox_imagenet()),
        ValueError,
        "preprocessing mode 'letterbox': an image's padding follows from its size, so set use_original",
    ),
    "sizes of other prompts": (
        lambda out: PostProcessImage(1)(out[0], [(4, 4)]),
        ValueError,
        "target_sizes_boxes has 1 entries for 3 prompts",
    ),
    "no masks": (
        lambda out: PostProcessImage(1, "segm")({k: v for k, v in out[0].items() if k != "pred_masks"}),
        ValueError,
        "needs pred_masks: build the model with enable_segmentation=True",
    ),
    "NaN": (
        lambda out: PostProcessImage(1)(out[0] | {"pred_logits": out[0]["pred_logits"] * torch.nan}),
        NonFiniteError,
        "scores are not finite",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_processed_is_refused(output: SAM3Output, case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error) as raised:
        call(output)
    assert message in str(raised.value)
