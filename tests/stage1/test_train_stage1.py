"""``train_stage1.py`` from end to end on a small world: output tree, resume, several students, online teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from stage1_world import TINY, Stage1World, make_store

from sam3.config import Sam3Config, StudentConfig
from sam3.model.student_encoder import build_student
from sam3.preprocess import Preprocess
from sam3_train.checkpoint import CheckpointManager, load_checkpoint
from sam3_train.log import read_metrics
from sam3_train.student_checkpoint import read_student
from stage1.train_stage1 import main


def train(cfg: Path | list[Path], output: Path, *words: str) -> int:
    cfgs = cfg if isinstance(cfg, list) else [cfg]
    flags = [word for path in cfgs for word in ("--cfg", str(path))]
    return main([*flags, "--output", str(output), "--device", "cpu", *words])


def model_of(run: Path, name: str = "") -> dict[str, torch.Tensor]:
    return load_checkpoint(run / (name or CheckpointManager(run).names()[0]))["model"]


def assert_same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    different = [key for key in mine if not torch.equal(mine[key], theirs[key])]
    assert not different, different[:3]


@pytest.fixture(scope="module")
def finished(world: Stage1World, tmp_path_factory) -> Path:
    """A run of two epochs."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert train(world.config("finished", TRAIN__EPOCHS=2), run) == 0
    return run


def test_the_run_leaves_the_documented_tree(finished):
    names = {path.name for path in finished.iterdir()}
    assert {"config.json", "log_rank0.txt", "ckpt_epoch_0.pth", "ckpt_epoch_1.pth", "best.pth", "last.json"} <= names
    assert not [name for name in names if ":" in name], "D-61: no colons in names"
    record = json.loads((finished / "config.json").read_text())  # D-26: JSON, not YAML
    assert record["config"]["MODEL"]["BACKBONE"] == "demo_cnn"
    assert record["identity"]["model"]["student"]["backbone"] == "demo_cnn"
    assert record["num_train_images"] == 12
    log = (finished / "log_rank0.txt").read_text()
    assert "mse" in log and "cosine" in log and "global batch 4" in log and "learning rate" in log


def test_the_loss_falls_and_each_term_is_logged(finished):
    """D-49, D-50: training and validation numbers, each term on its own."""
    steps = read_metrics(finished, "train")
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    for record in steps:
        assert record["loss"] == pytest.approx(record["mse"] + record["cosine"], rel=1e-5)
        assert {"lr", "grad_norm", "clip_fraction", "images_per_s", "data_wait_share", "global_batch"} <= record.keys()
    validations = read_metrics(finished, "val")
    assert len(validations) == 2
    assert validations[1]["similarity"] > 0


def test_a_checkpoint_reads_safely_and_says_what_it_is(finished):
    """D-45: plain types only; published names; descriptions and versions travel along."""
    state = torch.load(finished / "best.pth", weights_only=True)
    assert all(key.startswith(("backbone.model.", "head.")) for key in state["model"])
    assert Sam3Config.from_dict(state["identity"]["model"]) == TINY.replace(student=StudentConfig("demo_cnn"))
    assert Preprocess.from_dict(state["identity"]["preprocess"]) == Preprocess(TINY.image_size_px)
    assert "torch" in state["versions"]
    checkpoint = read_student(finished / "best.pth")
    assert (checkpoint.name, checkpoint.is_ema) == ("finished", False)
    assert checkpoint.metrics["loss"] == pytest.approx(state["best"]["value"])


@pytest.mark.parametrize("backbone", ["efficientvit_b0", "repvit_m0_9", "tiny_vit_5m"])
def test_one_student_of_each_family_trains(world, tmp_path, backbone):
    cfg = world.config(f"family_{backbone}", backbone, DATA__BATCH_SIZE=2)
    assert train(cfg, tmp_path, "--max-steps", "2", "--opts", "VAL.ENABLE", "False") == 0
    before, after = read_metrics(tmp_path, "train")
    assert after["loss"] < 3.0
    assert before["skipped_steps"] == after["skipped_steps"] == 0


def test_an_interrupted_run_ends_bit_for_bit_where_an_uninterrupted_one_ends(world, finished, tmp_path):
    """D-46, D-47: stopped inside an epoch, continued with the same command."""
    cfg = world.config("finished", TRAIN__EPOCHS=2)
    assert train(cfg, tmp_path, "--max-steps", "2") == 0
    stopped = load_checkpoint(tmp_path / json.loads((tmp_path / "last.json").read_text())["checkpoints"][0]["file"])
    assert (stopped["step"], stopped["position"]["batches_done"]) == (2, 2)
    assert train(cfg, tmp_path) == 0
    assert_same(model_of(tmp_path, "ckpt_epoch_1.pth"), model_of(finished, "ckpt_epoch_1.pth"))
    mine, theirs = (load_checkpoint(run / "ckpt_epoch_1.pth")["optimizer"] for run in (tmp_path, finished))
    for index, state in theirs["state"].items():
        assert all(torch.equal(mine["state"][index][name], value) for name, value in state.items())
    mine, theirs = (read_metrics(run, "train") for run in (tmp_path, finished))
    assert [r["loss"] for r in mine] == [r["loss"] for r in theirs]


def test_ema_is_saved_validated_and_read(world, tmp_path):
    """D-52."""
    assert train(world.config("ema", TRAIN__EMA_DECAY=0.5), tmp_path) == 0
    averaged, live = read_student(tmp_path / "best.pth"), read_student(tmp_path / "best.pth", use_ema=False)
    assert averaged.is_ema and not live.is_ema
    assert not torch.equal(averaged.weights["head.3.weight"], live.weights["head.3.weight"])


def test_several_students_on_one_pass_become_what_they_become_alone(world, tmp_path):
    """D-63: own optimizer, clipping, random stream and folder each; stochastic depth included (tiny_vit)."""
    names = ("demo_cnn", "tiny_vit_5m")
    cfgs = [world.config(f"multi_{name}", name, TRAIN__CLIP_GRAD=0.5, VAL__ENABLE=False) for name in names]
    assert train(cfgs, tmp_path / "together", "--max-steps", "2", "--batch-size", "2") == 0
    for cfg, name in zip(cfgs, names, strict=True):
        assert train(cfg, tmp_path / name, "--max-steps", "2", "--batch-size", "2") == 0
        assert_same(model_of(tmp_path / "together" / f"multi_{name}"), model_of(tmp_path / name))


def test_students_that_share_a_pass_must_agree_on_it(world, tmp_path, capfd):
    cfgs = [world.config("one"), world.config("two", TRAIN__BASE_LR=0.5), world.config("three", DATA__BATCH_SIZE=2)]
    assert train(cfgs, tmp_path, "--resume", "x.pth") == 2
    stderr = capfd.readouterr().err
    assert "students one and two cannot share a run: they differ in TRAIN.BASE_LR" in stderr
    assert "students one and three cannot share a run: they differ in DATA.BATCH_SIZE" in stderr
    assert "--resume names one checkpoint, but several students train" in stderr
    assert train([cfgs[0], cfgs[0]], tmp_path) == 2
    assert "two configs name the same student" in capfd.readouterr().err


def test_an_online_teacher_starts_with_the_loss_of_the_stored_one(world, finished, tmp_path):
    """No store is needed; the first loss differs by the store's float16 alone."""
    cfg = world.config("finished", TRAIN__EPOCHS=2, DISTILL__TEACHER_EMBED_PATH="there/is/none")
    assert train(cfg, tmp_path, "--online-teacher", "--max-steps", "1", "--opts", "VAL.MASK_AGREEMENT", "True") == 0
    online, stored = read_metrics(tmp_path, "train")[0], read_metrics(finished, "train")[0]
    for name in ("loss", "mse", "cosine"):
        assert online[name] == pytest.approx(stored[name], rel=1e-3)
    assert 0 <= read_metrics(tmp_path, "val")[0]["mask_iou"] <= 1
    description = load_checkpoint(tmp_path / "best.pth")["identity"]["teacher"]
    assert description == load_checkpoint(finished / "best.pth")["identity"]["teacher"]


def test_the_recipe_for_a_plain_folder_of_photos(world, tmp_path):
    """No SA-1B, no annotation, no store: the teacher in the loop on random views, masks compared on held-out photos."""
    cfg = world.config(
        "folder",
        DATA__DATASET="folder",
        DATA__DATA_PATH=world.data / "images/train",
        DATA__VAL_FRACTION=0.3,
        DATA__BATCH_SIZE=2,
        DISTILL__ONLINE_TEACHER=True,
        DISTILL__NO_RAND=False,
        VAL__MASK_AGREEMENT=True,
    )
    assert train(cfg, tmp_path, "--max-steps", "2") == 0
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["num_train_images"] + record["num_val_images"] == 12
    assert 0 <= read_metrics(tmp_path, "val")[0]["mask_iou"] <= 1


def demo_student_sizes() -> tuple[int, int]:
    """Parameters of the demo student, and bytes of its checkpoint: float32 weights, statistics and two moments."""
    student = build_student(TINY.replace(student=StudentConfig("demo_cnn")))
    trained = sum(parameter.numel() for parameter in student.parameters())
    return trained, 4 * (sum(value.numel() for value in student.state_dict().values()) + 2 * trained)


def test_the_plan_is_printed_and_a_dry_run_computes_nothing(world, tmp_path, capfd):
    """D-48, D-66: images, steps, effective rate, global batch, parameters, disk."""
    cfg = world.config("plan", TRAIN__LR_SCALING="linear", TRAIN__EPOCHS=5)
    assert train(cfg, tmp_path / "run", "--dry-run", "--accumulation-steps", "2") == 0
    printed = capfd.readouterr().out
    trained, checkpoint_bytes = demo_student_sizes()
    for text in (
        f"plan: {trained / 1e6:.2f} M parameters",
        "12 train, 3 val",
        "8 images per step: 4 x 2",
        "10 (5 epochs of 2)",
        "1.56e-05",
        f"{checkpoint_bytes / 1e6:.1f} MB per checkpoint",
    ):
        assert text in printed, text
    assert not (tmp_path / "run").exists()


def test_the_run_folder_follows_from_the_config_file(world, tmp_path, monkeypatch):
    """D-43: two students never share one by default."""
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        cfg = world.config(name, VAL__ENABLE=False)
        assert main(["--cfg", str(cfg), "--device", "cpu", "--max-steps", "1"]) == 0
        assert (tmp_path / "output/stage1" / name / "ckpt_step_00000001.pth").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "efficientvit_b0"}, "model.student.backbone is 'efficientvit_b0' now and was 'demo_cnn'"),
        ({"MODEL__FUSE_STRIDE16": True}, "model.student.fuse_stride16 is True now and was False"),
        ({"DATA__NUM_SAMPLES": 8}, "train_images_sha256"),
        ({"DATA__BATCH_SIZE": 2}, "the global batch is 2"),
    ],
    ids=["backbone", "fusion", "images", "batch"],
)
def test_a_run_is_not_continued_with_another_student_or_other_data(world, finished, tmp_path, capfd, changes, message):
    """D-43, D-47: a second student in the same folder is refused, nothing is lost."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = sorted((path.name, path.stat().st_size) for path in run.iterdir() if path.suffix == ".pth")
    assert train(world.config("other", **{"TRAIN__EPOCHS": 2, **changes}), run) == 2
    assert message in capfd.readouterr().err
    assert before == sorted((path.name, path.stat().st_size) for path in run.iterdir() if path.suffix == ".pth")


def test_other_files_in_the_run_folder_are_not_resumed_from(world, finished, tmp_path):
    """D-44: a newer .pth that is no checkpoint of this run, e.g. a merged file, is never looked at."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "ckpt_epoch_9.pth").write_bytes(b"half written")
    torch.save({"model": {"detector.x": torch.zeros(1)}}, run / "zz_merged.pth")
    assert train(world.config("finished", TRAIN__EPOCHS=3), run) == 0
    assert load_checkpoint(run / "ckpt_epoch_2.pth")["step"] == 9


def test_a_store_made_with_other_preprocessing_is_refused_and_both_are_printed(world, tmp_path, capfd):
    """D-01: student and teacher must see the same pixels."""
    letterboxed = Preprocess.letterbox_imagenet(TINY.image_size_px)
    store = make_store(tmp_path / "letterboxed", world.data, world.teacher, letterboxed)
    cfg = world.config("mismatch", DISTILL__TEACHER_EMBED_PATH=store)
    assert train(cfg, tmp_path / "run") == 2
    stderr = capfd.readouterr().err
    assert "'mode': 'stretch'" in stderr and "'mode': 'letterbox'" in stderr
    node = {"MODE": "letterbox", "MEAN": list(letterboxed.mean), "STD": list(letterboxed.std)}
    settings = {f"DATA__PREPROCESS__{key}": value for key, value in node.items()}
    cfg = world.config("match", DISTILL__TEACHER_EMBED_PATH=store, **settings)
    assert train(cfg, tmp_path / "run", "--max-steps", "1") == 0


def test_views_must_be_those_of_the_export(world, tmp_path, capfd):
    """D-27: a store without augmentation is not trained with flips."""
    assert train(world.config("views"), tmp_path / "run", "--opts", "DISTILL.NO_RAND", "False") == 2
    assert "was exported with views NO_RAND True, the training config asks for NO_RAND False" in capfd.readouterr().err


def test_images_without_an_embedding_are_found_before_training(world, tmp_path, capfd):
    """D-42: with their number and the first names; the remedy is named."""
    data = tmp_path / "photos"
    shutil.copytree(world.data, data)
    for name in ("sa_77", "sa_78"):
        shutil.copy(data / "images/train/sa_0.jpg", data / f"images/train/{name}.jpg")
        shutil.copy(data / "annotations/train/sa_0.json", data / f"annotations/train/{name}.json")
    assert train(world.config("coverage"), tmp_path / "run", "--data-path", str(data)) == 2
    stderr = capfd.readouterr().err
    assert "2 of 14 train images have no embedding, first sa_77, sa_78: run the export for the train split" in stderr


def test_a_store_of_another_model_size_is_refused(world, tmp_path, capfd):
    """D-12: shapes are stated, never guessed."""
    cfg = world.config("shape", MODEL__PRESET="sam3")
    assert train(cfg, tmp_path / "run") == 2
    assert "embeddings have shape (128, 18, 18), (1024, 72, 72) is wanted" in capfd.readouterr().err


def test_a_full_disk_is_found_before_training(world, tmp_path, capfd, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert train(world.config("disk"), tmp_path / "run") == 2
    # Two that stay, the best, and the one being written.
    wanted = f"the checkpoints take {4 * demo_student_sizes()[1] / 1e9:.2f} GB, 0.00 GB are free"
    assert wanted in capfd.readouterr().err
