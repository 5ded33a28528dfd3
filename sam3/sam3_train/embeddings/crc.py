"""CRC-32 of records, as zlib defines it, by the fastest library that is installed.

All of them give the same numbers, so a store does not depend on which one wrote it. On one AMD EPYC core zlib checks 4
GB/s; isal and zlib-ng, which use the processor's carry-less multiplication, 26 GB/s. Where the disk delivers 2 GB/s, a
read takes a quarter longer with zlib and hardly longer with the others: ``pip install isal``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

LIBRARIES = ("isal.isal_zlib", "zlib_ng.zlib_ng", "zlib")
"""Modules that have a ``crc32``, the fastest first; the last is Python's own."""


def pick_crc32(libraries: Sequence[str] = LIBRARIES) -> tuple[str, Callable[..., int]]:
    """Name and ``crc32(data, crc_before=0)`` of the first module that is installed.

    Raises:
        ImportError: If none is.
    """
    for name in libraries:
        try:
            return name, importlib.import_module(name).crc32
        except ImportError:
            continue
    raise ImportError(f"none of {', '.join(libraries)} is installed")


CRC_LIBRARY, crc32 = pick_crc32()
