"""Small embedding stores, made on the spot."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from sam3_train.embeddings import EmbeddingWriter, StoreSpec, begin_export, plan_rank
from sam3_train.embeddings.rank_files import INDEX_HEADER

SHAPE = (3, 2, 4)
KEYS = [f"sa_{number}" for number in range(11)]


def make_spec(**changes) -> StoreSpec:
    """A description with a small shape."""
    values = {"shape": SHAPE, "teacher": {"sha256": "ab"}, "preprocess": {"size_px": 28}}
    return StoreSpec(**{**values, **changes})


def make_seed(key: str) -> int:
    """The seed that `make_store` stores for a key."""
    return zlib.crc32(key.encode()) & 0x7FFFFFFF


def make_embedding(key: str, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """Normal values that depend on the key alone, float16."""
    return np.random.default_rng(make_seed(key)).standard_normal(shape).astype(np.float16)


def make_store(
    directory: Path,
    keys: Sequence[str] = KEYS,
    *,
    spec: StoreSpec | None = None,
    world_size: int = 1,
    batch_size: int = 2,
    stop_after: int | None = None,
    ranks: Iterable[int] | None = None,
) -> Path:
    """Run (or continue) an export with made-up embeddings; ``stop_after`` ends each rank after so many records."""
    spec = spec or make_spec()
    begin_export(directory, spec, keys, world_size, batch_size)
    for rank in range(world_size) if ranks is None else ranks:
        plan = plan_rank(directory, keys, rank, world_size)
        todo = [keys[i] for batch in plan.batches for i in batch if keys[i] not in plan.done_keys]
        with EmbeddingWriter(directory, rank) as writer:
            for key in todo[:stop_after]:
                writer.put(key, make_seed(key), make_embedding(key, spec.shape))
    return directory


def store_bytes(directory: Path) -> dict[str, bytes]:
    """What two exports of the same data must agree on: all rank files but the random export id in the index headers."""
    content = {path.name: path.read_bytes() for path in sorted(directory.glob("rank*"))}
    return {name: data[INDEX_HEADER.size :] if name.endswith("-index.bin") else data for name, data in content.items()}


def assert_one_line(error: BaseException, *parts: str) -> None:
    """An error that a user reads: one line that names all the parts."""
    assert "\n" not in str(error)
    for part in parts:
        assert part in str(error), f"{part!r} not in {error}"
