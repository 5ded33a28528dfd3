"""Key maps between our modules and published files, and recognising a student without metadata."""

from __future__ import annotations

import pytest
import torch
from students import RELEASED, meta_student

from sam3.checkpoint_io import CheckpointError
from sam3.checkpoint_keys import (
    STUDENT_PREFIX,
    identify_student_config,
    strip_prefixes,
    student_from_published,
    student_to_published,
)

BACKBONES = [*(facts.backbone for facts in RELEASED.values()), "demo_cnn"]


def _shapes(backbone: str, prefix: str = "", **options: bool) -> dict[str, tuple[int, ...]]:
    published = student_to_published(meta_student(backbone, **options).state_dict(), backbone)
    return {prefix + key: tuple(value.shape) for key, value in published.items()}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_maps_there_and_back_return_the_same_keys_and_the_same_tensors(backbone: str, fused: bool) -> None:
    state_dict = meta_student(backbone, fused=fused, fuse_stride16=True).state_dict()
    published = student_to_published(state_dict, backbone)
    back = student_from_published(published, backbone)
    assert len(published) == len(state_dict)
    assert list(back) == list(state_dict)
    assert all(back[key] is value for key, value in state_dict.items())


@pytest.mark.parametrize(
    ("backbone", "inside", "published"),
    [
        ("repvit_m1_1", "stem.conv2.bn.bias", "features.0.2.bn.bias"),
        ("repvit_m1_1", "stages.0.blocks.0.se.fc1.weight", "features.1.token_mixer.1.fc1.weight"),
        ("repvit_m1_1", "stages.1.downsample.pre_block.token_mixer.bn.bias", "features.3.token_mixer.0.bn.bias"),
        ("repvit_m1_1", "stages.1.downsample.channel_downsample.c.weight", "features.4.token_mixer.2.c.weight"),
        ("repvit_m1_1", "stages.3.downsample.ffn.conv2.bn.weight", "features.22.channel_mixer.m.2.bn.weight"),
        ("tiny_vit_5m", "stages.1.downsample.conv3.conv.weight", "layers.0.downsample.conv3.c.weight"),
        ("tiny_vit_5m", "stages.2.blocks.5.attn.attention_biases", "layers.2.blocks.5.attn.attention_biases"),
        ("tiny_vit_5m", "patch_embed.conv2.bn.bias", "patch_embed.seq.2.bn.bias"),
        (
            "efficientvit_b0",
            "stem.res0.main.depth_conv.conv.weight",
            "input_stem.op_list.1.main.depth_conv.conv.weight",
        ),
        (
            "efficientvit_b0",
            "stages.3.blocks.1.context_module.main.qkv.conv.weight",
            "stages.3.op_list.1.context_module.main.qkv.conv.weight",
        ),
    ],
)
def test_published_names_are_those_of_the_released_files(backbone: str, inside: str, published: str) -> None:
    state_dict = meta_student(backbone).state_dict()
    keys = [key for key in state_dict if key == f"backbone.model.{inside}"]
    assert len(keys) == 1
    names = dict(zip(state_dict, student_to_published(state_dict, backbone), strict=True))
    assert names[f"backbone.model.{inside}"] == f"backbone.model.{published}"


@pytest.mark.parametrize("prefix", ["", "module.", STUDENT_PREFIX, STUDENT_PREFIX.removeprefix("detector.")])
def test_a_student_is_recognised_under_each_prefix(prefix: str) -> None:
    other = {"detector.geometry_encoder.norm.weight": (256,)}
    assert identify_student_config(_shapes("repvit_m1_1", prefix) | other).backbone == "repvit_m1_1"


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_student_is_recognised_with_its_options(backbone: str) -> None:
    for options in ({}, {"fused": True}, {"fuse_stride16": True}):
        student = meta_student(backbone, **options).student
        assert identify_student_config(_shapes(backbone, **options)) == student


def test_an_unknown_width_names_the_nearest_students() -> None:
    shapes = _shapes("repvit_m1_1") | {"head.0.weight": (1024, 500, 1, 1)}
    with pytest.raises(CheckpointError, match=r"width 500.*repvit_m1_1 \(512\)"):
        identify_student_config(shapes)


def test_unknown_names_are_shown() -> None:
    with pytest.raises(CheckpointError, match=r"resnet\.conv1.*belong to no known student"):
        identify_student_config({"backbone.model.resnet.conv1": (8, 3, 3, 3), "head.0.weight": (1024, 8, 1, 1)})
    with pytest.raises(CheckpointError, match="no student keys"):
        identify_student_config({"detector.backbone.vision_backbone.trunk.patch_embed.proj.weight": (8, 3, 14, 14)})
    with pytest.raises(CheckpointError, match=r"head\.0\.weight.*missing"):
        identify_student_config({"backbone.model.features.0.0.c.weight": (8, 3, 3, 3)})


def test_a_key_of_another_backbone_is_refused() -> None:
    state_dict = meta_student("efficientvit_b0").state_dict()
    with pytest.raises(CheckpointError, match="no rule for the backbone key 'stages"):
        student_to_published({k: v for k, v in state_dict.items() if ".stages." in k}, "repvit_m0_9")
    with pytest.raises(CheckpointError, match=r"'neck\.weight' is no student key"):
        student_to_published({"neck.weight": torch.zeros(1)}, "repvit_m0_9")


def test_prefixes_are_stripped_from_the_front_only_and_never_merge_two_keys() -> None:
    stripped = strip_prefixes({"module.detector.a": 1, "detector.module.b": 2, "c.module.d": 3})
    assert stripped == {"a": 1, "module.b": 2, "c.module.d": 3}
    with pytest.raises(CheckpointError, match=r"'a' and 'module\.a' are both 'a'"):
        strip_prefixes({"a": 1, "module.a": 2})
