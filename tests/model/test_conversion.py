"""Conversions between layouts, containers and precisions: the same weights, and what is lost is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_files import STUDENT, TINY, student_model, whole_model, whole_weights
from safetensors import safe_open

from sam3 import conversion
from sam3.checkpoint_io import CheckpointError, read_checkpoint, read_state_dict, write_merged
from sam3.checkpoint_parts import MEMORY_PREFIXES, POINT_PROMPTS
from sam3.conversion import ConversionRequest, convert_checkpoint
from sam3.convert import main
from sam3.hf_keys import POINT_PROJECTIONS
from sam3.loading import load_model
from sam3.model.sam3_image_processor import Sam3Processor
from sam3.released_names import released_state_dict
from sam3.sam.prompts import PromptError

FOURIER = "tracker.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
POSITIONS = "detector.backbone.vision_backbone.trunk.pos_embed"
PREPROCESS = {"size_px": TINY.image_size_px, "mode": "letterbox"}


@pytest.fixture
def meta_file(tmp_path: Path) -> Path:
    """As Meta's: flat, complex rotary tables, no record."""
    torch.save(whole_weights(), tmp_path / "sam3.pt")
    return tmp_path / "sam3.pt"


@pytest.fixture
def student_file(tmp_path: Path) -> Path:
    record = {"variant": STUDENT, "model": student_model().config.to_dict(), "preprocess": PREPROCESS}
    write_merged(tmp_path / "student.pt", released_state_dict(student_model()), {**record, "provenance": {"epoch": 7}})
    return tmp_path / "student.pt"


def convert(*words: object) -> int:
    return main([str(word) for word in words])


def assert_same(path: Path, original: Path, except_for: tuple[str, ...] = ()) -> None:
    ours, theirs = read_state_dict(path)[0], read_state_dict(original)[0]
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if key not in except_for:
            assert torch.equal(ours[key], value), key


def test_to_hugging_face_and_back(meta_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf, back = tmp_path / "model.safetensors", tmp_path / "new" / "back.pt"
    assert convert(meta_file, hf, "--layout", "hf") == 0
    printed = capsys.readouterr().out
    assert "lost    6 tensors for point prompts of the detector" in printed
    assert "lost    the class token's row" in printed
    assert "checked the new file opens, and holds the same weights" in printed
    with safe_open(hf, "pt") as file:
        assert file.metadata()["format"] == "pt"  # transformers refuses files without it
    assert all(key.startswith(("detector_model.", "tracker_model.", "tracker_neck.")) for key in read_state_dict(hf)[0])
    assert load_model(hf, device="cpu").missing_parts == (POINT_PROMPTS,)

    assert convert(hf, back) == 0
    printed = capsys.readouterr().out
    assert f"Hugging Face (Sam3VideoModel), {len(read_state_dict(hf)[0])} tensors\n" in printed
    assert "added   zeros for point prompts of the detector" in printed
    assert f"added   {TINY.trunk.depth} rotary tables, recomputed" in printed
    assert f"absent  {POINT_PROMPTS}" in printed
    assert_same(back, meta_file, except_for=(*POINT_PROJECTIONS, POSITIONS))
    weights = read_state_dict(back)[0]
    assert not any(weights[key].any() for key in POINT_PROJECTIONS)
    assert torch.equal(weights[POSITIONS][:, 1:], whole_weights()[POSITIONS][:, 1:])
    # Zeros are recognised, however often the file is converted, and no point is answered with them.
    model = load_model(back, device="cpu")
    assert model.missing_parts == (POINT_PROMPTS,)
    processor = Sam3Processor(model)
    state = processor.set_image(torch.zeros(3, 40, 50, dtype=torch.uint8))
    with pytest.raises(PromptError, match="no weights for point prompts of the detector"):
        processor.add_point_prompt([0.5, 0.5], True, state)


def test_transformers_reads_what_was_written(meta_file: Path, tmp_path: Path) -> None:
    """Their own loader finds every weight, in a folder with their configuration beside the file."""
    transformers = pytest.importorskip("transformers")
    from hf_models import build_hf_image_model

    assert convert(meta_file, tmp_path / "hf" / "model.safetensors", "--layout", "hf") == 0
    expected = build_hf_image_model(whole_model())
    expected.config.save_pretrained(tmp_path / "hf")
    loaded, problems = transformers.Sam3Model.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(problems.values()), problems
    weights = loaded.state_dict()
    for key, value in expected.state_dict().items():
        assert torch.equal(weights[key], value), key


def test_to_safetensors_and_back(meta_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(meta_file, tmp_path / "a.safetensors") == 0
    assert f"lost    {TINY.trunk.depth} rotary tables: safetensors cannot hold complex" in capsys.readouterr().out
    assert convert(tmp_path / "a.safetensors", tmp_path / "b.pth") == 0
    assert_same(tmp_path / "b.pth", meta_file)


def test_a_student_keeps_its_record(student_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "student.safetensors"
    assert convert(student_file, output, "--dtype", "fp16") == 0
    before, after = read_checkpoint(student_file), read_checkpoint(output)
    assert after.metadata["provenance"] == {"epoch": 7}
    assert after.metadata["preprocess"] == PREPROCESS
    assert after.metadata["converted"]["files"].keys() == {"student.pt"}
    assert after.metadata["converted"]["dtype"] == "fp16"
    assert output.stat().st_size < 0.6 * student_file.stat().st_size
    for key, value in before.state_dict.items():
        stored = after.state_dict[key]
        assert torch.equal(stored, value.to(stored.dtype)), key
    loaded = load_model(output, device="cpu")
    assert loaded.config == student_model().config
    assert loaded.preprocess.mode == "letterbox"


def test_the_fourier_matrix_is_never_rounded(meta_file: Path, tmp_path: Path) -> None:
    """Rounded to bf16 it would move the codes of points by degrees."""
    for name, words in (("a.pt", ()), ("hf.safetensors", ("--layout", "hf"))):
        assert convert(meta_file, tmp_path / name, "--dtype", "bf16", *words) == 0
        loaded = load_model(tmp_path / name, device="cpu")
        ours, theirs = loaded.state_dict(), whole_model().state_dict()
        changed = 0
        for key, value in ours.items():
            if "gaussian_matrix" in key:
                assert torch.equal(value, theirs[key])
            elif value.is_floating_point():
                changed += not torch.equal(value, theirs[key])
        assert changed > 100


BAD = {
    "a student to Hugging Face": (
        ("student", "out.safetensors", "--layout", "hf"),
        "holds the student efficientvit_b0",
    ),
    "Hugging Face as .pt": (("meta", "out.pt", "--layout", "hf"), "stored as .safetensors alone"),
    "another suffix": (("meta", "out.bin"), "the name must end in one of .pt, .pth, .safetensors"),
    "a folder": (("meta", "."), "is a folder; name a file in it"),
    "onto itself": (("meta", "sam3.pt", "--force"), "is the file to convert itself"),
    "onto another": (("meta", "student.pt"), "exists already; choose another name, or replace it with --force"),
    "nothing": (("gone.pt", "out.pt"), "no such checkpoint file"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_converted(
    name: str, meta_file: Path, student_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source, output, *words), message = BAD[name]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    source_path = {"meta": meta_file, "student": student_file}.get(source, tmp_path / source)
    assert convert(source_path, tmp_path / output, *words) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_existing_file_is_replaced_if_asked(meta_file: Path, student_file: Path) -> None:
    assert convert(meta_file, student_file, "--force") == 0
    assert load_model(student_file, device="cpu").config == TINY


def test_numbers_beyond_a_type_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = "detector.dot_prod_scoring.hs_proj.bias"
    for value, message in (
        (1e5, "largest magnitude 100000 cannot be stored"),
        (float("nan"), "the weights are broken"),
    ):
        weights = whole_weights()
        torch.save(weights | {key: torch.full_like(weights[key], value)}, tmp_path / "a.pt")
        assert convert(tmp_path / "a.pt", tmp_path / "half.pt", "--dtype", "fp16") == 2
        assert message in capsys.readouterr().err
        assert convert(tmp_path / "a.pt", tmp_path / "whole.pt", "--force") == 0
        assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.pt", "whole.pt"]


def test_a_result_that_differs_never_appears(meta_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the writer stored something else, the proof finds it and leaves nothing."""

    def careless(path: Path, weights: dict, metadata: dict, dtype: torch.dtype | None) -> None:
        write_merged(path, weights | {FOURIER: weights[FOURIER] + 1}, metadata, dtype)

    monkeypatch.setattr(conversion, "write_merged", careless)
    with pytest.raises(CheckpointError, match=f"not written, {FOURIER} would differ"):
        convert_checkpoint(ConversionRequest(meta_file, tmp_path / "out.pt"))

    def forgetful(path: Path, weights: dict, metadata: dict, dtype: torch.dtype | None) -> None:
        write_merged(path, {k: v for k, v in weights.items() if not k.startswith(MEMORY_PREFIXES)}, metadata, dtype)

    monkeypatch.setattr(conversion, "write_merged", forgetful)
    with pytest.raises(CheckpointError, match=r"not written, tracker\.maskmem_tpos_enc would be missing"):
        convert_checkpoint(ConversionRequest(meta_file, tmp_path / "out.pt"))
    assert list(tmp_path.iterdir()) == [meta_file]
