"""A run that was stopped, killed or damaged ends with the weights of one that never was."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from toy_training import Group, ToyTask, run_group, toy_config, train_toy, train_toys

from sam3_train.checkpoint import load_checkpoint, state_dict_sha256
from sam3_train.data.samplers import ResumableDistributedSampler as Sampler
from sam3_train.errors import Interrupted, UserError
from sam3_train.log import read_metrics
from sam3_train.trainer import Trainer

# EMA, accumulation with a partial last step, dropout and BatchNorm: all that has a state of its own.
FULL = ["TRAIN.ACCUMULATION_STEPS", "3", "TRAIN.EMA_DECAY", "0.9", "TRAIN.SAVE_EVERY_STEPS", "2", "TRAIN.EPOCHS", "3"]
IMAGES = {"num_images": 44}


def final(folder: Path, epoch: int = 2) -> dict[str, str]:
    """Hashes of everything that a finished run's last checkpoint has learnt."""
    state = load_checkpoint(folder / f"ckpt_epoch_{epoch}.pth")
    moments = {f"{i}.{k}": torch.as_tensor(v) for i, s in state["optimizer"]["state"].items() for k, v in s.items()}
    hashes = {"optimizer": state_dict_sha256(moments), "counters": json.dumps(state["counters"])}
    for part in ("model", "ema"):
        if part in state:
            hashes[part] = state_dict_sha256(state[part])
    hashes["best"] = json.dumps(state["best"])
    return hashes


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train_toy(folder, FULL, **IMAGES)
    return final(folder)


@pytest.mark.parametrize("steps", [1, 4, 5, 7, 8])
def test_a_run_stopped_after_any_step_continues_bit_for_bit(tmp_path, uninterrupted, steps):
    """D-46, D-47: sampler position, random states, optimizer, EMA and BatchNorm are all restored (4 steps an epoch)."""
    first = train_toy(tmp_path, [*FULL, "TRAIN.MAX_STEPS", str(steps)], **IMAGES)
    assert first.step == steps and not first.is_finished
    second = train_toy(tmp_path, FULL, **IMAGES)
    assert second.is_finished and second.step == 12
    # What MAX_STEPS cuts short is validated too and may be the best; all else is the same.
    assert {**final(tmp_path), "best": ""} == {**uninterrupted, "best": ""}


def test_a_run_killed_at_random_moments_ends_with_the_same_weights(tmp_path, uninterrupted):
    """D-46: 20 times kill -9, at moments spread over start, training, validation and saving."""
    moments = random.Random(0)
    kills = 0
    run_group(train_toy, 1, tmp_path.parent, tmp_path.parent / "warm-up", FULL, **IMAGES)
    whole_s = run_group(train_toy, 1, tmp_path.parent, tmp_path.parent / "timed", FULL, **IMAGES).seconds
    while not (tmp_path / "ckpt_epoch_2.pth").exists() or kills < 20:
        if (tmp_path / "ckpt_epoch_2.pth").exists():
            assert final(tmp_path) == uninterrupted
            shutil.rmtree(tmp_path)
            tmp_path.mkdir()
        process = Group(train_toy, 1, tmp_path.parent, (tmp_path, FULL), **IMAGES).processes[0]
        process.join(moments.uniform(0.1, 1.0) * whole_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0
    assert train_toy(tmp_path, FULL, **IMAGES).is_finished
    assert final(tmp_path) == uninterrupted
    steps = [record["step"] for record in read_metrics(tmp_path, "train")]
    assert steps == sorted(set(steps)), "a resumed run must not log a step twice"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_next_step_and_ends_with_130(tmp_path, uninterrupted, number):
    """D-46"""
    group = Group(
        train_toy, 1, tmp_path, (tmp_path / "run", [*FULL, "TRAIN.SAVE_EVERY_STEPS", "0"]), delay_s=0.01, **IMAGES
    )
    wait_for(lambda: len(read_metrics(tmp_path / "run")) > 0)
    os.kill(group.processes[0].pid, number)
    ended = group.wait()
    assert ended.codes == [130]
    assert ended.text.count("start the same command again to continue") == 1 and "Traceback" not in ended.text
    train_toy(tmp_path / "run", FULL, **IMAGES)
    assert final(tmp_path / "run") == uninterrupted


def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path):
    """D-46: the ranks agree, and each ends with 130."""
    group = Group(train_toy, 2, tmp_path, (tmp_path / "run", ["TRAIN.EPOCHS", "50"]), delay_s=0.01)
    wait_for(lambda: len(read_metrics(tmp_path / "run")) > 0)
    os.kill(group.processes[1].pid, signal.SIGTERM)
    ended = group.wait()
    assert ended.codes == [130, 130]
    assert ended.text.count("start the same command again") == 1 and "Traceback" not in ended.text
    assert len(load_checkpoint(next((tmp_path / "run").glob("ckpt_step_*.pth")))["rng"]) == 2


def test_a_signal_during_validation_loses_nothing(tmp_path, uninterrupted, monkeypatch):
    """D-46: the epoch's training is saved, and its validation is done when the run continues."""
    original = ToyTask.validate

    def interrupted_validate(self, batch):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(ToyTask, "validate", interrupted_validate)
        with pytest.raises(Interrupted):
            train_toy(tmp_path, FULL, **IMAGES)
    assert read_metrics(tmp_path, "val") == []
    train_toy(tmp_path, FULL, **IMAGES)
    assert [record["epoch"] for record in read_metrics(tmp_path, "val")] == [0, 1, 2]
    assert final(tmp_path) == uninterrupted


def test_a_kill_between_validation_and_its_checkpoint_logs_the_validation_once(tmp_path, monkeypatch):
    """D-46, D-49: a run that has nothing left to do keeps what it logged."""

    def killed(self, *args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sam3_train.checkpoint.CheckpointManager.save_epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            train_toy(tmp_path, FULL, **IMAGES)
    assert [record["epoch"] for record in read_metrics(tmp_path, "val")] == [0]
    for _ in range(2):
        train_toy(tmp_path, FULL, **IMAGES)
        assert [record["epoch"] for record in read_metrics(tmp_path, "val")] == [0, 1, 2]


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, uninterrupted, capsys):
    """D-44: one flipped bit is noticed, and the run still ends with the same weights."""
    train_toy(tmp_path, [*FULL, "TRAIN.MAX_STEPS", "8"], **IMAGES)
    newest = json.loads((tmp_path / "last.json").read_text())["checkpoints"][0]["file"]
    content = bytearray((tmp_path / newest).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / newest).write_bytes(content)
    train_toy(tmp_path, FULL, **IMAGES)
    assert f"{newest}: content differs" in capsys.readouterr().out
    assert final(tmp_path) == uninterrupted


def test_a_run_whose_checkpoints_are_all_damaged_never_starts_from_nothing(tmp_path):
    """D-44"""
    train_toy(tmp_path, [*FULL, "TRAIN.MAX_STEPS", "6"], **IMAGES)
    for path in tmp_path.glob("ckpt_*.pth"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint .* can be used.*--resume"):
        train_toy(tmp_path, FULL, **IMAGES)


def test_only_the_pointer_decides_what_is_resumed(tmp_path):
    """D-44: a newer file of any other kind beside the checkpoints is never looked at."""
    torch.save({"model": {"foreign": torch.ones(1)}}, tmp_path / "merged.pth")
    assert train_toy(tmp_path, ["TRAIN.EPOCHS", "1"]).epochs_done == 1
    torch.save({"model": {}}, tmp_path / "ckpt_epoch_9.pth")
    assert train_toy(tmp_path, ["TRAIN.EPOCHS", "2"]).epochs_done == 2


def test_a_lost_pointer_is_no_new_run(tmp_path):
    """D-44: nothing is overwritten, and --resume is the way on."""
    train_toy(tmp_path, ["TRAIN.EPOCHS", "1"])
    (tmp_path / "last.json").unlink()
    before = (tmp_path / "ckpt_epoch_0.pth").read_bytes()
    with pytest.raises(UserError, match=r"but no last\.json"):
        train_toy(tmp_path, ["TRAIN.EPOCHS", "2"])
    assert train_toy(tmp_path, ["TRAIN.EPOCHS", "2"], resume=tmp_path / "ckpt_epoch_0.pth").step == 24
    assert (tmp_path / "ckpt_epoch_0.pth").read_bytes() == before


def test_a_finished_run_is_not_trained_again(tmp_path):
    train_toy(tmp_path)
    before = (tmp_path / "ckpt_epoch_1.pth").read_bytes()
    result = train_toy(tmp_path)
    assert result.is_finished and result.metrics["loss"] > 0
    assert (tmp_path / "ckpt_epoch_1.pth").read_bytes() == before


def test_another_model_or_preprocessing_is_refused_with_both_values(tmp_path):
    """D-43, D-01: a second student in the same folder never continues the first one's run."""
    train_toy(tmp_path, ["TRAIN.EPOCHS", "1"], identity={"model": {"backbone": "a"}, "preprocess": {"mode": "stretch"}})
    with pytest.raises(UserError, match=r"model\.backbone is 'b' now and was 'a'") as caught:
        train_toy(tmp_path, identity={"model": {"backbone": "b"}, "preprocess": {"mode": "letterbox"}})
    assert "preprocess.mode is 'letterbox' now and was 'stretch'" in str(caught.value)


def test_other_shapes_are_refused_by_name(tmp_path):
    """D-07, D-43"""
    train_toy(tmp_path, ["TRAIN.EPOCHS", "1"])
    with pytest.raises(UserError, match=r"student\.0\.weight: \(6, 3, 3, 3\) in the file, \(9, 3, 3, 3\) in the model"):
        train_toy(tmp_path, task=wide_task)


def wide_task() -> ToyTask:
    return ToyTask(width=9)


def test_another_global_batch_is_refused(tmp_path):
    """D-47"""
    train_toy(tmp_path, ["TRAIN.EPOCHS", "1"])
    with pytest.raises(UserError, match=r"global batch is 8 .* was 4 .*choose DATA\.BATCH_SIZE"):
        train_toy(tmp_path, ["TRAIN.ACCUMULATION_STEPS", "2"])


def test_another_number_of_images_is_refused(tmp_path):
    """D-47"""
    train_toy(tmp_path, ["TRAIN.EPOCHS", "1"])
    with pytest.raises(UserError, match=r"52 images now and had 48"):
        train_toy(tmp_path, num_images=52)


def test_another_seed_is_refused(tmp_path, monkeypatch):
    """D-47, D-60: the rest of an epoch in another order would repeat images and leave others out."""
    train_toy(tmp_path, ["TRAIN.MAX_STEPS", "5"])
    monkeypatch.setattr("toy_training.ResumableDistributedSampler", lambda n, seed, *ranks: Sampler(n, 3, *ranks))
    with pytest.raises(UserError, match=r"SEED is 3 now and was 0.*twice"):
        train_toy(tmp_path)


def test_a_changed_learning_rate_and_length_take_effect_and_are_said(tmp_path, capsys):
    """D-47: the schedule is computed from the step, not restored over the new settings."""
    train_toy(tmp_path, ["TRAIN.EPOCHS", "1"])
    train_toy(tmp_path, ["TRAIN.EPOCHS", "3", "TRAIN.BASE_LR", "0.005"])
    told = capsys.readouterr().err
    assert "TRAIN.BASE_LR was 0.001 and is 0.005 now" in told and "TRAIN.EPOCHS was 1 and is 3 now" in told
    rates = [record["lr"] for record in read_metrics(tmp_path, "train") if record["epoch"] == 1]
    assert max(rates) > 0.0025


def test_other_world_size_with_the_same_global_batch_continues_at_the_same_images(tmp_path):
    """D-47: 1 process x 4 images, stopped inside an epoch, goes on as 2 x 2 and lands where one process lands."""
    opts = ["TRAIN.EPOCHS", "1"]
    train_toy(tmp_path / "one", opts, task=plain_task)
    train_toy(tmp_path / "two", [*opts, "TRAIN.MAX_STEPS", "5"], task=plain_task)
    ended = run_group(train_toy, 2, tmp_path, tmp_path / "two", opts, task=plain_task, batch_size=2)
    assert ended.codes == [0, 0] and "the data order is the same" in ended.text, ended.text
    one, two = (load_checkpoint(tmp_path / name / "ckpt_epoch_0.pth") for name in ("one", "two"))
    assert one["step"] == two["step"] == 12
    torch.testing.assert_close(one["model"], two["model"], rtol=1e-5, atol=1e-6)


def plain_task() -> ToyTask:
    return ToyTask(norm=False)


def test_explicit_resume_continues_from_that_file(tmp_path):
    train_toy(tmp_path / "a", ["TRAIN.EPOCHS", "2"])
    result = train_toy(tmp_path / "b", ["TRAIN.EPOCHS", "2"], resume=tmp_path / "a" / "ckpt_epoch_0.pth")
    assert result.step == 24
    assert final(tmp_path / "a", 1)["model"] == final(tmp_path / "b", 1)["model"]
    assert not (tmp_path / "b" / "ckpt_epoch_0.pth").exists()


def test_a_file_of_mere_weights_is_no_checkpoint_to_resume(tmp_path):
    torch.save({"model": ToyTask().state_dict()}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"not a training checkpoint .*--pretrained"):
        train_toy(tmp_path / "run", resume=tmp_path / "weights.pth")


def test_a_folder_with_a_run_is_not_overwritten_when_resuming_is_off(tmp_path):
    """D-43"""
    train_toy(tmp_path, ["TRAIN.EPOCHS", "1"])
    with pytest.raises(UserError, match=r"already holds a run \(ckpt_epoch_0\.pth\).*--output"):
        train_toy(tmp_path, ["TRAIN.AUTO_RESUME", "False"])


def test_several_students_end_bit_for_bit_where_each_ends_alone(tmp_path):
    """D-63: one pass over the data; dropout, clipping and optimizer of one student do not touch the other."""
    opts = ["TRAIN.EMA_DECAY", "0.9", "TRAIN.CLIP_GRAD", "0.3"]
    train_toys([tmp_path / "a", tmp_path / "b"], opts)
    train_toy(tmp_path / "a-alone", opts)
    train_toy(tmp_path / "b-alone", opts, task=ToyTask8)
    for name in ("a", "b"):
        assert final(tmp_path / name, 1) == final(tmp_path / f"{name}-alone", 1)


class ToyTask8(ToyTask):
    def __init__(self) -> None:
        super().__init__(width=8)


def test_several_students_resume_together_from_what_all_have(tmp_path, monkeypatch):
    """D-63, D-46: a crash between the saving of two students must not leave them a step apart."""
    folders = [tmp_path / "a", tmp_path / "b"]
    opts = ["TRAIN.SAVE_EVERY_STEPS", "3"]
    train_toys(folders, opts)
    expected = [final(folder, 1) for folder in folders]
    for folder in folders:
        shutil.rmtree(folder)
    saves = 0
    original = Trainer._save_all

    def crash_between(self, *args, **kwargs):
        nonlocal saves
        saves += 1
        if saves == 3:
            self.managers[1].save_step = None  # type: ignore[method-assign]
        original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_all", crash_between)
        with pytest.raises(TypeError):
            train_toys(folders, opts)
    newest = [json.loads((f / "last.json").read_text())["checkpoints"][0]["file"] for f in folders]
    assert newest[0] != newest[1]
    train_toys(folders, opts)
    assert [final(folder, 1) for folder in folders] == expected


def test_students_that_max_steps_left_inside_an_epoch_never_mix_positions(tmp_path, monkeypatch):
    """D-63, D-46: a crash between their saves at the end of that epoch leaves both a checkpoint of one position."""
    folders = [tmp_path / "a", tmp_path / "b"]
    train_toys(folders, [])
    expected = [final(folder, 1) for folder in folders]
    for folder in folders:
        shutil.rmtree(folder)
    train_toys(folders, ["TRAIN.MAX_STEPS", "5"])
    original = Trainer._save_all

    def crash_between(self, *args, **kwargs):
        self.managers[1].save_epoch = None  # type: ignore[method-assign]
        original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_all", crash_between)
        with pytest.raises(TypeError):
            train_toys(folders, [])
    train_toys(folders, [])
    assert [{**final(folder, 1), "best": ""} for folder in folders] == [{**one, "best": ""} for one in expected]


def test_a_time_based_checkpoint_is_written_inside_an_epoch(tmp_path):
    """D-46"""
    train_toy(tmp_path, ["TRAIN.SAVE_EVERY_MINUTES", "0.0005", "TRAIN.MAX_STEPS", "6"], delay_s=0.003)
    records = json.loads((tmp_path / "last.json").read_text())["checkpoints"]
    assert any(record["file"].startswith("ckpt_step_") for record in records)


def test_the_config_in_a_checkpoint_is_plain(tmp_path):
    """D-45: weights_only loading reads all of it."""
    train_toy(tmp_path, ["TRAIN.EPOCHS", "1"], identity={"model": {"name": "toy"}})
    state = torch.load(tmp_path / "ckpt_epoch_0.pth", weights_only=True)
    assert state["config"]["TRAIN"]["BASE_LR"] == toy_config().TRAIN.BASE_LR
    assert state["identity"] == {"model": {"name": "toy"}} and "torch" in state["versions"]


def wait_for(condition, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.005)
