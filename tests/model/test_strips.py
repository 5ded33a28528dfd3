"""Strips and packed layers: the results of the whole map, whatever the strip, and never an old weight."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from students import lively_student
from torch import nn

from sam3.backbones import packed, strips
from sam3.backbones.packed import PackedConv2d, PackedLinear, pack_layers
from sam3.backbones.strips import can_run_in_strips, mix_channels_in_strips, run_in_strips, strip_ranges
from sam3.model import deployment
from sam3.model.deployment import optimize_for_deployment


@pytest.fixture
def thin_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "_BYTES_PER_THREAD", 1)


@pytest.mark.parametrize(
    ("rows", "bytes_per_row", "step"), [(252, 9999, 1), (63, 1, 14), (5, 10**9, 1), (70, 10**9, 7)]
)
def test_strips_cover_every_row_once(rows: int, bytes_per_row: int, step: int) -> None:
    ranges = list(strip_ranges(rows, bytes_per_row, step))
    assert [row for first, last in ranges for row in range(first, last)] == list(range(rows))
    assert all(first % step == 0 for first, _ in ranges)


def depthwise(kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(6, 6, kernel, stride, kernel // 2, groups=6)


@pytest.mark.parametrize("height", [1, 2, 7, 12])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_a_chain_in_strips_equals_the_chain(thin_strips: None, height: int, kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 6, 3, 2, 1), depthwise(kernel, stride), nn.Conv2d(6, 6, 3, 1, 1), nn.Conv2d(6, 4, 1)]
    x = torch.randn(2, 4, 2 * height, 9)
    with torch.no_grad():
        torch.testing.assert_close(run_in_strips(x, layers), nn.Sequential(*layers)(x))


def test_the_residual_and_the_activation_of_a_chain(thin_strips: None) -> None:
    layers = [nn.Conv2d(4, 6, 1), depthwise(3, 1), nn.Conv2d(6, 4, 1)]
    x = torch.randn(2, 4, 9, 5)
    with torch.no_grad():
        y = run_in_strips(x, layers, residual=True, activation_=torch.relu_)
        torch.testing.assert_close(y, torch.relu(nn.Sequential(*layers)(x) + x))


@pytest.mark.parametrize("with_depthwise", [True, False])
@pytest.mark.parametrize("with_gate", [True, False])
def test_mixed_channels_in_strips(thin_strips: None, with_depthwise: bool, with_gate: bool) -> None:
    mlp = nn.Sequential(nn.Conv2d(6, 12, 1), nn.GELU(), nn.Conv2d(12, 6, 1))
    conv = depthwise(3, 1) if with_depthwise else None
    gate = torch.rand(2, 6, 1, 1) if with_gate else None
    x = torch.randn(2, 6, 7, 5)
    with torch.no_grad():
        y = x if conv is None else conv(x)
        y = y if gate is None else y * gate
        torch.testing.assert_close(mix_channels_in_strips(x, mlp, 12, conv, gate), y + mlp(y))


def test_which_layers_can_run_in_strips() -> None:
    assert can_run_in_strips(depthwise(5, 2))
    for other in (
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 4, padding=2),
        nn.Conv2d(4, 4, 3, padding=1, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Identity(),
    ):
        assert not can_run_in_strips(other)


@pytest.mark.parametrize("backbone", ["repvit_m0_9", "tiny_vit_5m", "efficientvit_b0"])
def test_students_in_strips_give_the_same_features(monkeypatch: pytest.MonkeyPatch, backbone: str) -> None:
    """Several images, of a size where maps are odd and windows reach beyond the border."""
    ranges: list[tuple[int, int]] = []
    monkeypatch.setattr(strips, "_BYTES_PER_THREAD", (1 << 17) // torch.get_num_threads())
    monkeypatch.setattr(strips, "strip_ranges", lambda *args: ranges.extend(strip_ranges(*args)) or strip_ranges(*args))
    images = torch.randn(2, 3, 136, 104, generator=torch.Generator().manual_seed(1))
    student = lively_student(backbone, images)
    deployed = optimize_for_deployment(student)
    with torch.inference_mode():
        wanted, got = student(images), deployed(images)
    assert (wanted - got).abs().max() < 1e-3 * wanted.std()
    assert sum(first > 0 for first, _ in ranges) > 4


@pytest.mark.parametrize("backbone", ["tiny_vit_5m", "efficientvit_b0"])
def test_under_autocast_the_plain_operations_run(backbone: str) -> None:
    images = torch.randn(2, 3, 112, 112)
    student = lively_student(backbone, images)
    deployed = optimize_for_deployment(student)
    with torch.no_grad():
        exact = student(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            wanted, got = student(images).float(), deployed(images).float()
    assert (got - exact).norm() < 1.5 * (wanted - exact).norm()


LAYERS = [
    (nn.Conv2d(4, 8, 1), (2, 4, 5, 6)),
    (nn.Conv2d(4, 8, 3, 2, 1, bias=False), (2, 4, 5, 6)),
    (nn.Conv2d(4, 4, 5, padding=2, groups=4), (2, 4, 5, 6)),
    (nn.Linear(4, 8), (2, 5, 4)),
]


@pytest.mark.parametrize("activation", ["none", "gelu", "hardswish", "relu"])
@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_packed_layers_equal_plain_ones(layer: nn.Module, shape: tuple[int, ...], activation: str) -> None:
    root = nn.Sequential(copy.deepcopy(layer))
    pack_layers(root, {})
    root[0].activation = activation
    x = torch.randn(shape)
    expected = packed._ACTIVATIONS[activation](layer(x))
    torch.testing.assert_close(root(x), expected)  # with gradients: the plain operation
    with torch.no_grad():
        torch.testing.assert_close(root(x), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(root(x[:1, ..., 1:, :]), packed._ACTIVATIONS[activation](layer(x[:1, ..., 1:, :])))


def change_in_place(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.weight.mul_(2)


def load_another(layer: nn.Module) -> None:
    layer.load_state_dict({key: 2 * value for key, value in layer.state_dict().items()})


def replace_parameter(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(2 * layer.weight.detach())


def cast_there_and_back(layer: nn.Module) -> None:
    change_in_place(layer)
    layer.to(torch.bfloat16).to(torch.float32)


@pytest.mark.parametrize("change", [change_in_place, load_another, replace_parameter, cast_there_and_back])
@pytest.mark.parametrize("layer", [PackedConv2d(nn.Conv2d(4, 8, 1)), PackedLinear(nn.Linear(4, 4))])
def test_a_packed_weight_follows_the_weight(layer: nn.Module, change) -> None:
    layer = copy.deepcopy(layer)
    x = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        layer(x)
        change(layer)
        got = layer(x)
    torch.testing.assert_close(got, layer(x).detach(), atol=1e-5, rtol=1e-5)  # the plain operation


def test_packed_layers_are_copied_without_what_cannot_be() -> None:
    layer = PackedLinear(nn.Linear(4, 4))
    x = torch.randn(3, 4)
    with torch.no_grad():
        expected = layer(x)
        assert layer._packed is not None and copy.deepcopy(layer)._packed is None
        torch.testing.assert_close(copy.deepcopy(layer)(x), expected)
        torch.save(layer, io.BytesIO())


def test_without_onednn_the_plain_layers_run(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(2, 3, 112, 112)
    student = lively_student("tiny_vit_5m", images)
    monkeypatch.setattr(deployment, "has_packed_operations", lambda: False)
    deployed = optimize_for_deployment(student)
    assert not [module for module in deployed.modules() if isinstance(module, PackedConv2d | PackedLinear)]
    with torch.inference_mode():
        torch.testing.assert_close(deployed(images), student(images), atol=1e-3, rtol=1e-3)
