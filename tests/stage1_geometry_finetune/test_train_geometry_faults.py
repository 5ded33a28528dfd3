"""What is wrong with a fine-tune ends it before it computes anything, in one go and without a traceback."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from finetune_world import FinetuneWorld, finetune, make_student, write_merged_file, write_stage1_checkpoint
from geometry_world import TEACHER_FILE
from stage1_world import TINY, make_random_teacher, make_store

from sam3.preprocess import Preprocess
from sam3_train.checkpoint import load_checkpoint, save_checkpoint
from sam3_train.embeddings import EmbeddingStore
from sam3_train.log import read_metrics


def refusal(cfg: Path, output: Path, capfd, *words: str) -> str:
    """The message of a run that must not start."""
    assert finetune(cfg, output, *words) == 2
    stderr = capfd.readouterr().err
    assert "Traceback" not in stderr
    assert not list(output.glob("*.pth"))
    return stderr


SETTINGS = {
    "no start": ({"MODEL__PRETRAINED": ""}, "MODEL.PRETRAINED (--pretrained) is empty: name the merged file"),
    "missing start": ({"MODEL__PRETRAINED": "no/such.pth"}, "MODEL.PRETRAINED: there is no file no/such.pth"),
    "teacher as start": ({"MODEL__PRETRAINED": TEACHER_FILE}, "holds SAM 3's own trunk and no student"),
    "backbone": (
        {"MODEL__BACKBONE": "efficientvit_b0"},
        "holds the student demo_cnn, but the settings ask for efficientvit_b0: name this student's merged file",
    ),
    "unknown backbone": ({"MODEL__BACKBONE": "resnet"}, "MODEL.BACKBONE: "),
    "fusion": ({"MODEL__FUSE_STRIDE16": True}, "but the settings ask for demo_cnn with fused stride 16"),
    "no heads": ({"MODEL__SAM3_CHECKPOINT": "no/sam3.pt"}, "MODEL.SAM3_CHECKPOINT: there is no file no/sam3.pt"),
    "hub heads": ({"MODEL__SAM3_CHECKPOINT": ""}, "MODEL.SAM3_CHECKPOINT is empty: only the preset sam3 has a file"),
    "no route": ({"DISTILL__ROUTE_SAM": 0.0}, "DISTILL.ROUTE_DETECTOR and DISTILL.ROUTE_SAM are both 0"),
    "no loss": (
        {f"DISTILL__{name}": 0.0 for name in ("EMBEDDING", "MASK_BCE", "MASK_DICE", "SCORE", "PRESENCE", "BOX")},
        "there is no loss",
    ),
    "no loss of this route": (
        {f"DISTILL__{name}": 0.0 for name in ("EMBEDDING", "MASK_BCE", "MASK_DICE", "SCORE", "PRESENCE")},
        "BOX without ROUTE_DETECTOR is the only other one: there is no loss",
    ),
    "weight": ({"DISTILL__MASK_DICE": float("inf")}, "DISTILL.MASK_DICE: inf is out of range"),
    "cache": ({"DISTILL__TEACHER_CACHE_MB": 10}, "prompts come back only with PROMPTS.FIXED True"),
    "prompts": ({"PROMPTS__POINT_SAMPLING": "middle", "PROMPTS__NUM_POINTS": [2, 1]}, "'middle' is not one of"),
    "batch": ({"DATA__BATCH_SIZE": 7}, "DATA.BATCH_SIZE 7 over 1 processes is more than the 6 training images"),
    "no store": ({"DISTILL__TEACHER_EMBED_PATH": "no/store"}, "no/store"),
    "views": ({"DISTILL__NO_RAND": False}, "was exported with views NO_RAND True"),
    "letterbox": ({"DATA__PREPROCESS__MODE": "letterbox"}, "'mode': 'letterbox'"),
    "resume": ({"MODEL__RESUME": "no/ckpt.pth"}, "MODEL.RESUME: there is no checkpoint no/ckpt.pth"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_wrong_setting_is_named(finetune_world: FinetuneWorld, tmp_path, capfd, name):
    settings, message = SETTINGS[name]
    cfg = finetune_world.finetune("wrong", **settings)
    assert message in refusal(cfg, tmp_path / "run", capfd)
    assert not (tmp_path / "run").exists()


def test_everything_wrong_is_said_at_once(finetune_world, tmp_path, capfd):
    cfg = finetune_world.finetune(
        "many",
        MODEL__PRETRAINED="no/such.pth",
        MODEL__SAM3_CHECKPOINT="no/sam3.pt",
        DISTILL__TEACHER_EMBED_PATH="no/store",
        DISTILL__MATCH_TOP=0,
        PROMPTS__MAX_OBJECTS=0,
    )
    stderr = refusal(cfg, tmp_path / "run", capfd)
    assert "5 problems" in stderr
    for text in ("no/such.pth", "no/sam3.pt", "no/store", "DISTILL.MATCH_TOP: 0", "PROMPTS"):
        assert text in stderr, text


def test_an_unknown_key_and_flag_are_named(finetune_world, tmp_path, capfd):
    cfg = finetune_world.finetune("typo")
    assert "did you mean PROMPTS.MAX_OBJECTS" in refusal(cfg, tmp_path, capfd, "--opts", "PROMPTS.MAX_OBJECT", "3")
    with pytest.raises(SystemExit) as ended:
        finetune(cfg, tmp_path, "--disable-amp")
    assert ended.value.code == 2, "D-95: AMP_ENABLE is the one switch, spelt as in stage 1"


def test_a_folded_student_is_refused_with_the_remedy(finetune_world, tmp_path, capfd):
    merged = write_merged_file(tmp_path / "folded.safetensors", make_student(), fold=True)
    stderr = refusal(finetune_world.finetune("folded"), tmp_path / "run", capfd, "--pretrained", str(merged))
    assert "folded for deployment and cannot be trained" in stderr and "without --fuse" in stderr


def test_a_student_that_saw_other_pixels_is_refused(finetune_world, tmp_path, capfd):
    """D-85: stretch and letterbox are told apart, and both are printed."""
    letterbox = Preprocess.letterbox_imagenet(TINY.image_size_px)
    start = write_stage1_checkpoint(tmp_path / "start.pth", make_student(), letterbox)
    stderr = refusal(finetune_world.finetune("pixels"), tmp_path / "run", capfd, "--pretrained", str(start))
    assert "'mode': 'stretch'" in stderr and "'mode': 'letterbox'" in stderr


def test_a_merged_file_with_another_neck_is_refused(finetune_world, tmp_path, capfd):
    """A student tuned in front of these heads would be put behind that neck."""
    merged = write_merged_file(tmp_path / "merged.safetensors", make_student(), neck_factor=1.5)
    stderr = refusal(finetune_world.finetune("neck"), tmp_path / "run", capfd, "--pretrained", str(merged))
    assert "have other weights in SAM heads" in stderr and "Name the SAM 3 file that it was merged from" in stderr


def test_a_merged_file_is_no_teacher(finetune_world, tmp_path, capfd):
    merged = write_merged_file(tmp_path / "merged.safetensors", make_student())
    stderr = refusal(finetune_world.finetune("heads"), tmp_path / "run", capfd, "--sam3-checkpoint", str(merged))
    assert "a student stands in the trunk's place (demo_cnn)" in stderr


def test_heads_without_the_route_s_parts_are_refused(finetune_world, tmp_path, capfd):
    teacher = make_random_teacher(tmp_path / "no_detector.safetensors")
    cfg = finetune_world.finetune("parts", DISTILL__ROUTE_DETECTOR=1.0, MODEL__SAM3_CHECKPOINT=teacher)
    stderr = refusal(cfg, tmp_path / "run", capfd)
    assert "lacks text encoder, detector, segmentation head" in stderr


def test_a_store_of_another_teacher_is_refused(finetune_world, tmp_path, capfd):
    other = make_random_teacher(tmp_path / "other.safetensors", seed=3)
    store = make_store(tmp_path / "embeddings", finetune_world.data, other)
    cfg = finetune_world.finetune("teacher", DISTILL__TEACHER_EMBED_PATH=store)
    stderr = refusal(cfg, tmp_path / "run", capfd)
    assert f"the trunk in {TEACHER_FILE} has sha256" in stderr and str(store) in stderr


def test_a_student_of_another_teacher_is_pointed_out(finetune_world, tmp_path, capfd):
    state = load_checkpoint(finetune_world.start)
    state["identity"]["teacher"]["sha256"] = "b" * 64
    save_checkpoint(tmp_path / "other.pth", state)
    words = ("--pretrained", str(tmp_path / "other.pth"), "--dry-run")
    assert finetune(finetune_world.finetune("other"), tmp_path / "run", *words) == 0
    assert "warning: the student learned from a teacher with sha256 bbbbbbbbbbbb" in capfd.readouterr().out


def test_weights_that_are_not_finite_are_refused(finetune_world, tmp_path, capfd):
    student = make_student()
    with torch.no_grad():
        next(student.parameters()).fill_(float("nan"))
    start = write_stage1_checkpoint(tmp_path / "nan.pth", student)
    stderr = refusal(finetune_world.finetune("nan"), tmp_path / "run", capfd, "--pretrained", str(start))
    assert "1 weights are not finite" in stderr


# ---- images without embedding or annotation ------------------------------------------------------------------------


@pytest.fixture
def more_photos(finetune_world, tmp_path) -> Path:
    """The world's photos and two that the export has not seen."""
    data = tmp_path / "photos"
    shutil.copytree(finetune_world.data, data)
    for kind, suffix in (("images", "jpg"), ("annotations", "json")):
        for number in (50, 51):
            shutil.copy(data / f"{kind}/train/sa_0.{suffix}", data / f"{kind}/train/sa_{number}.{suffix}")
    return data


def test_images_without_an_embedding_are_counted_and_named(finetune_world, more_photos, tmp_path, capfd):
    """D-86: they are never replaced by other images."""
    cfg = finetune_world.finetune("missing", DATA__DATA_PATH=more_photos, DISTILL__MAX_MISSING_FRACTION=0.2)
    stderr = refusal(cfg, tmp_path / "run", capfd)
    assert "2 of 8 train images have no embedding, first sa_50, sa_51" in stderr
    assert "DISTILL.MAX_MISSING_FRACTION 0.2 allows 1" in stderr


def test_many_images_without_an_embedding_are_all_listed(finetune_world, more_photos, tmp_path, capfd):
    """D-86: the message names ten, the file all."""
    for kind, suffix in (("images", "jpg"), ("annotations", "json")):
        for number in range(60, 70):
            shutil.copy(more_photos / f"{kind}/train/sa_0.{suffix}", more_photos / f"{kind}/train/sa_{number}.{suffix}")
    cfg = finetune_world.finetune("many_missing", DATA__DATA_PATH=more_photos)
    stderr = refusal(cfg, tmp_path / "run", capfd)
    path = tmp_path / "run/missing_embeddings.txt"
    assert "12 of 18 train images have no embedding" in stderr and f"listed in {path}" in stderr
    assert "sa_67" in stderr and "sa_68" not in stderr
    assert path.read_text().splitlines() == [f"sa_{number}\ttrain" for number in (50, 51, *range(60, 70))]


def test_some_images_without_an_embedding_are_left_out_and_listed(finetune_world, more_photos, tmp_path, capfd):
    """D-86: up to the share that is allowed, with a count and a list."""
    cfg = finetune_world.finetune("left_out", DATA__DATA_PATH=more_photos, DISTILL__MAX_MISSING_FRACTION=0.25)
    assert finetune(cfg, tmp_path / "run", "--opts", "VAL.ENABLE", "False", "TRAIN.MAX_STEPS", "1") == 0
    assert "warning: 2 train images have no embedding and are left out" in capfd.readouterr().out
    record = json.loads((tmp_path / "run/config.json").read_text())
    assert record["num_train_images"] == 6 and record["num_missing_embeddings"] == {"train": 2}
    assert (tmp_path / "run/missing_embeddings.txt").read_text() == "sa_50\ttrain\nsa_51\ttrain\n"


@pytest.fixture
def quarantine(monkeypatch):
    """Let the store say that the export could not use some images."""

    def set_aside(*keys: str) -> None:
        check = EmbeddingStore.check_coverage

        def without_keys(store, wanted):
            found = check(store, wanted)
            return dataclasses.replace(found, quarantined={key: "not finite" for key in keys if key in list(wanted)})

        monkeypatch.setattr(EmbeddingStore, "check_coverage", without_keys)

    return set_aside


def test_images_that_the_export_set_aside_are_counted(finetune_world, tmp_path, capfd, quarantine):
    quarantine("sa_0", "sa_3")
    assert finetune(finetune_world.finetune("aside"), tmp_path / "run", "--dry-run") == 0
    printed = capfd.readouterr().out
    assert "; 2 train images that the export quarantined are left out" in printed and "4 train, 2 val" in printed


def test_a_split_whose_images_are_all_set_aside_is_refused(finetune_world, tmp_path, capfd, quarantine):
    quarantine("sa_1000", "sa_1001")
    stderr = refusal(finetune_world.finetune("all_aside"), tmp_path / "run", capfd)
    assert "no val image has an embedding, 2 were quarantined by the export, such as sa_1000 (not finite)" in stderr
    assert "(or VAL.ENABLE False)" in stderr


def test_a_data_set_without_annotations_is_refused(finetune_world, tmp_path, capfd):
    data = tmp_path / "photos"
    shutil.copytree(finetune_world.data, data)
    shutil.rmtree(data / "annotations/train")
    stderr = refusal(finetune_world.finetune("bare", DATA__DATA_PATH=data), tmp_path / "run", capfd)
    assert "train images that were looked at have no usable annotation" in stderr


def test_an_annotation_without_a_valid_mask_is_left_out_and_counted(finetune_world, tmp_path):
    """The image is listed with the reason; beyond DATA.MAX_BAD_FRACTION the run would end."""
    data = tmp_path / "photos"
    shutil.copytree(finetune_world.data, data)
    path = data / "annotations/train/sa_0.json"
    annotation = json.loads(path.read_text())
    for each in annotation["annotations"]:
        each["segmentation"] = {"size": [32, 48], "counts": [32 * 48]}
    path.write_text(json.dumps(annotation))
    cfg = finetune_world.finetune("empty", DATA__DATA_PATH=data, VAL__ENABLE=False, DATA__BATCH_SIZE=3)
    assert finetune(cfg, tmp_path / "run") == 0
    key, _, reason = (tmp_path / "run/bad_images.txt").read_text().partition("\t")
    assert key == "sa_0" and "no valid mask" in reason
    assert len(read_metrics(tmp_path / "run", "train")) == 2
    assert EmbeddingStore(finetune_world.store).read("sa_0") is not None, "the embedding was there"
