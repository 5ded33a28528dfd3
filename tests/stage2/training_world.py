"""What a whole training of the memory reads, at the size of a test: a student with the demo's tracker, small videos."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import clip_sets
import torch
import yaml

from sam3.checkpoint_io import read_checkpoint, write_merged
from sam3.checkpoint_keys import STUDENT_PREFIX, TRUNK_PREFIX, student_to_published
from sam3.config import Sam3Config, StudentConfig
from sam3.model.student_encoder import build_student
from sam3.preprocess import Preprocess
from sam3.recognition import recognise
from stage2.train_memory_stage2 import main

TINY = Sam3Config.preset("tiny")
TEACHER_FILE = Path(__file__).resolve().parents[2] / "data/demo/tiny_teacher.safetensors"
BACKBONE = "demo_cnn"
NUM_TRAIN, NUM_VAL = 4, 1
TRAIN_NAMES = [f"sav_{i:06d}" for i in range(NUM_TRAIN)]


@dataclass(frozen=True)
class MemoryWorld:
    """Where things are."""

    root: Path
    base: Path
    """The student, merged into the demo's teacher."""
    videos: Path
    val_videos: Path

    def config(self, name: str, **settings: object) -> Path:
        """A config of a short run: two steps an epoch; ``settings`` are dotted keys with ``__``."""
        defaults = {
            "MODEL__SAM3_CHECKPOINT": self.base,
            "MODEL__START": "fresh",
            "DATA__DATA_PATH": self.videos,
            "DATA__VAL_PATH": self.val_videos,
            "DATA__VAL_FRACTION": 0.0,
            "DATA__BATCH_SIZE": 2,
            "DATA__NUM_WORKERS": 0,
            "CLIPS__LENGTHS": [3],
            "CLIPS__MAX_OBJECTS": 2,
            "PROMPTS__CLICKS_PER_FRAME": 1,
            "PROMPTS__NUM_PROMPTED": [1, 1],
            "PROMPTS__NUM_CORRECTED": [0, 1],
            "FORWARD__PRESENCE_STEPS": 100,
            "VAL__LENGTH": 3,
            "VAL__PROMPTS": ["mask"],
            "TRAIN__EPOCHS": 1,
            "TRAIN__LR_SCALING": "none",
            "TRAIN__BASE_LR": 0.001,
            "TRAIN__WARMUP_EPOCHS": 0.0,
            "TRAIN__SAVE_EVERY_MINUTES": 0.0,
            "PRINT_FREQ": 1,
        }
        nested: dict[str, object] = {}
        for key, value in {**defaults, **settings}.items():
            node = nested
            *parents, leaf = key.split("__")
            for parent in parents:
                node = node.setdefault(parent, {})  # type: ignore[assignment]
            node[leaf] = str(value) if isinstance(value, Path) else value
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(nested))
        return path


def train_memory(cfg: Path, output: Path, *words: str) -> int:
    """The command on the CPU."""
    return main(["--cfg", str(cfg), "--output_dir", str(output), "--device", "cpu", *words])


def write_base_file(path: Path, without: str = "") -> Path:
    """A student with fixed random weights in front of the demo's heads and tracker.

    Args:
        path: The file.
        without: Leave out what begins with this.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        student = build_student(TINY.replace(student=StudentConfig(BACKBONE)))
    weights = {k: v for k, v in recognise(read_checkpoint(TEACHER_FILE)).weights.items() if TRUNK_PREFIX not in k}
    published = student_to_published(student.state_dict(), BACKBONE)
    weights |= {STUDENT_PREFIX + key: value for key, value in published.items()}
    if without:
        weights = {key: value for key, value in weights.items() if not key.startswith(without)}
    record = {"model": TINY.replace(student=student.student).to_dict()}
    write_merged(path, weights, {**record, "preprocess": Preprocess(TINY.image_size_px).to_dict()})
    return path


def make_memory_world(root: Path) -> MemoryWorld:
    """Everything below ``root``."""
    videos = clip_sets.write_sav_frames(root / "videos", TRAIN_NAMES, every=4)
    val_videos = clip_sets.write_sav_frames(root / "val", ["sav_900000"], every=4)
    return MemoryWorld(root, write_base_file(root / "student.pt"), videos, val_videos)
