"""The student adapter: shapes, the folded form, and ImageNet initialisation."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from students import RELEASED, lively_student, meta_student
from torch import nn

from sam3.checkpoint_io import CheckpointError
from sam3.checkpoint_keys import student_to_published
from sam3.config import Sam3Config, StudentConfig
from sam3.model.student_encoder import StudentTrunk, build_student, fuse_for_inference
from sam3.model.student_init import init_backbone_from

BACKBONES = [*(facts.backbone for facts in RELEASED.values()), "demo_cnn"]


@pytest.mark.parametrize("fuse_stride16", [False, True])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_1008_px_becomes_the_teachers_grid(backbone: str, fuse_stride16: bool) -> None:
    student = copy.deepcopy(meta_student(backbone, fuse_stride16=fuse_stride16)).to("meta").eval()
    assert student(torch.empty(1, 3, 1008, 1008, device="meta")).shape == (1, 1024, 72, 72)


def test_a_real_1008_px_image_becomes_1024_maps_of_72_by_72() -> None:
    trunk = StudentTrunk(build_student(Sam3Config(student=StudentConfig("efficientvit_b0")))).eval()
    with torch.inference_mode():
        outputs = trunk(torch.randn(1, 3, 1008, 1008))
    assert [tuple(m.shape) for m in outputs] == [(1, 1024, 72, 72)]
    assert torch.isfinite(outputs[0]).all()
    assert next(iter(trunk.state_dict())).startswith("model.backbone.model.")


def test_other_image_sizes_get_a_grid_in_proportion() -> None:
    student = copy.deepcopy(meta_student("tiny_vit_5m")).to("meta").eval()
    assert student(torch.empty(2, 3, 504, 756, device="meta")).shape == (2, 1024, 36, 54)


def test_stride_16_fusion_reads_the_finer_stage_and_adds_two_convolutions() -> None:
    """D-02"""
    plain, fused = meta_student("repvit_m0_9"), meta_student("repvit_m0_9", fuse_stride16=True)
    extra = {key: tuple(v.shape) for key, v in fused.state_dict().items() if key not in plain.state_dict()}
    assert extra == {
        "fusion.lateral_fine.weight": (384, 192, 1, 1),
        "fusion.lateral_coarse.weight": (384, 384, 1, 1),
    }


def test_a_description_without_a_student_is_an_error() -> None:
    with pytest.raises(ValueError, match="names no student"):
        build_student(Sam3Config())


# --- folding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_folded_student_gives_the_same_features_and_can_be_rebuilt(backbone: str) -> None:
    images = torch.randn(2, 3, 196, 196, generator=torch.Generator().manual_seed(1))
    student = lively_student(backbone, images)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    folded = fuse_for_inference(student)
    rebuilt = build_student(Sam3Config.preset("tiny").replace(student=folded.student))
    rebuilt.load_state_dict(folded.state_dict(), strict=True)
    channels_last = fuse_for_inference(student).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        wanted = student(images)
        scale = wanted.std()
        assert (folded(images) - wanted).abs().max() < 1e-3 * scale
        assert (channels_last(images) - wanted).abs().max() < 1e-3 * scale
        assert torch.equal(rebuilt(images), folded(images))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


def test_folding_says_so_in_the_description_and_is_done_once() -> None:
    student = build_student(Sam3Config.preset("tiny").replace(student=StudentConfig("demo_cnn")))
    folded = fuse_for_inference(student)
    assert (student.student.fused, folded.student.fused) == (False, True)
    assert student.training and not folded.training
    assert fuse_for_inference(folded) is folded
    assert not any(parameter.requires_grad for parameter in folded.parameters())


# --- ImageNet weights -------------------------------------------------------------------------------------------------


def _tiny(backbone: str = "efficientvit_b0"):
    return build_student(Sam3Config.preset("tiny").replace(student=StudentConfig(backbone)))


def _timm_file(tmp_path: Path, name: str = "efficientvit_b0", suffix: str = ".safetensors") -> Path:
    state_dict = timm.create_model(name, pretrained=False).state_dict()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state_dict, path)
    else:
        torch.save(state_dict, path)
    return path


@pytest.mark.parametrize(
    ("backbone", "timm_name", "suffix", "num_tensors", "num_dropped"),
    [
        ("efficientvit_b0", "efficientvit_b0", ".safetensors", 186, 11),
        ("repvit_m0_9", "repvit_m0_9", ".pth", 699, 14),
        ("tiny_vit_5m", "tiny_vit_5m_224", ".pth", 292, 4),
    ],
)
def test_a_local_timm_file_is_loaded_whole_and_reported(
    tmp_path: Path, backbone: str, timm_name: str, suffix: str, num_tensors: int, num_dropped: int
) -> None:
    path = _timm_file(tmp_path, timm_name, suffix)
    student = _tiny(backbone)
    head = student.head[0].weight.clone()
    report = init_backbone_from(student, path)
    assert (report.matched, report.missing, report.unexpected) == (num_tensors, (), ())
    assert len(report.dropped) == num_dropped
    assert f"{num_tensors} tensors loaded, 0 missing, 0 unexpected" in report.summary()
    source = timm.create_model(timm_name, pretrained=False, checkpoint_path=str(path)).state_dict()
    loaded = student.backbone.model.state_dict()
    assert all(torch.equal(value, source[key]) for key, value in loaded.items())
    assert torch.equal(student.head[0].weight, head)


@pytest.mark.parametrize("backbone", ["repvit_m0_9", "tiny_vit_5m", "efficientvit_b0", "demo_cnn"])
def test_a_students_own_file_initialises_another_run(tmp_path: Path, backbone: str) -> None:
    source = _tiny(backbone)
    published = student_to_published(source.state_dict(), backbone)
    torch.save({"model": {f"module.{key}": value for key, value in published.items()}}, tmp_path / "student.pth")
    student = _tiny(backbone)
    report = init_backbone_from(student, tmp_path / "student.pth")
    assert report.matched == len(source.backbone.state_dict())
    wanted = source.backbone.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in student.backbone.state_dict().items())


def test_a_file_of_another_backbone_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    student = _tiny("efficientvit_b1")
    before = {key: value.clone() for key, value in student.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: not the weights of efficientvit_b1.*nothing was"):
        init_backbone_from(student, _timm_file(tmp_path))
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


def test_a_missing_and_an_unexpected_tensor_are_named(tmp_path: Path) -> None:
    student = _tiny("demo_cnn")
    weights = dict(student.backbone.model.state_dict())
    key = next(iter(weights))
    weights["extra.weight"] = weights.pop(key)
    torch.save(weights, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError) as error:
        init_backbone_from(student, tmp_path / "odd.pth")
    assert f"missing: {key}" in str(error.value)
    assert "unexpected: extra.weight" in str(error.value)


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.pth"):
        init_backbone_from(_tiny(), tmp_path / "absent.pth")


def test_timm_weights_come_through_timms_own_download(monkeypatch: pytest.MonkeyPatch) -> None:
    create_model, requested = timm.create_model, []

    def downloaded(name: str, pretrained: bool = False, **kwargs):
        if pretrained:
            requested.append(name)
        network = create_model(name.split(".")[0], pretrained=False, **kwargs)
        return network if not pretrained else _filled(network, 0.25)

    monkeypatch.setattr(timm, "create_model", downloaded)
    student = _tiny()
    report = init_backbone_from(student, "timm:r256_in1k")
    assert requested == ["efficientvit_b0.r256_in1k"]
    assert (report.source, report.matched) == ("timm efficientvit_b0.r256_in1k", 186)
    assert all((p == 0.25).all() for p in student.backbone.parameters())


def _filled(network: nn.Module, value: float) -> nn.Module:
    for parameter in network.parameters():
        nn.init.constant_(parameter, value)
    return network


def test_offline_the_error_says_to_pass_a_file_and_nothing_is_silently_random(monkeypatch: pytest.MonkeyPatch) -> None:
    student = _tiny()

    def offline(name: str, **kwargs):
        raise ConnectionError("cannot reach the hub\nlong details")

    monkeypatch.setattr(timm, "create_model", offline)
    message = r"efficientvit_b0 \(ConnectionError: cannot reach the hub\)\. .*pass its path"
    with pytest.raises(CheckpointError, match=message):
        init_backbone_from(student, "timm")


def test_asking_timm_for_a_backbone_it_does_not_have_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="demo_cnn has no ImageNet weights"):
        init_backbone_from(_tiny("demo_cnn"), "timm")


def test_a_folded_student_takes_no_training_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="folded"):
        init_backbone_from(fuse_for_inference(_tiny()), _timm_file(tmp_path))
