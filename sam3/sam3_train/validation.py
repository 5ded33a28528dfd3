"""Metrics over a validation set: each image counts once, whatever the number of ranks and the batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from tqdm import tqdm

from sam3_train.distributed import RunContext
from sam3_train.metrics import RunningMean
from sam3_train.precision import autocast
from sam3_train.rng import load_rng_state_dict, mix_seed, rng_state_dict, seed_everything
from sam3_train.task import Task, to_device


def run_validation(
    tasks: list[Task],
    loader: Iterable[Any],
    run: RunContext,
    dtypes: list[torch.dtype],
    seed: int = 0,
    prepare_batch: Callable[[Any], Any] | None = None,
    should_stop: Callable[[], bool] = bool,
) -> list[dict[str, float]] | None:
    """Run `Task.validate` over a loader. Collective; a rank's loader must hold only its own part of the images.

    Args:
        tasks: Holding the weights to judge; put in eval mode.
        loader: Batches; ranks may have different numbers of them (`sam3_train.data.samplers.PartitionSampler`).
        run: This process.
        dtypes: Autocast dtype of each task.
        seed: Random prompts are drawn from it, the same in each epoch; the training's random stream is not touched.
        prepare_batch: As in `sam3_train.loop.fit`.
        should_stop: Asked after each batch; True ends this rank's part early.

    Returns:
        Means over all images for each task, or None if `should_stop` said so on any rank.
    """
    from sam3_train.distributed import all_gather_object

    means = [RunningMean() for _ in tasks]
    before = rng_state_dict(run.device)
    seed_everything(mix_seed(seed, run.rank, 1))
    stopped = False
    bar = tqdm(loader, desc="validate", leave=False, disable=None if run.is_main else True, mininterval=1.0)
    with torch.no_grad():
        for task in tasks:
            task.eval()
        for batch in bar:
            batch = to_device(batch, run.device)
            if prepare_batch is not None:
                batch = prepare_batch(batch)
            for task, dtype, mean in zip(tasks, dtypes, means, strict=True):
                with autocast(run.device, dtype):
                    values = task.validate(batch)
                mean.add(values, weight=task.batch_size(batch))
            if should_stop():
                stopped = True
                break
    load_rng_state_dict(before, run.device)
    if any(all_gather_object(stopped)):
        return None
    return [mean.means_over_ranks() for mean in means]
