"""What an export knows to be wrong before it starts: all at once, in words, with nothing computed or written."""

from __future__ import annotations

import shutil

import pytest
import torch
from fixtures_data import make_jpeg
from fixtures_embeddings import store_bytes

from sam3_train.teacher import Teacher
from stage1 import export_preflight
from stage1.save_embedding_stage1 import main


def test_an_export_that_does_not_fit_is_refused_before_it_starts(command, tmp_path, monkeypatch, capsys):
    """D-18 and D-137: bytes and free space are known before any compute."""
    monkeypatch.setattr(export_preflight, "free_bytes", lambda directory: 700_000)
    monkeypatch.setattr(Teacher, "from_config", lambda *args: pytest.fail("the teacher was built"))
    assert main(command()) == 2
    error = capsys.readouterr().err
    assert "needs 0.7 MB, 0.7 MB are free" in error and "DISTILL.CODEC int8" in error
    assert not (tmp_path / "run").exists()


def test_all_that_is_wrong_is_said_at_once_before_a_teacher_is_built(
    command, tiny_teacher_file, small_data, tmp_path, monkeypatch, capsys
):
    """D-137: settings, images, disk and the store that is there already, in one list."""
    assert main(command()) == 0
    before = store_bytes(tmp_path / "run/embeddings")
    other = torch.load(tiny_teacher_file, weights_only=True)
    other["model"] = {k: v + 0.01 if v.is_floating_point() else v for k, v in other["model"].items()}
    torch.save(other, tmp_path / "other.pt")
    for number in range(7, 12):
        (small_data / f"images/train/sa_{number}.jpg").write_bytes(make_jpeg(number))
    monkeypatch.setattr(Teacher, "from_config", lambda *args: pytest.fail("the teacher was built"))
    monkeypatch.setattr(export_preflight, "free_bytes", lambda directory: 1000)
    opts = {"MODEL.SAM3_CHECKPOINT": tmp_path / "other.pt", "DATA.PREPROCESS.MODE": "letterbox", "MODEL.RESUME": "x"}
    capsys.readouterr()
    assert main(command("--pretrained", "timm", **opts)) == 2
    error = capsys.readouterr().err
    for message in (
        "4 problems",
        "MODEL.RESUME (--resume) x",
        "--pretrained timm",
        "the store was begun with other settings",
        "teacher: {'name': 'tiny'",
        "'mode': 'letterbox'",
        "the export needs 0.4 MB, 0.0 MB are free",
    ):
        assert message in error, (message, error)
    opts = {"MODEL.SAM3_CHECKPOINT": "nowhere.pt", "AMP_DTYPE": "fp8", "MODEL.PRESET": "huge", "DISTILL.CODEC": "zip"}
    assert main(command("--split", "train,nothing", **opts)) == 2
    assert "5 problems" in capsys.readouterr().err
    assert store_bytes(tmp_path / "run/embeddings") == before


def test_a_dry_run_writes_nothing(command, tmp_path, capsys):
    assert main(command("--dry-run")) == 0
    assert "9 to export" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "opts", "message"),
    [
        ([], {"DATA.BATCHSIZE": 3}, "unknown key 'DATA.BATCHSIZE'"),
        ([], {"MODEL.SAM3_CHECKPOINT": "nowhere.pt"}, "MODEL.SAM3_CHECKPOINT: there is no file nowhere.pt"),
        ([], {"MODEL.SAM3_CHECKPOINT": ""}, "MODEL.SAM3_CHECKPOINT is empty"),
        ([], {"DISTILL.CODEC": "zip"}, "DISTILL.CODEC 'zip' is not one of fp16, int8"),
        ([], {"MODEL.RESUME": "x.pth"}, "an export resumes by itself"),
        ([], {"AMP_DTYPE": "fp8"}, "AMP_DTYPE 'fp8' is not one of"),
        ([], {"DATA.BATCH_SIZE": 0}, "DATA.BATCH_SIZE"),
        (["--split", "train,test"], {}, "'test' is unknown"),
        (["--check-saved-embed"], {}, "no such folder"),
    ],
)
def test_a_mistake_is_one_clear_message_and_exit_code_2(command, more, opts, message, capsys):
    assert main(command(*more, **opts)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and len(error.splitlines()) <= 3


@pytest.mark.parametrize(
    ("more", "opts", "message"),
    [
        (["--max-steps", "3"], {}, "--max-steps 3: an export has no such setting"),
        (["--pretrained", "timm"], {}, "--pretrained timm: an export has no such setting"),
        ([], {"DISTILL.TEACHER_EMBED_PATH": "elsewhere"}, "DISTILL.TEACHER_EMBED_PATH elsewhere: training reads there"),
        (["--dry-run", "--check-saved-embed", "1"], {}, "--dry-run and --check-saved-embed exclude each other"),
    ],
)
def test_settings_that_an_export_would_ignore_are_refused(command, capsys, more, opts, message):
    """D-03, D-59, D-66"""
    assert main(command(*more, **opts)) == 2
    assert message in capsys.readouterr().err


def test_a_missing_val_split_is_said_and_a_broken_one_is_an_error(command, small_data, capsys):
    val = small_data / "images/val"
    first = next(val.iterdir())
    shutil.copy(first, first.with_suffix(".png"))
    assert main(command("--dry-run")) == 2
    assert "have the same key" in capsys.readouterr().err
    shutil.rmtree(val)
    assert main(command("--dry-run")) == 0
    assert "exporting without val" in capsys.readouterr().out
    assert main(command("--dry-run", "--split", "train,val")) == 2
