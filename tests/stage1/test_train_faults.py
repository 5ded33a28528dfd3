"""What goes wrong in a stage-1 training run ends it with one clear line and loses nothing."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from stage1_world import Stage1World, make_random_teacher

from sam3.checkpoint_io import read_state_dict, write_merged
from sam3.checkpoint_keys import student_from_published
from sam3.preprocess import Preprocess
from sam3_train.checkpoint import CheckpointManager, load_checkpoint
from sam3_train.log import read_metrics
from sam3_train.run_lock import RunLock
from stage1.train_stage1 import main


def train(cfg: Path, output: Path, *words: str) -> int:
    return main(["--cfg", str(cfg), "--output", str(output), "--device", "cpu", *words])


def one_line(stderr: str) -> str:
    errors = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert "Traceback" not in stderr
    assert len(errors) == 1, stderr
    return errors[0]


@pytest.fixture(scope="module")
def finished(world: Stage1World, tmp_path_factory) -> Path:
    """A run of one epoch."""
    run = tmp_path_factory.mktemp("faults") / "run"
    assert train(world.config("faults"), run) == 0
    return run


def test_weights_are_loaded_from_a_local_file_with_a_report(world, finished, tmp_path, capfd):
    """D-03: the flag does what it says, and says what it did."""
    cfg = world.config("pretrained", TRAIN__BASE_LR=0.0, TRAIN__MIN_LR=0.0, VAL__ENABLE=False)
    assert train(cfg, tmp_path, "--pretrained", str(finished / "best.pth"), "--max-steps", "1") == 0
    assert f"backbone weights from {finished / 'best.pth'}: " in capfd.readouterr().out
    files = tmp_path / "ckpt_step_00000001.pth", finished / "ckpt_epoch_0.pth"
    mine, theirs = (load_checkpoint(path)["model"] for path in files)
    for key, value in student_from_published(theirs, "demo_cnn").items():
        is_weight = key.startswith("backbone.") and key.endswith(("weight", "bias"))
        assert not is_weight or torch.equal(student_from_published(mine, "demo_cnn")[key], value), key
    assert not torch.equal(mine["head.3.weight"], theirs["head.3.weight"]), "the head starts afresh"


def test_missing_imagenet_weights_are_an_error_and_never_random_ones(world, tmp_path, capfd, monkeypatch):
    """D-03: without a connection the run does not start, and says what to do."""
    import timm

    create = timm.create_model

    def offline(name, pretrained=False, **kwargs):
        if pretrained:
            raise OSError("no connection")
        return create(name, pretrained=False, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    cfg = world.config("offline", "efficientvit_b0", MODEL__PRETRAINED="timm")
    assert train(cfg, tmp_path / "run") == 2
    stderr = capfd.readouterr().err
    assert "timm could not get the weights of efficientvit_b0" in stderr
    assert "pass its path" in one_line(stderr)
    assert not list(tmp_path.glob("run/*.pth"))


def test_a_truncated_newest_checkpoint_falls_back_to_the_one_before(world, tmp_path, capfd):
    """D-44: the preflight must not refuse what the loop can repair."""
    cfg = world.config("truncated", TRAIN__EPOCHS=2)
    assert train(cfg, tmp_path, "--max-steps", "4") == 0
    newest = CheckpointManager(tmp_path).names()[0]
    assert newest == "ckpt_step_00000004.pth"
    (tmp_path / newest).write_bytes((tmp_path / newest).read_bytes()[:1000])
    capfd.readouterr()
    assert train(cfg, tmp_path, "--dry-run") == 0
    assert train(cfg, tmp_path) == 0
    captured = capfd.readouterr()
    assert f"{newest}: has 1000 bytes" in captured.out and "ckpt_epoch_0.pth: epoch 1, step 3" in captured.out
    assert load_checkpoint(tmp_path / "ckpt_epoch_1.pth")["step"] == 6


def test_a_dry_run_names_everything_that_forbids_to_continue(world, finished, tmp_path, capfd):
    """D-47, D-66: batch, seed and settings are compared before anything is loaded or written."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    words = ["--batch-size", "2", "--seed", "7"]
    for more in ([], ["--dry-run"]):
        assert train(world.config("faults", TRAIN__EPOCHS=2), run, *words, *more) == 2
        stderr = capfd.readouterr().err
        assert "the global batch is 2" in stderr and "SEED is 7 now and was 0" in stderr
    assert train(world.config("faults"), run, "--dry-run", "--opts", "TRAIN.AUTO_RESUME", "False") == 2
    assert "TRAIN.AUTO_RESUME is off" in one_line(capfd.readouterr().err)
    assert before == {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}


def hold_lock(folder: Path, ready: Any, done: Any) -> None:
    lock = RunLock(folder)
    ready.set()
    done.wait(60)
    lock.release()


def test_a_run_that_may_not_start_touches_nothing_of_the_other_one(world, finished, tmp_path, capfd):
    """D-43: neither while the other one is running, nor when the loop refuses to continue it with another teacher."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "config.json").write_text("of the other run")
    cfg = world.config("faults", TRAIN__EPOCHS=2)
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=hold_lock, args=(run, ready, done))
    holder.start()
    assert ready.wait(60)
    assert train(cfg, run) == 2
    done.set()
    holder.join()
    assert "another run is writing to" in one_line(capfd.readouterr().err)
    assert (run / "config.json").read_text() == "of the other run"
    other = make_random_teacher(tmp_path / "other.safetensors", seed=1)
    assert train(cfg, run, "--online-teacher", "--opts", "MODEL.SAM3_CHECKPOINT", str(other)) == 2
    assert "teacher.sha256" in one_line(capfd.readouterr().err)
    assert (run / "config.json").read_text() == "of the other run"
    assert train(cfg, run) == 0
    assert '"num_train_images"' in (run / "config.json").read_text()


def test_mask_agreement_wants_the_teacher_of_the_store(world, tmp_path, capfd):
    """D-137: heads of another teacher would judge features that they do not understand."""
    other = make_random_teacher(tmp_path / "other.safetensors", seed=1)
    state_dict, metadata = read_state_dict(world.teacher)
    letterboxed = tmp_path / "letterboxed.safetensors"
    record = {**metadata, "preprocess": Preprocess(252, mode="letterbox").to_dict()}
    write_merged(letterboxed, state_dict, record)
    cfg = world.config("agreement", VAL__MASK_AGREEMENT=True)
    words = ["--dry-run", "--opts", "VAL.MASK_PROMPTS", "0", "MODEL.SAM3_CHECKPOINT"]
    assert train(cfg, tmp_path / "run", *words, str(other)) == 2
    stderr = capfd.readouterr().err
    assert "2 problems" in stderr and f"MODEL.SAM3_CHECKPOINT: the trunk in {other} has sha256" in stderr
    assert str(world.store) in stderr and "VAL.MASK_PROMPTS: 0 is out of range" in stderr
    assert train(cfg, tmp_path / "run", *words, str(letterboxed)) == 2
    stderr = capfd.readouterr().err
    assert "'mode': 'letterbox'" in stderr and "letterboxed.safetensors" in stderr and "sha256" not in stderr
    assert not (tmp_path / "run").exists()


def test_impossible_views_are_named_with_all_else_that_is_wrong(world, tmp_path, capfd):
    """D-27: in the words of the export."""
    words = ["DISTILL.NO_RAND", "False", "DISTILL.FLIP_PROB", "1.5", "DATA.BATCH_SIZE", "0"]
    assert train(world.config("views"), tmp_path / "run", "--opts", *words) == 2
    stderr = capfd.readouterr().err
    assert "2 problems" in one_line(stderr)
    assert "DISTILL: " in stderr and "1.5" in stderr and "DATA.BATCH_SIZE: 0 is out of range" in stderr


def test_weights_of_another_backbone_are_refused(world, finished, tmp_path, capfd):
    cfg = world.config("wrong_backbone", "efficientvit_b0")
    assert train(cfg, tmp_path, "--pretrained", str(finished / "best.pth")) == 2
    assert "not the weights of efficientvit_b0" in one_line(capfd.readouterr().err)


def test_the_seed_decides_weights_and_order(world, finished, tmp_path):
    """D-60."""
    first = read_metrics(finished, "train")[0]
    for seed, is_same in ((0, True), (1, False)):
        run = tmp_path / str(seed)
        assert train(world.config("faults"), run, "--seed", str(seed), "--max-steps", "1") == 0
        assert (read_metrics(run, "train")[0]["loss"] == first["loss"]) is is_same


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_flipped_bit_in_the_store_ends_the_run_and_names_the_record(world, tmp_path, capfd, num_workers):
    """D-13: noisy training is worse than no training."""
    store = tmp_path / "embeddings"
    shutil.copytree(world.store, store)
    values = store / "rank0-values.bin"
    content = bytearray(values.read_bytes())
    content[5 * (len(content) // 15) + 1000] ^= 1  # in the sixth of 15 records
    values.write_bytes(content)
    cfg = world.config("flipped", DISTILL__TEACHER_EMBED_PATH=store, DATA__NUM_WORKERS=num_workers)
    assert train(cfg, tmp_path / "run") == 2
    line = one_line(capfd.readouterr().err)
    assert str(values) in line and "record 5" in line and "damaged" in line


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_store_with_a_damaged_rank_file_is_refused_before_training(world, tmp_path, capfd, damage):
    """D-14."""
    store = tmp_path / "embeddings"
    shutil.copytree(world.store, store)
    values = store / "rank0-values.bin"
    if damage == "truncated":
        values.write_bytes(values.read_bytes()[:-7])
    else:
        values.unlink()
    assert train(world.config("damaged", DISTILL__TEACHER_EMBED_PATH=store), tmp_path / "run") == 2
    stderr = capfd.readouterr().err
    assert "rank0-values.bin" in stderr and "Traceback" not in stderr
    assert not (tmp_path / "run").exists()


def test_an_unreadable_photo_is_skipped_within_the_limit_and_listed(world, tmp_path, capfd):
    """D-21: the same photo in export and training; beyond the limit the run ends."""
    data = tmp_path / "photos"
    shutil.copytree(world.data, data)
    photo = data / "images/train/sa_3.jpg"
    photo.write_bytes(photo.read_bytes()[:200])
    cfg = world.config("unreadable", DATA__DATA_PATH=data, DATA__MAX_BAD_FRACTION=0.1)
    assert train(cfg, tmp_path / "lenient") == 0
    assert (tmp_path / "lenient/bad_images.txt").read_text().startswith("sa_3\t")
    strict = world.config("strict", DATA__DATA_PATH=data, DATA__MAX_BAD_FRACTION=0.0)
    capfd.readouterr()
    assert train(strict, tmp_path / "strict") == 2
    assert "1 unreadable images, more than the 0 that DATA.MAX_BAD_FRACTION allows" in capfd.readouterr().err


def test_a_val_split_without_embeddings_has_to_be_switched_off_aloud(world, tmp_path, capfd):
    """D-24, D-49: no silent training without validation."""
    data = tmp_path / "photos"
    shutil.copytree(world.data, data)
    (data / "images/val/sa_1000.jpg").rename(data / "images/val/sa_1999.jpg")
    cfg = world.config("no_val", DATA__DATA_PATH=data)
    assert train(cfg, tmp_path / "run") == 2
    line = one_line(capfd.readouterr().err)
    assert "1 of 3 val images have no embedding, first sa_1999" in line and "VAL.ENABLE False" in line
    assert train(cfg, tmp_path / "run", "--max-steps", "1", "--opts", "VAL.ENABLE", "False") == 0


@pytest.mark.parametrize("flag", ["--eval", "--throughput", "--only-cpu", "--tag", "--use-checkpoint"])
def test_flags_that_would_do_nothing_do_not_exist(world, flag):
    """D-59."""
    with pytest.raises(SystemExit, match="2"):
        main(["--cfg", str(world.config("flags")), flag])


def test_a_diverging_run_ends_with_the_last_good_weights(world, tmp_path, capfd):
    """D-58: non-finite steps are not applied, do not advance the schedule, and too many in a row end the run."""
    cfg = world.config("diverging", TRAIN__MAX_NONFINITE_STEPS=2, DISTILL__MSE=1e38, TRAIN__EPOCHS=2)
    assert train(cfg, tmp_path) == 2
    assert "2 steps in a row had a loss or gradient that is not finite" in capfd.readouterr().err
