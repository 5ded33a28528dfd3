"""``convert_geometry_finetune.py``: exactly the fine-tuned weights are replaced, or nothing is written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import make_model
from PIL import Image
from stage1_world import TINY
from students import RELEASED, meta_student
from torch import Tensor

import sam3
from sam3 import Sam3Config
from sam3.checkpoint_io import read_state_dict, sha256_file, write_merged
from sam3.checkpoint_keys import STUDENT_PREFIX, TRUNK_PREFIX, student_to_published
from sam3.checkpoint_merge import MergeError, replace_weights, shapes_of
from sam3.checkpoint_parts import NECK_PREFIX
from sam3.config import StudentConfig
from sam3.model.student_encoder import StudentEncoder, build_student, fuse_for_inference
from sam3.model_builder import assemble_image_model
from sam3.preprocess import Preprocess
from sam3.released_names import released_state_dict
from sam3_train.checkpoint import load_checkpoint, save_checkpoint, state_dict_sha256
from sam3_train.merged_proof import MergedProof
from sam3_train.student_checkpoint import build_trained_student, read_student
from stage1.convert_stage1_weights import main as convert_stage1
from stage1_geometry_finetune.convert_geometry_finetune import main
from stage1_geometry_finetune.merge import ConvertRequest, ConvertResult

TRUNK_SHA256 = "a" * 64
NECK_KEY = NECK_PREFIX + "0.conv_1x1.bias"
CHANGED_NECK_KEYS = 2


def make_student(backbone: str, seed: int, **options: bool) -> StudentEncoder:
    """A student whose BatchNorm statistics have moved, in eval mode."""
    torch.manual_seed(seed)
    student = build_student(TINY.replace(student=StudentConfig(backbone, **options)))
    with torch.no_grad():
        student(torch.randn(2, 3, TINY.image_size_px, TINY.image_size_px))
    return student.eval()


def write_pretrained(path: Path, student: StudentEncoder, dtype: torch.dtype | None = None, **record: Any) -> Path:
    """A merged file as stage 1 writes it, around the whole tiny model."""
    model = TINY.replace(student=student.student)
    weights = released_state_dict(whole_model_around(student))
    provenance = {"teacher_file": "sam3.pt", "teacher_trunk_sha256": TRUNK_SHA256, "epoch": 15}
    metadata = {"variant": "es_x", "model": model.to_dict(), "preprocess": Preprocess(TINY.image_size_px).to_dict()}
    write_merged(path, weights, {**metadata, "provenance": provenance, **record}, dtype)
    return path


def whole_model_around(student: StudentEncoder):
    model = make_model(TINY.replace(student=student.student))
    model.backbone.vision_backbone.trunk.model.load_state_dict(student.state_dict())
    return model


def write_finetuned(
    path: Path, student: StudentEncoder, start: StudentEncoder, more: dict[str, Tensor] | None = None, **changes: Any
) -> Path:
    """A checkpoint of the fine-tune; ``changes`` go into its identity, those in capitals into its config."""
    backbone = student.student.backbone
    identity = {
        "model": TINY.replace(student=student.student).to_dict(),
        "preprocess": Preprocess(TINY.image_size_px).to_dict(),
        "teacher": {"sha256": TRUNK_SHA256},
        "initial_student_sha256": state_dict_sha256(student_to_published(start.state_dict(), backbone)),
        **{name: value for name, value in changes.items() if name.islower()},
    }
    settings = {name: value for name, value in changes.items() if not name.islower()}
    state = {
        "model": {**student_to_published(student.state_dict(), backbone), **(more or {})},
        "identity": identity,
        "epoch": 4,
        "step": 70,
        "metrics": {"mask_iou": 0.8},
        "config": {"MODEL": {"NAME": "es_x", "BACKBONE": backbone, **settings}},
    }
    save_checkpoint(path, state)
    return path


@pytest.fixture(scope="module")
def start() -> StudentEncoder:
    return make_student("demo_cnn", seed=0)


@pytest.fixture(scope="module")
def pretrained(start, tmp_path_factory) -> Path:
    return write_pretrained(tmp_path_factory.mktemp("merged") / "merged.pt", start)


@pytest.fixture(scope="module")
def finetuned(start, tmp_path_factory) -> Path:
    return write_finetuned(tmp_path_factory.mktemp("run") / "best.pth", make_student("demo_cnn", seed=1), start)


def convert(finetuned: Path, pretrained: Path, output: Path, *words: str) -> int:
    return main(["--finetune-ckpt", str(finetuned), "--pretrained", str(pretrained), "--output", str(output), *words])


def photo() -> Image.Image:
    generator = np.random.default_rng(5)
    return Image.fromarray(generator.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((320, 240))


@torch.no_grad()
def features_of(path: Path) -> Tensor:
    model = sam3.load_model(path, device="cpu")
    return model.backbone.vision_backbone.trunk(model.preprocess(photo())[None])[-1]


@torch.no_grad()
def trained_features(path: Path) -> Tensor:
    checkpoint = read_student(path)
    return build_trained_student(checkpoint)(checkpoint.preprocess(photo())[None])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_exactly_the_students_weights_are_replaced(pretrained, finetuned, tmp_path, suffix, capfd):
    """D-73: the new file has the trained features; every other tensor is the pretrained file's, bit for bit."""
    output = tmp_path / f"new{suffix}"
    assert convert(finetuned, pretrained, output) == 0
    assert torch.equal(features_of(output), trained_features(finetuned))
    old, new, trained = read_state_dict(pretrained)[0], read_state_dict(output)[0], load_checkpoint(finetuned)["model"]
    assert new.keys() == old.keys()
    for key, value in new.items():
        expected = trained[key.removeprefix(STUDENT_PREFIX)] if key.startswith(STUDENT_PREFIX) else old[key]
        assert torch.equal(value, expected), key
    printed = capfd.readouterr().out
    assert f"Student encoder keys extracted: {len(trained)}\nKeys matched in pretrained: {len(trained)}\n" in printed
    assert f"Replaced {len(trained)} weights of the student in merged.pt" in printed
    assert f"Total keys in output: {len(old)}" in printed
    assert "the fine-tuning began with the student of the pretrained file" in printed
    assert "teacher checked: the student learned from this SAM 3 trunk" in printed
    assert f"model = sam3.load_model({str(output)!r})" in printed
    assert [path.name for path in tmp_path.iterdir()] == [output.name], "nothing else is left behind"


def test_the_record_tells_the_whole_chain(pretrained, finetuned, tmp_path):
    """D-75: the fine-tuning in front, and under it what stage 1 wrote down; plain JSON."""
    output = tmp_path / "new.safetensors"
    assert convert(finetuned, pretrained, output) == 0
    before, record = read_state_dict(pretrained)[1], read_state_dict(output)[1]
    json.dumps(record)
    assert (record["variant"], record["model"]) == ("es_x", before["model"])
    provenance = record["provenance"]
    assert provenance["student_sha256"] == sha256_file(finetuned)
    assert provenance["teacher_trunk_sha256"] == TRUNK_SHA256
    assert (provenance["epoch"], provenance["metrics"]) == (4, {"mask_iou": 0.8})
    assert provenance["trained_parts"] == []
    assert provenance["pretrained"] == {
        "file": "merged.pt",
        "sha256": sha256_file(pretrained),
        "provenance": before["provenance"],
    }


def test_a_file_can_be_fine_tuned_again(pretrained, finetuned, tmp_path):
    """What is written is a pretrained file itself."""
    assert convert(finetuned, pretrained, tmp_path / "once.pt") == 0
    assert convert(finetuned, tmp_path / "once.pt", tmp_path / "twice.pt") == 0
    provenance = read_state_dict(tmp_path / "twice.pt")[1]["provenance"]
    assert provenance["pretrained"]["provenance"]["pretrained"]["file"] == "merged.pt"


def test_the_output_lies_beside_the_pretrained_file_by_default(start, finetuned, tmp_path):
    pretrained = write_pretrained(tmp_path / "merged.safetensors", start)
    assert main(["--finetune-ckpt", str(finetuned), "--pretrained", str(pretrained)]) == 0
    assert (tmp_path / "merged_geometry.safetensors").is_file()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_pretrained_files_precision_is_kept(start, finetuned, tmp_path, dtype):
    pretrained = write_pretrained(tmp_path / "half.safetensors", start, dtype)
    assert convert(finetuned, pretrained, tmp_path / "new.safetensors") == 0
    old, new = read_state_dict(pretrained)[0], read_state_dict(tmp_path / "new.safetensors")[0]
    assert {key: value.dtype for key, value in new.items()} == {key: value.dtype for key, value in old.items()}
    trained = load_checkpoint(finetuned)["model"]
    key = "head.3.weight"
    assert torch.equal(new[STUDENT_PREFIX + key], trained[key].to(dtype))


def test_a_folded_file_gets_the_student_folded_alike(tmp_path, capfd):
    """Its keys are those of the folded student, and it stays folded."""
    start, trained = make_student("repvit_m0_9", seed=0), make_student("repvit_m0_9", seed=1)
    pretrained = write_pretrained(tmp_path / "folded.pt", fuse_for_inference(start))
    finetuned = write_finetuned(tmp_path / "best.pth", trained, start)
    assert convert(finetuned, pretrained, tmp_path / "new.pt") == 0
    expected = trained_features(finetuned)
    assert (features_of(tmp_path / "new.pt") - expected).abs().max() < 1e-3 * expected.abs().max()
    weights, record = read_state_dict(tmp_path / "new.pt")
    assert record["model"]["student"]["fused"] is True
    num_folded = sum(key.startswith(STUDENT_PREFIX) for key in weights)
    num_trained = len(load_checkpoint(finetuned)["model"])
    assert num_folded < num_trained
    printed = capfd.readouterr().out
    assert f"Student encoder keys extracted: {num_trained}\nFolded as the pretrained file is: {num_trained} " in printed
    assert f"Keys matched in pretrained: {num_folded}\nReplaced {num_folded} weights" in printed
    assert "is not, bit for bit, the one that the fine-tuning began with" in printed


def neck_weights(pretrained: Path) -> dict[str, Tensor]:
    """A trained neck in which two keys differ from the file's."""
    weights = {k: v.clone() for k, v in read_state_dict(pretrained)[0].items() if k.startswith(NECK_PREFIX + "0.")}
    for key in sorted(weights)[:CHANGED_NECK_KEYS]:
        weights[key] += 0.25
    return weights


def test_a_trained_neck_is_replaced_and_said(start, pretrained, tmp_path, capfd):
    neck = neck_weights(pretrained)
    finetuned = write_finetuned(tmp_path / "best.pth", make_student("demo_cnn", 1), start, neck, TRAIN_NECK=True)
    assert convert(finetuned, pretrained, tmp_path / "new.pt") == 0
    assert f"Replaced {len(neck)} weights of the detector neck" in capfd.readouterr().out
    old, (new, record) = read_state_dict(pretrained)[0], read_state_dict(tmp_path / "new.pt")
    assert all(torch.equal(new[key], value) for key, value in neck.items())
    changed = [key for key in new if not torch.equal(new[key], old[key]) and not key.startswith(STUDENT_PREFIX)]
    assert len(changed) == CHANGED_NECK_KEYS
    assert record["provenance"]["trained_parts"] == ["detector neck"]


def test_a_published_file_without_a_record_is_taken(start, finetuned, tmp_path, capfd):
    """Its student is recognised by keys and shapes; preprocessing and description come from the checkpoint."""
    student = make_student("efficientvit_b0", seed=0)
    torch.save({"model": released_state_dict(whole_model_around(student))}, tmp_path / "published.pt")
    checkpoint = write_finetuned(tmp_path / "best.pth", make_student("efficientvit_b0", seed=1), student)
    assert convert(checkpoint, tmp_path / "published.pt", tmp_path / "new.pt") == 0
    assert "does not record whose neck and heads it holds" in capfd.readouterr().out
    assert read_state_dict(tmp_path / "new.pt")[1]["preprocess"] == Preprocess(TINY.image_size_px).to_dict()
    assert torch.equal(features_of(tmp_path / "new.pt"), trained_features(checkpoint))


# --- nothing is written -----------------------------------------------------------------------------------------------


def without(key: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {name: value for name, value in weights.items() if name != key}


def adding(key: str, value: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {**weights, key: value}


BIAS = "head.3.bias"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (without(STUDENT_PREFIX + BIAS), "the student in the merged file .* 1 keys are missing, such as head.3.bias"),
        (adding(STUDENT_PREFIX + "head.9.bias", torch.zeros(1)), "1 keys do not belong, such as head.9.bias"),
        (adding(STUDENT_PREFIX + BIAS, torch.zeros(3)), r"1 shapes differ: head.3.bias has shape \(3,\)"),
        (adding(TRUNK_PREFIX + "pos_embed", torch.zeros(1)), "1 keys of another trunk would stay in the file"),
        (without("tracker.no_mem_embed"), "the merged file does not load: .*tracker.no_mem_embed"),
    ],
    ids=["missing", "stale", "shape", "teacher's trunk left", "heads not whole"],
)
def test_a_pretrained_file_that_does_not_fit_writes_nothing(pretrained, finetuned, tmp_path, capfd, break_it, message):
    """D-73: a key that is missing, stale or of another shape is an error and no warning."""
    weights, metadata = read_state_dict(pretrained)
    write_merged(tmp_path / "broken.pt", break_it(weights), metadata)
    output = tmp_path / "out" / "new.pt"
    output.parent.mkdir()
    output.write_bytes(b"older")
    assert convert(finetuned, tmp_path / "broken.pt", output) == 2
    stderr = capfd.readouterr().err
    assert re.search(message, stderr), stderr
    assert "Traceback" not in stderr
    assert output.read_bytes() == b"older" and len(list(output.parent.iterdir())) == 1


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (without(BIAS), "the weights are not those of demo_cnn"),
        (adding("head.9.bias", torch.zeros(1)), "the weights are not those of demo_cnn"),
        (adding(NECK_KEY, torch.zeros(256)), "its config says MODEL.TRAIN_NECK False, but it holds 1 weights"),
        (adding("detector.transformer.x", torch.zeros(1)), "1 trained keys are of no part that can be replaced"),
    ],
    ids=["missing", "unexpected", "neck by surprise", "no part"],
)
def test_a_checkpoint_that_is_not_whole_writes_nothing(
    start, pretrained, finetuned, tmp_path, capfd, break_it, message
):
    state = load_checkpoint(finetuned)
    state["model"] = break_it(state["model"])
    save_checkpoint(tmp_path / "broken.pth", state)
    assert convert(tmp_path / "broken.pth", pretrained, tmp_path / "new.pt") == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "new.pt").exists()


def test_a_neck_of_other_shape_or_left_out_is_refused(start, pretrained, tmp_path, capfd):
    student = make_student("demo_cnn", seed=1)
    path = write_finetuned(tmp_path / "a.pth", student, start, {NECK_KEY: torch.zeros(3)}, TRAIN_NECK=True)
    assert convert(path, pretrained, tmp_path / "new.pt") == 2
    assert "shapes differ: detector.backbone.vision_backbone.convs.0.conv_1x1.bias" in capfd.readouterr().err
    path = write_finetuned(tmp_path / "b.pth", student, start, TRAIN_NECK=True)
    assert convert(path, pretrained, tmp_path / "new.pt") == 2
    assert "its config says MODEL.TRAIN_NECK True, but it holds 0 weights" in capfd.readouterr().err
    assert not (tmp_path / "new.pt").exists()


def test_a_wrong_pair_is_refused(start, pretrained, finetuned, tmp_path, capfd):
    """D-73: another backbone, another option, no student, a checkpoint of stage 1: named, and nothing is written."""
    output = tmp_path / "new.pt"
    other = write_pretrained(tmp_path / "other.pt", make_student("efficientvit_b0", seed=0))
    assert convert(finetuned, other, output) == 2
    assert "trained the student demo_cnn, but --pretrained" in capfd.readouterr().err
    fused16 = write_pretrained(tmp_path / "fused16.pt", make_student("demo_cnn", seed=0, fuse_stride16=True))
    assert convert(finetuned, fused16, output) == 2
    assert "holds demo_cnn with fused stride 16" in capfd.readouterr().err
    teacher = tmp_path / "teacher.pt"
    write_merged(teacher, released_state_dict(make_model(TINY)), {"model": TINY.to_dict()})
    assert convert(finetuned, teacher, output) == 2
    assert "holds SAM 3's own trunk and no student" in capfd.readouterr().err
    state = load_checkpoint(finetuned)
    del state["identity"]["initial_student_sha256"]
    save_checkpoint(tmp_path / "stage1.pth", state)
    assert convert(tmp_path / "stage1.pth", pretrained, output) == 2
    assert "is a checkpoint of stage 1 and not of the geometry fine-tune" in capfd.readouterr().err
    assert convert(pretrained, pretrained, output) == 2
    assert "not a training checkpoint of a student" in capfd.readouterr().err
    assert not output.exists()


def test_other_images_or_another_teacher_are_refused(start, pretrained, finetuned, tmp_path, capfd):
    output = tmp_path / "new.pt"
    letterbox = Preprocess.letterbox_imagenet(TINY.image_size_px)
    other = write_pretrained(tmp_path / "letterbox.pt", start, preprocess=letterbox.to_dict())
    assert convert(finetuned, other, output) == 2
    assert "letterbox" in capfd.readouterr().err
    student = make_student("demo_cnn", seed=1)
    stranger = write_finetuned(tmp_path / "stranger.pth", student, start, teacher={"sha256": "b" * 64})
    assert convert(stranger, pretrained, output) == 2
    stderr = capfd.readouterr().err
    assert "b" * 64 in stderr and TRUNK_SHA256 in stderr and "--allow-other-teacher" in stderr
    assert not output.exists()
    assert convert(stranger, pretrained, output, "--allow-other-teacher") == 0
    assert "warning: " in capfd.readouterr().out


def test_a_weight_beyond_the_files_precision_is_refused(start, tmp_path, capfd):
    student = make_student("demo_cnn", seed=1)
    with torch.no_grad():
        student.head[3].bias[0] = 1e6
    finetuned = write_finetuned(tmp_path / "best.pth", student, start)
    pretrained = write_pretrained(tmp_path / "half.pt", start, torch.float16)
    assert convert(finetuned, pretrained, tmp_path / "new.pt") == 2
    assert "head.3.bias: largest magnitude 1e+06 cannot be stored as torch.float16" in capfd.readouterr().err
    assert not (tmp_path / "new.pt").exists()


def test_a_failed_proof_keeps_the_old_file(pretrained, finetuned, tmp_path, capfd, monkeypatch):
    """If the deployed trunk gives anything else than the trained student, the file does not appear."""
    import sam3_train.merged_proof

    def load_another(path, **kwargs):
        model = sam3.load_model(path, **kwargs)
        with torch.no_grad():
            model.backbone.vision_backbone.trunk.model.head[3].bias.add_(1.0)
        return model

    monkeypatch.setattr(sam3_train.merged_proof, "load_model", load_another)
    output = tmp_path / "new.pt"
    output.write_bytes(b"older")
    assert convert(finetuned, pretrained, output) == 2
    assert "its trunk differs from the trained student" in capfd.readouterr().err
    assert output.read_bytes() == b"older" and len(list(tmp_path.iterdir())) == 1


def test_a_detector_that_gives_no_finite_answer_is_refused(start, finetuned, tmp_path, capfd):
    """The geometry path itself is run, not only the SAM heads."""
    weights, metadata = read_state_dict(write_pretrained(tmp_path / "merged.pt", start))
    key = next(key for key in weights if key.endswith("geometry_encoder.boxes_direct_project.bias"))
    write_merged(tmp_path / "broken.pt", adding(key, weights[key] * float("nan"))(weights), metadata)
    assert convert(finetuned, tmp_path / "broken.pt", tmp_path / "new.pt") == 2
    assert "new.pt was not written: asked for a box, the model's scores are not finite" in capfd.readouterr().err
    assert not (tmp_path / "new.pt").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"--output": "m.bin"}, "the name must end in one of .pt, .pth, .safetensors"),
        ({"--finetune-ckpt": "none.pth"}, "--finetune-ckpt: there is no file none.pth"),
        ({"--pretrained": "none.pt"}, "--pretrained: there is no file none.pt"),
        ({"--image": "none.jpg"}, "--image: there is no file none.jpg"),
    ],
)
def test_bad_flags_end_with_exit_2(pretrained, finetuned, tmp_path, capfd, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    flags = {"--finetune-ckpt": str(finetuned), "--pretrained": str(pretrained), "--output": "m.pt", **words}
    assert main([word for pair in flags.items() for word in pair]) == 2
    assert message in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_output_may_not_be_the_pretrained_file(pretrained, finetuned, capfd):
    before = sha256_file(pretrained)
    assert convert(finetuned, pretrained, pretrained) == 2
    assert "is the --pretrained itself" in capfd.readouterr().err
    assert sha256_file(pretrained) == before


def test_stage_1_does_not_merge_a_trained_neck(start, pretrained, tmp_path, capfd):
    """Its command would lose the neck, so it sends the checkpoint here."""
    neck = neck_weights(pretrained)
    path = write_finetuned(tmp_path / "best.pth", make_student("demo_cnn", 1), start, neck, TRAIN_NECK=True)
    teacher = tmp_path / "teacher.pt"
    write_merged(teacher, released_state_dict(make_model(TINY)), {"model": TINY.to_dict()})
    words = ["--student-ckpt", str(path), "--sam3-ckpt", str(teacher), "--output", str(tmp_path / "m.pt")]
    assert convert_stage1(words) == 2
    assert "convert_geometry_finetune.py" in capfd.readouterr().err


# --- the released sizes, without their memory -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released_rest() -> dict[str, Tensor]:
    """All of a released merged file but its student, on the meta device."""
    config = Sam3Config(student=StudentConfig("efficientvit_b0"))
    weights = released_state_dict(assemble_image_model(config, device="meta", enable_tracker=True))
    return {key: value for key, value in weights.items() if not key.startswith(STUDENT_PREFIX)}


def published(backbone: str) -> dict[str, Tensor]:
    """New tensors on the meta device under the student's published names."""
    state = student_to_published(meta_student(backbone).state_dict(), backbone)
    return {key: torch.empty_like(value) for key, value in state.items()}


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_key_counts_at_the_released_sizes(released_rest, name):
    """ES-RV-M: 653 keys extracted, matched and replaced, 1,698 in the output; the lines that are printed."""
    facts = RELEASED[name]
    student = published(facts.backbone)
    merged = {**{STUDENT_PREFIX + k: v for k, v in published(facts.backbone).items()}, **released_rest}
    weights, report = replace_weights(student, {}, merged, shapes_of(student))
    assert (report.num_student, report.num_matched, report.num_replaced) == (facts.num_keys,) * 3
    assert report.num_total == facts.num_merged_keys
    assert all(weights[key] is value for key, value in released_rest.items()), "kept weights must not be copied"
    if name == "es_rv_m":
        request = ConvertRequest(Path("best.pth"), Path("rv_m.pt"), Path(__file__))
        lines = ConvertResult(request, len(student), report, [], MergedProof(0.0, 0.0)).lines()
        assert lines[:4] == [
            "Student encoder keys extracted: 653",
            "Keys matched in pretrained: 653",
            "Replaced 653 weights of the student in rv_m.pt",
            "Total keys in output: 1698",
        ]


def test_another_student_never_fits_by_accident(released_rest):
    """The three TinyViTs have the same key names and differ in shapes alone."""
    ours, theirs = published("tiny_vit_11m"), published("tiny_vit_5m")
    merged = {**{STUDENT_PREFIX + k: v for k, v in theirs.items()}, **released_rest}
    assert ours.keys() == theirs.keys()
    with pytest.raises(MergeError, match=r"the student in the merged file .* shapes differ"):
        replace_weights(ours, {}, merged, shapes_of(ours))
