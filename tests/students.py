"""What is known of the released students, for several test files: counts, and hashes of their key lists.

A hash is the SHA-256 of the sorted lines ``<published name> <shape joined by x>`` that were listed from the public
checkpoints' models on the meta device; ``merged_sha256`` covers the student's part of a merged file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sam3.config import Sam3Config, StudentConfig
from sam3.model.student_encoder import StudentEncoder, build_student


class Released(NamedTuple):
    """Facts about one released student."""

    backbone: str
    backbone_parameters: int
    head_parameters: int
    num_keys: int
    num_merged_keys: int
    keys_sha256: str
    merged_sha256: str


RELEASED = {
    "es_ev_l": Released(
        "efficientvit_b2",
        14_977_008,
        9_833_472,
        362,
        1407,
        "b09c4387fd7b323c5fa7bf338b70141da83d668b13a1d8342e3458c184a7fc30",
        "fa2baf2364317ec94f364a762f6c8d07f3cdf304b134bd114b4d185ab5d52961",
    ),
    "es_ev_m": Released(
        "efficientvit_b1",
        4_643_936,
        9_702_400,
        269,
        1314,
        "39f5a0926609ba9fddc9e6e8d40667d02d4979caf9b8ebdd441c84a8d248f108",
        "319eba06e2020f21a5ff97f8550359645b64a6c52c277cbfa8227fcccd8a4f8a",
    ),
    "es_ev_s": Released(
        "efficientvit_b0",
        682_608,
        9_571_328,
        194,
        1239,
        "bb10d01af3a8abc5f141bc80ffb712eb470f916e6d0a1eee79303e4a6ab8c89b",
        "f00f0bd39bc80a6e0b1f76dfdd2305715fbf4a655e3e285f17edf3e7c651a1da",
    ),
    "es_rv_l": Released(
        "repvit_m2_3",
        22_404_232,
        10_095_616,
        1463,
        2508,
        "d95e8dfba271d24decba6212043c1ecd566e864c22b123a928f26c51505da6cc",
        "b072174cc8fbbb6ba7833b6c4a59610e5ddf1460378d363a67e25a476b8ceaf5",
    ),
    "es_rv_m": Released(
        "repvit_m1_1",
        7_774_864,
        9_964_544,
        653,
        1698,
        "a6250da27417a1af4cc3af2389c4690df59a199d02e3c425d2281c0978238ab5",
        "9e5db879f064d6646d85f1ca2daf644d58f1478d1c42a9c7524328f1ac89131b",
    ),
    "es_rv_s": Released(
        "repvit_m0_9",
        4_717_792,
        9_833_472,
        707,
        1752,
        "df4e53af225f5871013091dea5a6fd77a972652c579efed6d88bb11ff6dd7c9c",
        "c553b697bfdd1cd6db65b6ec5127619bc3c8e802484d26624bf2c16d531f482a",
    ),
    "es_tv_l": Released(
        "tiny_vit_21m",
        20_620_416,
        10_030_080,
        300,
        1345,
        "fd342e07f20d302de22d8b7bcde8c340feb21a5ee6c20a71e95ab3e5983d0cb1",
        "290269dac2c959e4575f9ba58569be47856086f7666857bd38b47dfb375035da",
    ),
    "es_tv_m": Released(
        "tiny_vit_11m",
        10_547_076,
        9_899_008,
        300,
        1345,
        "8670ef951c2f911fa3e31bdb0f140742b87c110f833a0bcfd2109f2076ea1825",
        "db1aceaea5ab090b0f240aabbca9f14427ff78b129e9148e8d8a6f0b2a7e28b6",
    ),
    "es_tv_s": Released(
        "tiny_vit_5m",
        5_071_124,
        9_767_936,
        300,
        1345,
        "42008b71cb0d13c18e8a9b83d40b9ed53f5a93ddf5ddf463b7925c229f3e9127",
        "2b4e76be7fa66cb32f79072505f9ff836c2aa9db95cf07788e6e12b8e254db4a",
    ),
}


def key_list_sha256(state_dict: Mapping[str, Tensor]) -> str:
    """Hash of names and shapes, as the module's docstring says."""
    lines = sorted(f"{key} {'x'.join(map(str, value.shape))}" for key, value in state_dict.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@cache
def meta_student(backbone: str, **options: bool) -> StudentEncoder:
    """A student of the ``sam3`` preset on the meta device: names and shapes, no memory. Shared: do not change it."""
    with torch.device("meta"):
        return build_student(Sam3Config(student=StudentConfig(backbone, **options)))


def lively_student(backbone: str, images_bchw: Tensor, preset: str = "tiny", **options: bool) -> StudentEncoder:
    """A student in eval mode whose BatchNorms have seen data and are no identities, so that folding them matters."""
    torch.manual_seed(0)
    config = Sam3Config.preset(preset).replace(student=StudentConfig(backbone, **options))
    student = build_student(config)
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            module.momentum = 1.0
    with torch.no_grad():
        student(images_bchw)
    return student.eval()
