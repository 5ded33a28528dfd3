"""Checkpoint files: what is read, what is refused and how, and that writing is all or nothing."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sam3 import checkpoint_io
from sam3.checkpoint_io import CheckpointError, read_state_dict, sha256_file, write_atomically, write_merged


def weights() -> dict[str, torch.Tensor]:
    return {"detector.a": torch.arange(6.0).view(2, 3), "tracker.b": torch.ones(4, dtype=torch.int64)}


def test_flat_nested_and_safetensors_give_the_same(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "flat.pt")
    torch.save({"model": weights(), "epoch": 3}, tmp_path / "nested.pth")
    torch.save(weights(), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(weights(), tmp_path / "plain.safetensors")
    for name in ("flat.pt", "nested.pth", "legacy.pt", "plain.safetensors"):
        state_dict, metadata = read_state_dict(tmp_path / name)
        assert metadata == {}
        assert state_dict.keys() == weights().keys()
        for key, value in weights().items():
            assert torch.equal(state_dict[key], value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_merged_files_keep_their_record(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "new" / f"merged{suffix}"
    record = {"variant": "tiny", "model": {"scales": [4.0, 2.0]}, "provenance": {"epoch": 3, "sha": None}}
    write_merged(path, weights(), record, dtype=torch.float16)
    state_dict, metadata = read_state_dict(path)
    assert metadata == {"format_version": 1, **record}
    assert state_dict["detector.a"].dtype == torch.float16
    assert state_dict["tracker.b"].dtype == torch.int64
    assert list(path.parent.iterdir()) == [path]


def test_a_view_is_stored_without_its_base(tmp_path: Path) -> None:
    base = torch.zeros(1_000_000)
    write_merged(tmp_path / "view.pt", {"a": base[:10], "b": base.view(1000, 1000).T[:2]}, {})
    assert (tmp_path / "view.pt").stat().st_size < 50_000


def test_rotary_tables_are_left_out_of_safetensors_and_kept_in_pt(tmp_path: Path) -> None:
    table = {"x.attn.freqs_cis": torch.ones(2, 2, dtype=torch.complex64)}
    write_merged(tmp_path / "a.safetensors", weights() | table, {})
    assert read_state_dict(tmp_path / "a.safetensors")[0].keys() == weights().keys()
    write_merged(tmp_path / "a.pt", weights() | table, {})
    assert read_state_dict(tmp_path / "a.pt")[0]["x.attn.freqs_cis"].is_complex()
    with pytest.raises(CheckpointError, match="complex tensor 'other'"):
        write_merged(tmp_path / "b.safetensors", {"other": torch.ones(2, dtype=torch.complex64)}, {})
    assert not (tmp_path / "b.safetensors").exists()


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("container", ["zip", "legacy", "bare pickle"])
def test_a_malicious_pickle_is_refused_and_never_runs(tmp_path: Path, container: str) -> None:
    path, trap = tmp_path / "evil.pt", tmp_path / "executed"
    content = {"model": weights(), "x": Payload(trap)}
    if container == "bare pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=container == "zip")
    with pytest.raises(CheckpointError, match=r"evil\.pt: refused"):
        read_state_dict(path)
    assert not trap.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 7, 0.5, -1])
def test_a_truncated_file_is_one_clear_error(tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"cut{suffix}"
    write_merged(path, {"a": torch.zeros(1000)}, {})
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep == 0.5 else keep])
    with pytest.raises(CheckpointError, match=rf"cut\{suffix}: (damaged|refused|the file is empty)") as error:
        read_state_dict(path)
    assert "\n" not in str(error.value)


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    cases = {
        "list.pt": ([torch.ones(1)], "holds a list"),
        "empty.pt": ({}, "it is empty"),
        "config.pt": ({"epoch": 3, "lr": 0.1}, "'epoch' is a int, not a tensor"),
        "inner.pt": ({"model": {"a": 3}}, "'a' is a int"),
        "future.pt": ({"model": weights(), "metadata": {"format_version": 2}}, "format version 2 is newer"),
        "record.pt": ({"model": weights(), "metadata": [1]}, "metadata is a list"),
    }
    for name, (content, message) in cases.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(CheckpointError, match=message) as error:
            read_state_dict(tmp_path / name)
        assert name in str(error.value)
    with pytest.raises(CheckpointError, match=r"gone\.pt: no such checkpoint file"):
        read_state_dict(tmp_path / "gone.pt")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_state_dict(tmp_path)
    (tmp_path / "text.safetensors").write_text("hello, this is no safetensors file")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_state_dict(tmp_path / "text.safetensors")
    save_file(weights(), tmp_path / "record.safetensors", metadata={"efficientsam3": "{"})
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_state_dict(tmp_path / "record.safetensors")


def test_metadata_must_be_plain(tmp_path: Path) -> None:
    for bad in ({"path": tmp_path}, {"loss": float("nan")}):
        with pytest.raises(CheckpointError, match="JSON cannot"):
            write_merged(tmp_path / "a.pt", weights(), bad)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    expected = (tmp_path / "plain").stat().st_mode
    for suffix in (".pt", ".safetensors"):
        write_merged(tmp_path / f"a{suffix}", weights(), {})
        assert (tmp_path / f"a{suffix}").stat().st_mode == expected


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    write_merged(path, weights(), {})
    before = sha256_file(path)

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, fail)
    assert sha256_file(path) == before
    assert list(tmp_path.iterdir()) == [path]


def test_weights_stay_on_disk_until_they_are_read(tmp_path: Path) -> None:
    """Memory-mapped: reading a file of 64 MB costs next to no memory of its own."""
    torch.save({"a": torch.zeros(16_000_000)}, tmp_path / "big.pt")
    before = _private_bytes()
    state_dict, _ = read_state_dict(tmp_path / "big.pt")
    assert _private_bytes() - before < 16_000_000
    assert state_dict["a"].sum() == 0


def _private_bytes() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def test_hash_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_record_is_json_under_one_key(tmp_path: Path) -> None:
    write_merged(tmp_path / "a.safetensors", weights(), {"variant": "x"})
    header_size = int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little")
    header = json.loads((tmp_path / "a.safetensors").read_bytes()[8 : 8 + header_size])
    record = header["__metadata__"][checkpoint_io.SAFETENSORS_METADATA_KEY]
    assert json.loads(record) == {"format_version": 1, "variant": "x"}
