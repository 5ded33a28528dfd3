"""What is wrong with a training of the memory ends it before it computes anything, and without a traceback."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_world import TEACHER_FILE, TRAIN_NAMES, MemoryWorld, train_memory, write_base_file

from sam3.model.efficient_sam3_train import EfficientSam3Train
from sam3_train.checkpoint import load_checkpoint, save_checkpoint
from sam3_train.log import read_metrics
from stage2.config import get_defaults
from stage2.data.clip_canvas import ClipCanvas
from stage2.feature_cache import FeatureCache
from stage2.train_memory_stage2 import main, with_hyphens


def refusal(cfg: Path, output: Path, capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """The message of a run that must not start."""
    assert train_memory(cfg, output, *words) == 2
    stderr = capfd.readouterr().err
    assert "Traceback" not in stderr
    assert not list(output.glob("*.pth"))
    return stderr


SETTINGS = {
    "no videos": ({"DATA__DATA_PATH": "no/videos"}, "no/videos is missing (DATA.DATA_PATH, --data_path)"),
    "no path": ({"DATA__DATA_PATH": ""}, "DATA.DATA_PATH is empty: name the folder of videos (--data_path)"),
    "kind": ({"DATA__DATASET": "film"}, "kind 'film' is not one of auto, sav"),
    "no checkpoint": ({"MODEL__SAM3_CHECKPOINT": ""}, "MODEL.SAM3_CHECKPOINT is empty: name sam3.pt, or a student"),
    "missing checkpoint, 7.6 (25)": (
        {"MODEL__SAM3_CHECKPOINT": "no/sam3.pt"},
        "MODEL.SAM3_CHECKPOINT no/sam3.pt: there is no such file (--sam3_checkpoint)",
    ),
    "way to start": ({"MODEL__START": "random"}, "MODEL.START 'random' is not one of full, fresh"),
    "tokens": ({"MODEL__MEMORY__NUM_LATENTS_2D": 10}, "MODEL.MEMORY: efficient memory: num_latents_2d 10 must be"),
    "attention": ({"MODEL__MEMORY__ATTENTION": "sparse"}, "attention 'sparse' is not one of softmax, linear"),
    "rules": ({"MODEL__MEMORY__COMPAT": "upstream"}, "compat 'upstream' is not one of published"),
    "clip": ({"CLIPS__LENGTHS": [4, 0]}, "CLIPS.LENGTHS [4, 0]: a clip has at least one frame"),
    "no clip": ({"CLIPS__LENGTHS": []}, "CLIPS.LENGTHS is empty"),
    "curriculum": (
        {"CLIPS__LENGTHS": [4, 8], "CLIPS__LENGTH_EPOCHS": [0]},
        "CLIPS.LENGTH_EPOCHS [0] must name a first epoch for each of CLIPS.LENGTHS [4, 8], or be empty",
    ),
    "shares": ({"PROMPTS__CLICK_SHARE": 0.5}, "CLICK_SHARE 0.5 add up to 1.25, not to 1"),
    "frames": (
        {"PROMPTS__NUM_PROMPTED": [2, 1]},
        "PROMPTS: clip prompting: num_prompted (2, 1) must be fewest and most",
    ),
    "one number": ({"PROMPTS__NUM_CORRECTED": [1]}, "PROMPTS.NUM_CORRECTED [1] must be two numbers: fewest and most"),
    "loss": ({"LOSS__FOCAL": -1.0}, "LOSS: tracking loss: weight focal must be at least 0, got -1.0"),
    "alpha": ({"LOSS__FOCAL_ALPHA": 2.0}, "LOSS: tracking loss: focal_alpha must lie in 0..1, got 2.0"),
    "teacher": ({"DISTILL__MASK": -0.5}, "DISTILL: distillation: weight mask must be at least 0, got -0.5"),
    "forced": ({"DISTILL__FORCED_SHARE": 0.5}, "FORWARD: stage 2: 1 forced_batches compare features alone"),
    "all forced": (
        {"DISTILL__FORCED_SHARE": 1.0, "DISTILL__FEATURES": 1.0},
        "DISTILL.FORCED_SHARE must lie in [0, 1), got 1.0: masks are learnt in the rest",
    ),
    "heads": ({"MODEL__MEMORY__NUM_HEADS": 7}, "MODEL.MEMORY does not fit the model 'tiny': "),
    "nothing to reconstruct": (
        {"LOSS__RECONSTRUCTION": 1.0, "MODEL__MEMORY__NUM_LATENTS": 0, "MODEL__MEMORY__NUM_LATENTS_2D": 0},
        "LOSS.RECONSTRUCTION 1: a memory without latents is not compressed",
    ),
    "start of one frame": (
        {"MODEL__START": "full", "CLIPS__LENGTHS": [1], "FORWARD__STILL_FRAMES": 1},
        "MODEL.START full looks at frames that read a memory, and the first clips have one frame",
    ),
    "sizes beside published ones": (
        {"MODEL__MEMORY__COMPAT": "published", "MODEL__MEMORY__NUM_LATENTS": 0},
        "is a memory of 64 + 256 tokens with sizes of its own, but NUM_LATENTS 0 is given too: set that to -1",
    ),
    "hue": ({"AUGMENT__HUE": 0.7}, "AUGMENT: looks of clips: hue is a share of the colour circle"),
    "validation": ({"VAL__PROMPTS": ["text"]}, "VAL.PROMPTS ['text'] must be some of mask, box, click"),
    "subset": ({"DATA__SUBSET_FRACTION": 0.0}, "subset_fraction 0.0 is not in (0, 1]"),
    "batch": ({"DATA__BATCH_SIZE": 0}, "DATA.BATCH_SIZE: 0 is out of range"),
    "images": ({"DATA__IMAGE_SHARE": 0.5}, "DATA.IMAGE_SHARE 0.5: images are asked for, but DATA.IMAGES_PATH is empty"),
    "idle images": ({"DATA__IMAGES_PATH": "photos"}, "DATA.IMAGES_PATH photos is never read: DATA.IMAGE_SHARE is 0"),
    "cache": ({"DATA__FEATURE_CACHE": "features"}, "keeps the features of unchanged frames: set AUGMENT.FLIP_SHARE,"),
    "resume": ({"MODEL__RESUME": "no/ckpt.pth"}, "MODEL.RESUME: there is no checkpoint no/ckpt.pth"),
    "start": ({"MODEL__PRETRAINED": "no/model_final.pth"}, "MODEL.PRETRAINED: there is no checkpoint no/model_final"),
    "rate": ({"TRAIN__BASE_LR": -1.0}, "TRAIN.BASE_LR must be a finite number >= 0, got -1.0"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_wrong_setting_is_named(
    memory_world: MemoryWorld, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    settings, message = SETTINGS[name]
    assert message in refusal(memory_world.config("wrong", **settings), tmp_path / "run", capfd)
    assert not (tmp_path / "run").exists()


def test_everything_wrong_is_said_at_once(
    memory_world: MemoryWorld, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cfg = memory_world.config(
        "many",
        MODEL__SAM3_CHECKPOINT="no/sam3.pt",
        DATA__DATA_PATH="no/videos",
        DATA__BATCH_SIZE=0,
        LOSS__DICE=-1.0,
        CLIPS__LENGTHS=[],
    )
    stderr = refusal(cfg, tmp_path / "run", capfd)
    assert "5 problems" in stderr
    for text in ("no/sam3.pt", "no/videos", "DATA.BATCH_SIZE: 0", "LOSS", "CLIPS.LENGTHS"):
        assert text in stderr, text


def test_an_unknown_key_and_flag_are_named(
    memory_world: MemoryWorld, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cfg = memory_world.config("typo")
    assert "did you mean VAL.LENGTH or CLIPS.LENGTHS" in refusal(cfg, tmp_path, capfd, "--opts", "CLIPS.LENGTH", "3")
    with pytest.raises(SystemExit) as ended:
        train_memory(cfg, tmp_path, "--frames_per_video", "8")
    assert ended.value.code == 2


def test_flags_are_understood_with_either_line() -> None:
    words = ["--data_path", "my_videos", "--sam3-checkpoint=my_sam3.pt", "--opts", "DATA.BATCH_SIZE", "1"]
    assert with_hyphens(words) == ["--data-path", "my_videos", "--sam3-checkpoint=my_sam3.pt", *words[3:]]


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_file_without_a_tracker_is_refused(
    memory_world: MemoryWorld, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = write_base_file(tmp_path / "no_tracker.pt", without="tracker.")
    stderr = refusal(memory_world.config("no_tracker", MODEL__SAM3_CHECKPOINT=base), tmp_path / "run", capfd)
    assert "lacks SAM heads and tracker memory, so nothing in it can track: name sam3.pt" in stderr


def test_a_file_of_another_kind_is_refused(
    memory_world: MemoryWorld, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": {"weight": torch.zeros(3)}}, tmp_path / "other.pt")
    cfg = memory_world.config("other", MODEL__SAM3_CHECKPOINT=tmp_path / "other.pt")
    assert str(tmp_path / "other.pt") in refusal(cfg, tmp_path / "run", capfd)


def test_a_cut_off_checkpoint_is_refused(
    memory_world: MemoryWorld, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Defect 7.6 (25) of the published training."""
    content = TEACHER_FILE.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    cfg = memory_world.config("cut", MODEL__SAM3_CHECKPOINT=tmp_path / "cut.safetensors")
    assert "cut.safetensors" in refusal(cfg, tmp_path / "run", capfd)


@pytest.fixture(scope="module")
def stopped(memory_world: MemoryWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended after one of its two steps."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    assert train_memory(memory_world.config("stopped", VAL__ENABLE=False), run, "--max-steps", "1") == 0
    return run


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"MODEL__MEMORY__NUM_LATENTS": 16}, "model.efficient_memory.num_latents is 16 now and was 64"),
        ({"MODEL__SAM3_CHECKPOINT": TEACHER_FILE}, "frozen_sha256 is"),
        ({"DATA__SUBSET_FRACTION": 0.5}, "train_videos_sha256 is"),
        ({"DATA__BATCH_SIZE": 1}, "the global batch is 1"),
        ({"SEED": 5}, "SEED is 5 now and was 0"),
    ],
)
def test_a_run_is_not_continued_as_another(
    stopped: Path,
    memory_world: MemoryWorld,
    capfd: pytest.CaptureFixture[str],
    settings: dict[str, object],
    message: str,
) -> None:
    before = sorted(path.name for path in stopped.iterdir())
    cfg = memory_world.config("another", VAL__ENABLE=False, **settings)
    assert train_memory(cfg, stopped) == 2
    stderr = capfd.readouterr().err
    assert message in stderr and "choose another --output, or restore the settings" in stderr
    assert sorted(path.name for path in stopped.iterdir()) == before


def test_a_memory_of_another_size_is_no_start(
    stopped: Path, memory_world: MemoryWorld, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cfg = memory_world.config("size", MODEL__MEMORY__NUM_LATENTS=16)
    stderr = refusal(cfg, tmp_path / "run", capfd, "--pretrained", str(stopped / "model_final.pth"))
    assert "holds another memory" in stderr and "num_latents=64" in stderr and "num_latents=16" in stderr


def test_a_start_of_another_stage_is_refused(
    memory_world: MemoryWorld, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path / "student.pth", {"model": {}, "identity": {"teacher": {}}, "epoch": 0})
    stderr = refusal(
        memory_world.config("stage"), tmp_path / "run", capfd, "--pretrained", str(tmp_path / "student.pth")
    )
    assert "is a checkpoint of another stage" in stderr


# --- videos -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def videos(memory_world: MemoryWorld, tmp_path: Path) -> Path:
    """The world's, to be changed."""
    return Path(shutil.copytree(memory_world.videos, tmp_path / "videos", ignore=shutil.ignore_patterns(".*")))


def test_a_bad_video_is_left_out_and_counted(
    memory_world: MemoryWorld, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Up to the share that is allowed; the index knows it before the first step."""
    annotation = videos / TRAIN_NAMES[0] / f"{TRAIN_NAMES[0]}_manual.json"
    annotation.write_text("{")
    cfg = memory_world.config("bad", DATA__DATA_PATH=videos, DATA__MAX_BAD_FRACTION=0.3, VAL__ENABLE=False)
    assert train_memory(cfg, tmp_path / "run", "--max-steps", "1") == 0
    shown = capsys.readouterr().out
    assert "warning: 1 videos cannot be used and are left out: " in shown and annotation.name in shown
    record = json.loads((tmp_path / "run/config.json").read_text())
    assert (record["num_train_videos"], record["num_left_out_videos"]) == (3, 1)
    assert train_memory(cfg, tmp_path / "run") == 0, "the listed one does not count again"
    (line,) = (tmp_path / "run/bad_videos.txt").read_text().splitlines()
    assert line.startswith(TRAIN_NAMES[0] + "\t") and annotation.name in line


def test_more_bad_videos_than_allowed_end_the_run(
    memory_world: MemoryWorld, videos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (videos / TRAIN_NAMES[1] / f"{TRAIN_NAMES[1]}_manual.json").write_text("[]")
    stderr = refusal(
        memory_world.config("too_bad", DATA__DATA_PATH=videos, DATA__MAX_BAD_FRACTION=0.0), tmp_path / "run", capfd
    )
    assert f"1 of 4 videos in {videos} cannot be used" in stderr and TRAIN_NAMES[1] in stderr


def test_a_frame_that_breaks_while_training_is_counted_and_replaced(
    memory_world: MemoryWorld, videos: Path, tmp_path: Path
) -> None:
    for path in (videos / TRAIN_NAMES[0]).glob("*.jpg"):
        if path.stem != "00000":  # the index looks at the first one
            path.write_bytes(b"no picture")
    cfg = memory_world.config("frames", DATA__DATA_PATH=videos, DATA__MAX_BAD_FRACTION=0.3, VAL__ENABLE=False)
    assert train_memory(cfg, tmp_path / "run") == 0
    assert len(read_metrics(tmp_path / "run", "train")) == 2
    assert TRAIN_NAMES[0] in (tmp_path / "run/bad_videos.txt").read_text()


def test_a_batch_that_fails_ends_the_run_with_the_names_of_its_videos(
    memory_world: MemoryWorld, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """D-116, 7.6 (15): the published script logs the error, goes on, and reports success."""

    def fails(self: EfficientSam3Train, memory: Tensor) -> Tensor:
        raise ZeroDivisionError("in the resampler")

    monkeypatch.setattr(EfficientSam3Train, "compress", fails)
    cfg = memory_world.config("fails", DATA__BATCH_SIZE=4)
    assert train_memory(cfg, tmp_path / "run") == 1
    stderr = capfd.readouterr().err
    assert "in the resampler" in stderr and all(name in stderr for name in TRAIN_NAMES)
    assert not (tmp_path / "run/model_final.pth").exists()


def test_memory_that_runs_out_in_the_backward_pass_is_told_with_the_videos(
    memory_world: MemoryWorld, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it usually does."""

    def runs_out(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(Tensor, "backward", runs_out)
    stderr = refusal(memory_world.config("full", DATA__BATCH_SIZE=4), tmp_path / "run", capfd)
    assert "out of memory on 4 clips of 3 frames" in stderr and all(name in stderr for name in TRAIN_NAMES)


def test_a_fault_in_reading_is_told_with_the_video(
    memory_world: MemoryWorld, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise IndexError("in a mask")

    monkeypatch.setattr(ClipCanvas, "cover", fails)
    assert train_memory(memory_world.config("reading"), tmp_path / "run") == 1
    assert re.search(r"clips of sav_00000\d failed: IndexError: in a mask", capfd.readouterr().err)


def test_steps_that_are_not_finite_are_told_with_the_videos(
    memory_world: MemoryWorld, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compress = EfficientSam3Train.compress
    monkeypatch.setattr(EfficientSam3Train, "compress", lambda self, memory: compress(self, memory) * math.nan)
    cfg = memory_world.config("nan", DATA__BATCH_SIZE=4, TRAIN__MAX_NONFINITE_STEPS=1)
    stderr = refusal(cfg, tmp_path / "run", capfd)
    assert "1 steps in a row had a loss or gradient that is not finite" in stderr
    assert all(name in stderr for name in TRAIN_NAMES)


def test_a_resume_of_a_damaged_file_is_refused(
    stopped: Path, memory_world: MemoryWorld, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ckpt.pth"
    path.write_bytes((stopped / "model_final.pth").read_bytes()[:1000])
    stderr = refusal(memory_world.config("damaged"), tmp_path / "run", capfd, "--resume", str(path))
    assert str(path) in stderr


def test_an_ended_run_is_not_continued_elsewhere(
    stopped: Path, memory_world: MemoryWorld, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = stopped / "ckpt_step_00000001.pth"
    cfg = memory_world.config("ended", VAL__ENABLE=False)
    stderr = refusal(cfg, tmp_path / "run", capfd, "--resume", str(path), "--max-steps", "1")
    assert (
        f"{path}: nothing is left to train, 0 epochs and 1 steps are done (TRAIN.EPOCHS 1, TRAIN.MAX_STEPS 1)" in stderr
    )


def test_only_weights_are_no_run_to_continue(
    stopped: Path, memory_world: MemoryWorld, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    final = stopped / "model_final.pth"
    assert "model" in load_checkpoint(final)
    stderr = refusal(memory_world.config("weights"), tmp_path / "run", capfd, "--resume", str(final))
    assert "it is not a training checkpoint of this format (only weights? then use --pretrained)" in stderr


def test_the_demo_s_clips_are_used_only_when_asked_for(
    memory_world: MemoryWorld, videos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """D-125: no dummy data behind the user's back."""
    (videos / "world.json").write_text("{}")
    stderr = refusal(memory_world.config("demo", DATA__DATA_PATH=videos), tmp_path / "run", capfd)
    assert "holds the generated clips of the demo world: to train on them, say DATA.DATASET demo" in stderr


def test_the_default_config_is_the_released_model_s(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Without --cfg; its checkpoint and data are not here."""
    assert main(["--output_dir", str(tmp_path / "run"), "--device", "cpu", "--data_path", str(tmp_path)]) == 2
    assert "MODEL.SAM3_CHECKPOINT sam3_checkpoints/sam3.pt: there is no such file" in capfd.readouterr().err


def test_a_cache_that_does_not_fit_on_the_disk_is_refused(
    memory_world: MemoryWorld, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FeatureCache, "bytes_per_frame", 10**15)
    plain = {f"AUGMENT__{name}": 0.0 for name in get_defaults().AUGMENT}
    cfg = memory_world.config("full_disk", DATA__FEATURE_CACHE=tmp_path / "cache", **plain)
    stderr = refusal(cfg, tmp_path / "run", capfd, "--dry-run")
    assert "DATA.FEATURE_CACHE: features take 45000000.0 GB more" in stderr and "DATA.SUBSET_FRACTION" in stderr
