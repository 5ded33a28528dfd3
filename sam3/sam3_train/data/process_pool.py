"""Doing one thing to many files in several processes, without losing any of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from typing import Any, TypeVar

from sam3_train.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
_IN_FLIGHT_PER_WORKER = 4


def process_context() -> BaseContext:
    """How worker processes start: forked on Linux, so that they share what is in memory."""
    return multiprocessing.get_context("fork" if sys.platform == "linux" else None)


def run_in_processes(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    num_workers: int,
    start: Callable[..., None] | None = None,
    start_args: tuple[Any, ...] = (),
    poll: Callable[[], None] | None = None,
    poll_s: float = 0.2,
) -> Iterator[tuple[Item, Result]]:
    """Apply a function to items; with one worker or none, in this process.

    Args:
        work: A module-level function (or a partial of one).
        items: What to apply it to; taken as workers become free.
        num_workers: Processes.
        start: Called in each worker first.
        start_args: Its arguments.
        poll: Called in this process between results, every ``poll_s`` seconds at least if there are workers.
        poll_s: See ``poll``.

    Yields:
        (item, result) in the order in which they end.

    Raises:
        UserError: If a worker process dies.
    """
    if num_workers <= 1:
        if start is not None:
            start(*start_args)
        for item in items:
            yield item, work(item)
            if poll is not None:
                poll()
        return
    pool = ProcessPoolExecutor(num_workers, process_context(), _start_worker, (os.getpid(), start, start_args))
    remaining = iter(items)
    running: dict[Future[Result], Item] = {}
    try:
        while True:
            while len(running) < _IN_FLIGHT_PER_WORKER * num_workers:
                try:
                    item = next(remaining)
                except StopIteration:
                    break
                running[pool.submit(work, item)] = item
            if not running:
                return
            for job in wait(running, timeout=poll_s, return_when=FIRST_COMPLETED).done:
                yield running.pop(job), job.result()
            if poll is not None:
                poll()
    except BrokenProcessPool:
        raise UserError(
            f"one of {num_workers} worker processes died (out of memory?); run again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(parent: int, start: Callable[..., None] | None, start_args: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    if start is not None:
        start(*start_args)


def _end_with_parent(parent: int) -> None:
    """A worker of a killed parent would otherwise wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
