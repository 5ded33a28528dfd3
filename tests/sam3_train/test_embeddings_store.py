"""The embedding store: bytes on disk, round trips, keys, resuming and refusing."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from fixtures_embeddings import KEYS, SHAPE, make_embedding, make_seed, make_spec, make_store, store_bytes

from sam3_train.embeddings import (
    CODECS,
    EmbeddingStore,
    EmbeddingWriter,
    StoreError,
    StoreSpec,
    begin_export,
    measure_distortion,
    plan_rank,
    values_file,
)
from sam3_train.embeddings.crc import LIBRARIES, pick_crc32
from sam3_train.embeddings.rank_files import RankPaths


def test_bytes_on_disk_are_the_public_layout(tmp_path):
    """int32 little-endian seed, then float16 in C order; one key per line; nothing else in those two files."""
    begin_export(tmp_path, make_spec(shape=(1, 1, 2)), ["a", "b"])
    with EmbeddingWriter(tmp_path) as writer:
        writer.put("a", 258, np.array([[[1.0, -2.0]]], np.float16))
        writer.put("b", 2**31 - 1, torch.tensor([[[0.5, 65504.0]]]))
    golden = bytes.fromhex("02010000003c00c0ffffff7f0038ff7b")
    assert (tmp_path / "rank0-values.bin").read_bytes() == golden
    assert (tmp_path / "rank0-keys.txt").read_bytes() == b"a\nb\n"


def test_a_record_of_the_released_size_has_the_published_number_of_bytes():
    """pipeline.md 2.4: 4 + 1024 * 72 * 72 * 2."""
    assert StoreSpec((1024, 72, 72)).record_bytes == 10_616_836
    assert StoreSpec((1024, 72, 72), "int8").record_bytes == 4 + 1024 * 72 * 72 + 4 * 1024


@pytest.mark.parametrize("last_newline", [b"", b"\n"])
def test_files_of_the_public_tool_open_when_the_shape_is_stated(tmp_path, last_newline):
    """D-12: sizes are checked against the stated shape; D-40: the seed is read on every version of numpy."""
    keys = ["sa_3", "sa_1"]
    (tmp_path / "rank0-keys.txt").write_bytes("\n".join(keys).encode() + last_newline)
    records = [struct.pack("<i", seed) + make_embedding(key).tobytes() for seed, key in enumerate(keys)]
    (tmp_path / "rank0-values.bin").write_bytes(b"".join(records))
    with pytest.raises(StoreError, match="state the shape"):
        EmbeddingStore(tmp_path)
    store = EmbeddingStore(tmp_path, SHAPE)
    seed, embedding = store.read("sa_1")
    assert seed == 1 and np.array_equal(embedding, make_embedding("sa_1"))
    with pytest.raises(StoreError, match=r"rank0-values.bin: 104 bytes, but 2 records of 100 bytes"):
        EmbeddingStore(tmp_path, (3, 4, 4))


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_every_codec_makes_the_round_trip(tmp_path, codec):
    spec = make_spec(codec=codec, shape=(8, 6, 6))
    make_store(tmp_path, spec=spec)
    with EmbeddingStore(tmp_path, (8, 6, 6)) as store:
        assert list(store.keys()) == KEYS and len(store) == 11
        for key in KEYS:
            seed, embedding = store.read(key)
            assert seed == store.read_seed(key) == make_seed(key)
            assert embedding.dtype == np.float16 and embedding.flags.writeable
            np.testing.assert_allclose(embedding, make_embedding(key, (8, 6, 6)), atol=0 if codec == "fp16" else 0.02)
            _, parts = store.read_raw(key)
            on_device = store.codec.to_float({name: torch.from_numpy(part) for name, part in parts.items()})
            assert torch.equal(on_device.half(), torch.from_numpy(embedding))


def test_int8_batches_decode_like_single_records():
    """D-53: what a loader hands over keeps its stored types and is decoded on the device, a batch at a time."""
    codec = CODECS["int8"]
    payloads = [codec.encode(make_embedding(key)) for key in "ab"]
    parts = [codec.split(payload, SHAPE) for payload in payloads]
    stacked = {name: torch.stack([torch.from_numpy(part[name].copy()) for part in parts]) for name in parts[0]}
    decoded = codec.to_float(stacked)
    for position, payload in enumerate(payloads):
        assert np.array_equal(decoded[position].half().numpy(), codec.decode(payload, SHAPE))


def test_distortion_is_what_the_table_promises():
    """D-18: the cost of a smaller store is stated, also with outlier channels and an empty one."""
    embedding = torch.randn(64, 18, 18, generator=torch.Generator().manual_seed(0))
    embedding[3] *= 50
    embedding[5] = 0
    fp16, int8 = (measure_distortion(CODECS[name], embedding) for name in ("fp16", "int8"))
    assert fp16.relative_rms < 3e-4 and fp16.min_cosine > 0.999999
    assert 1e-3 < int8.relative_rms < 2e-2 and int8.min_cosine > 0.995


def test_a_killed_export_ends_with_the_same_bytes(tmp_path):
    """D-10: what was written stays, and what is missing is added in the same order."""
    make_store(tmp_path / "whole", KEYS, world_size=2)
    for stop_after in (1, 2, 1, None):
        make_store(tmp_path / "resumed", KEYS, world_size=2, stop_after=stop_after)
    assert store_bytes(tmp_path / "resumed") == store_bytes(tmp_path / "whole")
    info = json.loads((tmp_path / "resumed" / "store.json").read_text())
    assert len(info["phases"]) == 1


@pytest.mark.parametrize("cut", ["values", "keys", "index"])
@pytest.mark.parametrize("num_bytes", [1, 7, 30])
def test_a_torn_tail_is_cut_and_made_again(tmp_path, cut, num_bytes):
    make_store(tmp_path / "whole", KEYS)
    make_store(tmp_path / "torn", KEYS)
    path = getattr(RankPaths(tmp_path / "torn", 0), cut)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - num_bytes)
    make_store(tmp_path / "torn", KEYS)
    assert store_bytes(tmp_path / "torn") == store_bytes(tmp_path / "whole")


def test_a_tail_of_garbage_behind_the_index_is_cut(tmp_path):
    """What a power failure can leave: bytes that were written before their index entry."""
    make_store(tmp_path / "whole", KEYS)
    make_store(tmp_path / "torn", KEYS, stop_after=5)
    with open(tmp_path / "torn" / "rank0-values.bin", "ab") as file:
        file.write(b"\0" * 70)
    with pytest.raises(StoreError, match="longer than its index"):
        EmbeddingStore(tmp_path / "torn")
    make_store(tmp_path / "torn", KEYS)
    assert store_bytes(tmp_path / "torn") == store_bytes(tmp_path / "whole")


def test_records_of_zeros_in_the_tail_are_made_again(tmp_path):
    """A file system may give a file its size before its data; the CRC of the newest records is checked on resume."""
    make_store(tmp_path / "whole", KEYS)
    make_store(tmp_path / "torn", KEYS)
    with open(tmp_path / "torn" / "rank0-values.bin", "r+b") as file:
        file.seek(-2 * make_spec().record_bytes, 2)
        file.write(b"\0" * 2 * make_spec().record_bytes)
    make_store(tmp_path / "torn", KEYS)
    assert store_bytes(tmp_path / "torn") == store_bytes(tmp_path / "whole")


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1), (3, 2)])
def test_another_number_of_ranks_continues_without_duplicates(tmp_path, first, second):
    """A changed world size: what is missing is dealt to the new ranks; nothing is made twice or lost."""
    make_store(tmp_path, KEYS, world_size=first, stop_after=2)
    make_store(tmp_path, KEYS, world_size=second, stop_after=1)
    make_store(tmp_path, KEYS, world_size=second)
    store = EmbeddingStore(tmp_path)
    assert sorted(store.keys()) == sorted(KEYS)
    assert not store.duplicate_keys()
    assert all(np.array_equal(store.read(key)[1], make_embedding(key)) for key in KEYS)


def test_added_images_are_appended(tmp_path):
    """D-34: nothing is computed again when the data set grows."""
    make_store(tmp_path, KEYS[::2])
    begin_export(tmp_path, make_spec(), KEYS, 1, 2)
    plan = plan_rank(tmp_path, KEYS)
    assert [KEYS[i] for batch in plan.batches for i in batch] == KEYS[1::2]
    make_store(tmp_path, KEYS)
    assert list(EmbeddingStore(tmp_path).keys()) == KEYS[::2] + KEYS[1::2]
    make_store(tmp_path, KEYS[:4], world_size=3)  # fewer images, more ranks: nothing to do
    assert len(EmbeddingStore(tmp_path)) == len(KEYS)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_share_the_keys_exactly(tmp_path, world_size):
    """D-31: an exact partition, no padding with duplicates."""
    begin_export(tmp_path, make_spec(), KEYS, world_size, 2)
    shares = [plan_rank(tmp_path, KEYS, rank, world_size) for rank in range(world_size)]
    assert sorted(i for share in shares for batch in share.batches for i in batch) == list(range(len(KEYS)))
    assert max(share.num_missing for share in shares) - min(share.num_missing for share in shares) <= 1


def test_a_resumed_rank_meets_the_same_batches(tmp_path):
    make_store(tmp_path, KEYS, batch_size=4, stop_after=5)
    begin_export(tmp_path, make_spec(), KEYS, 1, 4)
    plan = plan_rank(tmp_path, KEYS)
    assert plan.batches == [[4, 5, 6, 7], [8, 9, 10]]
    assert plan.done_keys == {KEYS[4]} and plan.num_missing == 6


def test_a_reader_pickles_as_its_path_and_reads_by_key(tmp_path):
    """D-55: workers share the mapped key table; a pickled reader carries no keys."""
    make_store(tmp_path, KEYS, world_size=2)
    store = EmbeddingStore(tmp_path)
    store.read(KEYS[0])
    copied = pickle.dumps(store)
    assert len(copied) < 500
    assert np.array_equal(pickle.loads(copied).read(KEYS[7])[1], make_embedding(KEYS[7]))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_what_the_main_process_opened(tmp_path, method):
    """One reader, opened once, used before and after workers start, by either way of starting them."""
    make_store(tmp_path, world_size=2)
    store = EmbeddingStore(tmp_path)
    store.read(KEYS[0])
    with multiprocessing.get_context(method).Pool(1) as pool:
        sums = pool.map(partial(sum_of_record, store), KEYS)
    assert sums == [float(make_embedding(key).astype(np.float32).sum()) for key in KEYS]


def sum_of_record(store: EmbeddingStore, key: str) -> float:
    return float(store.read(key)[1].astype(np.float32).sum())


def test_records_can_be_announced(tmp_path):
    make_store(tmp_path)
    store = EmbeddingStore(tmp_path)
    store.prefetch([*KEYS[:3], "not there"])
    assert np.array_equal(store.read(KEYS[1])[1], make_embedding(KEYS[1]))


@pytest.mark.parametrize("has_preadv", [True, False])
@pytest.mark.parametrize("codec", sorted(CODECS))
def test_records_are_read_into_rows_of_a_batch(tmp_path, monkeypatch, codec, has_preadv):
    """No array in between, and the same where the system has no positional reads of this kind."""
    if not has_preadv:
        monkeypatch.delattr(os, "preadv", raising=False)
    monkeypatch.setattr(values_file, "CHUNK_BYTES", 7)  # a record takes several pieces
    make_store(tmp_path, world_size=2, spec=make_spec(codec=codec))
    store = EmbeddingStore(tmp_path)
    layout = store.codec.layout(SHAPE)
    batch = {name: np.zeros((len(KEYS), *shape), dtype) for name, (dtype, shape) in layout.items()}
    with ThreadPoolExecutor(4) as pool:
        rows = [{name: part[i] for name, part in batch.items()} for i in range(len(KEYS))]
        seeds = list(pool.map(store.read_into, KEYS, rows))
    assert seeds == [make_seed(key) for key in KEYS]
    decoded = store.codec.to_float({name: torch.from_numpy(part) for name, part in batch.items()}).half()
    assert all(np.array_equal(row, store.read(key)[1]) for row, key in zip(decoded.numpy(), KEYS, strict=True))


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (np.empty(SHAPE, np.float32), "float32"),
        (np.empty((3, 4, 2), np.float16), r"\(3, 4, 2\)"),
        (np.empty((3, 2, 8), np.float16)[:, :, ::2], "strides"),
        (None, "missing"),
    ],
)
def test_a_record_is_not_read_into_memory_that_does_not_fit(tmp_path, values, found):
    store = EmbeddingStore(make_store(tmp_path))
    with pytest.raises(ValueError, match=found):
        store.read_into(KEYS[0], {} if values is None else {"values": values})


def test_every_crc_library_gives_the_same_numbers(tmp_path):
    """The check value of CRC-32; a store written with one library is read with another."""
    for names in (LIBRARIES, ("no.such_library", "zlib")):
        name, crc32 = pick_crc32(names)
        assert crc32(b"123456789") == 0xCBF43926
        assert crc32(b"6789", crc32(memoryview(b"12345"))) == 0xCBF43926
    assert name == "zlib"
    with pytest.raises(ImportError, match=r"no\.such_library"):
        pick_crc32(["no.such_library"])


def test_the_key_table_is_rebuilt_when_the_store_grows(tmp_path):
    make_store(tmp_path, KEYS, stop_after=4)
    assert KEYS[5] not in EmbeddingStore(tmp_path)
    make_store(tmp_path, KEYS)
    assert KEYS[5] in EmbeddingStore(tmp_path)
    (tmp_path / "key-index.bin").write_bytes(b"damaged")
    assert KEYS[5] in EmbeddingStore(tmp_path)


def test_keys_are_found_exactly(tmp_path):
    keys = ["a", "ab", "b", "A", "a b", "ü", "sa_1", "sa_10", "x" * 300]
    make_store(tmp_path, keys)
    store = EmbeddingStore(tmp_path)
    assert all(np.array_equal(store.read(key)[1], make_embedding(key)) for key in keys)
    assert "sa_" not in store and "sa_100" not in store and "B" not in store


def test_missing_keys_are_named_before_training(tmp_path):
    """D-42: coverage is checked at the start, not met as a KeyError in a worker."""
    make_store(tmp_path, KEYS)
    store = EmbeddingStore(tmp_path)
    assert store.require_coverage(KEYS[2:5]).num_present == 3
    with pytest.raises(StoreError, match=r"2 of 4 keys have no embedding \(first: new_1, new_2\)"):
        store.require_coverage(["new_1", *KEYS[:2], "new_2"])
    with pytest.raises(StoreError, match="no embedding for key 'new_1'"):
        store.read("new_1")
