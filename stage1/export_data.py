"""What an export reads: the images of one or more splits in one order, batch by batch as the plan says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset
from yacs.config import CfgNode

from sam3_train.data.augmentation import AugmentSpec
from sam3_train.data.distillation_dataset import DistillationDataset
from sam3_train.data.distillation_loader import DistillationLoader, build_loader, image_index_from_config
from sam3_train.data.image_index import ImageIndex, NoSuchSplitError
from sam3_train.data.packed_strings import PackedStrings
from sam3_train.data.splits import SPLITS
from sam3_train.distillation_config import augment_config, preprocess_config, teacher_config
from sam3_train.errors import UserError, attempt


@dataclass(frozen=True)
class ExportData:
    """Images of all chosen splits, one behind the other."""

    indices: list[ImageIndex]
    keys: PackedStrings
    dataset: ConcatDataset[dict[str, Any]]
    augment: AugmentSpec | None
    notes: list[str]
    """What the user should know about the choice of images, one line each."""

    def describe(self) -> str:
        """``100 train + 10 val images``."""
        return " + ".join(f"{len(index)} {index.split}" for index in self.indices) + " images"


def parse_splits(text: str) -> list[str]:
    """Splits of a comma-separated list.

    Raises:
        UserError: If a name is unknown or occurs twice.
    """
    names = [name.strip() for name in text.split(",")]
    wrong = [name for name in names if name not in SPLITS or names.count(name) > 1]
    if wrong:
        raise UserError(f"--split {text}: {wrong[0]!r} is unknown or there twice; choose from {', '.join(SPLITS)}")
    return names


def build_export_data(
    cfg: CfgNode, splits: Sequence[str], may_lack_val: bool, problems: list[str]
) -> ExportData | None:
    """Find the images and describe how they become inputs.

    Args:
        cfg: Stage-1 config.
        splits: Names of the splits, in order.
        may_lack_val: A data set without a val split exports the others; otherwise it is a problem.
        problems: Receives what is wrong: a data set that is not there, impossible settings.

    Returns:
        None if anything is wrong.
    """
    num_before, notes = len(problems), list[str]()
    indices: list[ImageIndex] = []
    for split in splits:
        index = attempt(problems, lambda split=split: _find_split(cfg, split, may_lack_val, notes))  # type: ignore[misc]
        if index is not None:
            indices.append(index)
    augment = attempt(problems, lambda: augment_config(cfg))
    teacher = attempt(problems, lambda: teacher_config(cfg))
    preprocess = attempt(problems, lambda: preprocess_config(cfg)) if teacher is not None else None
    if teacher is None or preprocess is None or len(problems) > num_before:
        return None
    if not indices:
        problems.append(f"{cfg.DATA.DATA_PATH}: no images of the splits {', '.join(splits)} (DATA.DATA_PATH)")
        return None
    datasets = [
        DistillationDataset(index, preprocess, "export", teacher.grid_size, augment=augment, seed=cfg.SEED)
        for index in indices
    ]
    return ExportData(indices, join_keys([index.keys for index in indices]), ConcatDataset(datasets), augment, notes)


def _find_split(cfg: CfgNode, split: str, may_lack_val: bool, notes: list[str]) -> ImageIndex | None:
    try:
        return image_index_from_config(cfg.DATA, split)
    except NoSuchSplitError as error:
        if split != "val" or not may_lack_val:
            raise
        notes.append(f"exporting without val: {error}")
        return None


def join_keys(parts: Sequence[PackedStrings]) -> PackedStrings:
    """Lists of keys one behind the other."""
    starts = np.cumsum([0, *(len(part.buffer) for part in parts)])
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts, strict=False)]
    return PackedStrings(np.concatenate([part.buffer for part in parts]), np.concatenate([*offsets, starts[-1:]]))


def build_export_loader(cfg: CfgNode, data: ExportData, batches: list[list[int]]) -> DistillationLoader:
    """A loader that yields exactly the planned batches, in order; unreadable images stand under ``bad``."""
    return build_loader(
        data.dataset,
        batches=batches,
        num_workers=cfg.DATA.NUM_WORKERS,
        prefetch_factor=cfg.DATA.PREFETCH_FACTOR,
        pin_memory=cfg.DATA.PIN_MEMORY,
    )
