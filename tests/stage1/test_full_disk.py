"""A disk that is really full, a small file system: export and training end with one line and lose nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fixtures_embeddings import store_bytes

from sam3_train.checkpoint import load_checkpoint
from sam3_train.embeddings import EmbeddingStore
from sam3_train.embeddings.verify import verify_store
from stage1.save_embedding_stage1 import main as export
from stage1.train_stage1 import main as train

RECORD_BYTES = 82_948


@contextlib.contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A file system in memory, mounted at ``folder`` inside the block."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "none", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small disk is not permitted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def disk(tmp_path, request) -> Iterator[Path]:
    """A disk of the size that the test is parametrized with."""
    try:
        with small_disk(tmp_path / "disk", request.param) as folder:
            yield folder
    except FileNotFoundError:
        pytest.skip("there is no mount command here")


def fill(disk: Path, num_left: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of somebody else that leaves so many bytes free, unnoticed by the checks before a start."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 30))
    stat = os.statvfs(disk)
    other = disk / "other"
    other.write_bytes(b"x" * (stat.f_bavail * stat.f_frsize - num_left))
    return other


def only_error(stderr: str) -> str:
    assert "Traceback" not in stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("error:")]
    return line


@pytest.mark.parametrize("disk", [4 << 20], indirect=True)
def test_an_export_onto_a_full_disk_keeps_every_record_and_goes_on(command, tmp_path, disk, monkeypatch, capfd):
    """Somebody else fills the disk after the export has found enough room."""
    assert export(command(name="whole")) == 0
    other = fill(disk, 5 * RECORD_BYTES, monkeypatch)
    capfd.readouterr()
    argv = command(name="disk/run")
    assert export(argv) == 2
    error = only_error(capfd.readouterr().err)
    assert "rank0-values.bin: the disk is full" in error and "free some space" in error
    kept = len(EmbeddingStore(disk / "run/embeddings"))
    assert 2 <= kept <= 4
    assert not verify_store(disk / "run/embeddings", wanted_keys=[]).problems
    other.unlink()
    assert export(argv) == 0
    assert f"continuing: {kept} embeddings are there" in capfd.readouterr().out
    assert store_bytes(disk / "run/embeddings") == store_bytes(tmp_path / "whole/embeddings")


@pytest.mark.parametrize("disk", [64 << 20], indirect=True)
def test_training_onto_a_full_disk_keeps_its_checkpoints_and_goes_on(world, tmp_path, disk, monkeypatch, capfd):
    """The first epoch's checkpoint fits, the second one's does not."""
    cfg = world.config("full_disk", TRAIN__EPOCHS=3, VAL__ENABLE=False)
    words = ["--cfg", str(cfg), "--device", "cpu", "--output"]
    assert train([*words, str(tmp_path / "whole")]) == 0
    newest = tmp_path / "whole/ckpt_epoch_2.pth"
    other = fill(disk, int(1.5 * newest.stat().st_size) + (256 << 10), monkeypatch)
    capfd.readouterr()
    assert train([*words, str(disk / "run")]) == 2
    error = only_error(capfd.readouterr().err)
    assert "cannot write checkpoint" in error and "ckpt_epoch_1.pth" in error and "No space left" in error
    kept = load_checkpoint(disk / "run/ckpt_epoch_0.pth")
    assert not list((disk / "run").glob("*ckpt_epoch_1*")), "half a checkpoint stays behind"
    other.unlink()
    assert train([*words, str(disk / "run")]) == 0
    resumed, whole = (load_checkpoint(run / "ckpt_epoch_2.pth") for run in (disk / "run", tmp_path / "whole"))
    assert resumed["model"].keys() == kept["model"].keys()
    assert all(torch.equal(value, whole["model"][name]) for name, value in resumed["model"].items())
