"""The embedding store when things go wrong: each fault is one line that names file, value and remedy."""

from __future__ import annotations

import errno
import os
import shutil

import numpy as np
import pytest
from fixtures_embeddings import KEYS, assert_one_line, make_embedding, make_seed, make_spec, make_store, store_bytes

from sam3_train.embeddings import (
    EmbeddingStore,
    EmbeddingWriter,
    StoreError,
    begin_export,
    plan_rank,
    rank_files,
)
from sam3_train.embeddings.values_file import ValuesFile
from sam3_train.embeddings.verify import main as verify

RECORD = make_spec().record_bytes


def flip_bit(path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("offset", [0, 30])
def test_a_flipped_bit_is_noticed_on_reading(tmp_path, offset):
    """D-13: disk or copy corruption is an error and not noisy training; seed and values are covered."""
    make_store(tmp_path)
    flip_bit(tmp_path / "rank0-values.bin", 3 * RECORD + offset)
    store = EmbeddingStore(tmp_path)
    store.read(KEYS[2])
    with pytest.raises(StoreError) as info:
        store.read(KEYS[3])
    assert_one_line(info.value, "rank0-values.bin: record 3", repr(KEYS[3]), "copy the file again")


def test_a_truncated_shard_is_noticed_when_it_is_opened(tmp_path):
    """D-14: the size is checked at once, not when the last records are read."""
    make_store(tmp_path, world_size=2)
    os.truncate(tmp_path / "rank1-values.bin", 2 * RECORD)
    with pytest.raises(StoreError) as info:
        EmbeddingStore(tmp_path)
    assert_one_line(info.value, "rank1-values.bin: 104 bytes, but 5 records", "truncated", "copy the file again")


def test_a_shard_that_is_cut_while_it_is_read_is_an_error(tmp_path):
    """With a memory map this would kill the process."""
    store = EmbeddingStore(make_store(tmp_path))
    os.truncate(tmp_path / "rank0-values.bin", 2 * RECORD + 20)
    store.read(KEYS[1])
    with pytest.raises(StoreError) as info:
        store.read(KEYS[2])
    assert_one_line(info.value, f"rank0-values.bin: ends at byte {2 * RECORD + 20}, inside record 2", "copy the file")


def test_a_disk_that_fails_is_named(tmp_path, monkeypatch):
    store = EmbeddingStore(make_store(tmp_path))

    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(ValuesFile, "_read_some", fail)
    with pytest.raises(StoreError) as info:
        store.read(KEYS[2])
    assert_one_line(info.value, "rank0-values.bin: record 2 cannot be read", "Input/output error", "good copy")
    (tmp_path / "rank0-values.bin").unlink()
    store.close()
    with pytest.raises(StoreError, match=r"rank0-values\.bin: cannot be read \(No such file"):
        store.read(KEYS[2])


def test_a_system_without_file_locks_reads_and_refuses_to_write(tmp_path, monkeypatch):
    """Windows has no fcntl: one line instead of a failed import."""
    make_store(tmp_path)
    monkeypatch.setattr(rank_files, "fcntl", None)
    assert EmbeddingStore(tmp_path).read(KEYS[0])[0] == make_seed(KEYS[0])
    with pytest.raises(StoreError) as info:
        make_store(tmp_path, [*KEYS, "new"])
    assert_one_line(info.value, "rank0-index.bin", "file locks", "WSL")


def test_truncated_keys_are_noticed_when_they_are_opened(tmp_path):
    make_store(tmp_path)
    os.truncate(tmp_path / "rank0-keys.txt", 9)
    with pytest.raises(StoreError, match=r"rank0-keys.txt: 9 bytes, its index says 56 \(11 keys\)"):
        EmbeddingStore(tmp_path)


@pytest.mark.parametrize("name", ["values.bin", "keys.txt", "index.bin"])
def test_a_missing_rank_is_named(tmp_path, name):
    make_store(tmp_path, world_size=3)
    (tmp_path / f"rank1-{name}").unlink()
    with pytest.raises(StoreError) as info:
        EmbeddingStore(tmp_path)
    assert_one_line(info.value, f"rank1-{name}: missing", "copy all")


def test_a_missing_rank_of_public_files_shows_as_a_gap(tmp_path):
    for rank in (0, 2):
        (tmp_path / f"rank{rank}-keys.txt").write_text("k\n")
        (tmp_path / f"rank{rank}-values.bin").write_bytes(b"\0" * RECORD)
    with pytest.raises(StoreError, match=r"rank1-values\.bin is missing"):
        EmbeddingStore(tmp_path, (3, 2, 4))


def test_a_wrong_shape_is_refused(tmp_path):
    """D-12: a reader that expects another shape gets an error, not shifted values."""
    make_store(tmp_path)
    with pytest.raises(StoreError, match=r"embeddings have shape \(3, 2, 4\), \(3, 4, 4\) is wanted"):
        EmbeddingStore(tmp_path, (3, 4, 4))
    wrong = pytest.raises(StoreError, match=r"'k' has shape \(3, 4, 4\), the store \(3, 2, 4\)")
    with wrong, EmbeddingWriter(tmp_path) as out:
        out.put("k", 0, np.zeros((3, 4, 4), np.float16))


@pytest.mark.parametrize("in_background", [True, False])
def test_a_record_that_cannot_be_encoded_costs_none_before_it(tmp_path, in_background):
    begin_export(tmp_path, make_spec(), ["a", "b", "c"])
    rows = [make_embedding("a"), make_embedding("b"), np.zeros((3, 4, 4), np.float16)]
    wrong = pytest.raises(StoreError, match=r"'c' has shape")
    with wrong, EmbeddingWriter(tmp_path, in_background=in_background) as out:
        out.put_batch(["a", "b", "c"], [1, 2, 3], rows)
    assert list(EmbeddingStore(tmp_path).keys()) == ["a", "b"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"shape": (3, 2, 2)}, "shape: [3, 2, 4] != [3, 2, 2]"),
        ({"codec": "int8"}, "codec: 'fp16' != 'int8'"),
        ({"teacher": {"sha256": "cd"}}, "teacher: {'sha256': 'ab'} != {'sha256': 'cd'}"),
        ({"preprocess": {"size_px": 56}}, "preprocess: {'size_px': 28} != {'size_px': 56}"),
        ({"augmentation": {"flip_prob": 0.5}}, "augmentation: None != {'flip_prob': 0.5}"),
    ],
)
def test_a_store_of_other_settings_is_not_continued(tmp_path, change, named):
    """D-12 and D-25: what the records are is written down and compared; two exports cannot mix."""
    make_store(tmp_path, stop_after=3)
    before = store_bytes(tmp_path)
    with pytest.raises(StoreError, match="begun with other settings") as info:
        begin_export(tmp_path, make_spec(**change), KEYS)
    assert named in str(info.value)
    assert store_bytes(tmp_path) == before


def test_stale_ranks_of_another_export_are_refused(tmp_path):
    """D-15: files that an export with more ranks left behind are neither read nor continued."""
    make_store(tmp_path / "old", world_size=3)
    make_store(tmp_path / "new", world_size=2)
    for path in (tmp_path / "old").glob("rank2-*"):
        shutil.copy(path, tmp_path / "new")
    for attempt in (EmbeddingStore, lambda path: begin_export(path, make_spec(), KEYS, 2)):
        with pytest.raises(StoreError) as info:
            attempt(tmp_path / "new")
        assert_one_line(info.value, "rank2-values.bin is there", "ranks 0..1", "stale", "remove rank2-*")


def test_a_rank_of_another_export_in_the_right_place_is_refused(tmp_path):
    """D-15: every rank file carries the export's id."""
    make_store(tmp_path / "old", world_size=2)
    make_store(tmp_path / "new", world_size=2)
    for path in (tmp_path / "old").glob("rank1-*"):
        shutil.copy(path, tmp_path / "new")
    for attempt in (EmbeddingStore, lambda path: begin_export(path, make_spec(), KEYS, 2)):
        with pytest.raises(StoreError, match=r"rank1-index.bin: belongs to export \w{32}, store.json to \w{32}"):
            attempt(tmp_path / "new")


def test_rank_files_of_unknown_origin_are_not_appended_to(tmp_path):
    (tmp_path / "rank0-keys.txt").write_text("k\n")
    (tmp_path / "rank0-values.bin").write_bytes(b"\0" * RECORD)
    with pytest.raises(StoreError, match=r"without a store\.json"):
        begin_export(tmp_path, make_spec(), KEYS)


def test_a_damaged_description_is_named(tmp_path):
    make_store(tmp_path)
    for content, message in (("{", "not readable as JSON"), ("{}", '"format" is not'), ("", "not readable")):
        (tmp_path / "store.json").write_text(content)
        with pytest.raises(StoreError, match=message):
            EmbeddingStore(tmp_path)


def test_ranks_that_see_other_images_are_refused(tmp_path):
    """D-23: the order of the keys is hashed; a node with another folder cannot export under wrong names."""
    begin_export(tmp_path, make_spec(), KEYS, 2)
    with pytest.raises(StoreError, match="all ranks need the same data set"):
        plan_rank(tmp_path, KEYS[::-1], 1, 2)


def test_a_node_without_the_shared_folder_is_told_so(tmp_path):
    """D-33: node-local disks are refused instead of leaving each node with a part."""
    with pytest.raises(StoreError, match="on storage that all nodes share"):
        plan_rank(tmp_path, KEYS, 1, 2)


@pytest.mark.parametrize("keys", [["a", "b", "a"], ["a\nb"], [""], ["a\tb"]])
def test_keys_that_the_files_cannot_hold_are_refused(tmp_path, keys):
    with pytest.raises(StoreError, match=r"'a' occurs twice|line break"):
        begin_export(tmp_path, make_spec(), keys)


def test_verify_is_content_with_a_whole_store(tmp_path, capsys):
    make_store(tmp_path, world_size=2)
    assert verify([str(tmp_path), "--all"]) == 0
    assert "11 records, 11 of them checked" in capsys.readouterr().out
    assert verify([str(tmp_path), "--sample", "4"]) == 0
    assert "11 records, 4 of them checked" in capsys.readouterr().out


def test_verify_lists_every_problem_and_ends_with_exit_code_2(tmp_path, capsys):
    """D-17: a verdict, each finding by file and record, and an exit code a script can use."""
    make_store(tmp_path)
    flip_bit(tmp_path / "rank0-values.bin", 2 * RECORD + 9)
    flip_bit(tmp_path / "rank0-values.bin", 7 * RECORD + 9)
    flip_bit(tmp_path / "rank0-keys.txt", 3)
    assert verify([str(tmp_path), "--all"]) == 2
    lines = capsys.readouterr().err
    assert "5 problems" in lines
    assert "record 2 (key 'sa_2'" in lines and "record 7 (key 'sa_7'" in lines
    assert "rank0-keys.txt: line 1" in lines
    assert "key 'sa_4' stands twice: rank 0 record 0 and rank 0 record 4" in lines
    assert "1 of 11 keys have no record (first: sa_0)" in lines


def test_verify_names_what_is_missing(tmp_path, capsys):
    make_store(tmp_path, stop_after=9)
    assert verify([str(tmp_path)]) == 2
    assert "2 of 11 keys have no record (first: sa_9, sa_10)" in capsys.readouterr().err
    (tmp_path / "wanted.txt").write_text("sa_1\nsa_2\n")
    assert verify([str(tmp_path), "--keys", str(tmp_path / "wanted.txt")]) == 0
    assert verify([str(tmp_path / "nothing")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_verify_reads_public_files(tmp_path, capsys):
    (tmp_path / "rank0-keys.txt").write_text("a\nb")
    values = np.ones((2, RECORD // 2), np.float16)
    values[1, 5] = np.nan
    (tmp_path / "rank0-values.bin").write_bytes(values.tobytes())
    assert verify([str(tmp_path), "--shape", "3", "2", "4"]) == 2
    assert "record 1 (key 'b') has 1 values that are not finite" in capsys.readouterr().err
