"""Which images are held out, and which belong to a subset: decided by a hash of the image's name alone.

A name's fate does not depend on what else is in the folder, on the order of the directory or on the machine, so adding
images never moves one from train to val.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

SPLITS = ("train", "val")
DEFAULT_VAL_FRACTION = 0.05


def name_fraction(name: str, salt: str) -> float:
    """A number in [0, 1) that looks random but is a pure function of the name and the salt."""
    digest = hashlib.blake2b(name.encode(), digest_size=8, salt=_salt(salt)).digest()
    return int.from_bytes(digest, "little") / 2.0**64


def split_of_name(name: str, val_fraction: float) -> str:
    """``train`` or ``val`` for an image name without folder and suffix."""
    return "val" if name_fraction(name, "split") < val_fraction else "train"


def split_indices(names: Iterable[str], split: str, val_fraction: float) -> np.ndarray:
    """Positions of the names that belong to a split, ascending.

    A data set of two or more names with a val fraction above zero always holds out one name at least (that with the
    smallest hash), and always keeps one for training.
    """
    fractions = _fractions(names, "split")
    is_val = fractions < val_fraction
    if len(fractions) >= 2 and 0.0 < val_fraction < 1.0:
        if not is_val.any():
            is_val[np.argmin(fractions)] = True
        elif is_val.all():
            is_val[np.argmax(fractions)] = False
    return np.flatnonzero(is_val if split == "val" else ~is_val)


def subset_indices(names: Iterable[str], fraction: float, seed: int) -> np.ndarray:
    """Positions of a random share of the names, ascending: at least one, and each share holds the smaller ones."""
    fractions = _fractions(names, f"subset{seed}")
    count = min(len(fractions), max(1, round(fraction * len(fractions))))
    return np.sort(np.argsort(fractions, kind="stable")[:count])


def _fractions(names: Iterable[str], salt: str) -> np.ndarray:
    return np.fromiter((name_fraction(name, salt) for name in names), np.float64)


def _salt(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=hashlib.blake2b.SALT_SIZE).digest()
