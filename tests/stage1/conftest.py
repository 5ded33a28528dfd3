"""What the stage-1 tests share: a tiny teacher with random weights, a small data set, a whole world for training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures_data import make_sa1b_tree
from stage1_world import Stage1World, make_world

from sam3.checkpoint_keys import TRUNK_PREFIX
from sam3.model_builder import build_sam3_trunk

TEACHER_CFG = Path(__file__).resolve().parents[2] / "stage1/configs/teacher/demo_tiny.yaml"


@pytest.fixture(scope="session")
def tiny_teacher_file(tmp_path_factory) -> Path:
    """A checkpoint in the released layout that holds the trunk of the tiny preset with random weights."""
    path = tmp_path_factory.mktemp("teacher") / "tiny.pt"
    torch.manual_seed(0)
    trunk = build_sam3_trunk(config="tiny", load_from_HF=False, device="cpu")
    torch.save({"model": {TRUNK_PREFIX + name: value for name, value in trunk.state_dict().items()}}, path)
    return path


@pytest.fixture
def small_data(tmp_path) -> Path:
    """Seven training and two validation images in SA-1B layout."""
    return make_sa1b_tree(tmp_path / "data", range(7), range(100, 102))


@pytest.fixture
def command(tiny_teacher_file, small_data, tmp_path):
    """Arguments of an export of the small data set into ``tmp_path/<name>``."""

    def build(*more: str, name: str = "run", **opts: object) -> list[str]:
        settings = {"MODEL.SAM3_CHECKPOINT": tiny_teacher_file, "DATA.NUM_WORKERS": 0, "DATA.BATCH_SIZE": 2, **opts}
        words = [str(word) for pair in settings.items() for word in pair]
        flags = ["--cfg", str(TEACHER_CFG), "--device", "cpu", "--data-path", str(small_data)]
        return [*flags, "--output", str(tmp_path / name), *more, "--opts", *words]

    return build


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Stage1World:
    """Twelve photos, three for validation, a random tiny teacher and its embeddings; no test changes it."""
    return make_world(tmp_path_factory.mktemp("stage1"))
