"""Checkpoints appear whole or not at all, are verified, and are kept as long as promised."""

from __future__ import annotations

import errno
import json
import os
import random

import numpy as np
import pytest
import torch
from torch import nn

from sam3_train.checkpoint import (
    CheckpointManager,
    load_checkpoint,
    load_common,
    load_strict,
    save_checkpoint,
    state_dict_sha256,
)
from sam3_train.errors import UserError
from sam3_train.rng import load_rng_state_dict, mix_seed, rng_state_dict, seed_everything


def state(value: float = 0.0) -> dict:
    return {"model": {"weight": torch.full((3,), value)}, "epoch": int(value)}


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_and_hash(tmp_path):
    weights = nn.Linear(2, 2)
    saved = {"model": weights.state_dict(), "parameter": weights.weight, "list": [1, 2.5, None, "x", True, (1, 2)]}
    digest = save_checkpoint(tmp_path / "a.pth", saved)
    loaded = load_checkpoint(tmp_path / "a.pth")
    torch.testing.assert_close(loaded["model"], dict(saved["model"]))
    torch.testing.assert_close(loaded["parameter"], weights.weight.detach())
    assert loaded["list"] == saved["list"] and len(digest) == 64
    assert names(tmp_path) == ["a.pth"]


@pytest.mark.parametrize("bad", [object(), np.float32(1), {1, 2}, {("a",): 1}, lambda: 0])
def test_anything_but_plain_types_is_refused_by_name(tmp_path, bad):
    """D-45: what would need unpickling of code never gets into a file."""
    with pytest.raises(TypeError, match=r"checkpoint\.config"):
        save_checkpoint(tmp_path / "a.pth", {"config": bad})
    assert names(tmp_path) == []


def test_a_file_that_would_run_code_is_not_loaded(tmp_path):
    """D-45"""
    torch.save({"config": CheckpointManager}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth is damaged or no training checkpoint: it holds more") as caught:
        load_checkpoint(tmp_path / "evil.pth")
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_a_damaged_file_is_a_user_error_that_names_it(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.pth is damaged or no training checkpoint"):
        load_checkpoint(tmp_path / "a.pth")
    with pytest.raises(UserError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "none.pth")


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace"])
def test_a_full_disk_is_one_clear_error_and_nothing_is_lost(tmp_path, monkeypatch, failing):
    save_checkpoint(tmp_path / "a.pth", state(1))
    before = (tmp_path / "a.pth").read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(failing, full)
    with pytest.raises(UserError, match=r"cannot write checkpoint .*a\.pth: .*No space left.*--output"):
        save_checkpoint(tmp_path / "a.pth", state(2))
    assert (tmp_path / "a.pth").read_bytes() == before
    assert names(tmp_path) == ["a.pth"], "no half-written file stays behind"


def test_a_disk_that_fills_up_inside_the_write_is_the_same_error(tmp_path):
    """A file system of 64 KiB would need root: the device that is always full stands in for it."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    target = tmp_path / "a.pth"
    os.symlink("/dev/full", tmp_path / f".a.pth.{os.getpid()}.tmp")
    with pytest.raises(UserError, match="cannot write checkpoint"):
        save_checkpoint(target, {"model": {"weight": torch.zeros(100_000)}})
    assert not target.exists()


def test_the_newest_the_best_and_every_nth_are_kept(tmp_path):
    """D-56"""
    manager = CheckpointManager(tmp_path, keep_last=2, keep_every=4)
    for epoch in range(11):
        manager.save_epoch(state(epoch), epoch, epoch * 10, is_best=epoch == 5)
    assert names(tmp_path) == [
        "best.pth",
        "ckpt_epoch_10.pth",
        "ckpt_epoch_3.pth",
        "ckpt_epoch_5.pth",
        "ckpt_epoch_7.pth",
        "ckpt_epoch_9.pth",
        "last.json",
    ]
    assert load_checkpoint(tmp_path / "best.pth")["epoch"] == 5


def test_a_new_best_releases_the_old_one(tmp_path):
    manager = CheckpointManager(tmp_path)
    for epoch in range(6):
        manager.save_epoch(state(epoch), epoch, epoch, is_best=epoch in (0, 2))
    assert names(tmp_path) == ["best.pth", "ckpt_epoch_2.pth", "ckpt_epoch_4.pth", "ckpt_epoch_5.pth", "last.json"]


def test_step_checkpoints_make_room_and_leave_a_fallback(tmp_path):
    manager = CheckpointManager(tmp_path, keep_last=1)
    for step in (10, 20, 30):
        manager.save_step(state(step), 0, step)
    assert names(tmp_path) == ["ckpt_step_00000020.pth", "ckpt_step_00000030.pth", "last.json"]


def test_remains_of_a_killed_run_are_cleared_and_foreign_files_are_not(tmp_path):
    CheckpointManager(tmp_path).save_epoch(state(), 0, 1)
    for name in (".ckpt_epoch_3.pth.123.tmp", ".best.pth.77.tmp", "merged.pth", "ckpt_epoch_99.pth", "notes.tmp"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "ckpt_step_00000001.pth").write_bytes(b"put aside by the user")
    CheckpointManager(tmp_path).save_epoch(state(), 1, 2)
    assert names(tmp_path) == [
        "ckpt_epoch_0.pth",
        "ckpt_epoch_1.pth",
        "ckpt_epoch_99.pth",
        "ckpt_step_00000001.pth",
        "last.json",
        "merged.pth",
        "notes.tmp",
    ]


class KilledError(BaseException):
    """Stands in for kill -9."""


def kill_in(manager: CheckpointManager, monkeypatch, call: int) -> None:
    """Let the manager end at its ``call``-th writing of the pointer."""
    original, calls = manager._write_pointer, []

    def write(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise KilledError
        original(*args, **kwargs)

    monkeypatch.setattr(manager, "_write_pointer", write)


def test_a_checkpoint_that_the_pointer_does_not_name_is_replaced_not_trusted(tmp_path, monkeypatch):
    """D-44: a step file written just before a crash, before the pointer knew it."""
    manager = CheckpointManager(tmp_path)
    manager.save_step(state(1), 0, 1)
    kill_in(manager, monkeypatch, 2)
    with pytest.raises(KilledError):
        manager.save_step(state(2), 0, 2)
    assert "ckpt_step_00000002.pth" in names(tmp_path)
    manager = CheckpointManager(tmp_path)
    path, loaded = load_common([manager])[0]
    assert path.name == "ckpt_step_00000001.pth" and loaded["epoch"] == 1
    manager.save_step(state(3), 0, 3)
    assert names(tmp_path) == ["ckpt_step_00000001.pth", "ckpt_step_00000003.pth", "last.json"]


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("again", ["step", "epoch"])
def test_a_kill_while_the_same_position_is_saved_again_leaves_a_checkpoint(tmp_path, monkeypatch, again, call):
    """D-44, D-46: e.g. once by time and once at the end, within one step."""
    manager = CheckpointManager(tmp_path)
    if again == "epoch":
        manager.save_step(state(1), 0, 1)
    save = manager.save_step if again == "step" else manager.save_epoch
    save(state(2), 0, 2)
    kill_in(manager, monkeypatch, call)
    with pytest.raises(KilledError):
        save(state(3), 0, 2)
    assert load_common([CheckpointManager(tmp_path)]) is not None
    CheckpointManager(tmp_path).save_step(state(4), 0, 4)
    assert load_common([CheckpointManager(tmp_path)])[0][1]["epoch"] == 4


def test_checkpoints_without_a_pointer_are_not_overwritten_by_a_new_run(tmp_path):
    """D-44: a lost last.json is an error, whatever the number of checkpoints."""
    CheckpointManager(tmp_path).save_epoch(state(), 0, 1)
    (tmp_path / "last.json").unlink()
    with pytest.raises(UserError, match=r"holds 1 checkpoints \(ckpt_epoch_0\.pth\) but no last\.json.*--resume"):
        CheckpointManager(tmp_path)
    assert CheckpointManager(tmp_path, reads_pointer=False).newest is None


def test_a_kill_in_the_very_first_save_is_a_new_run(tmp_path, monkeypatch):
    """D-46: its file is known to be nobody's."""
    manager = CheckpointManager(tmp_path)
    kill_in(manager, monkeypatch, 2)
    with pytest.raises(KilledError):
        manager.save_step(state(1), 0, 1)
    assert names(tmp_path) == ["ckpt_step_00000001.pth", "last.json"]
    manager = CheckpointManager(tmp_path)
    assert manager.newest is None
    manager.save_step(state(2), 0, 2)
    assert names(tmp_path) == ["ckpt_step_00000002.pth", "last.json"]


def test_the_checkpoint_a_user_continues_from_is_kept_and_so_are_its_neighbours(tmp_path):
    """D-44: going back with --resume loses nothing that lies in the folder."""
    manager = CheckpointManager(tmp_path)
    for step in (10, 20):
        manager.save_step(state(step), 0, step)
    chosen = tmp_path / "ckpt_step_00000010.pth"
    manager = CheckpointManager(tmp_path, reads_pointer=False)
    manager.adopt(chosen, {"epoch": 0, "step": 10})
    assert load_common([manager])[0][0] == chosen
    for step in (15, 25, 35, 45):
        manager.save_step(state(step), 0, step)
    assert CheckpointManager(tmp_path).names()[-1] == chosen.name
    kept = [f"ckpt_step_000000{step}.pth" for step in (10, 20, 35, 45)]
    assert names(tmp_path) == [*kept, "last.json"]


@pytest.mark.parametrize(
    "content", ['{"checkpoints": [', '{"checkpoints": [{"file": "a"}]}', "[]", '{"checkpoints": [1]}']
)
def test_a_broken_pointer_is_an_error_and_not_a_new_run(tmp_path, content):
    """D-44"""
    CheckpointManager(tmp_path).save_epoch(state(), 0, 1)
    (tmp_path / "last.json").write_text(content)
    with pytest.raises(UserError, match=r"last\.json cannot be read"):
        CheckpointManager(tmp_path)


def test_the_pointer_names_content_by_hash(tmp_path):
    path = CheckpointManager(tmp_path).save_epoch(state(), 4, 50)
    record = json.loads((tmp_path / "last.json").read_text())["checkpoints"][0]
    assert record["file"] == "ckpt_epoch_4.pth" and record["epoch"] == 4 and record["step"] == 50
    assert record["bytes"] == path.stat().st_size and len(record["sha256"]) == 64


def test_strict_loading_counts_and_names_what_differs():
    """D-07"""
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    weights = module.state_dict()
    weights.pop("0.bias")
    weights["head.extra"] = torch.zeros(1)
    weights["0.weight"] = torch.zeros(5, 2)
    before = state_dict_sha256(module.state_dict())
    with pytest.raises(UserError) as caught:
        load_strict(module, weights, "student.pth")
    text = str(caught.value)
    assert "student.pth" in text and "1 missing, first 0.bias" in text and "1 unexpected, first head.extra" in text
    assert "0.weight: (5, 2) in the file, (3, 2) in the model" in text
    assert state_dict_sha256(module.state_dict()) == before, "a refused file must not load half"


def test_only_listed_names_may_be_missing():
    module = nn.Linear(2, 3)
    weights = {"weight": torch.ones(3, 2)}
    load_strict(module, weights, "file", allow_missing=["bias"])
    assert module.weight.eq(1).all()
    with pytest.raises(UserError, match="bias"):
        load_strict(module, weights, "file", allow_missing=["bia"])


def test_the_hash_sees_values_names_dtypes_and_shapes_but_not_order():
    base = {"a": torch.arange(4.0), "b": torch.zeros(2, dtype=torch.bfloat16)}
    assert state_dict_sha256(base) == state_dict_sha256(dict(reversed(base.items())))
    changed = [
        {**base, "a": torch.arange(4.0).reshape(2, 2)},
        {**base, "a": torch.arange(4)},
        {**base, "a": torch.tensor([0.0, 1.0, 2.0, 3.0000002])},
        {"c": base["a"], "b": base["b"]},
    ]
    assert state_dict_sha256(base) not in {state_dict_sha256(other) for other in changed}


def test_random_states_survive_a_checkpoint(tmp_path):
    """D-47: Python, numpy and torch continue with the very next number."""
    seed_everything(3)
    np.random.normal()  # leaves a cached second value behind
    save_checkpoint(tmp_path / "a.pth", {"rng": rng_state_dict()})
    expected = (random.random(), np.random.normal(), np.random.rand(), torch.rand(2).tolist())
    seed_everything(99)
    load_rng_state_dict(load_checkpoint(tmp_path / "a.pth")["rng"])
    assert (random.random(), np.random.normal(), np.random.rand(), torch.rand(2).tolist()) == expected


def test_a_mixed_seed_depends_on_each_number():
    seeds = {mix_seed(*numbers) for numbers in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0), (2**40, 0, 0)]}
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)
    assert mix_seed(1, 2, 3) == mix_seed(1, 2, 3)
