"""A data loader for training runs: it follows its sampler's epoch, and says in this process what workers met."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from sam3_train.data.bad_images import BadImageLog
from sam3_train.data.loader_workers import LoaderWorkers
from sam3_train.data.process_pool import process_context
from sam3_train.errors import UserError


class EpochLoader(DataLoader[dict[str, Any]]):
    """A loader whose workers live as long as it does. Iterating raises `UserError` for what a worker could not do.

    Before each pass the dataset is told the sampler's epoch (``set_epoch``, if it has that). Batches are dicts; one
    that has ``error`` ends the run, and what it lists under ``bad``, pairs of name and reason, goes to ``bad_log``.

    Args:
        dataset: Of dicts.
        collate_fn: Makes batches of them.
        sampler: Positions in order; None takes all in index order.
        batch_size: Items per batch.
        batches: Positions batch by batch, instead of ``sampler``, ``batch_size`` and ``drop_last``.
        num_workers: Processes; 0 loads in this one.
        prefetch_factor: Batches that each worker prepares ahead.
        pin_memory: Page-locked batches, where there is a CUDA device.
        drop_last: Leave an incomplete last batch out.
        bad_log: Accounts for what cannot be read; None leaves that to the caller.
    """

    def __init__(
        self,
        dataset: Dataset[dict[str, Any]],
        collate_fn: Callable[[list[dict[str, Any]]], dict[str, Any]],
        sampler: Sampler[int] | Iterable[int] | None = None,
        batch_size: int = 1,
        *,
        batches: Sequence[list[int]] | None = None,
        num_workers: int = 8,
        prefetch_factor: int = 2,
        pin_memory: bool = True,
        drop_last: bool = False,
        bad_log: BadImageLog | None = None,
    ) -> None:
        order: dict[str, Any] = {"batch_size": batch_size, "sampler": sampler, "drop_last": drop_last}
        processes = LoaderWorkers(num_workers)
        workers: dict[str, Any] = {}
        if num_workers > 0:
            workers = {
                "prefetch_factor": prefetch_factor,
                "persistent_workers": True,
                "worker_init_fn": processes.start,
                "multiprocessing_context": process_context(),
            }
        super().__init__(
            dataset,
            num_workers=num_workers,
            collate_fn=collate_fn,
            # Starting workers draws a seed; from a generator of its own, so that the run's random stream does not
            # notice.
            generator=torch.Generator(),
            pin_memory=pin_memory and torch.cuda.is_available(),
            **(order if batches is None else {"batch_sampler": batches}),
            **workers,
        )
        self.bad_log = bad_log
        self._processes = processes if num_workers > 0 else None
        if self._processes is not None:
            self._processes.end_with(self)

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        epoch, set_epoch = getattr(self.sampler, "epoch", None), getattr(self.dataset, "set_epoch", None)
        if epoch is not None and set_epoch is not None:
            set_epoch(epoch)
        # Started here and not when the first batch is asked for: workers decode while the caller prepares itself.
        batches = super().__iter__()
        if self._processes is not None:
            self._processes.end_at_exit()
        return self._checked(batches)

    def _checked(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for batch in batches:
            if "error" in batch:
                raise UserError(batch["error"])
            if self.bad_log is not None:
                self.bad_log.record(batch["bad"])
            self.note(batch)
            yield batch

    def note(self, batch: dict[str, Any]) -> None:
        """Called in the main process with each batch before it is handed out; may raise."""
