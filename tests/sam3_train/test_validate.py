"""One pass over a data set finds what cannot be read, and what it lists is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fixtures_data import make_jpeg, make_sa1b_tar, make_sa1b_tree

from sam3_train.data import validate
from sam3_train.data.bad_images import BadImageLog, bad_image_limit, read_bad_images
from sam3_train.data.image_index import build_image_index
from sam3_train.errors import UserError


@pytest.mark.parametrize("workers", ["1", "2"])
def test_bad_photos_are_listed_and_then_left_out(tmp_path: Path, workers: str, capsys: pytest.CaptureFixture) -> None:
    """D-21: found once, skipped the same way by everything that reads the list."""
    root = make_sa1b_tree(tmp_path)
    (root / "images/train/sa_2.jpg").write_bytes(make_jpeg(2)[:200])
    (root / "images/val/sa_101.jpg").write_bytes(b"")
    assert validate.main(["--data-path", str(root), "--workers", workers]) == 2, "a script has to see it"
    printed = capsys.readouterr()
    assert "9 images checked, 2 unreadable" in printed.out
    assert f"leave them out: DATA.BAD_IMAGES {root / 'bad_images.txt'}" in printed.err
    bad = read_bad_images(root / "bad_images.txt")
    assert set(bad) == {"sa_2", "sa_101"} and "sa_2.jpg: unreadable image" in bad["sa_2"]
    assert list(build_image_index(root, "sa1b", "train", bad_keys=bad).keys) == ["sa_0", "sa_1", "sa_3", "sa_4", "sa_5"]


def test_a_repaired_photo_leaves_the_list(tmp_path: Path) -> None:
    root = make_sa1b_tree(tmp_path)
    (root / "images/train/sa_2.jpg").write_bytes(b"broken")
    assert validate.main(["--data-path", str(root), "--workers", "1"]) == 2
    (root / "images/train/sa_2.jpg").write_bytes(make_jpeg(2))
    assert validate.main(["--data-path", str(root), "--workers", "1"]) == 0
    assert read_bad_images(root / "bad_images.txt") == {}


def test_annotations_are_checked_on_request(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """D-22"""
    root = make_sa1b_tree(tmp_path)
    (root / "annotations/train/sa_1.json").unlink()
    (root / "annotations/val/sa_100.json").write_text("{}")
    assert validate.main(["--data-path", str(root), "--workers", "1", "--annotations"]) == 2
    printed = capsys.readouterr()
    assert "2 annotations are missing, empty or malformed" in printed.out
    assert "sa_1.json: has no annotation" in printed.err and "sa_100.json: not an SA-1B" in printed.err
    assert read_bad_images(root / "bad_images.txt") == {}, "trunk distillation does not read annotations"


def test_images_without_a_valid_mask_are_listed_on_request(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """What training with prompts cannot use is listed; an annotation with one valid mask of two is not."""
    root = make_sa1b_tree(tmp_path)
    (root / "annotations/train/sa_1.json").unlink()
    for name, emptied in (("sa_2", [0, 1]), ("sa_3", [0])):
        path = root / f"annotations/train/{name}.json"
        content = json.loads(path.read_text())
        for i in emptied:
            content["annotations"][i]["segmentation"] = {"size": [32, 48], "counts": [32 * 48]}
        path.write_text(json.dumps(content))
    half = root / "annotations/train/sa_4.json"
    content = json.loads(half.read_text())
    content["annotations"][0]["segmentation"] = "nothing"
    half.write_text(json.dumps(content))
    words = ["--data-path", str(root), "--workers", "1", "--list-annotations"]
    assert validate.main([*words, "--annotations"]) == 2
    assert "2 unreadable or without a valid mask" in capsys.readouterr().out
    assert read_bad_images(root / "bad_images.txt").keys() == {"sa_1", "sa_2"}
    assert validate.main(words) == 2
    assert "give both" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["coco", "folder"])
def test_annotations_of_a_layout_that_has_none_are_refused(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture
) -> None:
    """D-22: not every photo is reported for lacking what its layout never has."""
    assert validate.main(["--data-path", str(tmp_path), "--dataset", kind, "--annotations"]) == 2
    error = capsys.readouterr().err
    assert f"the layout {kind!r} has no SA-1B annotations" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_tars_are_checked_in_place(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_sa1b_tar(tmp_path / "sa_000001.tar", range(8))
    arguments = ["--data-path", str(tmp_path), "--dataset", "sa1b_tar", "--val-fraction", "0.3", "--workers", "1"]
    assert validate.main([*arguments, "--annotations"]) == 0
    assert "8 images checked, 0 unreadable" in capsys.readouterr().out


def test_a_wrong_path_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert validate.main(["--data-path", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not a folder" in capsys.readouterr().err


def test_a_run_ends_when_too_many_photos_are_bad(tmp_path: Path) -> None:
    """D-21: a few are skipped and written down, many end the run."""
    log = BadImageLog(tmp_path / "run" / "bad_images.txt", limit=2)
    log.record([("a", "a.jpg: broken\nin two lines"), ("b", "b.jpg: broken")])
    log.record([("a", "a.jpg: broken")])
    assert read_bad_images(tmp_path / "run" / "bad_images.txt") == {
        "a": "a.jpg: broken in two lines",
        "b": "b.jpg: broken",
    }
    with pytest.raises(UserError, match=r"3 unreadable images, more than the 2 .* c\.jpg: gone"):
        log.record([("c", "c.jpg: gone")])


def test_all_ranks_and_all_starts_of_a_run_share_one_limit(tmp_path: Path) -> None:
    """D-21: neither more processes nor a restart allow more bad photos."""
    path = tmp_path / "bad_images.txt"
    first, second = (BadImageLog(path, limit=2) for _ in range(2))
    first.record([("a", "a.jpg: broken")])
    second.record([("a", "a.jpg: broken"), ("b", "b.jpg: broken")])
    first.record([("b", "b.jpg: broken")])
    with pytest.raises(UserError, match="3 unreadable images, more than the 2 "):
        first.record([("c", "c.jpg: broken")])
    restarted = BadImageLog(path, limit=2)
    with pytest.raises(UserError, match=r"3 unreadable images.* take them off the list"):
        restarted.check()
    with pytest.raises(UserError, match="4 unreadable images"):
        restarted.record([("d", "d.jpg: broken")])
    assert list(read_bad_images(path)) == ["a", "b", "c", "d"]


def test_photos_that_a_run_leaves_out_do_not_count(tmp_path: Path) -> None:
    """D-21: the list of one start may be the DATA.BAD_IMAGES of the next."""
    path = tmp_path / "bad_images.txt"
    path.write_text("a\ta.jpg: broken\nb\tb.jpg: broken\n")
    log = BadImageLog(path, limit=1, left_out=read_bad_images(path))
    log.record([("c", "c.jpg: broken")])
    with pytest.raises(UserError, match="2 unreadable images, more than the 1 "):
        log.record([("d", "d.jpg: broken")])


def test_the_limit_is_a_share_but_one_at_least() -> None:
    assert [bad_image_limit(0.001, n) for n in (10, 5000)] == [1, 5]
    assert bad_image_limit(0.0, 5000) == 0
