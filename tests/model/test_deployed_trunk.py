"""The predictor runs a student in its fastest form, and never with weights that are out of date."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from sam3.config import Sam3Config, StudentConfig
from sam3.model import deployed_trunk, deployment
from sam3.model.sam3_image import Sam3Image
from sam3.model.student_encoder import StudentTrunk
from sam3.model_builder import assemble_image_model

TINY = Sam3Config.preset("tiny")


@pytest.fixture
def model() -> Sam3Image:
    torch.manual_seed(0)
    config = TINY.replace(student=StudentConfig("demo_cnn"))
    return assemble_image_model(config, enable_inst_interactivity=True, enable_detector=False).eval()


def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)


def plain_embedding(model: Sam3Image) -> torch.Tensor:
    vision = model.backbone.vision_backbone
    with torch.no_grad():
        pixels = model.preprocess(photo())[None].to(model.heads.no_mem_embed)
        maps = vision.neck(vision.trunk(pixels)[-1], need_detector=False)[2]
        return model.heads.image_features({"backbone_fpn": maps}).embedding


def predicted_embedding(model: Sam3Image) -> torch.Tensor:
    predictor = model.inst_interactive_predictor
    predictor.set_image(photo())
    return predictor.get_image_embedding()


def test_same_features_from_folded_weights_and_the_student_stays(model: Sam3Image) -> None:
    names = list(model.state_dict())
    torch.testing.assert_close(predicted_embedding(model), plain_embedding(model), atol=1e-3, rtol=1e-3)
    vision = model.backbone.vision_backbone
    trunk = vision.trunk
    deployed = vision.deployed_trunk.of(trunk)
    assert deployed is not trunk
    assert deployed.model.student.fused
    assert vision.deployed_trunk.of(trunk) is deployed
    assert isinstance(trunk, StudentTrunk)
    assert not trunk.model.student.fused
    assert list(model.state_dict()) == names


def change_in_place(model: Sam3Image) -> None:
    with torch.no_grad():
        model.backbone.vision_backbone.trunk.model.head[3].weight.mul_(-1)


def load_others(model: Sam3Image) -> None:
    torch.manual_seed(1)
    other = assemble_image_model(model.config, enable_inst_interactivity=True, enable_detector=False)
    model.load_state_dict(other.state_dict())


def assign_others(model: Sam3Image) -> None:
    torch.manual_seed(1)
    other = assemble_image_model(model.config, enable_inst_interactivity=True, enable_detector=False)
    model.load_state_dict(other.state_dict(), assign=True)


def change_statistics(model: Sam3Image) -> None:
    model.backbone.vision_backbone.trunk.model.head[1].running_mean.add_(1.0)


def cast_there_and_back(model: Sam3Image) -> None:
    change_in_place(model)
    model.to(torch.bfloat16).to(torch.float32)


@pytest.mark.parametrize(
    "change", [change_in_place, load_others, assign_others, change_statistics, cast_there_and_back]
)
def test_changed_weights_are_seen(model: Sam3Image, change) -> None:
    before = predicted_embedding(model)
    change(model)
    after = predicted_embedding(model)
    assert (after - before).abs().max() > 0.01
    torch.testing.assert_close(after, plain_embedding(model), atol=1e-3, rtol=1e-3)


def test_other_dtypes_and_copies(model: Sam3Image) -> None:
    expected = predicted_embedding(model)
    torch.testing.assert_close(predicted_embedding(copy.deepcopy(model)), expected)
    low = predicted_embedding(model.to(torch.bfloat16))
    assert low.dtype == torch.bfloat16
    assert (low.float() - expected).norm() / expected.norm() < 0.05


def test_every_path_without_gradients_runs_the_fast_form(model: Sam3Image) -> None:
    vision = model.backbone.vision_backbone
    pixels = model.preprocess(photo())[None]
    seen = []
    vision.trunk.register_forward_hook(lambda *_: seen.append("as trained"))
    with torch.no_grad():
        fast = vision(pixels)[2][-1]
        assert not seen
    exact = vision(pixels)[2][-1]
    assert seen == ["as trained"] and exact.requires_grad
    torch.testing.assert_close(fast, exact.detach(), atol=1e-3, rtol=1e-3)


def compile_trunk(model: Sam3Image, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Ask for compilation as the builders do; returns what was compiled, which runs uncompiled."""
    compiled: list[object] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: compiled.append(module))
    model.backbone.vision_backbone.trunk._compiled_call_impl = lambda *_: pytest.fail("the trunk as trained was run")
    return compiled


def test_compilation_is_of_the_fast_form_and_follows_the_weights(
    model: Sam3Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = predicted_embedding(model)
    compiled = compile_trunk(model, monkeypatch)
    monkeypatch.setattr(deployed_trunk, "has_cpp_compiler", lambda: True)
    monkeypatch.setattr(deployment, "has_cpp_compiler", lambda: True)
    for _ in range(2):
        torch.testing.assert_close(predicted_embedding(model), expected, atol=1e-3, rtol=1e-3)
    change_in_place(model)
    assert (predicted_embedding(model) - expected).abs().max() > 0.01
    fast = model.backbone.vision_backbone.deployed_trunk.of(model.backbone.vision_backbone.trunk)
    assert len(compiled) == 2 and compiled[1] is fast.model.backbone


def test_without_a_compiler_the_model_runs_and_says_so_once(
    model: Sam3Image, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = predicted_embedding(model)
    compiled = compile_trunk(model, monkeypatch)
    monkeypatch.setattr(deployment.shutil, "which", lambda name: None)
    for _ in range(2):
        torch.testing.assert_close(predicted_embedding(model), expected)
    assert not compiled
    assert [record.message for record in caplog.records if "no C++ compiler" in record.message] == [
        "compile=True has no effect: no C++ compiler was found (g++, clang++ or CXX); running without it"
    ]


def test_a_model_is_copied_and_saved_without_the_fast_form(model: Sam3Image) -> None:
    expected = predicted_embedding(model)
    file = io.BytesIO()
    torch.save(model, file)
    assert file.tell() < 4.2 * sum(tensor.numel() for tensor in model.state_dict().values()) + 1e6
    copied = copy.deepcopy(model)
    assert copied.backbone.vision_backbone.deployed_trunk._copy is None
    torch.testing.assert_close(predicted_embedding(copied), expected)


def test_training_mode_and_the_teacher_run_as_they_are(model: Sam3Image) -> None:
    trunk = model.backbone.vision_backbone.trunk
    assert model.backbone.vision_backbone.deployed_trunk.of(trunk.train()) is trunk
    teacher = assemble_image_model(TINY, enable_inst_interactivity=True, enable_detector=False).eval()
    assert torch.equal(predicted_embedding(teacher), plain_embedding(teacher))
