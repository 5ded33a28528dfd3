"""``convert_memory_weights_stage2.py``: what does not fit is one line that says so, and nothing is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import TINY, make_model, student_model, whole_model
from memory_files import (
    PREPROCESS,
    convert,
    identity_of,
    rewrite,
    trained_module,
    weights_of,
    write_base,
    write_trained,
)

import stage2.merge
from sam3.checkpoint_io import read_state_dict, write_merged
from sam3.checkpoint_keys import EFFICIENT_PREFIX
from sam3.checkpoint_parts import MEMORY_PREFIXES
from sam3.config import StudentConfig
from sam3.convert import main as convert_file
from sam3.preprocess import Preprocess
from sam3.released_names import released_state_dict

PUBLISHED = TINY.with_efficient_memory(compat="published")


def refused(trained: Path, base: Path, folder: Path, message: str, capfd: Any, *more: str) -> None:
    """The command ends with 2, a few lines and no file."""
    output = folder / "out" / "merged.pt"
    output.parent.mkdir(exist_ok=True)
    output.write_bytes(b"older")
    assert convert(trained, base, output, *more) == 2
    stderr = capfd.readouterr().err
    assert re.search(message, stderr), stderr
    assert "Traceback" not in stderr and len(stderr.splitlines()) <= 4
    assert output.read_bytes() == b"older" and len(list(output.parent.iterdir())) == 1


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda weights: {key: value for key, value in weights.items() if key != name}


def adding(name: str, value: torch.Tensor) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda weights: {**weights, name: value}


LATENTS = "spatial_perceiver.latents"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (without(LATENTS), "is not whole: .*1 of 296 missing: spatial_perceiver.latents"),
        (adding("memory_attention.layers.9.linear1.bias", torch.zeros(2)), "1 unexpected: memory_attention.layers.9"),
        (adding(LATENTS, torch.zeros(3, 16)), r"1 of another shape: spatial_perceiver.latents: file \(3, 16\)"),
        (adding("mem_proj.bias", torch.full((64,), float("nan"))), "cannot be stored as .* the weights are broken"),
        (adding("no_obj_ptr", torch.ones(1, 64)), "no_obj_ptr is not what .*sam3.safetensors holds, although"),
        (without("obj_ptr_proj.layers.0.bias"), "is not whole: .*obj_ptr_proj.layers.0.bias"),
    ],
    ids=["missing", "stale", "shape", "not finite", "heads moved", "heads not whole"],
)
def test_a_memory_that_is_not_whole(base_file, trained_file, tmp_path, capfd, break_it, message) -> None:
    broken = rewrite(tmp_path / "broken.pth", trained_file, model=break_it(weights_of(trained_file)))
    refused(broken, base_file, tmp_path, message, capfd)


def test_a_weight_that_the_file_cannot_hold(tmp_path, capfd) -> None:
    """The way out leads somewhere: half precision as float32 is the same base."""
    half = write_base(tmp_path / "half.pt", whole_model(), torch.float16)
    module = trained_module(half)
    torch.nn.init.constant_(module.mem_proj.bias, 1e6)
    trained = write_trained(tmp_path / "large.pth", half, module)
    message = "mem_proj.bias: largest magnitude 1e[+]06 cannot be stored as torch.float16 .*: convert the file first"
    refused(trained, half, tmp_path, message, capfd)
    assert convert_file([str(half), str(tmp_path / "single.pt"), "--dtype", "fp32"]) == 0
    assert convert(trained, tmp_path / "single.pt", tmp_path / "merged.pt") == 0


def test_a_memory_of_another_size_than_described(base_file, trained_file, tmp_path, capfd) -> None:
    module = trained_module(base_file, TINY.with_efficient_memory().efficient_memory.replace(num_latents=16))
    broken = rewrite(tmp_path / "broken.pth", trained_file, identity=identity_of(module, base_file))
    refused(broken, base_file, tmp_path, r"spatial_perceiver.latents: file \(64, 16\), model \(16, 16\)", capfd)


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ({"model": {}, "preprocess": {}}, "a checkpoint of another stage .*'nothing' .*convert_stage1_weights.py"),
        ({"stage": "stage2", "model": TINY.to_dict()}, "lacks identity.preprocess, identity.frozen_sha256"),
        (
            {"stage": "stage2", "model": TINY.to_dict(), "preprocess": PREPROCESS.to_dict(), "frozen_sha256": "x"},
            "its model description has no compressed memory",
        ),
        (
            {"stage": "stage2", "model": {"nonsense": 1}, "preprocess": {}, "frozen_sha256": "x"},
            "its model description cannot be read",
        ),
        (None, "a memory without a record of its training .*model_final.pth"),
    ],
    ids=["other stage", "half an identity", "no memory described", "strange description", "published"],
)
def test_a_checkpoint_of_another_kind(base_file, trained_file, tmp_path, capfd, identity, message) -> None:
    other = rewrite(tmp_path / "other.pth", trained_file, identity=identity)
    refused(other, base_file, tmp_path, message, capfd)


def test_a_whole_model_is_no_training_checkpoint(base_file, tmp_path, capfd) -> None:
    refused(base_file, base_file, tmp_path, "is a safetensors file, which no training writes", capfd)
    whole = write_base(tmp_path / "whole.pt", whole_model())
    refused(whole, base_file, tmp_path, "is a whole model and no training checkpoint", capfd)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda data: data[: len(data) // 2], "damaged or no training checkpoint"),
        (lambda data: b"", "damaged or no training checkpoint"),
        (lambda data: b"not a checkpoint", "damaged or no training checkpoint"),
    ],
    ids=["truncated", "empty", "text"],
)
def test_a_damaged_checkpoint(base_file, trained_file, tmp_path, capfd, content, message) -> None:
    broken = tmp_path / "broken.pth"
    broken.write_bytes(content(trained_file.read_bytes()))
    refused(broken, base_file, tmp_path, message, capfd)


def test_averaged_weights_that_are_not_there(base_file, trained_file, tmp_path, capfd) -> None:
    refused(trained_file, base_file, tmp_path, "holds no averaged weights .*leave --use-ema out", capfd, "--use-ema")
    averaged = rewrite(tmp_path / "averaged.pth", trained_file, is_ema=True)
    refused(averaged, base_file, tmp_path, "leave --no-use-ema out", capfd, "--no-use-ema")


def test_a_base_with_another_backbone(base_file, trained_file, tmp_path, capfd) -> None:
    student = write_base(tmp_path / "student.pt", student_model())
    remedy = "give the file that the training began with, sam3.safetensors"
    refused(trained_file, student, tmp_path, f"holds the student efficientvit_b0, but .* trunk: {remedy}", capfd)
    config = TINY.replace(student=StudentConfig("efficientvit_b1")).with_efficient_memory()
    behind = rewrite(
        tmp_path / "behind.pth",
        trained_file,
        identity=torch.load(trained_file, weights_only=True)["identity"] | {"model": config.to_dict()},
    )
    refused(behind, student, tmp_path, "holds the student efficientvit_b0, but .* efficientvit_b1", capfd)
    refused(behind, base_file, tmp_path, "holds SAM 3's own trunk and no student", capfd)


def test_a_base_of_another_size_or_for_other_images(trained_file, tmp_path, capfd) -> None:
    larger = make_model(TINY.replace(image_size_px=TINY.image_size_px * 2))
    record = Preprocess(TINY.image_size_px * 2).to_dict()
    base = write_base(tmp_path / "larger.pt", larger, preprocess=record)
    refused(trained_file, base, tmp_path, "belongs to the model 'tiny' at 504 px, but .* at 252 px", capfd)
    letterbox = Preprocess.letterbox_imagenet(TINY.image_size_px).to_dict()
    base = write_base(tmp_path / "letterbox.pt", whole_model(), preprocess=letterbox)
    refused(
        trained_file, base, tmp_path, "preprocessing differs between .*model_final.pth and --sam3_checkpoint", capfd
    )


def test_a_base_without_a_tracker(base_file, trained_file, tmp_path, capfd) -> None:
    weights, metadata = read_state_dict(base_file)
    alone = {key: value for key, value in weights.items() if not key.startswith(MEMORY_PREFIXES)}
    write_merged(tmp_path / "image.pt", alone, metadata)
    refused(trained_file, tmp_path / "image.pt", tmp_path, r"holds no tracker \(missing: tracker memory\)", capfd)


def test_flags_are_checked_together(base_file, trained_file, tmp_path, capfd) -> None:
    assert convert(tmp_path / "no.pth", base_file, tmp_path / "merged.bin") == 2
    stderr = capfd.readouterr().err
    assert "nothing was merged: 2 problems" in stderr
    assert "--output_path" in stderr and "must end in one of .pt, .pth, .safetensors" in stderr
    assert f"--trained_checkpoint: there is no file {tmp_path / 'no.pth'}" in stderr
    assert convert(trained_file, base_file, base_file) == 2
    assert "is the --sam3_checkpoint itself; choose another name" in capfd.readouterr().err


def test_a_merge_that_damages_is_noticed(base_file, trained_file, tmp_path, capfd, monkeypatch) -> None:
    """What is proven is the file that was written, against the checkpoint as training left it."""
    honest = stage2.merge.merge_memory

    def damaging(*args: Any) -> Any:
        weights, report = honest(*args)
        key = EFFICIENT_PREFIX + "mem_proj.weight"
        return {**weights, key: weights[key] * 1.01}, report

    monkeypatch.setattr(stage2.merge, "merge_memory", damaging)
    refused(trained_file, base_file, tmp_path, "on a generated clip it differs from the trained model by", capfd)

    def forgetting(*args: Any) -> Any:
        weights, report = honest(*args)
        return {key: value for key, value in weights.items() if key != EFFICIENT_PREFIX + LATENTS}, report

    monkeypatch.setattr(stage2.merge, "merge_memory", forgetting)
    refused(trained_file, base_file, tmp_path, "the merged file does not load: .*1 of 135 missing", capfd)


def test_original_weights_that_change_are_noticed(base_file, trained_file, tmp_path, capfd, monkeypatch) -> None:
    def write(path: Path, weights: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        write_merged(path, {**weights, "tracker.no_obj_ptr": weights["tracker.no_obj_ptr"] + 1}, record)

    monkeypatch.setattr(stage2.merge, "write_merged", write)
    message = "1 keys would not be what they should, such as tracker.no_obj_ptr"
    refused(trained_file, base_file, tmp_path, message, capfd)


def test_a_published_checkpoint_with_its_backbone_says_what_opens_it(base_file, tmp_path, capfd) -> None:
    model = make_model(PUBLISHED, seed=2)
    weights = {
        key.removeprefix("detector."): value
        for key, value in released_state_dict(model).items()
        if key.startswith("detector.backbone.")
    }
    weights |= dict(model.tracker.state_dict())
    torch.save({"model": weights, "epoch": 1}, tmp_path / "model_final.pth")
    refused(tmp_path / "model_final.pth", base_file, tmp_path, "sam3.load_model opens it as it is", capfd)
