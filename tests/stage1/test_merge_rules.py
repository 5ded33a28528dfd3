"""Splicing a student into SAM 3 as a function from dicts to a dict (D-07, D-70, D-71)."""

from __future__ import annotations

import pytest
import torch

from sam3.checkpoint_keys import STUDENT_PREFIX, TRUNK_PREFIX, student_to_published
from sam3.checkpoint_merge import MergeError, merge_student, require_representable, shapes_of, with_dot
from sam3.config import Sam3Config, StudentConfig
from sam3.model.student_encoder import build_student

NUM_TRUNK_KEYS, NUM_OTHER_KEYS = 420, 1045  # of the released sam3.pt: 1,465 in all
STUDENT_KEYS = {
    "repvit_m0_9": 707,
    "repvit_m1_1": 653,
    "repvit_m2_3": 1463,
    "tiny_vit_5m": 300,
    "tiny_vit_11m": 300,
    "tiny_vit_21m": 300,
    "efficientvit_b0": 194,
    "efficientvit_b1": 269,
    "efficientvit_b2": 362,
}


def small_student() -> dict[str, torch.Tensor]:
    return {"backbone.model.conv.weight": torch.ones(4, 3), "head.3.bias": torch.zeros(4)}


def small_sam3() -> dict[str, torch.Tensor]:
    trunk = {TRUNK_PREFIX + name: torch.full((2, 2), 7.0) for name in ("pos_embed", "blocks.0.attn.qkv.weight")}
    trunk[TRUNK_PREFIX + "blocks.0.attn.freqs_cis"] = torch.zeros(2, 2, dtype=torch.complex64)
    other = {
        "detector.backbone.vision_backbone.convs.0.weight": torch.ones(3),
        "tracker.maskmem_tpos_enc": torch.ones(2),
    }
    return {**trunk, **other}


def trunk_shapes_of(sam3):
    return {k.removeprefix(TRUNK_PREFIX): tuple(v.shape) for k, v in sam3.items() if k.startswith(TRUNK_PREFIX)}


def merge(student, sam3, **changes):
    arguments = {"student_shapes": shapes_of(small_student()), "trunk_shapes": trunk_shapes_of(small_sam3()), **changes}
    return merge_student(student, sam3, **arguments)


def test_the_teacher_trunk_goes_and_all_else_stays_untouched():
    student, sam3 = small_student(), small_sam3()
    merged, report = merge(student, sam3)
    assert set(merged) == {
        STUDENT_PREFIX + "backbone.model.conv.weight",
        STUDENT_PREFIX + "head.3.bias",
        "detector.backbone.vision_backbone.convs.0.weight",
        "tracker.maskmem_tpos_enc",
    }
    assert merged["tracker.maskmem_tpos_enc"] is sam3["tracker.maskmem_tpos_enc"], "kept weights must not be copied"
    assert (report.num_student, report.num_replaced, report.num_appended, report.num_total) == (2, 3, 2, 4)
    assert report.student_bytes == 4 * (12 + 4)
    assert report.replaced_bytes == 2 * 16 + 4 * 8
    assert report.total_bytes == 4 * (12 + 4 + 3 + 2)


@pytest.mark.parametrize("backbone", sorted(STUDENT_KEYS))
def test_key_counts_of_the_released_students(backbone):
    """ES-RV-M: 653 student keys, 1,698 merged."""
    with torch.device("meta"):
        network = build_student(Sam3Config(student=StudentConfig(backbone)))
        student = student_to_published(network.state_dict(), backbone)
        sam3 = {f"{TRUNK_PREFIX}blocks.{i}.weight": torch.empty(4) for i in range(NUM_TRUNK_KEYS)}
        sam3 |= {f"detector.transformer.{i}.weight": torch.empty(4) for i in range(NUM_OTHER_KEYS)}
    merged, report = merge_student(student, sam3, shapes_of(student), trunk_shapes_of(sam3))
    assert report.num_student == STUDENT_KEYS[backbone]
    assert report.num_replaced == NUM_TRUNK_KEYS
    assert report.num_total == len(merged) == STUDENT_KEYS[backbone] + NUM_OTHER_KEYS


def without(state_dict, key):
    return {name: value for name, value in state_dict.items() if name != key}


SHAPELESS = torch.zeros(5)
CONV, BIAS = "backbone.model.conv.weight", "head.3.bias"


@pytest.mark.parametrize(
    ("student", "sam3", "changes", "message"),
    [
        (without(small_student(), BIAS), small_sam3(), {}, "student checkpoint .* missing, such as head.3.bias"),
        ({**small_student(), "head.9": SHAPELESS}, small_sam3(), {}, "1 keys do not belong, such as head.9"),
        ({**small_student(), BIAS: SHAPELESS}, small_sam3(), {}, r"head.3.bias has shape \(5,\), expected \(4,\)"),
        (small_student(), without(small_sam3(), TRUNK_PREFIX + "pos_embed"), {}, "trunk .* missing, such as pos_embed"),
        (
            small_student(),
            {**small_sam3(), TRUNK_PREFIX + "blocks.9.weight": SHAPELESS},
            {},
            "trunk .* do not belong, such as blocks.9.weight",
        ),
        (
            small_student(),
            {**small_sam3(), TRUNK_PREFIX + "pos_embed": SHAPELESS},
            {},
            r"pos_embed has shape \(5,\), expected \(2, 2\)",
        ),
        (small_student(), {"a.b": SHAPELESS}, {}, "no SAM 3 key lies under --replace-prefix .* such as a.b"),
        (small_student(), small_sam3(), {"replace_prefix": "image_encoder"}, "no SAM 3 key lies under .*image_encoder"),
        (small_student(), {STUDENT_PREFIX + CONV: SHAPELESS}, {}, "already holds a student .* original sam3.pt"),
        (
            small_student(),
            {**small_sam3(), "other.vision_backbone.trunk.pos_embed": SHAPELESS},
            {},
            "1 teacher trunk keys would be left behind, such as other.vision_backbone",
        ),
        (
            small_student(),
            {**small_sam3(), "tracker." + CONV: SHAPELESS},
            {"target_prefix": "tracker"},
            "1 student keys under 'tracker.' would overwrite SAM 3 keys",
        ),
    ],
)  # fmt: skip
def test_nothing_is_forgiven(student, sam3, changes, message):
    """D-70, D-71: wrong prefixes, sets and shapes are errors that name the first keys."""
    with pytest.raises(MergeError, match=message):
        merge(student, sam3, **changes)


def test_dots_at_the_end_of_prefixes_are_normalised():
    assert with_dot("a.b") == with_dot("a.b.") == "a.b."
    assert with_dot("") == ""
    merged, _ = merge(
        small_student(), small_sam3(), target_prefix=STUDENT_PREFIX[:-1], replace_prefix=TRUNK_PREFIX[:-1]
    )
    assert STUDENT_PREFIX + "head.3.bias" in merged


def test_a_weight_beyond_float16_is_refused():
    weights = {"norm.running_var": torch.tensor([1.0, 70000.0]), "norm.num_batches_tracked": torch.tensor(10**9)}
    require_representable(weights, torch.bfloat16)
    with pytest.raises(MergeError, match=r"norm.running_var: largest magnitude 70000 .*use --dtype bf16 or fp32"):
        require_representable(weights, torch.float16)
    with pytest.raises(MergeError, match="the weights are broken"):
        require_representable({"w": torch.tensor([float("nan")])}, torch.float32)
