"""What surrounds the loop: the device, the run's folder, its log and its lock."""

from __future__ import annotations

import errno
import json
import math
import os
import time

import pytest
import torch
from toy_training import Group, run_group, train_toy

from sam3_train.distributed import pick_device, training_run
from sam3_train.errors import UserError
from sam3_train.log import RunLog, read_metrics
from sam3_train.run_lock import RunLock
from sam3_train.throughput import Throughput, spell_duration


@pytest.mark.parametrize(
    "name, world_size, message",
    [("gpu", 1, "'gpu' is not a device"), ("mps", 2, "mps"), ("xpu", 1, "not available here")],
)
def test_a_device_that_is_not_there_is_named(name, world_size, message):
    """D-28, D-59"""
    with pytest.raises(UserError, match=message):
        pick_device(name, 0, world_size)


def test_a_missing_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="sees no CUDA device; use --device cpu"):
        pick_device("cuda")
    assert pick_device("cpu") == pick_device(None) or torch.backends.mps.is_available()


def test_more_processes_than_gpus_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda", 1, 2) == torch.device("cuda", 1)
    with pytest.raises(UserError, match=r"needs GPU 2, this machine has 2.*GPUS="):
        pick_device("cuda", 2, 3)


def test_one_process_needs_no_process_group(monkeypatch):
    """D-28"""
    monkeypatch.delenv("RANK", raising=False)
    with training_run("cpu") as run:
        assert run.is_main and run.world_size == 1 and not torch.distributed.is_initialized()


def test_the_log_of_a_resumed_run_has_no_doubled_parts(tmp_path):
    with RunLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.numbers("train", 0, step, {"loss": float(step), "bad": math.nan})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # cut off by a crash
    with RunLog(tmp_path, resume_step=2) as log:
        log.numbers("train", 0, 3, {"loss": 30.0})
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["bad"] is None


@pytest.mark.parametrize("damage", [b'{"kind": "tr', b"3", b"\x00\xff\x00"], ids=["torn", "a number", "noise"])
def test_a_damaged_line_is_left_out_at_the_end_and_named_anywhere_else(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    good = b'{"kind": "train", "epoch": 0, "step": 1}'
    path.write_bytes(good + b"\n" + damage)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]
    path.write_bytes(good + b"\n" + damage + b"\n" + good + b"\n")
    for call in (lambda: read_metrics(tmp_path), lambda: RunLog(tmp_path, tensorboard=False, resume_step=1)):
        with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 of 3 is damaged.*Remove that line"):
            call()


def test_a_validation_that_is_done_again_is_logged_once(tmp_path):
    """D-49: killed between the log line and the epoch's checkpoint, a run validates that epoch again."""
    with RunLog(tmp_path, tensorboard=False) as log:
        for epoch in (0, 1):
            log.numbers("train", epoch, 3 * epoch + 3, {"loss": 1.0})
            log.numbers("val", epoch, 3 * epoch + 3, {"loss": 1.0})
    with RunLog(tmp_path, tensorboard=False, resume_step=6, resume_epoch=1) as log:
        log.numbers("val", 1, 6, {"loss": 2.0})
    assert [(r["kind"], r["epoch"], r["loss"]) for r in read_metrics(tmp_path)] == [
        ("train", 0, 1.0),
        ("val", 0, 1.0),
        ("train", 1, 1.0),
        ("val", 1, 2.0),
    ]


def test_tensorboard_shows_a_validation_that_is_done_again_once(tmp_path):
    """D-49: and keeps the training numbers of the step that is continued from."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path) as log:
        for step in (5, 6, 7):
            log.numbers("train", 0, step, {"loss": float(step)})
        log.numbers("val", 0, 6, {"iou": 0.1})
    time.sleep(1.1)  # event files of one second are sorted by a counter as text: the tenth comes before the ninth
    with RunLog(tmp_path, resume_step=6, resume_epoch=0) as log:
        log.numbers("val", 0, 6, {"iou": 0.2})
        log.numbers("train", 1, 7, {"loss": 70.0})
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    values = {tag: [(e.step, round(e.value, 3)) for e in shown.Scalars(tag)] for tag in ("train/loss", "val/iou")}
    assert values == {"train/loss": [(5, 5.0), (6, 6.0), (7, 70.0)], "val/iou": [(6, 0.2)]}


def test_a_missing_tensorboard_is_said_and_training_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    train_toy(tmp_path, ["TRAIN.MAX_STEPS", "1"])
    assert "pip install 'efficientsam3[stage1]'" in capsys.readouterr().err
    assert not (tmp_path / "tensorboard").exists()


def test_a_log_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write in the output folder .*file/run: Not a directory"):
        train_toy(tmp_path / "file" / "run")


def test_a_disk_that_is_full_for_the_log_is_one_clear_error(tmp_path, monkeypatch):
    log = RunLog(tmp_path, tensorboard=False)

    class Full:
        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self):
            return None

    for attribute, write in (("_file", lambda: log.info("x")), ("_metrics", lambda: log.numbers("val", 0, 0, {}))):
        monkeypatch.setattr(log, attribute, Full())
        with pytest.raises(UserError, match=r"cannot write the log in .*No space left.*--output"):
            write()


def test_two_runs_never_write_to_one_folder(tmp_path):
    """D-43: the second one ends at once; the first is not disturbed, and leaves no lock behind when killed."""
    first = Group(train_toy, 1, tmp_path, (tmp_path / "run", ["TRAIN.EPOCHS", "99"]), delay_s=0.01)
    deadline = time.monotonic() + 60
    while not read_metrics(tmp_path / "run"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    second = run_group(train_toy, 1, tmp_path, tmp_path / "run")
    assert second.codes == [2] and "another run is writing to" in second.text and "Traceback" not in second.text
    assert first.processes[0].is_alive()
    first.processes[0].kill()
    first.wait()
    lock = RunLock(tmp_path / "run")
    lock.release()


def test_deterministic_kernels_are_a_setting(tmp_path):
    """D-60"""
    try:
        train_toy(tmp_path / "a", ["TRAIN.MAX_STEPS", "1", "DETERMINISTIC", "True"])
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        train_toy(tmp_path / "b", ["TRAIN.MAX_STEPS", "1"])
        assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)


def test_waiting_for_data_is_seen():
    throughput = Throughput(torch.device("cpu"))
    with throughput.waiting():
        time.sleep(0.05)
    throughput.num_images = 8
    numbers = throughput.window()
    assert 0.5 < numbers["data_wait_share"] <= 1.0 and 0 < numbers["images_per_s"] < 161
    assert throughput.num_images == 0


@pytest.mark.parametrize("seconds, text", [(3.4, "3s"), (725, "12m05s"), (11220, "3h07m"), (3599.6, "1h00m")])
def test_durations_are_spelt_for_people(seconds, text):
    assert spell_duration(seconds) == text
