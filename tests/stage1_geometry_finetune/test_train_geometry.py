"""``train_geometry_finetune.py`` from end to end on a small world: output tree, plan, resume, both routes."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from finetune_world import FinetuneWorld, finetune, make_student, write_merged_file
from stage1_world import TINY

from sam3.checkpoint_io import read_state_dict
from sam3.checkpoint_keys import STUDENT_PREFIX, student_to_published
from sam3.config import Sam3Config, StudentConfig
from sam3.model.vitdet import ViT
from sam3_train.checkpoint import load_checkpoint, state_dict_sha256
from sam3_train.distributed import RunContext
from sam3_train.log import read_metrics
from sam3_train.student_checkpoint import build_trained_student, read_student
from sam3_train.trainer import Trainer
from stage1_geometry_finetune.convert_geometry_finetune import main as convert
from stage1_geometry_finetune.run import prepare_run
from stage1_geometry_finetune.train_geometry_finetune import build_parser

STEP_1 = "ckpt_step_00000001.pth"


def assert_same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    different = [key for key in mine if not torch.equal(mine[key], theirs[key])]
    assert not different, different[:3]


@pytest.fixture(scope="module")
def finished(finetune_world: FinetuneWorld, tmp_path_factory) -> Path:
    """Two epochs through the SAM heads."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert finetune(finetune_world.finetune("finished", TRAIN__EPOCHS=2), run) == 0
    return run


def test_the_run_leaves_the_documented_tree(finished):
    names = {path.name for path in finished.iterdir()}
    assert {"config.json", "log_rank0.txt", "ckpt_epoch_0.pth", "ckpt_epoch_1.pth", "best.pth", "last.json"} <= names
    record = json.loads((finished / "config.json").read_text())
    assert record["config"]["PROMPTS"]["MAX_OBJECTS"] == 2
    assert (record["num_train_images"], record["num_val_images"]) == (6, 2)
    assert "global batch 2" in (finished / "log_rank0.txt").read_text()


def test_losses_and_validation_are_logged_and_pick_the_best(finished):
    """D-94: each epoch is validated on annotated objects, with a box and with a click."""
    steps = read_metrics(finished, "train")
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "mse", "sam_mask_bce", "sam_mask_dice", "sam_score", "objects", "grad_norm"} <= steps[0].keys()
    validations = read_metrics(finished, "val")
    assert len(validations) == 2
    assert {"truth_iou", "sam_box_truth_iou", "sam_click_truth_iou", "teacher_iou"} <= validations[0].keys()
    best = torch.load(finished / "best.pth", weights_only=True)
    assert best["best"]["value"] == pytest.approx(max(record["truth_iou"] for record in validations))


def test_a_checkpoint_holds_the_trained_weights_and_where_they_began(finished, finetune_world):
    """D-90: no frozen part is in it; the student opens as one of stage 1 does."""
    state = torch.load(finished / "best.pth", weights_only=True)
    expected = student_to_published(make_student().state_dict(), "demo_cnn")
    assert state["model"].keys() == expected.keys()
    assert Sam3Config.from_dict(state["identity"]["model"]) == TINY.replace(student=StudentConfig("demo_cnn"))
    start = load_checkpoint(finetune_world.start)["model"]
    assert state["identity"]["initial_student_sha256"] == state_dict_sha256(start)
    assert (finished / "best.pth").stat().st_size < 8e6
    checkpoint = read_student(finished / "ckpt_epoch_1.pth")
    build_trained_student(checkpoint)
    moved = [key for key, value in start.items() if not torch.equal(value, checkpoint.weights[key])]
    statistics = [key for key in start if key.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert statistics and set(moved) == start.keys() - set(statistics), "BatchNorm keeps what stage 1 has learnt"


def test_what_a_run_leaves_goes_into_the_merged_file(finished, finetune_world, tmp_path, capfd):
    """From the run's own checkpoint, without a flag: the origin and the teacher are recognised."""
    merged = write_merged_file(tmp_path / "merged.safetensors", make_student())
    assert convert(["--finetune-ckpt", str(finished / "best.pth"), "--pretrained", str(merged)]) == 0
    printed = capfd.readouterr().out
    assert "the fine-tuning began with the student of the pretrained file" in printed
    weights = read_state_dict(tmp_path / "merged_geometry.safetensors")[0]
    trained = load_checkpoint(finished / "best.pth")["model"]
    assert all(torch.equal(weights[STUDENT_PREFIX + key], value) for key, value in trained.items())


def test_an_interrupted_run_ends_bit_for_bit_where_an_uninterrupted_one_ends(finetune_world, finished, tmp_path):
    """D-87, D-91: stopped inside an epoch, continued with the same command: prompts are drawn alike."""
    cfg = finetune_world.finetune("finished", TRAIN__EPOCHS=2)
    assert finetune(cfg, tmp_path, "--max-steps", "2") == 0
    assert finetune(cfg, tmp_path) == 0
    mine, theirs = (load_checkpoint(run / "ckpt_epoch_1.pth") for run in (tmp_path, finished))
    assert_same(mine["model"], theirs["model"])
    for index, state in theirs["optimizer"]["state"].items():
        assert all(torch.equal(mine["optimizer"]["state"][index][name], value) for name, value in state.items())
    losses = [[record["loss"] for record in read_metrics(run, "train")] for run in (tmp_path, finished)]
    assert losses[0] == losses[1]


def test_a_merged_file_and_the_checkpoint_inside_it_start_the_same_run(finetune_world, finished, tmp_path):
    merged = write_merged_file(tmp_path / "merged.safetensors", make_student())
    cfg = finetune_world.finetune("merged", TRAIN__EPOCHS=2, VAL__ENABLE=False)
    assert finetune(cfg, tmp_path / "run", "--pretrained", str(merged), "--max-steps", "1") == 0
    mine, theirs = (read_metrics(run, "train")[0] for run in (tmp_path / "run", finished))
    assert mine["loss"] == theirs["loss"]
    identities = [load_checkpoint(path)["identity"] for path in (tmp_path / "run" / STEP_1, finished / "best.pth")]
    assert identities[0] == identities[1]


def test_both_routes_and_trained_parts_with_the_teacher_in_the_loop(finetune_world, tmp_path):
    """No store; the neck and the mask decoders of both routes are trained and saved as wholes."""
    cfg = finetune_world.finetune(
        "both",
        DISTILL__ROUTE_DETECTOR=1.0,
        DISTILL__TEACHER_EMBED_PATH="there/is/none",
        MODEL__TRAIN_NECK=True,
        MODEL__TRAIN_MASK_DECODER=True,
        PROMPTS__MAX_OBJECTS=1,
        VAL__ENABLE=False,
    )
    assert finetune(cfg, tmp_path, "--online-teacher", "--max-steps", "1") == 0
    (record,) = read_metrics(tmp_path, "train")
    assert record["skipped_steps"] == 0
    assert {"detector_mask_bce", "detector_box", "detector_presence", "sam_mask_dice"} <= record.keys()
    checkpoint = read_student(tmp_path / STEP_1)
    prefixes = {".".join(key.split(".")[:4]) for key in checkpoint.other_weights}
    assert any(prefix.startswith("detector.backbone.vision_backbone.convs") for prefix in prefixes)
    assert any(prefix.startswith("tracker.sam_mask_decoder") for prefix in prefixes)
    assert not any("trunk" in prefix or "language" in prefix for prefix in prefixes)
    merged = write_merged_file(tmp_path / "merged.pt", make_student())
    words = ["--finetune-ckpt", str(tmp_path / STEP_1), "--pretrained", str(merged)]
    assert convert(words) == 0, "and all of it goes into the merged file"
    weights = read_state_dict(tmp_path / "merged_geometry.pt")[0]
    for key, value in checkpoint.other_weights.items():
        assert torch.equal(weights[key], value.to(weights[key].dtype)), key  # the teacher's file is in float16


def test_the_teacher_is_asked_once_where_prompts_are_fixed(finetune_world, tmp_path):
    """D-96: in the second epoch every answer is known, and with no step in between the loss would be the same."""
    cfg = finetune_world.finetune(
        "cache",
        DATA__NUM_SAMPLES=2,
        PROMPTS__FIXED=True,
        DISTILL__TEACHER_CACHE_MB=8,
        TRAIN__EPOCHS=2,
        TRAIN__BASE_LR=0.0,
        TRAIN__WARMUP_LR=0.0,
        TRAIN__MIN_LR=0.0,
        VAL__ENABLE=False,
    )
    assert finetune(cfg, tmp_path) == 0
    first, second = read_metrics(tmp_path, "train")
    assert (first["cache_hits"], second["cache_hits"]) == (0.0, 1.0)
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)


def test_a_cache_in_several_processes_is_warned_of(finetune_world):
    """D-96: each process meets the images of the others too."""
    cfg = finetune_world.finetune("caches", PROMPTS__FIXED=True, DISTILL__TEACHER_CACHE_MB=8)
    args = build_parser().parse_args(["--cfg", str(cfg)])
    for world_size in (1, 3):
        lines = prepare_run(args, RunContext(torch.device("cpu"), world_size=world_size)).lines()
        warned = [line for line in lines if "each of 3 processes has a teacher cache of its own" in line]
        assert len(warned) == (world_size == 3)


def test_the_teacher_s_trunk_is_never_there_with_stored_embeddings(finetune_world, tmp_path, monkeypatch):
    """D-90: looked for among all living objects when the first step begins; what the preflight hashed is gone."""
    found = []

    def living() -> list[ViT]:
        gc.collect()
        return [each for each in gc.get_objects() if type(each) is ViT]

    others = living()  # of tests that ran before in this process
    kept = {id(each) for each in others}

    def look(run_self):
        found.append([each for each in living() if id(each) not in kept])

    monkeypatch.setattr(Trainer, "train", look)
    assert finetune(finetune_world.finetune("trunk"), tmp_path / "stored") == 0
    assert finetune(finetune_world.finetune("trunk"), tmp_path / "online", "--online-teacher") == 0
    stored, online = ([module for module in each if not next(module.parameters()).is_meta] for each in found)
    assert not stored and len(online) == 1


def test_the_plan_is_printed_and_a_dry_run_computes_nothing(finetune_world, tmp_path, capfd):
    cfg = finetune_world.finetune("plan", TRAIN__EPOCHS=5, DISTILL__ROUTE_DETECTOR=0.5, MODEL__TRAIN_NECK=True)
    assert finetune(cfg, tmp_path / "run", "--dry-run", "--accumulation-steps", "3") == 0
    printed = capfd.readouterr().out
    for text in (
        f"start     {finetune_world.start} (epoch 3, step 40)",
        "detector x 0.5, SAM heads x 1; neck trained too",
        "up to 2 objects per image, box : points : both = 1 : 1 : 1",
        "6 train, 2 val",
        "6 images per step: 2 x 3 accumulated x 1 processes",
        "5 (5 epochs of 1)",
        "MB per checkpoint",
    ):
        assert text in printed, text
    student = sum(parameter.numel() for parameter in make_student().parameters())
    shown = float(printed.split("plan: ")[1].split(" M")[0]) * 1e6
    assert shown > student + 1e4, "the neck is counted"
    assert not (tmp_path / "run").exists()


def test_random_weights_have_to_be_asked_for_by_name(finetune_world, tmp_path, capfd):
    """D-89."""
    cfg = finetune_world.finetune("random", MODEL__PRETRAINED="random", VAL__ENABLE=False)
    assert finetune(cfg, tmp_path, "--max-steps", "1") == 0
    assert "RANDOM weights, as MODEL.PRETRAINED random says" in capfd.readouterr().out


def test_a_run_is_not_continued_from_another_student(finetune_world, finished, tmp_path, capfd):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    cfg = finetune_world.finetune("finished", TRAIN__EPOCHS=3, MODEL__PRETRAINED="random")
    assert finetune(cfg, run) == 2
    stderr = capfd.readouterr().err
    assert "belongs to another run" in stderr and "initial_student_sha256" in stderr
    assert not (run / "ckpt_epoch_2.pth").exists()
