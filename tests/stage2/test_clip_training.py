"""Clips through the one training loop: a continued run and several processes see what one whole run sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import clip_sets
import pytest
import torch
from torch import Tensor, nn
from toy_training import newest, run_group, toy_config

from sam3.preprocess import Preprocess
from sam3_train.data.epoch_loader import EpochLoader
from sam3_train.distributed import RunContext, training_run
from sam3_train.errors import UserError
from sam3_train.loop import fit
from sam3_train.rng import seed_everything
from sam3_train.task import Task
from stage2.data.clip_choice import ClipSpec
from stage2.data.clip_index import build_clip_index
from stage2.data.clip_loader import build_train_loader, build_val_loader
from stage2.data.clip_look import LookSpec
from stage2.data.clip_sampler import ClipSampler
from stage2.data.clip_sources import VideoClips
from stage2.data.layouts import open_layout
from stage2.data.sav_dataset import ClipDataset
from stage2.data.video_set import VideoSettings, open_video_set

PREPROCESS = Preprocess(size_px=28)
SPEC = ClipSpec(lengths=((0, 2), (1, 3)), max_objects=2, gap_share=0.5)


class GuessArea(Task):
    """How much of each frame its objects cover, from the frame's mean colours."""

    best_metric: ClassVar[str] = "loss"

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        clips = batch["clips"]
        colours = clips.images(PREPROCESS).mean(dim=(3, 4))[clips.clip_of_object]
        areas = clips.coverage_tbhw().mean(dim=(2, 3)).T
        return {"loss": (self.layer(colours)[..., 0] - areas).square().mean()}

    def batch_size(self, batch: Any) -> int:
        return int(batch["clips"].num_clips)


def loaders(root: Path, run: RunContext) -> tuple[EpochLoader, EpochLoader]:
    """Four videos: two batches of two clips in each epoch."""
    videos = open_video_set(VideoSettings(str(root), val_fraction=0.0), "train")
    train_set = ClipDataset(VideoClips(videos, SPEC, PREPROCESS, 8, LookSpec()), seed=3)
    val_set = ClipDataset(VideoClips(videos, SPEC.for_validation(2), PREPROCESS, 8), is_fixed=True)
    share = 2 // run.world_size
    sampler = ClipSampler(4, batch_size=share, seed=3, rank=run.rank, world_size=run.world_size)
    val_loader = build_val_loader(val_set, 2, run.rank, run.world_size, num_workers=0)
    return build_train_loader(train_set, sampler, share, num_workers=0), val_loader


def train(root: Path, output: Path, *opts: str) -> None:
    """Two epochs."""
    with training_run("cpu") as run:
        seed_everything(0)
        fit(GuessArea(), *loaders(root, run), toy_config(["TRAIN.EPOCHS", "2", *opts]), run, output)


def write_batches(root: Path, output: Path) -> None:
    """The batches of a rank in one epoch: name and frames of each clip."""
    with training_run("cpu") as run:
        loader, _ = loaders(root, run)
        batches = [list(zip(b["key"], b["clips"].frame_numbers.tolist(), strict=True)) for b in loader]
        (output / f"batches{run.world_size}-{run.rank}.json").write_text(json.dumps(batches))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_sets.write_sav_frames(tmp_path_factory.mktemp("set"), [f"sav_{i:06d}" for i in range(4)], every=4)


def test_a_continued_run_sees_the_clips_that_were_left(root: Path, tmp_path: Path) -> None:
    train(root, tmp_path / "whole")
    for steps in ("1", "3", "0"):
        train(root, tmp_path / "parts", "TRAIN.MAX_STEPS", steps)
    whole, parts = newest(tmp_path / "whole"), newest(tmp_path / "parts")
    assert whole["step"] == parts["step"] == 4
    assert all(torch.equal(value, parts["model"][name]) for name, value in whole["model"].items())


def test_two_processes_share_one_index_and_the_batches_of_one(tmp_path: Path) -> None:
    root = clip_sets.write_sav_frames(tmp_path / "set", [f"sav_{i:06d}" for i in range(4)], every=4)
    ended = run_group(write_batches, 2, tmp_path, root, tmp_path)
    assert ended.codes == [0, 0], ended.text
    assert len(list((root / ".clip_index").iterdir())) == 1
    write_batches(root, tmp_path)
    whole, *parts = (json.loads((tmp_path / f"batches{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert [first + second for first, second in zip(*parts, strict=True)] == whole
    assert len(whole) == 2


def test_an_index_that_another_machine_does_not_see_is_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stage2.data.clip_index.broadcast_object", lambda value: ("/nowhere/index", ""))
    with pytest.raises(UserError, match=r"rank 0 keeps the index there, but rank 0 sees none.*DATA\.INDEX_CACHE"):
        build_clip_index(open_layout(root))
