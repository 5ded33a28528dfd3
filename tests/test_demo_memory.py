"""The compressed memory on the demo's page: both memories of one file on the same clips, as sessions keep them."""

from __future__ import annotations

import json
from pathlib import Path

import demo_tracking
import pytest
from checkpoint_files import TINY, whole_model, whole_weights
from demo_clips import write_clip
from demo_memory import compare_memories, loss_chart
from demo_report import main as report_main
from tracker_eval import clip_features

from sam3.checkpoint_io import CheckpointError, write_merged
from sam3.config import Sam3Config
from sam3.efficient_keys import own_weights
from sam3.model.efficient_sam3_tracker import EfficientSam3Tracker
from sam3_train.errors import UserError

SETTINGS = {"num_clips": 1, "num_shown_clips": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_clip(folder / "clips" / "test", 0, "test", 0, 12, 90)
    return folder


def write_file(path: Path, config: Sam3Config) -> Path:
    weights = whole_weights()
    if config.efficient_memory is not None:
        weights |= own_weights(EfficientSam3Tracker(config).state_dict())
    write_merged(path, weights, {"model": config.to_dict(), "preprocess": whole_model().preprocess.to_dict()})
    return path


def write_log(run: Path) -> Path:
    run.mkdir()
    terms = {"focal": 0.01, "dice": 0.4, "iou": 0.1, "object_score": 0.2, "loss": 0.9}
    records = [{"teacher_features": 0.3}, {"teacher_features": 0.2, **terms}, {"teacher_features": 0.2, **terms}]
    lines = [json.dumps({"kind": "train", "step": step, **record}) for step, record in enumerate(records)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return run


def test_both_memories_are_measured_on_features_that_are_computed_once(world, tmp_path, monkeypatch) -> None:
    file = write_file(tmp_path / "both.pt", TINY.with_efficient_memory())
    computed = []

    def features(model, clip):
        computed.append(model)
        return clip_features(model, clip)

    monkeypatch.setattr(demo_tracking, "clip_features", features)
    found = compare_memories(file, world, SETTINGS, write_log(tmp_path / "run"))
    assert len(computed) == 1
    assert (found.full.tokens, found.compressed.tokens) == (TINY.grid_size**2, 64)
    mem_dim = TINY.tracker.mem_dim
    assert (found.full.num_bytes, found.compressed.num_bytes) == (2 * mem_dim * TINY.grid_size**2, 2 * mem_dim * 64)
    assert [score.prompt for score in found.scores] == ["mask", "box", "one click"]
    assert found.num_clips == len(found.clips) == 1 and found.num_objects > 0
    for words in ("features, of the full memory", "mask cross entropy x 4", "Dice", "object score"):
        assert words in found.chart


def test_a_file_with_one_memory_and_a_world_without_clips_are_refused(world, tmp_path) -> None:
    file = write_file(tmp_path / "full.pt", TINY)
    with pytest.raises(CheckpointError, match=r"full.pt: holds no efficient memory \(it holds: full\)"):
        compare_memories(file, world, SETTINGS, tmp_path)
    with pytest.raises(UserError, match="has no test clips to track"):
        compare_memories(file, tmp_path, SETTINGS, tmp_path)
    with pytest.raises(UserError, match=r"has no metrics\.jsonl with training records"):
        loss_chart(tmp_path)


def test_a_memory_without_its_run_is_one_clear_line(tmp_path, capsys) -> None:
    words = [word for name in ("world", "teacher", "student", "run") for word in (f"--{name}", str(tmp_path))]
    assert report_main([*words, "--memory", str(tmp_path), "--output", str(tmp_path / "page.html")]) == 2
    assert "--memory and --memory-run go together" in capsys.readouterr().err
