"""Work in several processes: everything is done once, and a worker that dies is noticed."""

from __future__ import annotations

import os
import time

import pytest

from sam3_train.data.process_pool import run_in_processes
from sam3_train.errors import UserError


def square(number: int) -> int:
    return number * number


def die_at_three(number: int) -> int:
    if number == 3:
        os._exit(9)
    return number


def refuse_three(number: int) -> int:
    if number == 3:
        raise UserError("three is refused")
    return number


def sleep_a_little(number: int) -> int:
    time.sleep(0.1)
    return number


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_each_item_is_done_once(num_workers: int) -> None:
    assert sorted(run_in_processes(square, range(50), num_workers)) == [(n, n * n) for n in range(50)]
    assert list(run_in_processes(square, [], num_workers)) == []


def test_a_killed_worker_ends_the_work_with_one_line() -> None:
    """D-104: the kernel's out-of-memory killer leaves no pool that waits for ever."""
    with pytest.raises(UserError, match="one of 2 worker processes died"):
        list(run_in_processes(die_at_three, range(8), 2))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_error_in_a_worker_reaches_the_caller(num_workers: int) -> None:
    with pytest.raises(UserError, match="three is refused"):
        list(run_in_processes(refuse_three, range(8), num_workers))


def test_progress_is_polled_while_workers_are_busy() -> None:
    polls: list[float] = []
    list(run_in_processes(sleep_a_little, range(2), 2, poll=lambda: polls.append(time.monotonic()), poll_s=0.01))
    assert len(polls) > 3
