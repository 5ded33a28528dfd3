"""The list of images: one order everywhere, splits by name, tars in place, bad photos left out."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from fixtures_data import add_member, make_jpeg, make_sa1b_tar, make_sa1b_tree
from PIL import Image, ImageFile

from sam3_train.data import image_index as image_index_module
from sam3_train.data.decode import UnreadableImageError, decode_image
from sam3_train.data.image_index import build_image_index, require_same_on_all_ranks
from sam3_train.data.image_tars import load_tar_table
from sam3_train.data.packed_strings import PackedStrings
from sam3_train.data.splits import name_fraction, split_indices, split_of_name, subset_indices
from sam3_train.errors import UserError


def make_photos(root: Path, names: list[str]) -> Path:
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".png"):
            Image.fromarray(np.full((9, 8, 3), seed, np.uint8)).save(root / name)
        else:
            (root / name).write_bytes(make_jpeg(seed))
    return root


# ---- order -------------------------------------------------------------------------------------------------------


def test_the_order_does_not_depend_on_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D-23: whatever order the file system lists names in, keys are sorted and their hash is the same."""
    ids = [5, 100, 1, 20, 3]
    index = build_image_index(make_sa1b_tree(tmp_path, train=ids), "sa1b", "train")
    assert list(index.keys) == ["sa_1", "sa_100", "sa_20", "sa_3", "sa_5"]
    scandir = os.scandir
    for seed in range(3):

        class Shuffled:
            def __init__(self, path: object, seed: int = seed) -> None:
                with scandir(path) as entries:  # type: ignore[call-overload]
                    self.entries = sorted(entries, key=lambda entry: entry.name)
                random.Random(seed).shuffle(self.entries)

            def __enter__(self) -> list:
                return self.entries

            def __exit__(self, *args: object) -> None:
                pass

        monkeypatch.setattr(os, "scandir", Shuffled)
        shuffled = build_image_index(tmp_path, "sa1b", "train")
        assert list(shuffled.keys) == list(index.keys) and shuffled.sha256 == index.sha256
        assert [shuffled.where(i) for i in range(5)] == [index.where(i) for i in range(5)]
    assert index.sha256 == hashlib.sha256(b"sa_1\nsa_100\nsa_20\nsa_3\nsa_5\n").hexdigest()


def test_ranks_that_list_other_images_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D-23: two nodes with different copies of a data set do not start."""
    index = build_image_index(make_sa1b_tree(tmp_path), "sa1b", "train")
    require_same_on_all_ranks(index)
    other = ("node-b", 5, "0" * 64)
    monkeypatch.setattr(image_index_module, "all_gather_object", lambda mine: [mine, mine, other])
    with pytest.raises(UserError, match=r"lists 6 train images .* rank 2 on node-b 5"):
        require_same_on_all_ranks(index)


def test_positions_keys_and_images_belong_together(tmp_path: Path) -> None:
    index = build_image_index(make_sa1b_tree(tmp_path, train=[7, 70, 8]), "sa1b", "train")
    for position, image_id in enumerate([7, 70, 8]):
        assert index.key(position) == f"sa_{image_id}" and index.find(f"sa_{image_id}") == position
        expected = decode_image(make_jpeg(image_id), "here")
        assert np.array_equal(np.asarray(index.open_image(position)), np.asarray(expected))
        assert f"sa_{image_id}.json" in (index.annotation_where(position) or "")
    assert index.find("sa_9") is None and index.find("") is None
    with pytest.raises(IndexError):
        index.key(3)


def test_images_without_annotations_are_listed(tmp_path: Path) -> None:
    """D-19, D-22: trunk distillation opens no annotation and misses none."""
    root = make_sa1b_tree(tmp_path)
    for path in (root / "annotations").rglob("*.json"):
        path.unlink()
    index = build_image_index(root, "sa1b", "train")
    assert len(index) == 6 and index.read_annotation(0) is None
    assert index.open_image(0).size == (48, 32)


# ---- layouts -----------------------------------------------------------------------------------------------------


def test_coco_images_are_found_with_and_without_the_images_folder(tmp_path: Path) -> None:
    for root in (tmp_path / "a" / "images", tmp_path / "b"):
        make_photos(root, ["train2017/000000000009.jpg", "train2017/000000000025.jpg", "val2017/000000000139.jpg"])
    for root in (tmp_path / "a", tmp_path / "b"):
        assert list(build_image_index(root, "coco", "train").keys) == ["000000000009", "000000000025"]
        assert list(build_image_index(root, "coco", "val").keys) == ["000000000139"]


def test_a_folder_of_photos_splits_itself_by_name(tmp_path: Path) -> None:
    """D-24: a val split exists for every data set."""
    names = [f"holiday/{i:03d}.jpg" for i in range(40)] + [
        "x.PNG".lower(),
        "deep/er/y.JPEG",
        "notes.txt",
        ".hidden.jpg",
    ]
    root = make_photos(tmp_path, [name for name in names if not name.endswith(".txt")])
    (root / "notes.txt").write_text("no image")
    train, val = (build_image_index(root, "folder", split, val_fraction=0.2) for split in ("train", "val"))
    keys = {*train.keys, *val.keys}
    assert len(train) + len(val) == 42 == len(keys) and 2 <= len(val) <= 16
    assert {"holiday/000", "x", "deep/er/y"} <= keys
    assert train.open_image(0).size


def test_a_folder_with_train_and_val_uses_them(tmp_path: Path) -> None:
    make_photos(tmp_path, ["train/a.jpg", "train/b.jpg", "val/c.jpg"])
    assert list(build_image_index(tmp_path, "folder", "train").keys) == ["train/a", "train/b"]
    assert list(build_image_index(tmp_path, "folder", "val").keys) == ["val/c"]


def test_same_stem_in_two_folders_gives_two_keys_and_in_one_an_error(tmp_path: Path) -> None:
    make_photos(tmp_path, ["a/1.jpg", "b/1.jpg"])
    assert list(build_image_index(tmp_path, "folder", "train", val_fraction=0).keys) == ["a/1", "b/1"]
    make_photos(tmp_path, ["a/1.png"])
    with pytest.raises(UserError, match=r"1\.jpg and .*1\.png have the same key 'a/1'"):
        build_image_index(tmp_path, "folder", "train")


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    make_photos(tmp_path / "elsewhere", ["a.jpg"])
    root = make_photos(tmp_path / "photos", ["b.jpg"])
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    assert list(build_image_index(root, "folder", "train", val_fraction=0).keys) == ["b", "link/a"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "imagenet"}, "'imagenet' is not one of sa1b, sa1b_tar, coco, folder"),
        ({"kind": "coco"}, "train2017 is not a folder"),
        ({"kind": "sa1b_tar"}, "holds no \\*.tar"),
        ({"split": "test"}, "'test' is not one of train, val"),
        ({"subset": 0.0}, "DATA.SUBSET"),
        ({"num_samples": 0}, "DATA.NUM_SAMPLES"),
        ({"root": "/nowhere"}, "/nowhere is not a folder"),
        ({"kind": "x", "subset": 2.0}, "2 problems"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, settings: dict, said: str) -> None:
    arguments = {"root": make_sa1b_tree(tmp_path), "kind": "sa1b", "split": "train", **settings}
    with pytest.raises(UserError, match=said):
        build_image_index(**arguments)


def test_an_empty_data_set_is_an_error_that_says_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "images" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no train image found .*images/train/\*\.jpg"):
        build_image_index(tmp_path, "sa1b", "train")
    make_sa1b_tar(tmp_path / "tars" / "sa_1.tar", range(2))
    with pytest.raises(UserError, match=r"DATA\.DATASET sa1b_tar"):
        build_image_index(tmp_path / "tars", "sa1b", "train")


# ---- splits and subsets ------------------------------------------------------------------------------------------


def test_the_split_of_a_name_is_fixed_for_ever() -> None:
    """D-100: these are the values of the first release; an image that changes sides leaks."""
    assert [i for i in range(40) if split_of_name(f"sa_{i}", 0.2) == "val"] == [9, 16, 18, 22, 25, 26, 27, 34]
    assert [i for i in range(40) if split_of_name(f"sa_{i}", 0.05) == "val"] == [27]
    assert name_fraction("sa_223750", "split") == pytest.approx(0.5684768249, abs=1e-9)


def test_adding_images_moves_none() -> None:
    """D-100"""
    few, many = [f"sa_{i}" for i in range(200)], [f"sa_{i}" for i in range(1000)]
    val_few = {few[i] for i in split_indices(few, "val", 0.1)}
    val_many = {many[i] for i in split_indices(many, "val", 0.1)}
    assert val_few == {name for name in val_many if name in few}
    assert 60 < len(val_many) < 140


def test_every_split_of_two_images_has_one() -> None:
    for names in (["a", "b"], ["c", "d"], ["e", "f"]):
        for fraction in (0.001, 0.999):
            assert len(split_indices(names, "val", fraction)) == 1
    assert len(split_indices(["a", "b"], "val", 0.0)) == 0


def test_subsets_nest_and_depend_on_the_seed() -> None:
    names = [f"sa_{i}" for i in range(500)]
    tenth, half = subset_indices(names, 0.1, 0), subset_indices(names, 0.5, 0)
    assert len(tenth) == 50 and len(half) == 250 and set(tenth) < set(half)
    assert list(tenth) == sorted(tenth)
    assert set(subset_indices(names, 0.1, 1)) != set(tenth)
    assert len(subset_indices(["only"], 0.001, 0)) == 1


def test_sample_limit_subset_and_bad_list_act_on_sorted_keys(tmp_path: Path) -> None:
    """D-23: NUM_SAMPLES takes the same images everywhere."""
    root = make_sa1b_tree(tmp_path, train=range(20))
    limited = build_image_index(root, "sa1b", "train", num_samples=3)
    assert list(limited.keys) == ["sa_0", "sa_1", "sa_10"]
    assert len(build_image_index(root, "sa1b", "train", num_samples=99)) == 20
    assert len(build_image_index(root, "sa1b", "train", subset=0.25)) == 5
    without = build_image_index(root, "sa1b", "train", num_samples=3, bad_keys=["sa_1", "sa_nowhere"])
    assert list(without.keys) == ["sa_0", "sa_10", "sa_11"]
    assert without.open_image(2).size == (48, 32) and without.where(2).endswith("sa_11.jpg")


# ---- tars --------------------------------------------------------------------------------------------------------


def test_tars_are_read_in_place_with_the_split_of_the_reorganiser(tmp_path: Path) -> None:
    """D-101: no file is unpacked, and an image is on the side it would be on if it were."""
    make_sa1b_tar(tmp_path / "sa_000001.tar", range(30))
    make_sa1b_tar(tmp_path / "sa_000002.tar", range(30, 60), with_annotations=False)
    train, val = (build_image_index(tmp_path, "sa1b_tar", split, val_fraction=0.2) for split in ("train", "val"))
    assert len(train) + len(val) == 60
    for index in (train, val):
        assert list(index.keys) == sorted(index.keys)
        for position, key in enumerate(index.keys):
            assert split_of_name(key, 0.2) == index.split
            image_id = int(key.removeprefix("sa_"))
            expected = decode_image(make_jpeg(image_id), "here")
            assert np.array_equal(np.asarray(index.open_image(position)), np.asarray(expected))
            assert (index.read_annotation(position) is not None) == (image_id < 30)
            assert f"sa_00000{1 if image_id < 30 else 2}.tar:{key}.jpg" in index.where(position)


def test_a_tars_table_is_kept_and_made_again_when_the_tar_changes(tmp_path: Path) -> None:
    tar = make_sa1b_tar(tmp_path / "sa_000001.tar", range(3))
    kept = tmp_path / ".tar_tables" / "sa_000001.tar.npz"
    assert list(load_tar_table(tar).keys) == ["sa_0", "sa_1", "sa_2"]
    stamp = kept.stat().st_mtime_ns
    load_tar_table(tar)
    assert kept.stat().st_mtime_ns == stamp
    make_sa1b_tar(tar, range(5))
    assert len(load_tar_table(tar).keys) == 5
    kept.write_bytes(kept.read_bytes()[:100])
    assert len(load_tar_table(tar).keys) == 5


def test_tables_can_live_in_a_cache_folder(tmp_path: Path) -> None:
    make_sa1b_tar(tmp_path / "tars" / "sa_000001.tar", range(3))
    build_image_index(tmp_path / "tars", "sa1b_tar", "train", val_fraction=0, cache_dir=tmp_path / "cache")
    assert (tmp_path / "cache" / "sa_000001.tar.npz").is_file()
    assert not (tmp_path / "tars" / ".tar_tables").exists()


def test_all_damaged_tars_are_named_at_once(tmp_path: Path) -> None:
    """D-98"""
    make_sa1b_tar(tmp_path / "sa_000001.tar", range(3))
    (tmp_path / "sa_000002.tar").write_bytes(b"")
    (tmp_path / "sa_000003.tar").write_bytes((tmp_path / "sa_000001.tar").read_bytes()[:4000])
    with pytest.raises(UserError, match=r"(?s)2 problems.*sa_000002.tar: is empty.*sa_000003.tar"):
        build_image_index(tmp_path, "sa1b_tar", "train")


def test_one_image_in_two_tars_is_an_error(tmp_path: Path) -> None:
    make_sa1b_tar(tmp_path / "sa_000001.tar", range(3))
    make_sa1b_tar(tmp_path / "sa_000002.tar", range(2, 5))
    with pytest.raises(UserError, match=r"sa_000001.tar and .*sa_000002.tar both hold 'sa_2'"):
        build_image_index(tmp_path, "sa1b_tar", "train")


def test_a_tar_that_shrinks_during_the_run_is_noticed(tmp_path: Path) -> None:
    tar = make_sa1b_tar(tmp_path / "sa_000001.tar", range(3))
    index = build_image_index(tmp_path, "sa1b_tar", "train", val_fraction=0)
    index.open_image(0)
    os.truncate(tar, 100)
    with pytest.raises(UserError, match="the tar has changed"):
        index.open_image(2)


def test_compressed_tars_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "sa_000001.tar", "w:gz") as tar:
        add_member(tar, "sa_1.jpg", make_jpeg(1))
    with pytest.raises(UserError, match="no whole uncompressed tar"):
        build_image_index(tmp_path, "sa1b_tar", "train")


# ---- compact storage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sa1b", "sa1b_tar"])
def test_an_index_pickles_for_workers_that_are_not_forked(tmp_path: Path, kind: str) -> None:
    make_sa1b_tree(tmp_path)
    make_sa1b_tar(tmp_path / "sa_000001.tar", range(4))
    index = build_image_index(tmp_path, kind, "train", val_fraction=0)
    index.open_image(0)
    copy = pickle.loads(pickle.dumps(index))
    assert copy.sha256 == index.sha256 and copy.open_image(1).size == (48, 32)


def test_a_million_keys_take_a_few_bytes_each() -> None:
    """D-55: the index is two arrays, which forked workers share; not a million objects."""
    names = np.char.add(b"sa_", np.arange(1_000_000).astype("S7"))
    packed = PackedStrings.from_array(np.sort(names))
    assert packed.buffer.nbytes + packed.offsets.nbytes < 20 * len(packed)
    assert packed[5] == "sa_10000" and packed.find("sa_999999") == len(packed) - 1
    picked = packed.select(np.arange(0, len(packed), 1000))
    assert picked[3] == packed[3000] and len(picked) == 1000


def test_packed_strings_behave_like_a_list() -> None:
    texts = ["", "a", "zz", "é", "日本"]
    packed = PackedStrings.pack(texts)
    assert list(packed) == texts and [packed[i] for i in range(5)] == texts
    assert list(packed.select([4, 0, 2])) == ["日本", "", "zz"]
    assert list(PackedStrings.from_array(packed.to_array())) == texts
    assert [packed.find(text) for text in texts] == list(range(5))
    assert list(PackedStrings.pack([])) == [] and len(PackedStrings.pack([]).select([])) == 0
    with pytest.raises(ValueError, match="newline"):
        PackedStrings.pack(["a\nb"])


# ---- decoding ----------------------------------------------------------------------------------------------------


def damaged(kind: str) -> bytes:
    whole = make_jpeg(1, (200, 150))
    return {
        "truncated": whole[: len(whole) // 2],
        "last_bytes_missing": whole[:-40],
        "empty": b"",
        "text": b"this is no image",
        "header_only": whole[:30],
    }[kind]


@pytest.mark.parametrize("kind", ["truncated", "last_bytes_missing", "empty", "text", "header_only"])
def test_half_a_photo_is_an_error_and_not_a_grey_area(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """D-21: even if a library has told Pillow to accept truncated files."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(UnreadableImageError, match=r"photos/a\.jpg: unreadable image: \w+"):
        decode_image(damaged(kind), "photos/a.jpg")


def test_a_photo_that_vanished_is_unreadable(tmp_path: Path) -> None:
    index = build_image_index(make_sa1b_tree(tmp_path), "sa1b", "train")
    Path(index.where(2)).unlink()
    with pytest.raises(UnreadableImageError, match=r"sa_2\.jpg: unreadable image: the file is gone"):
        index.open_image(2)


def test_a_failing_disk_is_not_taken_for_a_bad_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = build_image_index(make_sa1b_tree(tmp_path), "sa1b", "train")

    def fail(path: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(UserError, match="Input/output error") as caught:
        index.open_image(0)
    assert not isinstance(caught.value, UnreadableImageError)
