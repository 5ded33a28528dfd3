"""Files for the converter's tests: merged files, and checkpoints of the fine-tune, around the whole tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoint_files import make_model
from PIL import Image
from stage1_world import TINY
from torch import Tensor

import sam3
from sam3.checkpoint_io import read_state_dict, write_merged
from sam3.checkpoint_keys import student_to_published
from sam3.checkpoint_parts import NECK_PREFIX
from sam3.config import StudentConfig
from sam3.model.student_encoder import StudentEncoder, build_student
from sam3.preprocess import Preprocess
from sam3.released_names import released_state_dict
from sam3_train.checkpoint import save_checkpoint, state_dict_sha256
from sam3_train.student_checkpoint import build_trained_student, read_student
from stage1_geometry_finetune.convert_geometry_finetune import main

TRUNK_SHA256 = "a" * 64
NECK_KEY = NECK_PREFIX + "0.conv_1x1.bias"
CHANGED_NECK_KEYS = 2


def make_student(backbone: str, seed: int, **options: bool) -> StudentEncoder:
    """A student whose BatchNorm statistics have moved, in eval mode."""
    torch.manual_seed(seed)
    student = build_student(TINY.replace(student=StudentConfig(backbone, **options)))
    with torch.no_grad():
        student(torch.randn(2, 3, TINY.image_size_px, TINY.image_size_px))
    return student.eval()


def write_pretrained(path: Path, student: StudentEncoder, dtype: torch.dtype | None = None, **record: Any) -> Path:
    """A merged file as stage 1 writes it, around the whole tiny model."""
    model = TINY.replace(student=student.student)
    weights = released_state_dict(whole_model_around(student))
    provenance = {"teacher_file": "sam3.pt", "teacher_trunk_sha256": TRUNK_SHA256, "epoch": 15}
    metadata = {"variant": "es_x", "model": model.to_dict(), "preprocess": Preprocess(TINY.image_size_px).to_dict()}
    write_merged(path, weights, {**metadata, "provenance": provenance, **record}, dtype)
    return path


def whole_model_around(student: StudentEncoder):
    model = make_model(TINY.replace(student=student.student))
    model.backbone.vision_backbone.trunk.model.load_state_dict(student.state_dict())
    return model


def write_finetuned(
    path: Path, student: StudentEncoder, start: StudentEncoder, more: dict[str, Tensor] | None = None, **changes: Any
) -> Path:
    """A checkpoint of the fine-tune; ``changes`` go into its identity, those in capitals into its config."""
    backbone = student.student.backbone
    identity = {
        "model": TINY.replace(student=student.student).to_dict(),
        "preprocess": Preprocess(TINY.image_size_px).to_dict(),
        "teacher": {"sha256": TRUNK_SHA256},
        "initial_student_sha256": state_dict_sha256(student_to_published(start.state_dict(), backbone)),
        **{name: value for name, value in changes.items() if name.islower()},
    }
    settings = {name: value for name, value in changes.items() if not name.islower()}
    state = {
        "model": {**student_to_published(student.state_dict(), backbone), **(more or {})},
        "identity": identity,
        "epoch": 4,
        "step": 70,
        "metrics": {"mask_iou": 0.8},
        "config": {"MODEL": {"NAME": "es_x", "BACKBONE": backbone, **settings}},
    }
    save_checkpoint(path, state)
    return path


def convert(finetuned: Path, pretrained: Path, output: Path, *words: str) -> int:
    return main(["--finetune-ckpt", str(finetuned), "--pretrained", str(pretrained), "--output", str(output), *words])


def photo() -> Image.Image:
    generator = np.random.default_rng(5)
    return Image.fromarray(generator.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((320, 240))


@torch.no_grad()
def features_of(path: Path) -> Tensor:
    model = sam3.load_model(path, device="cpu")
    return model.backbone.vision_backbone.trunk(model.preprocess(photo())[None])[-1]


@torch.no_grad()
def trained_features(path: Path) -> Tensor:
    checkpoint = read_student(path)
    return build_trained_student(checkpoint)(checkpoint.preprocess(photo())[None])


def neck_weights(pretrained: Path) -> dict[str, Tensor]:
    """A trained neck in which two keys differ from the file's."""
    weights = {k: v.clone() for k, v in read_state_dict(pretrained)[0].items() if k.startswith(NECK_PREFIX)}
    for key in sorted(weights)[:CHANGED_NECK_KEYS]:
        weights[key] += 0.25
    return weights
