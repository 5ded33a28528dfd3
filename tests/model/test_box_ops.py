"""Box formats and the logit that boxes are refined in."""

from __future__ import annotations

import math

import pytest
import torch

from sam3.model.box_ops import cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh


def test_formats_and_back() -> None:
    boxes = torch.tensor([[0.30, 0.40, 0.20, 0.25], [0.05, 0.95, 0.30, 0.20]])
    corners = cxcywh_to_xyxy(boxes)
    expected = torch.tensor([[0.20, 0.275, 0.40, 0.525], [-0.10, 0.85, 0.20, 1.05]])  # not clamped
    torch.testing.assert_close(corners, expected)
    torch.testing.assert_close(xyxy_to_cxcywh(corners), boxes)
    assert cxcywh_to_xyxy(torch.zeros(3, 2, 5, 4)).shape == (3, 2, 5, 4)
    assert xyxy_to_cxcywh(torch.zeros(0, 4)).shape == (0, 4)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (0.5, 0.0),
        (0.25, math.log(1 / 3)),
        (0.0, math.log(1e-3)),
        (1.0, math.log(1e3)),
        (-3.0, math.log(1e-3)),
        (7.0, math.log(1e3)),
        (0.0005, math.log(1e-3 / 0.9995)),  # only the numerator is raised
        (0.9995, math.log(0.9995 / 1e-3)),
    ],
)
def test_inverse_sigmoid(x: float, expected: float) -> None:
    assert inverse_sigmoid(torch.tensor(x)).item() == pytest.approx(expected, abs=1e-4)


def test_inverse_sigmoid_inverts_between_its_tolerances() -> None:
    logits = torch.linspace(-6.8, 6.8, 101)
    torch.testing.assert_close(inverse_sigmoid(logits.sigmoid()), logits, atol=1e-3, rtol=0)


def test_inverse_sigmoid_computes_in_float32_and_keeps_float64() -> None:
    assert inverse_sigmoid(torch.tensor(0.5, dtype=torch.bfloat16)).dtype == torch.float32
    assert inverse_sigmoid(torch.tensor(0.5, dtype=torch.float64)).dtype == torch.float64


def test_gradient_is_finite_at_the_borders() -> None:
    x = torch.tensor([0.0, 1e-4, 0.3, 1.0], requires_grad=True)
    inverse_sigmoid(x).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad[2].item() == pytest.approx(1 / (0.3 * 0.7), rel=1e-4)
