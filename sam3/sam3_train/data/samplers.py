"""Which image comes when: a pure function of (seed, epoch, position), the same for any number of ranks.

The order of an epoch is one permutation. Rank r of W takes every W-th entry from r on, so that a step's global batch is
the same set of images however it is spread over ranks, and a position is one number: images consumed over all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler

from sam3_train.errors import UserError
from sam3_train.rng import mix_seed


def partition(num_samples: int, rank: int, world_size: int) -> range:
    """The contiguous part of ``range(num_samples)`` that belongs to a rank.

    All parts together hold each index exactly once; their lengths differ by at most one.
    """
    base, extra = divmod(num_samples, world_size)
    start = rank * base + min(rank, extra)
    return range(start, start + base + (rank < extra))


class PartitionSampler(Sampler[int]):
    """Each index once over all ranks, in order: for validation and export. Ranks may differ by one in length."""

    def __init__(self, num_samples: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices = partition(num_samples, rank, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class ResumableDistributedSampler(Sampler[int]):
    """The training order, which can start anywhere in an epoch.

    Args:
        num_samples: Number of images.
        seed: Decides the permutation together with the epoch.
        rank: This process.
        world_size: Number of processes.
        shuffle: False takes the images in order.
        drop_last: True drops the up to ``world_size - 1`` images that would make ranks unequal; False repeats the
            first images of the epoch instead.

    Raises:
        UserError: If there are fewer images than ranks.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> None:
        if num_samples < world_size:
            raise UserError(f"the training set has {num_samples} images, fewer than the {world_size} processes")
        self.num_samples = num_samples
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.epoch = 0
        self.position = 0
        """Images of this epoch that all ranks together have consumed before the next iteration starts."""

    @property
    def per_rank(self) -> int:
        """Images of a whole epoch on each rank."""
        whole, extra = divmod(self.num_samples, self.world_size)
        return whole if self.drop_last or not extra else whole + 1

    def __len__(self) -> int:
        # Of the whole epoch, wherever the iteration starts: the loader's length is the number of batches per epoch.
        return self.per_rank

    def set_epoch(self, epoch: int, position: int = 0) -> None:
        """Choose the epoch of the next iteration, and how many images over all ranks it leaves out at the start."""
        if position % self.world_size:
            raise ValueError(f"position {position} is not a multiple of the world size {self.world_size}")
        self.epoch = epoch
        self.position = position

    def order(self) -> list[int]:
        """The epoch's order over all ranks."""
        if not self.shuffle:
            order = list(range(self.num_samples))
        else:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
            order = torch.randperm(self.num_samples, generator=generator).tolist()
        total = self.per_rank * self.world_size
        return (order + order[: max(0, total - len(order))])[:total]

    def __iter__(self) -> Iterator[int]:
        return iter(self.order()[self.position + self.rank :: self.world_size])

    def state_dict(self) -> dict[str, Any]:
        """Where the next iteration starts, and what decides the order."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "num_samples": self.num_samples,
            "shuffle": self.shuffle,
        }
