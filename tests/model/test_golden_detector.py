"""Numbers of the original SAM 3's detector (fp32, CPU) on deterministic weights, from pixels and texts to masks.

Case A has texts alone; case B adds a point and two boxes to the first prompt, a point and one box to the second.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden import SMALL, check, small_model, table

from sam3.model.data_misc import BatchedDatapoint, FindStage
from sam3.model.prompt import Prompt
from sam3.model.sam3_image import Sam3Image

TEXTS = ["a cat", "yellow school bus"]
Row = tuple[tuple[int, ...], "float | None", "float | None", dict[tuple[int, ...], float]]

# Name of the tensor -> shape, mean, standard deviation, single values.
CASE_A: dict[str, Row] = {
    "prompt": ((33, 2, 256), 0.11577, 1.07877, {(32, 0, 0): -0.11755, (32, 0, 10): 1.66819, (32, 1, 200): -0.53705}),
    "encoder_hidden_states": (
        (576, 2, 256),
        0.06210,
        3.66498,
        {(0, 0, 0): -8.18933, (300, 1, 100): 1.95988, (575, 1, 255): 2.69022},
    ),
    "queries": (
        (2, 200, 256),
        0.01285,
        1.01093,
        {(0, 0, 0): -0.68093, (0, 100, 50): 0.33998, (1, 199, 255): -0.71415},
    ),
    "pred_boxes": (
        (2, 200, 4),
        0.71637,
        0.33786,
        {
            (0, 0, 0): 0.94262,
            (0, 0, 1): 0.04580,
            (0, 0, 2): 0.88173,
            (0, 0, 3): 0.97463,
            (1, 150, 0): 0.96948,
            (1, 150, 3): 0.91476,
        },
    ),
    "pred_logits": (
        (2, 200, 1),
        0.12106,
        0.08410,
        {(0, 0, 0): 0.03713, (0, 77, 0): 0.04948, (1, 199, 0): 0.20871},
    ),
    "presence_logit_dec": ((2, 1), 0.35345, 0.02661, {(0, 0): 0.32683, (1, 0): 0.38006}),
    "pred_masks": (
        (2, 200, 96, 96),
        -1.57839,
        4.11930,
        {(0, 0, 0, 0): -1.13636, (0, 50, 40, 60): -0.63760, (1, 199, 95, 95): -1.77724},
    ),
    "semantic_seg": ((2, 1, 96, 96), 0.25936, 0.51812, {(0, 0, 0, 0): 0.33470, (1, 0, 50, 20): 0.55642}),
}
CASE_B: dict[str, Row] = {
    "prompt": (
        (36, 2, 256),
        None,
        None,
        {(32, 0, 0): -1.35224, (35, 0, 10): 0.69480, (33, 1, 200): 0.61468, (34, 1, 7): 0.19112},
    ),
    "encoder_hidden_states": (
        (576, 2, 256),
        -0.02700,
        3.62318,
        {(0, 0, 0): -7.83735, (300, 1, 100): 3.38486, (575, 1, 255): 3.04716},
    ),
    "queries": (
        (2, 200, 256),
        0.01400,
        1.00936,
        {(0, 0, 0): -0.22130, (0, 100, 50): 1.08509, (1, 199, 255): -0.74652},
    ),
    "pred_boxes": (
        (2, 200, 4),
        0.74882,
        0.27853,
        {
            (0, 0, 0): 0.91774,
            (0, 0, 1): 0.11316,
            (0, 0, 2): 0.86303,
            (0, 0, 3): 0.97213,
            (1, 150, 0): 0.97111,
            (1, 150, 3): 0.92852,
        },
    ),
    "pred_logits": (
        (2, 200, 1),
        0.04337,
        0.07376,
        {(0, 0, 0): -0.02843, (0, 77, 0): -0.04208, (1, 199, 0): 0.12607},
    ),
    "presence_logit_dec": ((2, 1), 0.15647, 0.02794, {(0, 0): 0.12853, (1, 0): 0.18441}),
    "pred_masks": (
        (2, 200, 96, 96),
        -0.58066,
        4.51594,
        {(0, 0, 0, 0): 1.03569, (0, 50, 40, 60): -0.36984, (1, 199, 95, 95): -1.34417},
    ),
    "semantic_seg": ((2, 1, 96, 96), 0.26795, 0.52670, {(0, 0, 0, 0): 0.25309, (1, 0, 50, 20): 0.58605}),
}


def case_b_prompt() -> Prompt:
    """One point and two boxes for the first prompt; one point, one box and a padded slot for the second."""
    return Prompt(
        box_embeddings=torch.tensor(
            [[[0.30, 0.40, 0.20, 0.25], [0.70, 0.30, 0.15, 0.35]], [[0.60, 0.55, 0.30, 0.20], [0.0, 0.0, 0.0, 0.0]]]
        ),
        box_labels=torch.tensor([[1, 1], [0, 0]]),
        box_mask=torch.tensor([[False, False], [False, True]]),
        point_embeddings=torch.tensor([[[0.25, 0.75], [0.5, 0.5]]]),
        point_labels=torch.tensor([[1, 0]]),
        point_mask=torch.tensor([[False], [False]]),
    )


@pytest.fixture(scope="module")
def model() -> Sam3Image:
    return small_model()


@pytest.fixture(scope="module")
def backbone_out(model: Sam3Image) -> dict[str, Any]:
    with torch.no_grad():
        out = model.backbone.forward_image(table("input.image", (1, 3, SMALL.image_size_px, SMALL.image_size_px)))
        return out | model.backbone.forward_text(TEXTS)


@pytest.fixture(scope="module")
def results(model: Sam3Image, backbone_out: dict[str, Any]) -> dict[str, dict[str, Any]]:
    stage = FindStage.of([0, 0], [0, 1])
    with torch.no_grad():
        cases = {
            "A": model.forward_grounding(backbone_out, stage, geometric_prompt=model._get_dummy_prompt(2)),
            "B": model.forward_grounding(backbone_out, stage, geometric_prompt=case_b_prompt()),
        }
    for out in cases.values():
        out["prompt"] = out["prev_encoder_out"]["encoder_out"]["prompt_before_enc"]
    return cases


def test_the_small_model_has_the_published_size(model: Sam3Image) -> None:
    keys = [key for key in model.state_dict() if not key.startswith("inst_interactive")]
    assert len(keys) == 528
    heads = sum(p.numel() for p in model.heads.parameters())
    assert sum(p.numel() for p in model.parameters()) - heads == 41_171_254


def test_text_features(backbone_out: dict[str, Any]) -> None:
    samples = {(0, 0, 0): -0.16533, (3, 0, 100): -1.45297, (4, 1, 255): -0.94763, (31, 1, 0): 1.09921}
    check(backbone_out["language_features"], (32, 2, 256), 0.11910, 1.08096, samples)
    assert backbone_out["language_mask"].sum(dim=1).tolist() == [28, 27]
    assert backbone_out["language_embeds"].shape == (32, 2, 64)


@pytest.mark.parametrize("name", CASE_A)
def test_texts_alone(results: dict[str, dict[str, Any]], name: str) -> None:
    check(results["A"][name], *CASE_A[name])


@pytest.mark.parametrize("name", CASE_B)
def test_texts_with_points_and_boxes(results: dict[str, dict[str, Any]], name: str) -> None:
    check(results["B"][name], *CASE_B[name])


def test_padding_of_the_prompt(results: dict[str, dict[str, Any]]) -> None:
    mask = results["B"]["prev_encoder_out"]["encoder_out"]["prompt_mask"]
    assert mask.shape == (2, 36)
    assert mask[:, 32:].tolist() == [[False] * 4, [False, False, False, True]]


def test_joint_scores(model: Sam3Image, backbone_out: dict[str, Any]) -> None:
    """What the video model returns as class logits: class and presence in one."""
    model.supervise_joint_box_scores = True
    try:
        with torch.no_grad():
            out = model.forward_grounding(backbone_out, FindStage.of([0, 0], [0, 1]), geometric_prompt=case_b_prompt())
    finally:
        model.supervise_joint_box_scores = False
    samples = {(0, 0, 0): -1.03424, (0, 77, 0): -1.04364, (1, 199, 0): -0.89455}
    check(out["pred_logits"], (2, 200, 1), -0.96803, 0.06746, samples)


def test_forward_of_a_batch_is_the_same_computation(model: Sam3Image, results: dict[str, dict[str, Any]]) -> None:
    prompt = case_b_prompt()
    stage = FindStage.of([0, 0], [0, 1])
    stage.input_boxes, stage.input_boxes_mask = prompt.box_embeddings, prompt.box_mask
    stage.input_boxes_label = prompt.box_labels
    stage.input_points, stage.input_points_mask = prompt.point_embeddings, prompt.point_mask
    stage.input_points_label = prompt.point_labels
    image = table("input.image", (1, 3, SMALL.image_size_px, SMALL.image_size_px))
    with torch.no_grad():
        output = model(BatchedDatapoint(image, TEXTS, [stage], [], []))
    (out,) = output
    assert len(output) == 1 and output[0] is out is output.stages[0][0]
    for name in ("pred_logits", "pred_boxes", "pred_masks", "semantic_seg"):
        torch.testing.assert_close(out[name], results["B"][name], atol=1e-5, rtol=0)
