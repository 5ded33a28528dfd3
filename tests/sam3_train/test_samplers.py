"""Which image comes when."""

from __future__ import annotations

from itertools import chain

import pytest

from sam3_train.data.samplers import PartitionSampler, ResumableDistributedSampler, partition
from sam3_train.errors import UserError


@pytest.mark.parametrize("num_samples, world_size", [(10, 1), (10, 3), (2, 4), (0, 2), (1001, 8)])
def test_a_partition_holds_each_index_exactly_once(num_samples, world_size):
    """D-31: no rank repeats what another does."""
    parts = [list(PartitionSampler(num_samples, rank, world_size)) for rank in range(world_size)]
    assert sorted(chain(*parts)) == list(range(num_samples))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert [len(PartitionSampler(num_samples, rank, world_size)) for rank in range(world_size)] == list(map(len, parts))
    assert partition(num_samples, 0, 1) == range(num_samples)


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    """D-60: the sampler follows SEED."""

    def order(seed, epoch):
        sampler = ResumableDistributedSampler(50, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert sorted(order(0, 1)) == list(range(50))
    assert len({tuple(order(*key)) for key in [(0, 0), (0, 1), (1, 0), (1, 1)]}) == 4


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_global_batch_is_the_same_images_for_any_number_of_ranks(world_size):
    ranks = [list(ResumableDistributedSampler(48, 5, rank, world_size)) for rank in range(world_size)]
    per_rank = 6 // world_size
    whole = list(ResumableDistributedSampler(48, 5))
    for start in range(0, 48, 6):
        local = start // world_size
        batch = list(chain(*(rank[local : local + per_rank] for rank in ranks)))
        assert sorted(batch) == sorted(whole[start : start + 6])


def test_a_position_leaves_out_what_was_consumed_and_the_length_stays_the_epochs():
    whole = list(ResumableDistributedSampler(20, 1, 1, 2))
    sampler = ResumableDistributedSampler(20, 1, 1, 2)
    sampler.set_epoch(0, position=12)
    assert list(sampler) == whole[6:] and len(sampler) == 10
    with pytest.raises(ValueError, match="multiple of the world size"):
        sampler.set_epoch(0, position=3)


def test_a_position_continues_with_another_number_of_ranks():
    """D-47"""
    first = ResumableDistributedSampler(24, 2)
    first.set_epoch(3, position=8)
    rest = list(first)
    halves = []
    for rank in range(2):
        sampler = ResumableDistributedSampler(24, 2, rank, 2)
        sampler.set_epoch(3, position=8)
        halves.append(list(sampler))
    assert sorted(chain(*halves)) == sorted(rest)


def test_unequal_ranks_either_drop_or_repeat():
    dropping = [list(ResumableDistributedSampler(11, 0, rank, 2)) for rank in range(2)]
    assert [len(part) for part in dropping] == [5, 5] and len(set(chain(*dropping))) == 10
    repeating = [list(ResumableDistributedSampler(11, 0, rank, 2, drop_last=False)) for rank in range(2)]
    assert [len(part) for part in repeating] == [6, 6] and set(chain(*repeating)) == set(range(11))


def test_fewer_images_than_processes_is_an_error():
    with pytest.raises(UserError, match="1 images, fewer than the 2 processes"):
        ResumableDistributedSampler(1, world_size=2)
