"""``train_memory_stage2.py`` from end to end on a small world: tree, plan, what is trained, resume, final file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from fixtures_data import make_sa1b_tree
from torch import Tensor
from training_world import BACKBONE, TEACHER_FILE, TINY, MemoryWorld, train_memory

from sam3.config import Sam3Config, StudentConfig
from sam3.model.efficient_sam3_model_builder import (
    build_efficient_sam3_tracker,
    build_efficient_sam3_train,
    load_efficient_sam3_checkpoint,
)
from sam3.model.efficient_sam3_train import EfficientSam3Train, is_trained
from sam3_train.checkpoint import load_checkpoint
from sam3_train.log import read_metrics
from sam3_train.trainer import Trainer
from stage2.config import get_defaults
from stage2.trained_memory import read_trained_memory


@pytest.fixture(scope="module")
def finished(memory_world: MemoryWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of clips of two and of three frames."""
    run = tmp_path_factory.mktemp("finished") / "run"
    cfg = memory_world.config("finished", TRAIN__EPOCHS=2, CLIPS__LENGTHS=[2, 3], TRAIN__WEIGHT_DECAY=0.0)
    assert train_memory(cfg, run) == 0
    return run


def weights_of(path: Path) -> dict[str, Tensor]:
    """Of the model, without what is counted beside it."""
    return {k: v for k, v in torch.load(path, weights_only=True)["model"].items() if is_trained(k)}


def test_the_run_leaves_the_documented_tree(finished: Path) -> None:
    """7.6 (29): the files that README names, `model_final.pth` among them."""
    names = {path.name for path in finished.iterdir()}
    assert {"config.json", "log_rank0.txt", "metrics.jsonl", "ckpt_epoch_0.pth", "ckpt_epoch_1.pth"} <= names
    assert {"best.pth", "last.json", "model_final.pth"} <= names
    record = json.loads((finished / "config.json").read_text())
    assert (record["num_train_videos"], record["num_val_videos"], record["world_size"]) == (4, 1, 1)
    assert record["start"]["file"] == "student.pt" and len(record["start"]["sha256"]) == 64
    assert record["identity"]["stage"] == "stage2"
    log = (finished / "log_rank0.txt").read_text()
    assert "2 epochs of 2 steps (4 clips)" in log and "clips/s" in log


def test_losses_and_validation_are_logged(finished: Path) -> None:
    """D-122 and D-126: an epoch of four videos has two steps, and held-out videos pick the best."""
    steps = read_metrics(finished, "train")
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert {"loss", "focal", "dice", "iou", "object_score", "grad_norm"} <= steps[0].keys()
    assert all(record["grad_norm"] > 0 for record in steps)
    validations = read_metrics(finished, "val")
    assert len(validations) == 2 and {"j_and_f", "j_and_f_mask", "iou"} <= validations[0].keys()
    best = load_checkpoint(finished / "best.pth")
    assert best["best"]["value"] == pytest.approx(max(record["j_and_f"] for record in validations))


def test_every_trained_weight_moves_and_no_other_is_in_a_checkpoint(finished: Path, memory_world: MemoryWorld) -> None:
    """Without weight decay, so that nothing but a gradient moves them. The embedding of absence needs a clip with an
    object that is away for a while and back: `test_a_step_moves_all_that_is_trained_and_nothing_else`.
    """
    torch.manual_seed(0)
    start = build_efficient_sam3_train(memory_world.base, device="cpu").trained_state()
    end = weights_of(finished / "ckpt_epoch_1.pth")
    assert end.keys() == start.keys()
    still = [name for name, value in start.items() if torch.equal(value, end[name])]
    assert set(still) <= {"no_obj_embed_spatial"}


def test_the_final_file_is_the_whole_tracker_and_knows_where_it_comes_from(
    finished: Path, memory_world: MemoryWorld
) -> None:
    """D-125: it is called model_final.pth, as the launcher says; it opens strictly and without a backbone."""
    final, last = finished / "model_final.pth", weights_of(finished / "ckpt_epoch_1.pth")
    assert weights_of(final).keys() == last.keys()
    assert all(torch.equal(value, last[name]) for name, value in weights_of(final).items())
    config = TINY.replace(student=StudentConfig(BACKBONE)).with_efficient_memory()
    tracker = build_efficient_sam3_tracker(config=config, device="cpu")
    record = load_efficient_sam3_checkpoint(tracker, final)
    assert Sam3Config.from_dict(record["metadata"]["model"]) == config
    assert (record["epoch"], record["step"], record["is_ema"]) == (1, 4, False)
    assert load_checkpoint(finished / "best.pth")["start"] == record["start"], (
        "any of them names the file it began with"
    )
    assert record["start"]["file"] == "student.pt" and record["config"]["CLIPS"]["LENGTHS"] == [2, 3]
    state = tracker.state_dict()
    heads = build_efficient_sam3_train(memory_world.base, device="cpu").state_dict()
    assert all(torch.equal(state[n], heads[n]) for n in state if not is_trained(n))
    trained = read_trained_memory(final)
    assert trained.weights.keys() == last.keys() and not trained.left_out


def test_the_same_command_again_changes_nothing(finished: Path, memory_world: MemoryWorld, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "model_final.pth").unlink()
    cfg = memory_world.config("finished", TRAIN__EPOCHS=2, CLIPS__LENGTHS=[2, 3], TRAIN__WEIGHT_DECAY=0.0)
    assert train_memory(cfg, run) == 0
    again, before = weights_of(run / "model_final.pth"), weights_of(finished / "model_final.pth")
    assert all(torch.equal(value, again[name]) for name, value in before.items())


def test_each_trained_parameter_is_in_one_group_and_no_other_in_any(
    memory_world: MemoryWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D-127; vectors and tables are not decayed (D-122)."""
    trainers: list[Trainer] = []
    monkeypatch.setattr(Trainer, "train", lambda self: trainers.append(self))
    monkeypatch.setattr("stage2.run.write_final", lambda *args: None)
    assert train_memory(memory_world.config("groups"), tmp_path / "run") == 0
    (learner,) = trainers[0].learners
    grouped = [p for group in learner.optimizer.param_groups for p in group["params"]]
    trained = [p for p in learner.task.parameters() if p.requires_grad]
    assert len(grouped) == len({id(p) for p in grouped}) == len(trained)
    assert {id(p) for p in grouped} == {id(p) for p in trained}
    model = learner.task.model
    assert {n for n, p in model.named_parameters() if p.requires_grad} == model.trained_state().keys()
    decayed = {id(p) for group in learner.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    tables = ("norm", "bias", "maskmem_tpos_enc", "no_obj_embed_spatial", "latents")
    assert not [n for n, p in model.named_parameters() if id(p) in decayed and (n.endswith(tables) or ".norm" in n)]


def test_a_dry_run_says_what_would_happen_and_leaves_nothing(
    memory_world: MemoryWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = memory_world.config("dry", CLIPS__LENGTHS=[2, 4], TRAIN__EPOCHS=4, DISTILL__MASK=0.5)
    words = ["--dry-run", "--subset_fraction", "0.5", "--batch_size", "1", "--data_path", str(memory_world.videos)]
    assert train_memory(cfg, tmp_path / "run", *words) == 0
    shown = capsys.readouterr().out
    for part in (
        "64 tokens of a frame instead of 324 (5x)",
        "fresh weights; backbone student demo_cnn of",
        "2 train (0.5 of the data set), 1 held out",
        "2 frames, 4 frames from epoch 2, up to 2 objects",
        "mask : box : click = 0.5 : 0.25 : 0.25",
        "20 focal + 1 dice + 1 iou + 1 object_score; focal alpha 0.25, gamma 2",
        "the full memory: 0.5 mask",
        "8 (4 epochs of 2)",
    ):
        assert part in shown, part
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fraction", ["0.01", "0.5"])
def test_a_fraction_of_the_videos_is_one_at_least(
    fraction: str, memory_world: MemoryWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """D-126, 7.6 (26): a tiny subset makes steps, also where a batch is larger than it."""
    cfg = memory_world.config("subset")
    words = ["--dry-run", "--subset_fraction", fraction, "--batch_size", "4"]
    assert train_memory(cfg, tmp_path / "run", *words) == 0
    shown = capsys.readouterr().out
    assert f"{max(1, round(float(fraction) * 4))} train" in shown and "(1 epochs of 1)" in shown


def test_a_run_on_cached_features_does_not_need_the_backbone(
    finished: Path, memory_world: MemoryWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D-121: they are computed once; the second run never asks the backbone."""
    plain = {f"AUGMENT__{name}": 0.0 for name in get_defaults().AUGMENT}
    cfg = memory_world.config("cached", DATA__FEATURE_CACHE=tmp_path / "cache", FORWARD__FEATURE_SCALE=0.0, **plain)
    assert train_memory(cfg, tmp_path / "first") == 0
    files = sorted((tmp_path / "cache").rglob("*.npy"))
    assert len(files) == 5
    monkeypatch.setattr(EfficientSam3Train, "clip_features", lambda *args, **kwargs: pytest.fail("asked the backbone"))
    assert train_memory(cfg, tmp_path / "second") == 0
    first, second = (weights_of(tmp_path / name / "model_final.pth") for name in ("first", "second"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    record = json.loads((tmp_path / "first/config.json").read_text())
    assert record["feature_scale"] > 0 and record["feature_scale"] != 1.0


def test_distillation_images_and_an_average_in_one_run(memory_world: MemoryWorld, tmp_path: Path) -> None:
    """The optional parts together: the full memory as teacher, images as still clips, both more losses, EMA."""
    photos = make_sa1b_tree(tmp_path / "photos", train=range(2), val=range(0))
    cfg = memory_world.config(
        "all",
        DATA__IMAGES_PATH=photos,
        DATA__IMAGE_SHARE=0.5,
        LOSS__TEMPORAL=0.1,
        LOSS__RECONSTRUCTION=0.1,
        LOSS__ABSENT=0.5,
        DISTILL__MASK=0.5,
        DISTILL__FEATURES=0.1,
        DISTILL__POINTERS=0.1,
        DISTILL__FORCED_SHARE=0.25,
        TRAIN__EMA_DECAY=0.5,
        VAL__ENABLE=False,
    )
    run = tmp_path / "run"
    assert train_memory(cfg, run) == 0
    steps = read_metrics(run, "train")
    assert len(steps) == 4, "two batches of clips, two of images"
    terms = {"temporal", "reconstruction", "absent", "teacher_mask", "teacher_features", "teacher_pointers"}
    assert terms <= set().union(*steps)
    state = load_checkpoint(run / "ckpt_epoch_0.pth")
    final = read_trained_memory(run / "model_final.pth")
    assert final.is_ema and not final.left_out
    assert all(torch.equal(value, state["ema"][name]) for name, value in final.weights.items())
    assert not all(torch.equal(value, state["model"][name]) for name, value in final.weights.items())


def test_a_trained_memory_is_trained_on(finished: Path, memory_world: MemoryWorld, tmp_path: Path) -> None:
    """--pretrained starts from its weights; a new run's counters start at zero."""
    cfg = memory_world.config("more", TRAIN__BASE_LR=0.0, TRAIN__WARMUP_LR=0.0, TRAIN__MIN_LR=0.0, VAL__ENABLE=False)
    words = ["--pretrained", str(finished / "model_final.pth"), "--max-steps", "1"]
    assert train_memory(cfg, tmp_path / "run", *words) == 0
    start, end = weights_of(finished / "model_final.pth"), weights_of(tmp_path / "run/model_final.pth")
    assert all(torch.equal(value, end[name]) for name, value in start.items())
    assert [record["step"] for record in read_metrics(tmp_path / "run", "train")] == [1]


def test_a_new_memory_starts_near_the_full_one(
    memory_world: MemoryWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """D-118: everything that can be taken from the full memory is; a continued run does not start again."""
    cfg = memory_world.config(
        "start",
        MODEL__START="full",
        MODEL__START_CLIPS=2,
        MODEL__SAM3_CHECKPOINT=TEACHER_FILE,
        MODEL__MEMORY__NUM_LATENTS=0,
        MODEL__MEMORY__NUM_LATENTS_2D=64,
        TRAIN__SAVE_EVERY_STEPS=1,
        TRAIN__KEEP_LAST=5,
        VAL__ENABLE=False,
    )
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    assert train_memory(cfg, whole) == 0
    assert "is still missed" in capsys.readouterr().out
    assert 0 < json.loads((whole / "config.json").read_text())["start_error"] < 1
    assert train_memory(cfg, rest, "--resume", str(whole / "ckpt_step_00000001.pth")) == 0
    assert "is still missed" not in capsys.readouterr().out
    first, second = weights_of(whole / "model_final.pth"), weights_of(rest / "model_final.pth")
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_half_precision_trains_every_weight(memory_world: MemoryWorld, tmp_path: Path) -> None:
    """Defect 1 of the published code: autocast that is entered once keeps the first step's weights for ever."""
    cfg = memory_world.config("half", TRAIN__WEIGHT_DECAY=0.0, AMP_DTYPE="bf16", VAL__ENABLE=False)
    run = tmp_path / "run"
    assert train_memory(cfg, run, "--max-steps", "1") == 0
    torch.manual_seed(0)
    start = build_efficient_sam3_train(memory_world.base, device="cpu").trained_state()
    end = weights_of(run / "model_final.pth")
    assert end["mem_proj.weight"].dtype == torch.float32
    still = [name for name, value in start.items() if torch.equal(value, end[name])]
    assert set(still) <= {"no_obj_embed_spatial"}


def test_the_forced_share_is_one_of_optimizer_steps(memory_world: MemoryWorld, tmp_path: Path) -> None:
    """Of 4 steps of 2 batches the first two; what has no part in them rests, and begins alike in a continued run."""
    cfg = memory_world.config(
        "forced",
        DATA__BATCH_SIZE=1,
        DISTILL__FEATURES=1.0,
        DISTILL__FORCED_SHARE=0.5,
        TRAIN__EPOCHS=2,
        TRAIN__ACCUMULATION_STEPS=2,
        TRAIN__SAVE_EVERY_STEPS=1,
        TRAIN__KEEP_LAST=9,
        VAL__ENABLE=False,
    )
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    assert train_memory(cfg, whole) == 0
    assert ["focal" in record for record in read_metrics(whole, "train")] == [False, False, True, True]
    first, second, last = (weights_of(whole / f"ckpt_{name}.pth") for name in ("step_00000001", "epoch_0", "epoch_1"))
    written = [name for name in first if name.startswith("maskmem_backbone.")]
    assert written and all(torch.equal(first[name], second[name]) for name in written)
    assert not any(torch.equal(second[name], last[name]) for name in written)
    assert not torch.equal(first["spatial_perceiver.latents"], second["spatial_perceiver.latents"])
    assert train_memory(cfg, rest, "--resume", str(whole / "ckpt_step_00000001.pth")) == 0
    continued = weights_of(rest / "ckpt_epoch_1.pth")
    assert all(torch.equal(value, continued[name]) for name, value in last.items())
