"""The teacher embedding store: a crash-safe, checksummed, memory-mapped superset of the public layout.

Writing: `begin_export` once, then `plan_rank` and an `EmbeddingWriter` per rank. Reading: `EmbeddingStore`. Checking:
``python -m sam3_train.embeddings.verify DIR``.
"""

from sam3_train.embeddings.codecs import CODECS, Codec, compare_embeddings, measure_distortion
from sam3_train.embeddings.plan import (
    RankPlan,
    StoreState,
    begin_export,
    count_missing,
    plan_rank,
    require_continuable,
    require_unique,
)
from sam3_train.embeddings.reader import Coverage, EmbeddingStore
from sam3_train.embeddings.spec import StoreError, StoreInfo, StoreSpec, key_order_sha256
from sam3_train.embeddings.writer import EmbeddingWriter

__all__ = [
    "CODECS",
    "Codec",
    "Coverage",
    "EmbeddingStore",
    "EmbeddingWriter",
    "RankPlan",
    "StoreError",
    "StoreInfo",
    "StoreSpec",
    "StoreState",
    "begin_export",
    "compare_embeddings",
    "count_missing",
    "key_order_sha256",
    "measure_distortion",
    "plan_rank",
    "require_continuable",
    "require_unique",
]
