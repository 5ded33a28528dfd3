"""From a config to image indices, and from a dataset to a loader."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler, default_collate
from yacs.config import CfgNode

from sam3_train.data.bad_images import BadImageLog, read_bad_images
from sam3_train.data.distillation_dataset import DistillationDataset, ItemExtras
from sam3_train.data.epoch_loader import EpochLoader
from sam3_train.data.image_index import ImageIndex, build_image_index
from sam3_train.errors import UserError


def image_index_from_config(data: CfgNode, split: str, bad_keys: Collection[str] = ()) -> ImageIndex:
    """The images that a config's ``DATA`` node names.

    Args:
        data: The node (`sam3_train.distillation_config.data_defaults`).
        split: ``train`` or ``val``.
        bad_keys: Unreadable images, beside those of the list ``DATA.BAD_IMAGES``.

    Raises:
        UserError: As `build_image_index`.
    """
    return build_image_index(
        data.DATA_PATH,
        data.DATASET,
        split,
        val_fraction=data.VAL_FRACTION,
        num_samples=data.NUM_SAMPLES if split == "train" else data.VAL_NUM_SAMPLES,
        subset=data.SUBSET if split == "train" else 1.0,
        subset_seed=data.SUBSET_SEED,
        bad_keys={*left_out_images(data), *bad_keys},
        cache_dir=data.INDEX_CACHE or None,
    )


def left_out_images(data: CfgNode) -> dict[str, str]:
    """The images that the list ``DATA.BAD_IMAGES`` names: reason by key.

    Raises:
        UserError: If the list does not exist or cannot be read.
    """
    if data.BAD_IMAGES and not Path(data.BAD_IMAGES).is_file():
        raise UserError(
            f"DATA.BAD_IMAGES: {data.BAD_IMAGES} does not exist; python -m sam3_train.data.validate makes it"
        )
    return read_bad_images(data.BAD_IMAGES) if data.BAD_IMAGES else {}


def collate(items: list[dict[str, Any]], extras: ItemExtras | None = None) -> dict[str, Any]:
    """Stack the readable items of a batch.

    Args:
        items: From a `DistillationDataset`.
        extras: The data set's own.

    Returns:
        ``key`` list of B names, ``bad`` list of (key, reason) of the others, ``seed`` int64 (B,), ``image``
        (B, 3, S, S), and what the mode adds: ``valid`` (B, 1, G, G), ``embedding`` dict of arrays with a leading B;
        and what the extras add.
        A batch with no readable image has ``key``, ``bad`` and ``seed`` only; one with an error that ends the run
        has ``error``.
    """
    errors = [item["error"] for item in items if "error" in item]
    if errors:
        return {"error": errors[0]}
    good = [item for item in items if not item["bad"]]
    batch: dict[str, Any] = {
        "key": [item["key"] for item in good],
        "bad": [(item["key"], item["bad"]) for item in items if item["bad"]],
        "seed": torch.tensor([item["seed"] for item in good], dtype=torch.int64),
    }
    for name in ("image", "valid", "embedding"):
        if good and name in good[0]:
            # Not torch.stack: in a worker this stacks right into the memory that it shares with the main process.
            batch[name] = default_collate([item[name] for item in good])
    if good and extras is not None:
        batch.update(extras.collate(good))
    return batch


class DistillationLoader(EpochLoader):
    """The batches of `collate`, none of them without an image where bad images are accounted for."""

    def note(self, batch: dict[str, Any]) -> None:
        """See `EpochLoader`."""
        extras = extras_of(self.dataset)
        if self.bad_log is not None and not batch["key"]:
            with_annotations = "" if extras is None else " --annotations --list-annotations"
            raise UserError(
                f"no image of a batch can be used, e.g. {batch['bad'][0][1]}; list the bad ones with python -m "
                f"sam3_train.data.validate{with_annotations} and name the list in DATA.BAD_IMAGES"
            )
        if extras is not None:
            extras.report(batch)


def extras_of(dataset: Dataset[dict[str, Any]]) -> ItemExtras | None:
    """What the items of a data set hold beside images and embeddings."""
    return dataset.extras if isinstance(dataset, DistillationDataset) else None


def build_loader(
    dataset: Dataset[dict[str, Any]],
    sampler: Sampler[int] | Iterable[int] | None = None,
    batch_size: int = 1,
    *,
    batches: Sequence[list[int]] | None = None,
    num_workers: int = 8,
    prefetch_factor: int = 2,
    pin_memory: bool = True,
    drop_last: bool = False,
    bad_log: BadImageLog | None = None,
) -> DistillationLoader:
    """A loader whose workers live as long as it does.

    Args:
        dataset: A `DistillationDataset`, or several in a `ConcatDataset`.
        sampler: Positions in order; None takes all in index order.
        batch_size: Images per batch.
        batches: Positions batch by batch, instead of ``sampler``, ``batch_size`` and ``drop_last``.
        num_workers: Processes; 0 loads in this one.
        prefetch_factor: Batches that each worker prepares ahead.
        pin_memory: Page-locked batches, where there is a CUDA device.
        drop_last: Leave an incomplete last batch out.
        bad_log: Accounts for unreadable images: those are then left out of their batch. None leaves that to the caller,
            who finds them under ``bad`` and may meet batches without any image.

    Returns:
        The loader; `collate` describes its batches. Iterating raises `UserError` for what a worker could not do.
    """
    return DistillationLoader(
        dataset,
        partial(collate, extras=extras_of(dataset)),
        sampler,
        batch_size,
        batches=batches,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor,
        pin_memory=pin_memory,
        drop_last=drop_last,
        bad_log=bad_log,
    )
