"""scripts/ablate_memory.py: its variants are what they say, a run goes through, and the table holds what was found."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import ablate_memory
import demo_world
import pytest
import tracker_eval
from ablate_memory import VARIANTS, build_parser, finished, run_one, table, training_words

from sam3_train.config import load_config
from stage2.config import get_defaults
from stage2.run import read_config
from stage2.settings import clip_spec, distill_weights, memory_config
from stage2.train_memory_stage2 import build_parser as training_parser

NAMES = [variant.name for variant in VARIANTS]


@pytest.mark.parametrize("variant", VARIANTS, ids=NAMES)
def test_each_variant_changes_what_it_is_named_after(variant: ablate_memory.Variant) -> None:
    args = build_parser().parse_args([])
    cfg = read_config(training_parser().parse_args(training_words(args, variant, 3, Path("run"))))
    memory, spec = memory_config(cfg, "tiny"), clip_spec(cfg)
    expected = {"windows16": (0, 16), "windows256": (0, 256), "global64": (64, 0)}
    assert (memory.num_latents, memory.num_latents_2d) == expected.get(variant.name, (0, 64))
    assert (cfg.SEED, cfg.OUTPUT) == (3, "run")
    if variant.name == "no_teacher":
        assert not distill_weights(cfg).is_on and not cfg.DISTILL.FORCED_SHARE
    assert (cfg.MODEL.START == "fresh") == (variant.name == "fresh")
    whole = clip_spec(load_config(get_defaults(), args.cfg))
    assert (spec.lengths != whole.lengths) == (variant.name == "curriculum")
    frames = [sum(one.length_at(epoch) for epoch in range(cfg.TRAIN.EPOCHS)) for one in (spec, whole)]
    assert abs(frames[0] / frames[1] - 1) < 0.1, "as much is seen"


def test_one_run_trains_tracks_and_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = functools.partial(tracker_eval.generate_test_clips, num_frames=12)
    monkeypatch.setattr(tracker_eval, "generate_test_clips", short)
    world = tmp_path / "world"
    none = [word for name in ("train", "val", "test", "val-clips", "test-clips") for word in (f"--{name}", "0")]
    counts = [*none, "--train-clips", "2"]
    assert demo_world.main(["--output", str(world), "--frames", "12", "--workers", "1", *counts]) == 0
    words = ["--world", str(world), "--output", str(tmp_path), "--test-clips", "1", "--seeds", "1"]
    words += ["--opts", "TRAIN.MAX_STEPS", "1", "DATA.NUM_WORKERS", "0", "DATA.BATCH_SIZE", "1", "CLIPS.LENGTHS", "[2]"]
    words += ["MODEL.START_CLIPS", "1", "TRAIN.ACCUMULATION_STEPS", "1"]
    args = build_parser().parse_args(words)
    assert finished(args, VARIANTS[1], 0) is None
    found = run_one(args, VARIANTS[1], 0)
    assert found == finished(args, VARIANTS[1], 0)
    assert (found["variant"], found["tokens"], found["bytes"]) == ("windows16", 16, 16 * 16 * 2)
    assert 0 <= found["j_and_f"] <= 1 and found["training_s"] > 0
    assert json.loads((tmp_path / "memory_ablation/windows16_0/result.json").read_text()) == found
    assert finished(build_parser().parse_args([*words, "SEED", "1"]), VARIANTS[1], 0) is None, "other settings"


def test_the_table_has_a_row_for_each_variant_that_has_run() -> None:
    full = {"j_and_f": 0.8, "tokens": 324, "bytes": 10_368}
    result = {"variant": "windows16", "tokens": 16, "bytes": 512, "training_s": 61.0}
    lines = table(full, [{**result, "j_and_f": 0.5}, {**result, "j_and_f": 0.7}], {"cpu_cores": 2}).splitlines()
    assert lines[-2] == "| SAM 3's own | 80.0 |  |  | 100% | 324 | 10,368 |  |"
    assert lines[-1] == "| 16 tokens, one for each window | 60.0 | 50.0 .. 70.0 | 2 | 75% | 16 | 512 | 61 s |"
