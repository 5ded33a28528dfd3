"""The list of images that every stage and every rank reads in the same order.

`build_image_index` finds the images of a data set, sorts them by key and applies split, bad list, subset and sample
limit; all of that depends on the names alone. Annotations are not read here: distilling the trunk needs none.
"""

from __future__ import annotations

import socket
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from sam3_train.data.decode import decode_image
from sam3_train.data.image_files import scan_folder
from sam3_train.data.packed_strings import PackedStrings
from sam3_train.data.splits import DEFAULT_VAL_FRACTION, SPLITS, split_indices, subset_indices
from sam3_train.distributed import all_gather_object
from sam3_train.errors import UserError

KINDS = ("sa1b", "sa1b_tar", "coco", "folder")


class NoSuchSplitError(UserError):
    """The data set has no image of the split at all; everything else that is wrong with it is another error."""


class ImageSource(Protocol):
    """Reads the image at a position of an index; positions follow the index's keys."""

    def where(self, index: int, key: str) -> str:
        """What messages call the image."""

    def read(self, index: int, key: str) -> bytes:
        """The image file's bytes."""

    def annotation_where(self, index: int, key: str) -> str | None:
        """What messages call the image's annotation; None if the data set has none."""

    def read_annotation(self, index: int, key: str) -> bytes | None:
        """The annotation's bytes, or None if the image has none."""

    def select(self, indices: np.ndarray) -> ImageSource:
        """The same for some positions."""


class ImageIndex:
    """Images of one split in one order.

    Args:
        keys: One key per image, sorted by bytes.
        source: Reads them.
        kind: One of `KINDS`.
        split: ``train`` or ``val``.
        root: The data set's folder, for messages.
    """

    def __init__(self, keys: PackedStrings, source: ImageSource, kind: str, split: str, root: Path) -> None:
        self.keys = keys
        self.source = source
        self.kind = kind
        self.split = split
        self.root = root
        self.sha256 = keys.sha256

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        return f"ImageIndex({self.kind} {self.split}: {len(self)} images in {self.root}, keys {self.sha256[:12]})"

    def key(self, index: int) -> str:
        """The image's name in the embedding store and in messages."""
        return self.keys[index]

    def find(self, key: str) -> int | None:
        """Position of a key, or None."""
        return self.keys.find(key)

    def where(self, index: int) -> str:
        """Path of the image, or tar and member."""
        return self.source.where(index, self.keys[index])

    def open_image(self, index: int) -> Image.Image:
        """Decode an image completely.

        Raises:
            UnreadableImageError: If the file is gone or is not a whole image.
            UserError: If the disk fails.
        """
        key = self.keys[index]
        return decode_image(self.source.read(index, key), self.source.where(index, key))

    def read_annotation(self, index: int) -> bytes | None:
        """The bytes of the image's annotation file, or None if it has none."""
        return self.source.read_annotation(index, self.keys[index])

    def annotation_where(self, index: int) -> str | None:
        """What messages call the image's annotation; None if the data set has none."""
        return self.source.annotation_where(index, self.keys[index])

    def select(self, indices: np.ndarray) -> ImageIndex:
        """An index of some positions, given in ascending order."""
        return ImageIndex(self.keys.select(indices), self.source.select(indices), self.kind, self.split, self.root)

    def without(self, keys: Collection[str]) -> ImageIndex:
        """An index without some keys; keys that are not in it are ignored."""
        positions = [position for position in map(self.find, keys) if position is not None]
        if not positions:
            return self
        return self.select(np.setdiff1d(np.arange(len(self)), np.array(positions, np.int64)))


def require_same_on_all_ranks(index: ImageIndex) -> None:
    """Check that all ranks list the same images in the same order. Collective.

    Raises:
        UserError: If the machines see different images; the message names one of each kind.
    """
    seen = all_gather_object((socket.gethostname(), len(index), index.sha256))
    first = seen[0]
    for rank, other in enumerate(seen):
        if other[1:] != first[1:]:
            raise UserError(
                f"{index.root}: rank 0 on {first[0]} lists {first[1]} {index.split} images ({first[2][:12]}), rank "
                f"{rank} on {other[0]} {other[1]} ({other[2][:12]}): give all machines the same data set"
            )


def build_image_index(
    root: str | Path,
    kind: str,
    split: str,
    *,
    val_fraction: float = DEFAULT_VAL_FRACTION,
    num_samples: int = -1,
    subset: float = 1.0,
    subset_seed: int = 0,
    bad_keys: Collection[str] = (),
    cache_dir: str | Path | None = None,
) -> ImageIndex:
    """Find the images of a data set.

    Args:
        root: The data set's folder. ``sa1b``: holds ``images/{train,val}`` and, if there are any,
            ``annotations/{train,val}``. ``sa1b_tar``: holds ``sa_*.tar``. ``coco``: holds
            ``images/{train,val}2017`` (or ``{train,val}2017``). ``folder``: any photos, at any depth; if it has the
            sub-folders ``train`` and ``val`` these are the splits.
        kind: One of `KINDS`.
        split: ``train`` or ``val``.
        val_fraction: Share of the images that ``sa1b_tar`` and ``folder`` hold out, by hash of the name.
        num_samples: The first N in key order, after everything else; -1 takes all.
        subset: Share of the images to use, chosen by hash of name and seed.
        subset_seed: Another seed chooses another subset.
        bad_keys: Images that are known to be unreadable (`sam3_train.data.bad_images`).
        cache_dir: Where the offset tables of tars are kept; None: beside the tars.

    Returns:
        The index; never empty.

    Raises:
        UserError: If a setting is impossible, the layout is another one, or no image remains.
    """
    root = Path(root)
    _check_settings(root, kind, split, val_fraction, num_samples, subset)
    index = _SCANNERS[kind](root, split, val_fraction, cache_dir)
    if bad_keys:
        index = index.without(bad_keys)
    if subset < 1.0 and len(index):
        index = index.select(subset_indices(index.keys, subset, subset_seed))
    if 0 <= num_samples < len(index):
        index = index.select(np.arange(num_samples))
    if not len(index):
        raise NoSuchSplitError(f"{root}: no {split} image found (data set kind {kind!r}): {_LAYOUTS[kind]}")
    return index


def _check_settings(root: Path, kind: str, split: str, val_fraction: float, num_samples: int, subset: float) -> None:
    problems = []
    if kind not in KINDS:
        problems.append(f"data set kind {kind!r} is not one of {', '.join(KINDS)} (DATA.DATASET)")
    if split not in SPLITS:
        problems.append(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if not 0.0 <= val_fraction < 1.0:
        problems.append(f"val fraction {val_fraction} is not in [0, 1) (DATA.VAL_FRACTION)")
    if num_samples == 0 or num_samples < -1:
        problems.append(f"number of samples {num_samples} must be positive, or -1 for all (DATA.NUM_SAMPLES)")
    if not 0.0 < subset <= 1.0:
        problems.append(f"subset {subset} is not in (0, 1] (DATA.SUBSET)")
    if not root.is_dir():
        problems.append(f"{root} is not a folder (DATA.DATA_PATH, --data-path)")
    if problems:
        raise UserError.from_problems("data set", problems)


def _scan_sa1b(root: Path, split: str, val_fraction: float, cache_dir: str | Path | None) -> ImageIndex:
    images = root / "images" / split
    if not images.is_dir():
        hint = "; its tars can be read in place with DATA.DATASET sa1b_tar" if any(root.glob("*.tar")) else ""
        raise NoSuchSplitError(f"{images} is not a folder: {_LAYOUTS['sa1b']}{hint}")
    keys, source = scan_folder(images, key_has_folder=False)
    source.annotation_root = root / "annotations" / split
    return ImageIndex(keys, source, "sa1b", split, root)


def _scan_coco(root: Path, split: str, val_fraction: float, cache_dir: str | Path | None) -> ImageIndex:
    for images in (root / "images" / f"{split}2017", root / f"{split}2017"):
        if images.is_dir():
            return ImageIndex(*scan_folder(images, key_has_folder=False), "coco", split, root)
    raise NoSuchSplitError(f"{root / 'images' / f'{split}2017'} is not a folder: {_LAYOUTS['coco']}")


def _scan_photos(root: Path, split: str, val_fraction: float, cache_dir: str | Path | None) -> ImageIndex:
    keys, source = scan_folder(root, key_has_folder=True)
    index = ImageIndex(keys, source, "folder", split, root)
    if all((root / name).is_dir() for name in SPLITS):
        return index.select(np.flatnonzero(np.fromiter((key.startswith(f"{split}/") for key in keys), bool)))
    return index.select(split_indices(keys, split, val_fraction))


def _scan_tars(root: Path, split: str, val_fraction: float, cache_dir: str | Path | None) -> ImageIndex:
    from sam3_train.data.image_tars import scan_tars

    keys, source = scan_tars(root, None if cache_dir is None else Path(cache_dir))
    return ImageIndex(keys, source, "sa1b_tar", split, root).select(split_indices(keys, split, val_fraction))


_SCANNERS = {"sa1b": _scan_sa1b, "sa1b_tar": _scan_tars, "coco": _scan_coco, "folder": _scan_photos}
_LAYOUTS = {
    "sa1b": "expected images/train/*.jpg and images/val/*.jpg (data/reorg_sa1b.py makes them from the tars)",
    "sa1b_tar": "expected sa_*.tar files (data/download_sa1b.py fetches them)",
    "coco": "expected images/train2017/*.jpg and images/val2017/*.jpg",
    "folder": "expected photos at any depth (jpg, png, webp, bmp, tif)",
}
