"""The deployment form of a student: the same features and the same names, other kernels."""

from __future__ import annotations

import pytest
import torch
from students import RELEASED, lively_student
from torch import nn

from sam3.backbones import backbone_spec, build_backbone
from sam3.backbones.packed import PackedConv2d, PackedLinear
from sam3.config import Sam3Config, StudentConfig
from sam3.model import deployment
from sam3.model.deployment import optimize_for_deployment
from sam3.model.student_encoder import StudentTrunk, build_student, fuse_for_inference
from sam3.model.winograd import WinogradConv2d


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (2, 5, 7, 10), (1, 4, 1, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_winograd_equals_the_direct_convolution(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(shape[1], 6, 3, padding=1, bias=bias)
    winograd = WinogradConv2d(conv)
    x = torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(winograd(x), conv(x), atol=1e-5, rtol=1e-5)
    assert list(winograd.state_dict()) == list(conv.state_dict())


def test_winograd_follows_a_state_dict_loaded_later() -> None:
    conv, other = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    winograd = WinogradConv2d(conv)
    winograd.load_state_dict(other.state_dict())
    x = torch.randn(1, 4, 9, 9)
    with torch.inference_mode():
        torch.testing.assert_close(winograd(x), other(x), atol=1e-5, rtol=1e-5)


def test_winograd_with_gradients_is_the_direct_convolution() -> None:
    winograd = WinogradConv2d(nn.Conv2d(4, 4, 3, padding=1))
    x = torch.randn(1, 4, 9, 9, requires_grad=True)
    winograd(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_winograd_refuses_another_kind_of_convolution() -> None:
    with pytest.raises(ValueError, match="stride 1"):
        WinogradConv2d(nn.Conv2d(4, 4, 3, stride=2, padding=1))


@pytest.mark.parametrize("fuse_stride16", [False, True])
@pytest.mark.parametrize("backbone", ["repvit_m0_9", "tiny_vit_5m", "efficientvit_b0", "demo_cnn"])
def test_the_deployed_trunk_gives_the_same_features_at_the_real_width(backbone: str, fuse_stride16: bool) -> None:
    images = torch.randn(2, 3, 168, 168, generator=torch.Generator().manual_seed(1))
    trunk = StudentTrunk(lively_student(backbone, images, preset="sam3", fuse_stride16=fuse_stride16)).eval()
    deployed = optimize_for_deployment(trunk)
    with torch.inference_mode():
        wanted, got = trunk(images)[0], deployed(images)[0]
    assert wanted.shape == got.shape
    assert (wanted - got).abs().max() < 1e-3 * wanted.std()
    assert isinstance(deployed.model.head[3], WinogradConv2d)
    assert list(deployed.state_dict()) == [f"model.{key}" for key in fuse_for_inference(trunk.model).state_dict()]


JOINED = {"repvit_m0_9": 28, "tiny_vit_5m": 22, "efficientvit_b0": 23}


@pytest.mark.parametrize("backbone", JOINED)
def test_every_activation_that_follows_a_layer_is_computed_with_it(backbone: str) -> None:
    images = torch.randn(1, 3, 112, 112)
    deployed = optimize_for_deployment(lively_student(backbone, torch.cat([images, images])))
    packed = [module for module in deployed.modules() if isinstance(module, PackedConv2d | PackedLinear)]
    separate = [name for name, module in deployed.named_modules() if isinstance(module, nn.GELU | nn.Hardswish)]
    assert sum(layer.activation != "none" for layer in packed) == JOINED[backbone]
    assert all(name.endswith("act3") for name in separate)  # TinyViT's GELU after a residual sum
    assert not [module for module in deployed.modules() if type(module) in (nn.Conv2d, nn.Linear)]


def test_a_student_folded_by_the_merge_gets_the_same_fast_form() -> None:
    images = torch.randn(2, 3, 112, 112)
    student = lively_student("repvit_m0_9", images)
    fast, fast_of_folded = optimize_for_deployment(student), optimize_for_deployment(fuse_for_inference(student))
    assert [type(module) for module in fast_of_folded.modules()] == [type(module) for module in fast.modules()]
    with torch.inference_mode():
        torch.testing.assert_close(fast_of_folded(images), fast(images))


def test_the_original_is_left_as_it_was_and_gradients_still_work() -> None:
    images = torch.randn(2, 3, 112, 112)
    student = lively_student("demo_cnn", images)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    deployed = optimize_for_deployment(student)
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert all(p.requires_grad for p in student.parameters())
    leaf = images.clone().requires_grad_()
    deployed(leaf).sum().backward()
    assert leaf.grad is not None


def test_the_cpu_kernels_are_for_float32_only() -> None:
    student = lively_student("demo_cnn", torch.randn(2, 3, 112, 112), preset="sam3").to(torch.bfloat16)
    deployed = optimize_for_deployment(student)
    assert type(deployed.head[3]) is nn.Conv2d


def test_a_teacher_trunk_has_no_special_form() -> None:
    trunk = nn.Linear(2, 2)
    assert optimize_for_deployment(trunk) is trunk


def test_without_folding_only_the_layout_changes() -> None:
    student = lively_student("demo_cnn", torch.randn(2, 3, 112, 112))
    deployed = optimize_for_deployment(student, fuse=False)
    assert list(deployed.state_dict()) == list(student.state_dict())
    assert deployed.head[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_compiling_without_a_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment.shutil, "which", lambda name: None)
    student = build_student(Sam3Config.preset("tiny").replace(student=StudentConfig("demo_cnn")))
    with pytest.raises(ValueError, match=r"install g\+\+"):
        optimize_for_deployment(student, compile=True)


@pytest.mark.parametrize("name", RELEASED)
def test_where_a_gelu_joins_a_convolution_is_stated_for_whole_families(name: str) -> None:
    """A renamed block in another timm version would silently lose the speed."""
    spec = backbone_spec(name)
    with torch.device("meta"):
        classes = {type(module).__name__ for module in build_backbone(spec.name).modules()}
    assert set(spec.activation_pairs) <= classes
