"""The nine released backbones and the small extra one: counts, names, taps, and the door for a tenth."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from students import RELEASED, key_list_sha256, meta_student
from torch import Tensor, nn

from sam3.backbones import BackboneSpec, backbone_names, backbone_spec, build_backbone, registry, student_names
from sam3.backbones.tiny_vit import bias_table_index
from sam3.checkpoint_keys import STUDENT_PREFIX, identify_student_config, student_from_published, student_to_published
from sam3.config import Sam3Config, StudentConfig
from sam3.model.student_encoder import build_student, fuse_for_inference


def test_the_nine_released_students_and_the_demo_one_are_registered() -> None:
    assert student_names() == {name: facts.backbone for name, facts in sorted(RELEASED.items())}
    assert set(backbone_names()) == {*student_names().values(), "demo_cnn"}


@pytest.mark.parametrize("name", RELEASED)
def test_counts_and_published_key_set_equal_the_released_students(name: str) -> None:
    facts = RELEASED[name]
    student = meta_student(facts.backbone)
    published = student_to_published(student.state_dict(), facts.backbone)
    assert sum(p.numel() for p in student.backbone.parameters()) == facts.backbone_parameters
    assert sum(p.numel() for p in student.head.parameters()) == facts.head_parameters
    assert len(published) == facts.num_keys
    assert key_list_sha256(published) == facts.keys_sha256
    merged_part = {STUDENT_PREFIX + key: value for key, value in published.items()}
    assert key_list_sha256(merged_part) == facts.merged_sha256
    # 1,045 keys of sam3.pt lie outside the trunk; all stay in a merged file.
    assert len(published) + 1045 == facts.num_merged_keys


@pytest.mark.parametrize("backbone", [*(facts.backbone for facts in RELEASED.values()), "demo_cnn"])
def test_taps_have_the_channels_and_strides_of_the_spec(backbone: str) -> None:
    spec = backbone_spec(backbone)
    network = build_backbone(backbone).eval()
    with torch.inference_mode():
        maps = spec.forward_taps(network, torch.zeros(1, 3, 224, 224))
    sides = [224 // stride for stride in spec.tap_strides_px]
    assert [tuple(m.shape) for m in maps] == [(1, c, s, s) for c, s in zip(spec.tap_channels, sides, strict=True)]


@pytest.mark.parametrize("backbone", ["repvit_m0_9", "tiny_vit_5m", "efficientvit_b0", "demo_cnn"])
def test_every_parameter_of_a_student_takes_part_in_the_forward(backbone: str) -> None:
    """A classifier left in the network would get no gradient, and DDP would refuse the model."""
    config = Sam3Config.preset("tiny").replace(student=StudentConfig(backbone, fuse_stride16=True))
    student = build_student(config)
    student(torch.randn(2, 3, 252, 252)).square().mean().backward()
    assert [name for name, p in student.named_parameters() if p.grad is None] == []


def test_efficientvit_attention_has_the_released_eps() -> None:
    from timm.models.efficientvit_mit import LiteMLA

    attentions = [m for m in build_backbone("efficientvit_b1").modules() if isinstance(m, LiteMLA)]
    assert len(attentions) == 7
    assert {m.eps for m in attentions} == {1e-15}


def test_tiny_vit_bias_follows_weights_that_change_in_eval_mode() -> None:
    """timm caches the expanded bias in eval mode: an EMA copied in place would be read with the old one."""
    network = build_backbone("tiny_vit_5m").eval()
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        before = network.forward_features(image)
        for name, parameter in network.named_parameters():
            if name.endswith("attention_biases"):
                parameter.normal_(std=3.0)
        changed = network.forward_features(image)
        network.train().eval()
        fresh = network.forward_features(image)
    assert not torch.allclose(before, changed)
    assert torch.equal(changed, fresh)


def test_tiny_vit_bias_table_index_is_timms_own() -> None:
    from timm.models.tiny_vit import Attention

    timm_index = Attention(64, 32, num_heads=2, attn_ratio=1, resolution=(3, 5)).attention_bias_idxs
    assert torch.equal(bias_table_index(3, 5), timm_index)


def test_a_student_built_on_meta_needs_only_its_file() -> None:
    """Tables that no checkpoint holds are real even in a meta build, so assigning a state dict completes the model."""
    config = Sam3Config.preset("tiny").replace(student=StudentConfig("tiny_vit_5m"))
    real = build_student(config).eval()
    with torch.device("meta"):
        student = build_student(config).eval()
    student.load_state_dict(real.state_dict(), strict=True, assign=True)
    image = torch.randn(1, 3, 112, 112)
    with torch.inference_mode():
        assert torch.equal(student(image), real(image))


def test_an_unknown_name_lists_the_nearest_and_all() -> None:
    with pytest.raises(ValueError, match=r"repvit_m1_2.*did you mean repvit_m1_1.*es_ev_s.*tiny_vit_5m"):
        backbone_spec("repvit_m1_2")


def test_a_name_cannot_be_registered_twice() -> None:
    with pytest.raises(ValueError, match=r"demo_cnn.*already registered"):
        registry.register(backbone_spec("demo_cnn"))


def test_listing_the_students_does_not_import_timm() -> None:
    """Naming a student must stay cheap: timm is imported when a network is built."""
    code = "import sys, sam3.backbones as b; b.student_names(); assert 'timm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


class _Tenth(nn.Module):
    """What the package's docstring asks of a new backbone, in a few lines."""

    def __init__(self) -> None:
        super().__init__()
        self.tenth_stem = nn.Sequential(nn.Conv2d(3, 8, 3, 16, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.last = nn.Conv2d(8, 24, 3, 2, 1)

    def taps(self, images_bchw: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.tenth_stem(images_bchw)
        return fine, self.last(fine)


def test_one_register_call_adds_a_student_that_trains_folds_and_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone_names()
    monkeypatch.setattr(registry, "_BACKBONES", dict(registry._BACKBONES))
    registry.register(BackboneSpec("tenth", _Tenth, _Tenth.taps, (8, 24), (16, 32), marker="tenth_stem."))
    student = build_student(Sam3Config.preset("tiny").replace(student=StudentConfig("tenth", fuse_stride16=True)))
    image = torch.randn(2, 3, 252, 252)
    assert student(image).shape == (2, 128, 18, 18)
    published = student_to_published(student.state_dict(), "tenth")
    assert list(student_from_published(published, "tenth")) == list(student.state_dict())
    assert identify_student_config({k: v.shape for k, v in published.items()}) == student.student
    folded = fuse_for_inference(student)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
