"""``convert_geometry_finetune.py``: exactly the fine-tuned weights are replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from converted_files import (
    CHANGED_NECK_KEYS,
    TRUNK_SHA256,
    convert,
    features_of,
    make_student,
    neck_weights,
    trained_features,
    whole_model_around,
    write_finetuned,
    write_pretrained,
)
from stage1_world import TINY
from students import RELEASED, meta_student
from torch import Tensor

from sam3 import Sam3Config
from sam3.checkpoint_io import read_state_dict, sha256_file, write_merged
from sam3.checkpoint_keys import STUDENT_PREFIX, student_to_published
from sam3.checkpoint_merge import MergeError, replace_weights, shapes_of
from sam3.config import StudentConfig
from sam3.efficient_keys import own_weights
from sam3.loading import load_model
from sam3.model.efficient_sam3_tracker import EfficientSam3Tracker
from sam3.model.student_encoder import fuse_for_inference
from sam3.model_builder import assemble_image_model
from sam3.preprocess import Preprocess
from sam3.released_names import released_state_dict
from sam3_train.checkpoint import load_checkpoint
from sam3_train.merged_proof import MergedProof, as_stored
from stage1_geometry_finetune.convert_geometry_finetune import main
from stage1_geometry_finetune.frozen_heads import FrozenHeads
from stage1_geometry_finetune.merge import ConvertRequest, ConvertResult


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


def test_a_start_from_a_file_in_16_bit_is_recognised(tmp_path, capfd):
    """A fine-tune computes in float32 from the rounded weights; that is no difference."""
    start = make_student("demo_cnn", 0)
    pretrained = write_pretrained(tmp_path / "half.pt", start, torch.float16)
    rounded = as_stored(start, dict.fromkeys(start.state_dict(), torch.float16))
    assert rounded is not start
    finetuned = write_finetuned(tmp_path / "best.pth", make_student("demo_cnn", 1), rounded)
    assert convert(finetuned, pretrained, tmp_path / "new.pt") == 0
    assert "the fine-tuning began with the student of the pretrained file" in capfd.readouterr().out


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


def test_a_compressed_memory_is_kept_and_called_stale(pretrained, finetuned, tmp_path, capfd):
    """Stage 2 trained it behind the student that is replaced."""
    weights, metadata = read_state_dict(pretrained)
    config = Sam3Config.from_dict(metadata["model"]).with_efficient_memory()
    own = own_weights(EfficientSam3Tracker(config).state_dict())
    with_memory = tmp_path / "with_memory.pt"
    write_merged(with_memory, weights | own, metadata | {"model": config.to_dict()})
    assert convert(finetuned, with_memory, tmp_path / "new.pt") == 0
    assert "the compressed memory of" in capfd.readouterr().out
    new, record = read_state_dict(tmp_path / "new.pt")
    assert all(torch.equal(new[key], value) for key, value in own.items())
    assert Sam3Config.from_dict(record["model"]) == config
    assert isinstance(load_model(tmp_path / "new.pt", "cpu").tracker, EfficientSam3Tracker)
    heads = FrozenHeads.from_checkpoint(with_memory, TINY, torch.device("cpu"), detector=False, sam=True)
    assert torch.equal(heads.model.heads.no_mem_embed, weights["tracker.no_mem_embed"])
