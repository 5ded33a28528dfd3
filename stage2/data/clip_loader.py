"""Loaders of clips for training and validation."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from sam3_train.data.bad_images import BadImageLog, bad_image_limit
from sam3_train.data.epoch_loader import EpochLoader
from sam3_train.data.samplers import PartitionSampler
from stage2.data.clip_batch import collate_clips
from stage2.data.clip_sampler import ClipSampler
from stage2.data.sav_dataset import ClipDataset

BAD_VIDEOS_FILE = "bad_videos.txt"


def bad_video_log(
    output: str | Path | None, max_bad_fraction: float, num_videos: int, left_out: Collection[str] = ()
) -> BadImageLog:
    """Accounts for the videos that turn out to be bad while they are read, in a run's folder.

    Args:
        output: The run's folder; None keeps the list in memory.
        max_bad_fraction: More of them end the run.
        num_videos: Of the data set.
        left_out: Listed videos that do not count, because the run does not use them.
    """
    return BadImageLog(
        None if output is None else Path(output) / BAD_VIDEOS_FILE,
        bad_image_limit(max_bad_fraction, num_videos),
        left_out,
        noun="videos that cannot be used",
        how_to_leave_out="remove them from the data set",
    )


def build_train_loader(
    dataset: ClipDataset,
    sampler: ClipSampler,
    batch_size: int,
    *,
    num_workers: int = 4,
    prefetch_factor: int = 2,
    pin_memory: bool = True,
    bad_log: BadImageLog | None = None,
) -> EpochLoader:
    """Whole batches in the sampler's order; `collate_clips` describes them.

    Args:
        dataset: Clips, and images if the sampler draws them.
        sampler: Made for this batch size and this rank.
        batch_size: Clips of a batch on this rank.
        num_workers: Processes that decode; 0 decodes in this one.
        prefetch_factor: Batches that each of them prepares ahead.
        pin_memory: Page-locked batches, where there is a CUDA device.
        bad_log: From `bad_video_log`.
    """
    return EpochLoader(
        dataset,
        collate_clips,
        sampler,
        batch_size,
        drop_last=True,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor,
        pin_memory=pin_memory,
        bad_log=bad_log,
    )


def build_val_loader(
    dataset: ClipDataset,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    *,
    num_workers: int = 4,
    prefetch_factor: int = 2,
    pin_memory: bool = True,
    bad_log: BadImageLog | None = None,
) -> EpochLoader:
    """Every video once over all ranks, in order.

    Args:
        dataset: With fixed clips and without images.
        batch_size: Clips of a batch; the last one of a rank may have fewer.
        rank: This process.
        world_size: Number of processes.
        num_workers: See `build_train_loader`, and the next three.
        prefetch_factor: See there.
        pin_memory: See there.
        bad_log: See there.
    """
    return EpochLoader(
        dataset,
        collate_clips,
        PartitionSampler(len(dataset), rank, world_size),
        batch_size,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor,
        pin_memory=pin_memory,
        bad_log=bad_log,
    )
