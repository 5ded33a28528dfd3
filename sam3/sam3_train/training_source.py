"""The batches of a distillation: loaders, the teacher's features and their scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from yacs.config import CfgNode

from sam3_train.data.bad_images import BAD_IMAGES_FILE, BadImageLog, bad_image_limit
from sam3_train.data.distillation_dataset import DistillationDataset, ItemExtras
from sam3_train.data.distillation_loader import DistillationLoader, build_loader, left_out_images
from sam3_train.data.image_index import ImageIndex, require_same_on_all_ranks
from sam3_train.data.samplers import PartitionSampler, ResumableDistributedSampler
from sam3_train.distributed import RunContext, broadcast_object
from sam3_train.feature_scale import measure_channel_variance
from sam3_train.task import to_device
from sam3_train.teacher import Teacher, online_features, stored_features
from sam3_train.training_data import TrainingData

PrepareBatch = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class TrainingSource:
    """The batches of a run, for all its students."""

    train: DistillationLoader
    val: DistillationLoader | None
    prepare_batch: PrepareBatch
    """Adds ``teacher`` to a batch that is on the device."""
    variance_c: Tensor
    """The teacher's variance per channel."""
    teacher: dict[str, Any]
    """What is known about the teacher: name, hash of its weights, precision."""


def build_source(
    cfg: CfgNode,
    data: TrainingData,
    run: RunContext,
    output: Path,
    train_extras: ItemExtras | None = None,
    val_extras: ItemExtras | None = None,
) -> TrainingSource:
    """Open loaders and teacher, and measure the scale of its features. Collective.

    Args:
        cfg: The settings that all students share.
        data: From the preflight.
        run: This process.
        output: Where unreadable images are listed.
        train_extras: Adds to the items of the training images.
        val_extras: Adds to those of the validation images.

    Raises:
        CheckpointError: If an online teacher's weights do not fit.
        UserError: If too many images are unreadable, or the ranks see different images.
    """
    for index in filter(None, (data.train, data.val)):
        require_same_on_all_ranks(index)
    if data.store is None:
        teacher = Teacher.from_config(cfg, run.device)
        prepare, description = online_features(teacher), dict(teacher.description)
    else:
        prepare, description = stored_features(data.store.codec), dict(data.store.spec.teacher)
    limit = bad_image_limit(cfg.DATA.MAX_BAD_FRACTION, len(data.train))
    bad_log = BadImageLog(output / BAD_IMAGES_FILE, limit, left_out_images(cfg.DATA))
    train_sampler = ResumableDistributedSampler(len(data.train), cfg.SEED, run.rank, run.world_size)
    train = _loader(cfg, data, data.train, train_sampler, bad_log, train_extras, drop_last=True)
    val = None
    if data.val is not None:
        val_sampler = PartitionSampler(len(data.val), run.rank, run.world_size)
        val = _loader(cfg, data, data.val, val_sampler, bad_log, val_extras, drop_last=False)
    variance_c = _measure_scale(cfg, data, prepare, run, bad_log)
    return TrainingSource(train, val, prepare, variance_c, description)


def build_dataset(
    cfg: CfgNode, data: TrainingData, index: ImageIndex, extras: ItemExtras | None = None
) -> DistillationDataset:
    """The images of an index with their embeddings, or for a teacher in the loop."""
    return DistillationDataset(
        index,
        data.preprocess,
        "online" if data.store is None else "train",
        data.grid_size,
        store=data.store,
        augment=data.augment,
        seed=cfg.SEED,
        extras=extras,
    )


def _loader(
    cfg: CfgNode,
    data: TrainingData,
    index: ImageIndex,
    sampler: Any,
    bad_log: BadImageLog,
    extras: ItemExtras | None,
    *,
    drop_last: bool,
) -> DistillationLoader:
    return build_loader(
        build_dataset(cfg, data, index, extras),
        sampler,
        cfg.DATA.BATCH_SIZE,
        num_workers=cfg.DATA.NUM_WORKERS,
        prefetch_factor=cfg.DATA.PREFETCH_FACTOR,
        pin_memory=cfg.DATA.PIN_MEMORY,
        drop_last=drop_last,
        bad_log=bad_log,
    )


def _measure_scale(
    cfg: CfgNode, data: TrainingData, prepare: PrepareBatch, run: RunContext, bad_log: BadImageLog
) -> Tensor:
    """The variance per channel over the first images in key order, measured by the main process for all."""
    variance_c = None
    if run.is_main:
        count = min(cfg.DISTILL.STATISTICS_IMAGES, len(data.train))
        loader = build_loader(
            build_dataset(cfg, data, data.train), range(count), min(8, count), num_workers=0, bad_log=bad_log
        )

        def features() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in loader:
                ready = prepare(to_device(batch, run.device))
                yield ready["teacher"], ready["valid"]

        with torch.no_grad():
            variance_c = measure_channel_variance(features()).cpu()
    measured = broadcast_object(variance_c)
    assert measured is not None
    return measured
