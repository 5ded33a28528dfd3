"""Builders: which parts a model has, and students by the names that the field uses."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import table
from torch import Tensor, nn

from sam3 import Preprocess, Sam3Config, build_efficientsam3_image_model, build_sam3_image_model, load_model
from sam3.checkpoint_io import CheckpointError, write_merged
from sam3.config import StudentConfig
from sam3.model.data_misc import BatchedDatapoint, FindStage
from sam3.model.matcher import BinaryHungarianMatcherV2
from sam3.model.sam3_image import Sam3Image
from sam3.model_builder import STUDENT_SIZES, assemble_image_model, student_backbone
from sam3.preprocess import PreprocessMismatchError
from sam3.released_names import released_state_dict

TINY = Sam3Config.preset("tiny")
STUDENT = "efficientvit_b0"
FRESH = {"load_from_HF": False, "config": "tiny", "device": "cpu"}


@pytest.fixture(scope="module")
def student_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sam3Image]:
    config = TINY.replace(student=StudentConfig(STUDENT))
    torch.manual_seed(0)
    model = assemble_image_model(config, enable_inst_interactivity=True).eval()
    path = tmp_path_factory.mktemp("student") / "merged.pt"
    write_merged(
        path, released_state_dict(model), {"model": config.to_dict(), "preprocess": model.preprocess.to_dict()}
    )
    return path, model


def image() -> Tensor:
    return table("input.image", (1, 3, TINY.image_size_px, TINY.image_size_px))


def batch(texts: list[str]) -> BatchedDatapoint:
    return BatchedDatapoint(image(), texts, [FindStage.of([0] * len(texts), list(range(len(texts))))], [], [])


# --- switches ---------------------------------------------------------------------------------------------------------


def test_by_default_there_is_everything_but_the_sam_heads() -> None:
    model = build_sam3_image_model(**FRESH)
    assert model.has_detector and not model.training and model.matcher is None
    assert model.backbone.language_backbone is not None and model.segmentation_head is not None
    assert model.inst_interactive_predictor is None and model.missing_parts == ()
    with torch.no_grad():
        (out,) = model(batch(["red circle", "blue square"]))
    side = TINY.low_res_mask_size
    assert out["pred_masks"].shape == (2, TINY.decoder.num_queries, side, side)
    assert out["semantic_seg"].shape == (2, 1, side, side)
    assert out["presence_logit"] is None
    assert all(torch.isfinite(out[k]).all() for k in ("pred_masks", "pred_boxes", "pred_logits", "presence_logit_dec"))


def test_without_masks_there_are_boxes_and_the_features_stay() -> None:
    model = build_sam3_image_model(**FRESH, enable_segmentation=False)
    assert model.segmentation_head is None
    with torch.no_grad():
        out = model(batch(["red circle"]))[0]
    assert "pred_masks" not in out and "semantic_seg" not in out
    assert out["pred_boxes"].shape == (1, TINY.decoder.num_queries, 4)
    assert len(out["prev_encoder_out"]["backbone_out"]["backbone_fpn"]) == 3


def test_without_a_text_encoder_features_come_from_the_caller() -> None:
    whole = build_sam3_image_model(**FRESH)
    model = build_sam3_image_model(**FRESH, enable_text_encoder=False)
    missing = model.load_state_dict(whole.state_dict(), strict=False)
    assert not missing.missing_keys and all("language_backbone" in key for key in missing.unexpected_keys)
    with pytest.raises(ValueError, match="no text encoder: build it with enable_text_encoder=True"):
        model(batch(["red circle"]))
    with torch.no_grad():
        backbone_out = model.backbone.forward_image(image())
        with pytest.raises(ValueError, match="no language_features and language_mask"):
            model.forward_grounding(backbone_out, FindStage.of([0], [0]))
        backbone_out |= whole.backbone.forward_text(["red circle"])
        out = model.forward_grounding(backbone_out, FindStage.of([0], [0]))
        assert torch.equal(out["pred_logits"], whole(batch(["red circle"]))[0]["pred_logits"])


def test_without_a_detector_there_is_an_encoder_that_says_so() -> None:
    model = build_sam3_image_model(**FRESH, enable_detector=False)
    assert not model.has_detector and model.backbone.language_backbone is None
    with pytest.raises(ValueError, match="this model has no detector: build it with enable_detector=True"):
        model.forward_grounding(model.backbone.forward_image(image()), FindStage.of([0], [0]))


def test_training_mode_matches_queries_to_objects() -> None:
    model = build_sam3_image_model(**FRESH, eval_mode=False)
    assert model.training and isinstance(model.matcher, BinaryHungarianMatcherV2)
    assert not any("matcher" in key for key in model.state_dict())
    seen: list[tuple] = []

    class Matcher(nn.Module):
        def forward(self, logits: Tensor, boxes: Tensor, target: str) -> str:
            seen.append((logits.shape, boxes.shape, target))
            return "matched"

    model.matcher = Matcher()
    data = batch(["red circle", "blue square"])
    data.find_targets = ["what to find"]
    (out,) = model(data)
    queries = TINY.decoder.num_queries
    assert seen == [((2, queries), (2, queries, 4), "what to find")] * TINY.decoder.num_layers
    assert out["indices"] == "matched" and all(layer["indices"] == "matched" for layer in out["aux_outputs"])
    assert out["pred_masks"].shape[1] == out["pred_masks_o2m"].shape[1] == out["pred_logits_o2m"].shape[1] == queries
    sum(out[key].sum() for key in ("pred_masks", "semantic_seg", "pred_logits", "pred_boxes")).backward()
    for part in (model.backbone.vision_backbone.trunk, model.geometry_encoder.encode, model.transformer.encoder):
        assert all(p.grad is not None for p in part.parameters())
    model.eval()
    assert "indices" not in model(data)[0]


def test_several_stages_belong_to_video() -> None:
    data = batch(["red circle"])
    data.find_inputs = data.find_inputs * 2
    with pytest.raises(ValueError, match="one stage of prompts, the batch has 2"):
        build_sam3_image_model(**FRESH)(data)


def test_different_numbers_of_prompts_are_refused() -> None:
    model = build_sam3_image_model(**FRESH)
    with torch.no_grad():
        backbone_out = model.backbone.forward_image(image()) | model.backbone.forward_text(["red circle"])
        with pytest.raises(ValueError, match="'img_ids': 2, 'text_ids': 1"):
            model.forward_grounding(backbone_out, FindStage.of([0, 0], [0]))
        with pytest.raises(ValueError, match="'text_ids': 2, 'boxes': 1, 'points': 1"):
            stage, prompt = FindStage.of([0, 0], [0, 0]), model._get_dummy_prompt(1)
            model.forward_grounding(backbone_out, stage, geometric_prompt=prompt)


def test_images_can_be_encoded_when_a_prompt_needs_them() -> None:
    model = build_sam3_image_model(**FRESH)
    images = table("input.image", (3, 3, TINY.image_size_px, TINY.image_size_px))
    text = model.backbone.forward_text(["red circle"])
    encoded: list[int] = []
    model.backbone.vision_backbone.trunk.register_forward_pre_hook(lambda _, args: encoded.append(len(args[0])))
    with torch.no_grad():
        stage = FindStage.of([2, 0, 2], [0, 0, 0])
        lazy = {"img_batch_all_stages": images, **text}
        ours = model.forward_grounding(lazy, stage)
        assert encoded == [2]  # image 1 is in no prompt
        again = model.forward_grounding(lazy, stage)
        assert encoded == [2]
        eager = model.forward_grounding(model.backbone.forward_image(images) | text, stage)
        used = model.backbone.forward_image(images[[0, 2]])
        same = model.forward_grounding(used | text, FindStage.of([1, 0, 1], [0, 0, 0]))
    for key in ("pred_masks", "pred_boxes"):
        assert torch.equal(ours[key], again[key]) and torch.equal(ours[key], same[key])
        # Kernels may add up a row in another order where the batch has another size, or the row another place.
        torch.testing.assert_close(ours[key], eager[key], atol=1e-5, rtol=0)
        torch.testing.assert_close(ours[key][0], ours[key][2], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="neither backbone_fpn nor img_batch_all_stages"):
        model.forward_grounding({**text}, stage)
    with torch.no_grad():  # another prompt, another image
        other = model.forward_grounding(lazy, FindStage.of([1], [0]))
        expected = model.forward_grounding(model.backbone.forward_image(images[1:2]) | text, FindStage.of([0], [0]))
    torch.testing.assert_close(other["pred_masks"], expected["pred_masks"], atol=1e-5, rtol=0)


def test_the_vocabulary_of_released_calls_is_checked(tmp_path: Path) -> None:
    package = importlib.util.find_spec("open_clip")
    assert package is not None and package.origin is not None
    known = Path(package.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    build_sam3_image_model(**FRESH, enable_detector=False, bpe_path=known)
    (tmp_path / "other.gz").write_bytes(b"x")
    for path, message in ((tmp_path / "other.gz", "not the vocabulary"), (tmp_path / "none.gz", "no such file")):
        with pytest.raises(ValueError, match=message):
            build_sam3_image_model(**FRESH, bpe_path=path)


# --- interactive predictor on the whole model -------------------------------------------------------------------------


def test_clicks_read_the_features_of_the_state() -> None:
    model = build_sam3_image_model(**FRESH, enable_inst_interactivity=True)
    photo = np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)
    pixels = model.preprocess(photo)[None]
    with torch.no_grad():
        state = {
            "original_height": 50,
            "original_width": 70,
            "backbone_out": model.backbone.forward_image(pixels),
        }
        encoded: list[int] = []
        model.backbone.vision_backbone.trunk.register_forward_pre_hook(lambda *_: encoded.append(1))
        masks, ious, _ = model.predict_inst(state, point_coords=[[20, 30]], point_labels=[1])
    assert not encoded and masks.shape == (3, 50, 70) and ious.shape == (3,)
    predictor = model.inst_interactive_predictor
    predictor.set_image(photo)
    again, _, _ = predictor.predict(point_coords=[[20, 30]], point_labels=[1])
    np.testing.assert_array_equal(masks, again)
    batch_state = state | {"original_heights": [50], "original_widths": [70]}
    (first,), _, _ = model.predict_inst_batch(batch_state, box_batch=[[5, 5, 30, 40]], multimask_output=False)
    one, _, _ = predictor.predict(box=[5, 5, 30, 40], multimask_output=False)  # the image set before is set again
    np.testing.assert_array_equal(first, one)
    with pytest.raises(ValueError, match="use predict_inst_batch"):
        model.predict_inst(batch_state)
    with pytest.raises(ValueError, match="holds no batch of images"):
        model.predict_inst_batch(state)
    with pytest.raises(ValueError, match="no features for the SAM heads"):
        model.predict_inst({"original_height": 5, "original_width": 5})
    with pytest.raises(ValueError, match="no SAM heads"):
        build_sam3_image_model(**FRESH).predict_inst(state)


# --- students ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone_type", "model_name", "expected"),
    [
        ("repvit", "m1.1", "repvit_m1_1"),
        ("RepViT", "M0_9", "repvit_m0_9"),
        ("repvit", "repvit_m2_3", "repvit_m2_3"),
        ("tinyvit", "11m", "tiny_vit_11m"),
        ("tiny_vit", "tiny_vit_5m", "tiny_vit_5m"),
        ("efficientvit", "b0", "efficientvit_b0"),
        ("efficientvit", "B2", "efficientvit_b2"),
    ],
)
def test_the_names_of_the_field(backbone_type: str, model_name: str, expected: str) -> None:
    assert student_backbone(backbone_type, model_name) == expected


def test_every_released_student_has_such_a_name() -> None:
    from sam3.backbones import student_names

    assert {b for sizes in STUDENT_SIZES.values() for b in sizes.values()} == set(student_names().values())


@pytest.mark.parametrize(
    ("backbone_type", "model_name"), [("repvit", "b0"), ("resnet", "50"), ("repvit", None), (None, "b0"), ("", "")]
)
def test_unknown_students_are_refused_with_the_list(backbone_type: str | None, model_name: str | None) -> None:
    with pytest.raises(ValueError, match=r"repvit with m0\.9, m1\.1, m2\.3; tinyvit with 5m, 11m, 21m; efficientvit"):
        build_efficientsam3_image_model(backbone_type=backbone_type, model_name=model_name, config="tiny")


def test_a_student_opens_by_its_name_or_by_its_file(student_file: tuple[Path, Sam3Image]) -> None:
    path, original = student_file
    for arguments in (("efficientvit", "b0"), ()):
        model = build_efficientsam3_image_model(path, *arguments, device="cpu", enable_inst_interactivity=True)
        assert model.config == original.config and not model.training
        for (key, ours), theirs in zip(model.state_dict().items(), original.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs), key
    plain = build_efficientsam3_image_model(path, "efficientvit", "b0", device="cpu", enable_text_encoder=False)
    assert plain.inst_interactive_predictor is None and plain.backbone.language_backbone is None
    with torch.no_grad():
        assert torch.equal(model(batch(["x"]))[0]["pred_masks"], original(batch(["x"]))[0]["pred_masks"])


def test_another_student_than_the_file_holds_is_refused(student_file: tuple[Path, Sam3Image], tmp_path: Path) -> None:
    path, _ = student_file
    with pytest.raises(CheckpointError, match="holds the student 'efficientvit_b0', not 'efficientvit_b1'"):
        build_efficientsam3_image_model(path, "efficientvit", "b1")
    with pytest.raises(PreprocessMismatchError, match="the argument preprocess"):
        build_efficientsam3_image_model(path, preprocess=Preprocess(TINY.image_size_px, mode="letterbox"))
    teacher = assemble_image_model(TINY, enable_inst_interactivity=True)
    write_merged(tmp_path / "sam3.pt", released_state_dict(teacher), {"model": TINY.to_dict()})
    with pytest.raises(CheckpointError, match="holds SAM 3 itself, no student"):
        build_efficientsam3_image_model(tmp_path / "sam3.pt", "efficientvit", "b0")


def test_fresh_students_in_any_size_of_the_rest() -> None:
    model = build_efficientsam3_image_model(backbone_type="tinyvit", model_name="5m", config="tiny", device="cpu")
    assert model.config == TINY.replace(student=StudentConfig("tiny_vit_5m")) and model.has_detector
    with pytest.raises(ValueError, match="must say which student"):
        build_efficientsam3_image_model(config="tiny")


def test_the_shipped_teacher_of_an_earlier_version_opens(student_file: tuple[Path, Sam3Image], tmp_path: Path) -> None:
    """A file and a record from before the detector: the model then has no detector and says what is missing."""
    encoder = assemble_image_model(TINY, enable_inst_interactivity=True, enable_detector=False)
    record = {k: v for k, v in TINY.to_dict().items() if k not in ("text", "decoder", "fusion_encoder", "scoring")}
    write_merged(tmp_path / "old.safetensors", released_state_dict(encoder), {"model": record})
    model = load_model(tmp_path / "old.safetensors", device="cpu")
    assert model.config == TINY and not model.has_detector and model.inst_interactive_predictor is not None
    assert model.missing_parts
