"""Unpacking SA-1B tars: whole or reported, resumable, split by name, never outside the target folder."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import reorg_sa1b
from fixtures_data import add_member, make_jpeg, make_sa1b_tar

from sam3_train.data.image_index import build_image_index


def unpack(source: Path, output: Path, *more: str) -> int:
    return reorg_sa1b.main(["--source", str(source), "--output", str(output), "--workers", "1", *more])


def tree(output: Path) -> dict[str, bytes]:
    """Images and annotations."""
    files = [path for path in sorted(output.rglob("sa_*.*")) if path.suffix in (".jpg", ".json")]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def manifest(output: Path) -> dict:
    return json.loads((output / "reorg_manifest.json").read_text())["tars"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make_sa1b_tar(tmp_path / "tars" / "sa_000020.tar", range(20))
    make_sa1b_tar(tmp_path / "tars" / "sa_000021.tar", range(20, 35))
    return tmp_path / "tars"


def test_every_image_lands_beside_its_annotation(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "sa-1b"
    assert unpack(source, output, "--val-ratio", "0.3") == 0
    names = set(tree(output))
    assert len(names) == 70
    for name in names:
        if name.startswith("images"):
            assert name.replace("images", "annotations").replace(".jpg", ".json") in names
    train, val = (build_image_index(output, "sa1b", split) for split in ("train", "val"))
    assert len(train) + len(val) == 35 and len(val) > 3
    counts = [manifest(output)[name] for name in ("sa_000020.tar", "sa_000021.tar")]
    assert [record["train"] + record["val"] for record in counts] == [20, 15]
    assert all(record["status"] == "done" for record in counts)


def test_one_unpacked_pair_does_not_stop_the_rest(source: Path, tmp_path: Path) -> None:
    """D-99: a set that is partly there is completed, never taken for whole."""
    output = tmp_path / "sa-1b"
    assert unpack(source, output) == 0
    everything = tree(output)
    for name in list(everything)[1:]:
        (output / name).unlink()
    (output / "reorg_manifest.json").unlink()
    assert unpack(source, output) == 0
    assert tree(output) == everything


def test_an_interrupted_run_continues_between_members(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D-99: killed at any member, the next run ends with the same files as one that was never killed."""
    assert unpack(source, tmp_path / "whole") == 0
    expected = tree(tmp_path / "whole")
    write = reorg_sa1b._write_file
    for stop_at in (0, 7, 45):
        output = tmp_path / f"killed{stop_at}"
        written = []

        def write_or_die(
            archive: tarfile.TarFile,
            member: reorg_sa1b._Member,
            target: Path,
            stop_at: int = stop_at,
            log: list = written,
        ) -> None:
            if len(log) == stop_at:
                target.parent.mkdir(parents=True, exist_ok=True)
                (target.parent / f".{target.name}.part").write_bytes(b"torn")
                raise KeyboardInterrupt
            log.append(target)
            write(archive, member, target)

        monkeypatch.setattr(reorg_sa1b, "_write_file", write_or_die)
        assert unpack(source, output) == 130
        monkeypatch.setattr(reorg_sa1b, "_write_file", write)
        survivors = {path: path.stat().st_mtime_ns for path in output.rglob("sa_*.jpg")}
        assert unpack(source, output) == 0
        assert tree(output) == expected
        assert all(path.stat().st_mtime_ns == stamp for path, stamp in survivors.items()), "written again"


def test_a_tar_that_is_done_is_not_opened_again(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "sa-1b"
    assert unpack(source, output) == 0
    make_sa1b_tar(source / "sa_000022.tar", range(50, 55))
    size = (source / "sa_000020.tar").stat().st_size
    (source / "sa_000020.tar").write_bytes(b"x" * size)
    assert unpack(source, output) == 0
    assert "2 done before, 1 to do" in capsys.readouterr().out
    assert len(tree(output)) == 80


@pytest.mark.parametrize("flags", [[], ["--folder-per-tar"]])
def test_images_deleted_from_the_output_are_unpacked_again(
    source: Path, tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture
) -> None:
    """D-99: done means that the files are there; other files in the folder hide no loss, and no other tar is opened."""
    output = tmp_path / "sa-1b"
    assert unpack(source, output, *flags) == 0
    everything = tree(output)
    for name in [name for name in everything if "/sa_7." in name or "/sa_9.jpg" in name]:
        (output / name).unlink()
    (output / "images/train/photo.jpg").write_bytes(make_jpeg(1))
    (source / "sa_000021.tar").write_bytes(b"x" * (source / "sa_000021.tar").stat().st_size)
    capsys.readouterr()
    assert unpack(source, output, *flags) == 0
    printed = capsys.readouterr().out
    assert "1 done before, 1 to do" in printed
    assert f"3 files that were unpacked are gone from {output}, of sa_000020.tar" in printed
    assert tree(output) == everything
    assert unpack(source, output, *flags) == 0
    assert "2 done before, 0 to do" in capsys.readouterr().out


def test_images_that_are_gone_with_their_tar_are_reported(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """D-99, D-101: and unpacked again once the tar is back."""
    output = tmp_path / "sa-1b"
    assert unpack(source, output, "--delete-tars") == 0
    everything = tree(output)
    lost = next(name for name in everything if name.endswith("/sa_3.jpg"))
    (output / lost).unlink()
    assert unpack(source, output) == 2
    assert "sa_000020.tar: 1 of its files are gone from" in capsys.readouterr().err
    make_sa1b_tar(source / "sa_000020.tar", range(20))
    assert unpack(source, output) == 0
    assert tree(output) == everything


def test_the_split_does_not_change_when_images_are_added(source: Path, tmp_path: Path) -> None:
    """D-100: the side of an image is a function of its name."""
    assert unpack(source, tmp_path / "before", "--val-ratio", "0.3") == 0
    make_sa1b_tar(source / "sa_000001.tar", range(1000, 1040))
    assert unpack(source, tmp_path / "after", "--val-ratio", "0.3", "--workers", "2") == 0
    assert set(tree(tmp_path / "before")) <= set(tree(tmp_path / "after"))


def test_another_split_ratio_is_refused_in_a_begun_folder(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """D-100"""
    assert unpack(source, tmp_path / "out", "--val-ratio", "0.3") == 0
    assert unpack(source, tmp_path / "out", "--val-ratio", "0.1") == 2
    assert "images would change sides" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage", ["empty", "text", "cut_in_data", "cut_at_header", "no_images", "damaged_header", "no_end"]
)
def test_a_damaged_tar_is_reported_and_the_others_are_unpacked(
    source: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture
) -> None:
    """D-98: nothing of a damaged tar is unpacked, the exit code is 2 and the report names it."""
    bad = source / "sa_000021.tar"
    content = bad.read_bytes()
    with tarfile.open(bad) as tar:
        members = tar.getmembers()
    if damage == "no_images":
        with tarfile.open(bad, "w") as tar:
            add_member(tar, "readme.txt", b"nothing here")
    else:
        header = members[5].offset
        bad.write_bytes(
            {
                "empty": b"",
                "text": b"<html>403 Forbidden</html>" * 100,
                "cut_in_data": content[: members[6].offset_data + 10],
                "cut_at_header": content[: members[6].offset + 100],
                "damaged_header": content[:header] + b"\xff" * 512 + content[header + 512 :],
                "no_end": content[: members[-1].offset_data + (members[-1].size + 511) // 512 * 512],
            }[damage]
        )
    report = tmp_path / "report.json"
    assert unpack(source, tmp_path / "out", "--report", str(report)) == 2
    assert str(bad) in capsys.readouterr().err
    record = json.loads(report.read_text())
    assert record["failed"] == ["sa_000021.tar"]
    assert record["tars"]["sa_000021.tar"]["status"] == "damaged"
    assert len(tree(tmp_path / "out")) == 40
    bad.write_bytes(content)
    assert unpack(source, tmp_path / "out") == 0
    assert len(tree(tmp_path / "out")) == 70


def hostile(kind: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo({"parent": "../../escaped.jpg", "absolute": "/tmp/escaped.jpg"}.get(kind, "./sa_7.jpg"))
    info.type = {"symlink": tarfile.SYMTYPE, "hardlink": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}.get(
        kind, tarfile.REGTYPE
    )
    info.linkname = "/etc/passwd" if "link" in kind else ""
    return info


@pytest.mark.parametrize("kind", ["parent", "absolute", "symlink", "hardlink", "device"])
def test_a_member_that_would_leave_the_folder_is_refused(
    source: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture
) -> None:
    with tarfile.open(source / "sa_000099.tar", "w") as tar:
        add_member(tar, "./sa_900.jpg", make_jpeg(900))
        tar.addfile(hostile(kind))
    assert unpack(source, tmp_path / "deep" / "out") == 2
    assert "nothing of this tar is unpacked" in capsys.readouterr().err
    assert manifest(tmp_path / "deep" / "out")["sa_000099.tar"]["status"] == "refused"
    assert not list(tmp_path.rglob("escaped*")) and not list((tmp_path / "deep").rglob("sa_900*"))
    assert len(tree(tmp_path / "deep" / "out")) == 70


def test_a_dry_run_writes_nothing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """D-102: the plan can be seen before anything happens."""
    assert unpack(source, tmp_path / "out", "--dry-run") == 0
    assert not (tmp_path / "out").exists()
    printed = capsys.readouterr().out
    assert "35 images" in printed and "nothing was written" in printed


def test_a_full_disk_is_refused_before_the_first_byte(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    usage = reorg_sa1b.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(reorg_sa1b.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert unpack(source, tmp_path / "out") == 2
    assert "--index-only" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_tars_with_one_image_name_are_reported(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with tarfile.open(source / "sa_000030.tar", "w") as tar:
        add_member(tar, "./sa_3.jpg", make_jpeg(12345))
    assert unpack(source, tmp_path / "out") == 2
    assert "sa_3.jpg exists with" in capsys.readouterr().err


def test_folders_per_tar_and_deleted_tars(source: Path, tmp_path: Path) -> None:
    """D-101: no flat folder of millions, and no second copy on the disk."""
    assert unpack(source, tmp_path / "out", "--folder-per-tar", "--delete-tars") == 0
    assert not list(source.glob("*.tar"))
    index = build_image_index(tmp_path / "out", "sa1b", "train")
    assert "images/train/sa_000020/sa_" in index.where(index.find("sa_1") or 0)
    assert index.read_annotation(0)


def test_a_run_that_deleted_its_tars_can_be_repeated(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """D-99, D-101: deleted tars are done, not missing, and stay in the counts."""
    output, report = tmp_path / "out", tmp_path / "report.json"
    assert unpack(source, output, "--delete-tars") == 0
    everything = tree(output)
    capsys.readouterr()
    assert unpack(source, output, "--delete-tars", "--report", str(report)) == 0
    printed = capsys.readouterr().out
    assert "0 to do, 2 more done and deleted" in printed and "2 tars, 35 images" in printed
    assert set(json.loads(report.read_text())["tars"]) == {"sa_000020.tar", "sa_000021.tar"}
    assert tree(output) == everything
    make_sa1b_tar(source / "sa_000022.tar", range(50, 55))
    assert unpack(source, output, "--delete-tars") == 0
    assert "3 tars, 40 images" in capsys.readouterr().out


def test_another_empty_folder_is_not_taken_for_one_that_is_done(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """D-98: what was deleted elsewhere does not excuse a wrong --source."""
    assert unpack(source, tmp_path / "out", "--delete-tars") == 0
    (tmp_path / "empty").mkdir()
    assert unpack(tmp_path / "empty", tmp_path / "out", "--delete-tars") == 2
    assert "empty: holds no *.tar" in capsys.readouterr().err


def test_indexing_only_unpacks_nothing_and_names_damaged_tars(source: Path, capsys: pytest.CaptureFixture) -> None:
    """D-101"""
    (source / "sa_000050.tar").write_bytes(b"")
    assert reorg_sa1b.main(["--source", str(source), "--index-only", "--workers", "2"]) == 2
    assert "sa_000050.tar: is empty" in capsys.readouterr().err
    (source / "sa_000050.tar").unlink()
    assert reorg_sa1b.main(["--source", str(source), "--index-only", "--workers", "2"]) == 0
    assert "DATA.DATASET sa1b_tar" in capsys.readouterr().out
    assert {path.name for path in (source / ".tar_tables").iterdir()} >= {"sa_000020.tar.npz", "sa_000021.tar.npz"}


def test_a_folder_without_tars_is_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """D-98"""
    assert unpack(tmp_path, tmp_path / "out") == 2
    assert "holds no *.tar" in capsys.readouterr().err
