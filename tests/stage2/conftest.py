"""Files that the tests of merging share."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_files import whole_model
from memory_files import write_base, write_trained
from training_world import MemoryWorld, make_memory_world


@pytest.fixture(scope="session")
def memory_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("memory_files")


@pytest.fixture(scope="session")
def base_file(memory_folder: Path) -> Path:
    """The whole tiny model."""
    return write_base(memory_folder / "sam3.safetensors", whole_model())


@pytest.fixture(scope="session")
def trained_file(memory_folder: Path, base_file: Path) -> Path:
    """A memory that was trained in front of it."""
    return write_trained(memory_folder / "model_final.pth", base_file)


@pytest.fixture(scope="session")
def memory_world(tmp_path_factory: pytest.TempPathFactory) -> MemoryWorld:
    """Four videos and one for validation, a student with the demo's tracker; no test changes it."""
    return make_memory_world(tmp_path_factory.mktemp("memory_world"))
