"""``convert_geometry_finetune.py``: what does not fit is an error that names it, and nothing is written."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from checkpoint_files import make_model
from converted_files import (
    NECK_KEY,
    TRUNK_SHA256,
    convert,
    make_student,
    neck_weights,
    write_finetuned,
    write_pretrained,
)
from stage1_world import TINY
from torch import Tensor

import sam3
from sam3.checkpoint_io import read_state_dict, sha256_file, write_merged
from sam3.checkpoint_keys import STUDENT_PREFIX, TRUNK_PREFIX
from sam3.preprocess import Preprocess
from sam3.released_names import released_state_dict
from sam3_train.checkpoint import load_checkpoint, save_checkpoint
from stage1.convert_stage1_weights import main as convert_stage1
from stage1_geometry_finetune.convert_geometry_finetune import main


def without(key: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {name: value for name, value in weights.items() if name != key}


def adding(key: str, value: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {**weights, key: value}


BIAS = "head.3.bias"
SAYS = "is not what its description says "


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
    part = {key: value for key, value in neck_weights(pretrained).items() if key != NECK_KEY}
    path = write_finetuned(tmp_path / "part.pth", student, start, part, TRAIN_NECK=True)
    assert convert(path, pretrained, tmp_path / "new.pt") == 2
    assert f"the trained detector neck, beside the merged file's, {SAYS}1 keys are missing, such as {NECK_KEY}" in (
        re.sub(r"\(\d+ keys\): ", "", capfd.readouterr().err)
    )
    path = write_finetuned(tmp_path / "b.pth", student, start, TRAIN_NECK=True)
    assert convert(path, pretrained, tmp_path / "new.pt") == 2
    assert "its config says MODEL.TRAIN_NECK True, but it holds 0 weights" in capfd.readouterr().err
    assert not (tmp_path / "new.pt").exists()


def test_a_part_that_an_earlier_fine_tune_trained_must_not_stay(start, pretrained, finetuned, tmp_path, capfd):
    """Its neck was made for another student: behind this one it would give wrong masks without an error."""
    neck = neck_weights(pretrained)
    with_neck = write_finetuned(tmp_path / "neck.pth", make_student("demo_cnn", 2), start, neck, TRAIN_NECK=True)
    assert convert(with_neck, pretrained, tmp_path / "tuned.pt") == 0
    capfd.readouterr()
    assert convert(finetuned, tmp_path / "tuned.pt", tmp_path / "new.pt") == 2
    stderr = capfd.readouterr().err
    assert "an earlier fine-tune trained its detector neck" in stderr and "made from, merged.pt" in stderr
    assert not (tmp_path / "new.pt").exists()
    assert convert(with_neck, tmp_path / "tuned.pt", tmp_path / "new.pt") == 0, (
        "a run that trained the same replaces it"
    )


def test_a_wrong_pair_is_refused(start, pretrained, finetuned, tmp_path, capfd):
    """D-73: another backbone, another option, no student, a checkpoint of stage 1: named, and nothing is written."""
    output = tmp_path / "new.pt"
    other = write_pretrained(tmp_path / "other.pt", make_student("efficientvit_b0", seed=0))
    assert convert(finetuned, other, output) == 2
    assert f"holds the student efficientvit_b0, but {finetuned} trained demo_cnn: give" in capfd.readouterr().err
    fused16 = write_pretrained(tmp_path / "fused16.pt", make_student("demo_cnn", seed=0, fuse_stride16=True))
    assert convert(finetuned, fused16, output) == 2
    assert "holds the student demo_cnn with fused stride 16, but" in capfd.readouterr().err
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
