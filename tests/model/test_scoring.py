"""Class scores, the joint score, and what a detection step returns."""

from __future__ import annotations

import pytest
import torch
from detector_parts import DECODER, DIM, assert_released, build, make_inputs, relative_error, with_other_padding
from golden import table
from torch import Tensor

from sam3.config import ScoringConfig
from sam3.model.box_ops import cxcywh_to_xyxy
from sam3.model.decoder import DecoderOutput
from sam3.model.scoring import DotProductScoring, joint_logits, update_scores_and_boxes


@pytest.fixture(scope="module")
def scoring() -> DotProductScoring:
    return build(DotProductScoring)


def queries(layers: int = 2, batch: int = 2, num_queries: int = DECODER.num_queries) -> Tensor:
    return table("input.queries", (layers, batch, num_queries, DIM))


def decoded(layers: int, num_queries: int = DECODER.num_queries) -> DecoderOutput:
    return DecoderOutput(
        hs=queries(layers, 2, num_queries),
        boxes=(3 * table("input.boxes", (layers, 2, num_queries, 4))).sigmoid(),
        presence_logits=3 * table("input.presence", (layers, 1, 2)),
        presence_feats=table("input.presence_feats", (1, 2, DIM)),
        num_one_to_one=DECODER.num_queries,
    )


def test_released_names_and_shapes() -> None:
    digest = "0827f0ff3996c0baa1888b401923ce95f17e2fe7595649b6a512a800a6102313"
    assert_released(DotProductScoring, 10, 1_182_976, digest)


@pytest.mark.parametrize(
    ("logit", "presence", "expected"),
    [(0, 0, -1.098612), (5, 8, 4.951102), (12, 30, 6.907749), (-12, 8, -6.907749)],
)
def test_joint_logits_are_those_of_the_original(logit: float, presence: float, expected: float) -> None:
    joint = joint_logits(torch.tensor(float(logit)), torch.tensor(float(presence)))
    assert joint.item() == pytest.approx(expected, abs=2e-5)


@torch.no_grad()
def test_logits_are_dot_products_with_the_mean_of_the_valid_tokens(scoring: DotProductScoring) -> None:
    inputs = make_inputs()
    logits = scoring(queries(), inputs.prompt, inputs.prompt_mask)
    assert logits.shape == (2, 2, DECODER.num_queries, 1)
    for item in range(2):
        tokens = scoring.prompt_mlp(inputs.prompt[:, item])[~inputs.prompt_mask[item]]
        pooled = scoring.prompt_proj(tokens.mean(0))
        expected = scoring.hs_proj(queries()[:, item]) @ pooled / DIM**0.5
        torch.testing.assert_close(logits[:, item, :, 0], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_changes_nothing(scoring: DotProductScoring) -> None:
    inputs = make_inputs()
    expected = scoring(queries(), inputs.prompt, inputs.prompt_mask)
    for value in (50.0, float("nan")):
        padded = with_other_padding(inputs, value)
        assert torch.equal(scoring(queries(), padded.prompt, padded.prompt_mask), expected)
    # The first item has no padding: no mask means the same.
    assert torch.allclose(scoring(queries(), inputs.prompt, None)[:, 0], expected[:, 0], atol=1e-6)


@torch.no_grad()
def test_an_item_that_is_all_padding_gets_finite_scores(scoring: DotProductScoring) -> None:
    inputs = make_inputs()
    logits = scoring(queries(), inputs.prompt, torch.ones_like(inputs.prompt_mask))
    assert torch.isfinite(logits).all()


@torch.no_grad()
def test_logits_are_clamped() -> None:
    scoring = DotProductScoring(ScoringConfig(mlp_dim=8, max_logit=0.5, dropout=0.0), DIM).eval()
    logits = scoring(1000 * queries(), make_inputs().prompt, None)
    assert logits.abs().max() == 0.5
    assert logits.unique().numel() > 1
    assert ScoringConfig().max_logit == 12.0


@torch.no_grad()
def test_dropout_acts_in_training_alone() -> None:
    scoring = DotProductScoring(ScoringConfig(mlp_dim=64), DIM)
    prompt = make_inputs().prompt
    assert not torch.equal(scoring.train()(queries(), prompt, None), scoring(queries(), prompt, None))
    assert torch.equal(scoring.eval()(queries(), prompt, None), scoring(queries(), prompt, None))


@torch.no_grad()
def test_bf16_stays_close(scoring: DotProductScoring) -> None:
    inputs = make_inputs()
    expected = scoring(queries(), inputs.prompt, inputs.prompt_mask)
    low = build(DotProductScoring).to(torch.bfloat16)
    logits = low(queries().bfloat16(), inputs.prompt.bfloat16(), inputs.prompt_mask)
    assert logits.dtype == torch.bfloat16
    assert relative_error(logits, expected) < 0.02


@torch.no_grad()
def test_outputs_of_inference(scoring: DotProductScoring) -> None:
    inputs, step = make_inputs(), decoded(layers=1)
    out = update_scores_and_boxes(step, scoring, inputs.prompt, inputs.prompt_mask)
    n = DECODER.num_queries
    shapes = {key: tuple(value.shape) for key, value in out.items()}
    assert shapes == {
        "pred_logits": (2, n, 1),
        "pred_boxes": (2, n, 4),
        "pred_boxes_xyxy": (2, n, 4),
        "presence_logit_dec": (2, 1),
        "queries": (2, n, DIM),
        "presence_feats": (1, 2, DIM),
    }
    assert torch.equal(out["pred_logits"], scoring(step.hs, inputs.prompt, inputs.prompt_mask)[-1])
    assert torch.equal(out["pred_boxes_xyxy"], cxcywh_to_xyxy(step.boxes[-1]))
    assert torch.equal(out["presence_logit_dec"][:, 0], step.presence_logits[-1, 0])


@torch.no_grad()
def test_joint_scores_use_the_presence_of_each_prompt_and_layer(scoring: DotProductScoring) -> None:
    inputs, step = make_inputs(), decoded(layers=3)
    plain = update_scores_and_boxes(step, scoring, inputs.prompt, inputs.prompt_mask)
    joint = update_scores_and_boxes(step, scoring, inputs.prompt, inputs.prompt_mask, supervise_joint_box_scores=True)
    for mine, theirs in ((joint, plain), *zip(joint["aux_outputs"], plain["aux_outputs"], strict=True)):
        probability = theirs["pred_logits"].sigmoid() * theirs["presence_logit_dec"].sigmoid()[:, None]
        torch.testing.assert_close(mine["pred_logits"].sigmoid(), probability, atol=1e-5, rtol=0)
        assert torch.equal(mine["presence_logit_dec"], theirs["presence_logit_dec"])


@torch.no_grad()
def test_outputs_of_training_with_one_to_many_queries(scoring: DotProductScoring) -> None:
    inputs, n = make_inputs(), DECODER.num_queries
    step = decoded(layers=3, num_queries=2 * n)
    out = update_scores_and_boxes(step, scoring, inputs.prompt, inputs.prompt_mask)
    logits = scoring(step.hs, inputs.prompt, inputs.prompt_mask)
    assert len(out["aux_outputs"]) == 2
    for i, layer in enumerate([*out["aux_outputs"], out]):
        assert torch.equal(layer["pred_logits"], logits[i, :, :n])
        assert torch.equal(layer["pred_logits_o2m"], logits[i, :, n:])
        assert torch.equal(layer["pred_boxes"], step.boxes[i, :, :n])
        assert torch.equal(layer["pred_boxes_o2m"], step.boxes[i, :, n:])
        assert torch.equal(layer["pred_boxes_xyxy_o2m"], cxcywh_to_xyxy(step.boxes[i, :, n:]))
        assert torch.equal(layer["presence_logit_dec"][:, 0], step.presence_logits[i, 0])
    assert set(out["aux_outputs"][0]) == set(out) - {"aux_outputs", "queries", "presence_feats"}
    assert torch.equal(out["queries"], step.hs[-1, :, :n])
