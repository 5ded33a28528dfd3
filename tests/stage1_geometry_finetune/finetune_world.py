"""What a whole fine-tune reads, at the size of a test: photos with annotations, embeddings, heads, a student."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from fixtures_data import make_sa1b_tree
from geometry_world import TEACHER_FILE
from stage1_world import TINY, Stage1World, make_store

from sam3.checkpoint_io import read_checkpoint, write_merged
from sam3.checkpoint_keys import STUDENT_PREFIX, TRUNK_PREFIX, student_to_published
from sam3.config import StudentConfig
from sam3.model.student_encoder import StudentEncoder, build_student, fuse_for_inference
from sam3.preprocess import Preprocess
from sam3.recognition import recognise
from sam3_train.checkpoint import save_checkpoint
from sam3_train.teacher import trunk_file_sha256
from stage1_geometry_finetune.train_geometry_finetune import main

NUM_TRAIN, NUM_VAL = 6, 2


@dataclass(frozen=True)
class FinetuneWorld(Stage1World):
    """`Stage1World` with the demo's teacher, and a student that has been through stage 1."""

    start: Path
    """The student's training checkpoint."""

    def finetune(self, name: str, **settings: object) -> Path:
        """A config of a short run through the SAM heads; ``settings`` are dotted keys with ``__``."""
        defaults = {
            "MODEL__PRETRAINED": self.start,
            "DATA__BATCH_SIZE": 2,
            "DISTILL__ROUTE_DETECTOR": 0.0,
            "DISTILL__ROUTE_SAM": 1.0,
            "PROMPTS__MAX_OBJECTS": 2,
            "TRAIN__ACCUMULATION_STEPS": 1,
        }
        return self.config(name, **{**defaults, **settings})


def finetune(cfg: Path, output: Path, *words: str) -> int:
    """The command on the CPU."""
    return main(["--cfg", str(cfg), "--output", str(output), "--device", "cpu", *words])


def make_student(backbone: str = "demo_cnn", **options: bool) -> StudentEncoder:
    """A student that starts from fixed random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return build_student(TINY.replace(student=StudentConfig(backbone, **options)))


def write_stage1_checkpoint(path: Path, student: StudentEncoder, preprocess: Preprocess | None = None) -> Path:
    """What ``train_stage1.py`` would have saved."""
    identity = {
        "model": TINY.replace(student=student.student).to_dict(),
        "preprocess": (preprocess or Preprocess(TINY.image_size_px)).to_dict(),
        "teacher": {"name": "tiny", "sha256": trunk_file_sha256(TEACHER_FILE, TINY)},
    }
    weights = student_to_published(student.state_dict(), student.student.backbone)
    config = {"MODEL": {"NAME": "student", "BACKBONE": student.student.backbone}}
    save_checkpoint(
        path, {"model": weights, "identity": identity, "epoch": 3, "step": 40, "metrics": {}, "config": config}
    )
    return path


def write_merged_file(path: Path, student: StudentEncoder, fold: bool = False, neck_factor: float = 1.0) -> Path:
    """What ``convert_stage1_weights.py`` would have written; ``neck_factor`` 1 keeps the teacher's neck."""
    student = fuse_for_inference(student.eval()) if fold else student
    weights = {k: v for k, v in recognise(read_checkpoint(TEACHER_FILE)).weights.items() if TRUNK_PREFIX not in k}
    published = student_to_published(student.state_dict(), student.student.backbone)
    weights |= {STUDENT_PREFIX + key: value for key, value in published.items()}
    for key in [key for key in weights if "vision_backbone.sam2_convs." in key]:
        weights[key] = weights[key] * neck_factor
    record = {"model": TINY.replace(student=student.student).to_dict()}
    write_merged(path, weights, {**record, "preprocess": Preprocess(TINY.image_size_px).to_dict()})
    return path


def make_finetune_world(root: Path) -> FinetuneWorld:
    """Everything below ``root``."""
    data = make_sa1b_tree(root / "photos", train=range(NUM_TRAIN), val=range(1000, 1000 + NUM_VAL))
    store = make_store(root / "embeddings", data, TEACHER_FILE)
    start = write_stage1_checkpoint(root / "start.pth", make_student())
    return FinetuneWorld(root, data, TEACHER_FILE, store, start)
