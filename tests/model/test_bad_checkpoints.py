"""Bad checkpoints: a table of files and of the one line that each gets; none of them runs code or gives a model."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_files import STUDENT, TINY, Payload, student_model, whole_weights
from safetensors.torch import save_file
from torch import Tensor

from sam3.checkpoint_io import INDEX_SUFFIX, CheckpointError, read_state_dict, write_merged
from sam3.checkpoint_keys import STUDENT_PREFIX, TRUNK_PREFIX
from sam3.config import StudentConfig
from sam3.inspect import main as inspect
from sam3.loading import load_model
from sam3.released_names import released_state_dict

QKV = TRUNK_PREFIX + "blocks.3.attn.qkv.weight"
TEXT_KEY = "detector.backbone.language_backbone.encoder.ln_final.weight"
Maker = Callable[[Path], Path]


def torch_file(content: object, name: str = "bad.pt") -> Maker:
    """Writes what ``content`` is, or what it returns for the folder, with `torch.save`."""

    def make(folder: Path) -> Path:
        torch.save(content(folder) if callable(content) else content, folder / name)
        return folder / name

    return make


def changed(**changes: Tensor | None) -> Maker:
    """The whole model's weights with some keys replaced, or left out where the value is None."""

    def make(folder: Path) -> Path:
        weights = whole_weights() | changes
        torch.save({key: value for key, value in weights.items() if value is not None}, folder / "bad.pt")
        return folder / "bad.pt"

    return make


def raw(content: bytes, name: str) -> Maker:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def safetensors_bytes(header: object, data: bytes = b"", size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def cut(name: str, keep: float) -> Maker:
    """A whole file of which only the first part arrived."""

    def make(folder: Path) -> Path:
        write_merged(folder / name, {"a": torch.zeros(1000)}, {})
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(keep * len(content))])
        return folder / name

    return make


def malicious(container: str) -> Maker:
    """A checkpoint with whole weights beside an object that makes the file ``executed`` when it is unpickled."""

    def make(folder: Path) -> Path:
        content = {"model": whole_weights(), "x": Payload(folder / "executed")}
        path = folder / "bad.pt"
        if container == "pickle":
            path.write_bytes(pickle.dumps({"x": Payload(folder / "executed")}, protocol=2))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=container == "zip")
        return path

    return make


def zip_of(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def published_training_checkpoint(folder: Path) -> Path:
    """As the published stage-1 scripts store one: the settings beside the weights are a yacs object."""
    from yacs.config import CfgNode

    torch.save({"model": {"backbone.model.x": torch.ones(1)}, "config": CfgNode({"A": 1})}, folder / "ckpt.pth")
    return folder / "ckpt.pth"


def index_of(weight_map: object, *shards: str) -> Maker:
    def make(folder: Path) -> Path:
        for name in shards:
            save_file({"a": torch.zeros(2)}, folder / name)
        path = folder / f"model{INDEX_SUFFIX}"
        path.write_text(json.dumps({"weight_map": weight_map}))
        return path

    return make


def resnet_like(folder: Path) -> Path:
    layers = {f"layer{i}.0.conv{j}.weight": torch.ones(2, 2, 3, 3) for i in (1, 2) for j in (1, 2)}
    torch.save(layers | {"conv1.weight": torch.ones(4, 3, 7, 7), "fc.bias": torch.ones(10)}, folder / "resnet.pth")
    return folder / "resnet.pth"


def record_of_another_model(folder: Path) -> Path:
    record = {"model": TINY.replace(student=StudentConfig(STUDENT)).to_dict()}
    write_merged(folder / "m.pt", whole_weights(), record)
    return folder / "m.pt"


def half_a_student(folder: Path) -> Path:
    weights = released_state_dict(student_model())
    gone = [key for key in weights if key.startswith(STUDENT_PREFIX + "backbone.model.stages.2.")]
    torch.save({"model": {k: v for k, v in weights.items() if k not in gone}}, folder / "student.pt")
    return folder / "student.pt"


def two_parts(first: str, second: str) -> dict[str, Tensor]:
    return {first: torch.ones(1), second: torch.ones(1)}


# name -> (what makes the file, part of the message)
CASES: dict[str, tuple[Maker, str]] = {
    # nothing there
    "missing": (lambda folder: folder / "nothing.pt", "no such checkpoint file"),
    "empty": (raw(b"", "bad.pt"), "the file is empty (an interrupted copy or download?)"),
    "folder": (lambda folder: folder, "is a folder without a checkpoint (sam3.pt, model.safetensors.index.json, model"),
    # damaged
    "truncated zip": (cut("bad.pt", 0.5), "damaged or not a checkpoint (an interrupted copy or download?)"),
    "truncated safetensors": (cut("bad.safetensors", 0.9), "damaged or not a safetensors file"),
    "zip of something else": (raw(zip_of(**{"word/document.xml": b"<a/>"}), "bad.pt"), "damaged or not a checkpoint"),
    "zip with nonsense as pickle": (raw(zip_of(**{"a/data.pkl": b"\x80\x02garbage"}), "bad.pt"), "bad.pt: "),
    "safetensors header of 2^60 bytes": (
        raw(safetensors_bytes({}, size=1 << 60), "bad.safetensors"),
        "damaged or not a safetensors file",
    ),
    "safetensors header that is no JSON": (
        raw(safetensors_bytes(b"{" + b"\xff" * 63), "bad.safetensors"),
        "damaged or not a safetensors file",
    ),
    "safetensors with offsets beyond the end": (
        raw(
            safetensors_bytes({"a": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}, b"\0" * 8),
            "bad.safetensors",
        ),
        "damaged or not a safetensors file",
    ),
    "safetensors with another shape than its bytes": (
        raw(
            safetensors_bytes({"a": {"dtype": "F32", "shape": [1 << 62], "data_offsets": [0, 8]}}, b"\0" * 8),
            "bad.safetensors",
        ),
        "damaged or not a safetensors file",
    ),
    "safetensors without tensors": (raw(safetensors_bytes({}), "bad.safetensors"), "the file holds no tensors"),
    # something else
    "text": (
        raw(b"hello, these are no weights\n", "bad.pt"),
        "it is text, beginning with 'hello, these",
    ),
    "web page": (raw(b"<!DOCTYPE html><html>404</html>", "bad.pt"), "a web page and not a checkpoint"),
    "Git LFS pointer": (raw(b"version https://git-lfs.github.com/spec/v1\n", "bad.pt"), "`git lfs pull`"),
    "picture": (
        raw(b"\x89PNG\r\n\x1a\n" + bytes(40), "bad.pt"),
        "its first bytes 89 50 4e 47 0d 0a 1a 0a are",
    ),
    "list": (torch_file([torch.ones(1)]), "holds a list, expected a dict of tensors"),
    "settings alone": (torch_file({"epoch": 3, "lr": 0.1}), "'epoch' is a int, not a tensor; top-level keys are"),
    # would run code
    "malicious zip": (malicious("zip"), "refused, because loading it would run shutil.copyfile"),
    "malicious legacy file": (malicious("legacy"), "refused, because loading it would run shutil.copyfile"),
    "malicious bare pickle": (malicious("pickle"), "refused, because loading it would run shutil.copyfile"),
    "published training checkpoint": (published_training_checkpoint, "a training checkpoint of the published stage-1"),
    # weights of something else
    "another network": (resnet_like, "not a layout that is known here. The nearest is 'sam3', with"),
    "student alone": (torch_file(two_parts("backbone.model.x", "head.0.weight")), "merge it into a SAM 3 checkpoint"),
    "stage 2": (torch_file(two_parts("spatial_perceiver.latents", "mem_proj.bias")), "a compressed memory (stage 2)"),
    "geometry fine-tuning": (torch_file(two_parts("student_trunk.a", "frozen_convs.b")), "geometry fine-tuning"),
    "SAM 3.1": (torch_file(two_parts(TRUNK_PREFIX + "blocks.0.attn.freqs_cis_real", "tracker.x")), "a file of SAM 3.1"),
    "SAM 2": (torch_file({"model": two_parts("image_encoder.trunk.x", "memory_attention.y")}), "a SAM 2 checkpoint"),
    "SAM 1": (torch_file(two_parts("image_encoder.pos_embed", "mask_decoder.y")), "a checkpoint of the first SAM"),
    "tracker alone": (torch_file(two_parts("tracker.no_mem_embed", "tracker.no_obj_ptr")), "the tracker alone"),
    "student text encoder": (
        changed(**{"detector.backbone.language_backbone.encoder.embedding_layer.weight": torch.ones(1)}),
        "a student text encoder (MobileCLIP)",
    ),
    # nearly right
    "a tensor is missing": (changed(**{QKV: None}), f"trunk: 1 of 76 missing: {QKV}"),
    "half a text encoder": (changed(**{TEXT_KEY: None}), f"text encoder: 1 of 31 missing: {TEXT_KEY}"),
    "half a student": (half_a_student, f"missing: {STUDENT_PREFIX}backbone.model.stages.2."),
    "an unknown part": (changed(**{"detector.extra.weight": torch.ones(1)}), "1 unexpected: detector.extra.weight"),
    "a tampered shape": (changed(**{QKV: torch.ones(3, 3)}), f"{QKV}: file (3, 3), model (384, 128)"),
    "whole numbers": (changed(**{QKV: torch.ones(384, 128, dtype=torch.int8)}), f"{QKV}: file int8, model float32"),
    "complex numbers": (changed(**{QKV: torch.ones(384, 128, dtype=torch.complex64)}), "file complex64, model float32"),
    "a sparse tensor": (changed(**{QKV: torch.ones(384, 128).to_sparse()}), "only plain tensors are read"),
    "a tensor without data": (changed(**{QKV: torch.ones(384, 128, device="meta")}), "is a tensor without data"),
    "a foreign rotary table": (
        changed(**{TRUNK_PREFIX + "blocks.0.attn.freqs_cis": torch.ones(36, 16, dtype=torch.complex64)}),
        "blocks.0.attn.freqs_cis: the rotary table differs from this model's by up to 1.99",
    ),
    "two names for one tensor": (changed(**{"module." + QKV: torch.ones(384, 128)}), "without the prefixes"),
    "the record of another model": (record_of_another_model, f"tiny with student {STUDENT}' (it holds a ViT trunk"),
    # shards
    "one shard of three": (
        raw(safetensors_bytes({}), "model-00001-of-00003.safetensors"),
        "one of 3 shards: give their index (*.safetensors.index.json) or folder",
    ),
    "a shard is missing": (
        index_of({"a": "one.safetensors", "b": "two.safetensors"}, "one.safetensors"),
        "1 of 2 shards",
    ),
    "a shard elsewhere": (
        index_of({"a": "../one.safetensors"}),
        "names the shard '../one.safetensors', which",
    ),
    "another version of a shard": (index_of({"b": "one.safetensors"}, "one.safetensors"), "files of two versions?"),
    "an index of nothing": (index_of({}), "names no tensors"),
    "an index without a map": (index_of([1]), "not an index of safetensors shards"),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("name", CASES)
def test_each_bad_checkpoint_gets_one_clear_line(tmp_path: Path, name: str) -> None:
    make, message = CASES[name]
    path = make(tmp_path)
    with pytest.raises(CheckpointError) as error:
        load_model(path, device="cpu")
    text = str(error.value)
    assert message in text
    assert "\n" not in text
    assert len(text) < 700
    assert path.name in text
    assert "weights_only" not in text, "torch's advice to load the file all the same"
    assert not (tmp_path / "executed").exists()


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("name", [name for name in CASES if name != "missing"])
def test_inspect_says_the_same(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a traceback, with exit code 2, and without running anything either."""
    make, message = CASES[name]
    assert inspect([str(make(tmp_path))]) == 2
    printed = capsys.readouterr()
    assert message in (printed.out + printed.err)
    assert "Traceback" not in printed.err
    assert not (tmp_path / "executed").exists()


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 10


def test_the_payload_would_run_if_it_were_unpickled(tmp_path: Path) -> None:
    """The malicious cases prove nothing unless their file does harm where it is trusted."""
    path = malicious("pickle")(tmp_path)
    assert not (tmp_path / "executed").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(("name", "other"), [("a.pt", "a.safetensors"), ("a.safetensors", "a.pt")])
def test_the_content_decides_and_not_the_name(tmp_path: Path, name: str, other: str) -> None:
    weights = {"a": torch.arange(3.0)}
    write_merged(tmp_path / name, weights, {})
    (tmp_path / name).rename(tmp_path / other)
    assert torch.equal(read_state_dict(tmp_path / other)[0]["a"], weights["a"])


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["a.pt", "legacy.pt", "a.safetensors"])
def test_flipped_bytes_give_weights_or_one_clear_line(tmp_path: Path, name: str) -> None:
    """400 damaged copies of a small file: no other error than ours, no crash."""
    weights = {"detector.a": torch.arange(6.0).view(2, 3), "tracker.b": torch.ones(4, dtype=torch.int64)}
    if name == "legacy.pt":
        torch.save({"model": weights}, tmp_path / name, _use_new_zipfile_serialization=False)
    else:
        write_merged(tmp_path / name, weights, {"variant": "x"})
    content = (tmp_path / name).read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(content)
        where, value = torch.randint(0, 1 << 30, (2, 3), generator=generator).tolist()
        for position, byte in zip(where, value, strict=True):
            # Half of them in the header or pickle, where the structure is.
            limit = len(damaged) if position % 2 else min(300, len(damaged))
            damaged[(position // 2) % limit] = byte % 256
        path = tmp_path / f"damaged-{name}"
        path.write_bytes(damaged)
        try:
            read_state_dict(path)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 40
