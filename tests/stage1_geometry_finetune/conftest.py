"""What the tests of the fine-tune's command share."""

from __future__ import annotations

from pathlib import Path

import pytest
from converted_files import make_student, write_finetuned, write_pretrained
from finetune_world import FinetuneWorld, make_finetune_world

from sam3.model.student_encoder import StudentEncoder


@pytest.fixture(scope="session")
def finetune_world(tmp_path_factory) -> FinetuneWorld:
    """Six photos and two for validation, the demo's teacher and its embeddings; no test changes it."""
    return make_finetune_world(tmp_path_factory.mktemp("geometry"))


@pytest.fixture(scope="session")
def start() -> StudentEncoder:
    """The student that the converter's tests begin with."""
    return make_student("demo_cnn", seed=0)


@pytest.fixture(scope="session")
def pretrained(start, tmp_path_factory) -> Path:
    """The merged file that holds it; no test changes it."""
    return write_pretrained(tmp_path_factory.mktemp("merged") / "merged.pt", start)


@pytest.fixture(scope="session")
def finetuned(start, tmp_path_factory) -> Path:
    """A checkpoint of its fine-tune; no test changes it."""
    return write_finetuned(tmp_path_factory.mktemp("run") / "best.pth", make_student("demo_cnn", seed=1), start)
