"""inspect says what a file holds, at little cost, and never more than the file's names unless asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_files import STUDENT, TINY, student_model, whole_weights
from safetensors.torch import save_file

from sam3.checkpoint_io import write_merged
from sam3.checkpoint_parts import HEADS
from sam3.hf_keys import released_to_hf
from sam3.inspect import main
from sam3.inspection import inspect_checkpoint
from sam3.released_names import released_state_dict


def inspect_json(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    code = main([*map(str, words), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert code == (0 if result["opens"] else 2)
    return result


def test_a_released_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": whole_weights()}, tmp_path / "sam3.pt")
    result = inspect_json(capsys, tmp_path / "sam3.pt")
    assert result["layout"] == "released, under 'model'"
    assert result["container"] == "torch"
    assert (result["preset"], result["student"], result["image_size_px"]) == ("tiny", None, TINY.image_size_px)
    assert result["missing_parts"] == []
    assert result["non_finite"] == []
    assert result["dtypes"]["complex64"] == TINY.trunk.depth
    assert {part["state"] for part in result["parts"]} == {"complete"}
    assert sum(part["tensors"] for part in result["parts"]) == result["num_tensors"]


def test_a_memory_without_the_heads_is_not_read(tmp_path: Path) -> None:
    memory = {key: value for key, value in whole_weights().items() if not key.startswith(HEADS.prefixes)}
    torch.save(memory, tmp_path / "memory.pt")
    result = inspect_checkpoint(tmp_path / "memory.pt")
    states = {part.name: part.state for part in result.parts}
    assert (states["SAM heads"], states["tracker memory"]) == ("absent", "not read")
    assert result.missing_parts == ["SAM heads", "tracker memory"]


def test_parameters_do_not_count_buffers(tmp_path: Path) -> None:
    model = student_model()
    torch.save(released_state_dict(model), tmp_path / "a.pt")
    found = {part.name: part.parameters for part in inspect_checkpoint(tmp_path / "a.pt").parts}
    vision = model.backbone.vision_backbone
    assert found["trunk"] == sum(p.numel() for p in vision.trunk.parameters())
    assert found["detector neck"] == sum(p.numel() for p in vision.convs.parameters())
    assert sum(found.values()) == sum(p.numel() for p in model.parameters())


def test_a_merged_student_with_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {
        "variant": "es_ev_s",
        "model": student_model().config.to_dict(),
        "preprocess": {"size_px": TINY.image_size_px, "mode": "letterbox"},
        "provenance": {"teacher_file": "sam3.pt", "epoch": 7, "config": {"TRAIN": {"EPOCHS": 30}}},
    }
    write_merged(tmp_path / "student.safetensors", released_state_dict(student_model()), record)
    assert main([str(tmp_path / "student.safetensors")]) == 0
    text = capsys.readouterr().out
    for line in (
        f"model       tiny, {TINY.image_size_px} px, with the student {STUDENT} (es_ev_s) in the trunk's place",
        "mode letterbox",
        "  teacher_file: sam3.pt",
        "opens       yes",
        "missing     nothing",
        "values      all finite",
    ):
        assert line in text
    assert "EPOCHS" not in text
    result = inspect_json(capsys, tmp_path / "student.safetensors")
    assert (result["student"], result["student_name"]) == (STUDENT, "es_ev_s")
    assert result["record"]["provenance"]["config"] == {"TRAIN": {"EPOCHS": 30}}


def test_what_would_be_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = whole_weights()
    hf = {
        k: v.contiguous().clone()
        for k, v in released_to_hf(weights).items()
        if not k.startswith("detector_model.text_")
    }
    save_file(hf, tmp_path / "model.safetensors")
    result = inspect_json(capsys, tmp_path)
    assert result["layout"] == "Hugging Face (Sam3VideoModel)"
    assert result["files"] == ["model.safetensors"]
    assert result["missing_parts"] == ["text encoder", "point prompts of the detector"]
    assert {part["state"] for part in result["parts"] if part["name"] in ("detector", "trunk")} == {"complete"}

    gone = [key for key in weights if key.startswith("detector.segmentation_head.")][:5]
    torch.save({k: v for k, v in weights.items() if k not in gone}, tmp_path / "half.pt")
    result = inspect_json(capsys, tmp_path / "half.pt")
    assert not result["opens"]
    assert "segmentation head: 5 of 28 missing" in result["problem"]
    (row,) = (part for part in result["parts"] if part["name"] == "segmentation head")
    assert (row["state"], row["tensors"], row["missing"]) == ("partial", 23, 5)


def test_what_is_no_model_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"layer1.a": torch.ones(2), "layer1.b": torch.ones(2), "fc.c": torch.ones(3)}, tmp_path / "net.pt")
    assert main([str(tmp_path / "net.pt")]) == 2
    text = capsys.readouterr().out
    assert "layout      not recognised" in text
    assert "  layer1: 2\n  fc: 1" in text
    assert "opens       no: not a layout that is known here" in text


def test_values_are_looked_at_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = whole_weights()
    broken = {"detector.dot_prod_scoring.hs_proj.bias": float("nan"), "tracker.no_mem_embed": float("inf")}
    for key, value in broken.items():
        weights[key] = weights[key].clone()
        weights[key].view(-1)[3] = value
    torch.save(weights, tmp_path / "broken.pt")
    assert inspect_json(capsys, tmp_path / "broken.pt")["non_finite"] == sorted(broken)
    assert inspect_json(capsys, tmp_path / "broken.pt", "--no-values")["non_finite"] is None
    assert main([str(tmp_path / "broken.pt"), "--values"]) == 0
    assert "values      NaN or infinity in 2 tensors: detector.dot_prod_scoring.hs_proj.bias" in capsys.readouterr().out


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    """A file of 4 GB of holes: names and sizes come at once, without memory for the numbers."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 30], "data_offsets": [0, 1 << 32]}}).encode()
    with (tmp_path / "large.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 32))
    before = _private_bytes()
    result = inspect_checkpoint(tmp_path / "large.safetensors")
    assert _private_bytes() - before < 100_000_000
    assert (result.num_bytes > 1 << 32, result.non_finite, result.num_tensors) == (True, None, 1)


def _private_bytes() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024
