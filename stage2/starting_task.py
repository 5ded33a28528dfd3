"""Model and task as a run begins with them: which weights, which teacher, and what is measured first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

from sam3.model.efficient_sam3_model_builder import build_efficient_sam3_train
from sam3.model.efficient_sam3_train import EfficientSam3Train
from sam3_train.checkpoint import load_strict
from sam3_train.data.epoch_loader import EpochLoader
from sam3_train.distributed import RunContext, broadcast_object
from sam3_train.errors import UserError
from sam3_train.task import to_device
from stage2.data.clip_batch import collate_clips
from stage2.distill import full_memory_teacher
from stage2.preflight import BaseFile
from stage2.settings import task_options
from stage2.task import Stage2Task, measure_feature_scale
from stage2.trained_memory import read_trained_memory
from stage2.training_clips import trunk_dtype

_SCALE_CLIPS = 4


def build_model(cfg: CfgNode, base: BaseFile, run: RunContext) -> EfficientSam3Train:
    """What is trained: the memory of ``MODEL.PRETRAINED``, else the file's own, else a new one. Rank 0's weights win.

    Raises:
        CheckpointError: If the file lacks a part.
        UserError: If ``MODEL.PRETRAINED`` does not fit.
    """
    model = build_efficient_sam3_train(base.path, memory=base.model.efficient_memory, device=run.device)
    if cfg.MODEL.PRETRAINED and run.is_main:
        trained = read_trained_memory(Path(cfg.MODEL.PRETRAINED))
        absent = [name for name in model.state_dict() if name not in trained.weights]
        load_strict(model, trained.weights, str(trained.path), allow_missing=absent)
    return model


def starts_from_full(cfg: CfgNode, base: BaseFile) -> bool:
    """Whether a new memory starts from the full one (``MODEL.START``), there being no trained one to start from."""
    return cfg.MODEL.START == "full" and base.is_new and not cfg.MODEL.PRETRAINED


def build_task(
    cfg: CfgNode, base: BaseFile, model: EfficientSam3Train, loader: EpochLoader, run: RunContext, is_resumed: bool
) -> tuple[Stage2Task, float | None]:
    """The task, with a teacher where one is wanted. Collective.

    Args:
        cfg: The settings.
        base: The file that the model is of.
        model: From `build_model`; a new memory is given its start.
        loader: Of the training clips, some of which are looked at.
        run: This process.
        is_resumed: The weights will come from a checkpoint of the run.

    Returns:
        The task, and how far a memory that starts from the full one is from it (None for others, and on other ranks
        than 0).
    """
    scale = cfg.FORWARD.FEATURE_SCALE or _measured_scale(cfg, model, loader, run)
    options = task_options(cfg, cfg.TRAIN.EPOCHS * len(loader), trunk_dtype(cfg, run), scale)
    starts = starts_from_full(cfg, base) and run.is_main and not is_resumed
    full = full_memory_teacher(base.path, run.device) if starts or options.distill.is_on else None
    task = Stage2Task(model, options, full if options.distill.is_on else None)
    if not starts:
        return task, None
    assert full is not None
    error = task.start_from_full(full, first_clips(loader, cfg.MODEL.START_CLIPS, run.device))
    print(f"started: {error:.3f} of the variance of what the full memory shows is still missed", flush=True)
    if error > 1.0:
        print("warning: that is further away than a constant: MODEL.START fresh may begin better", flush=True)
    return task, error


def _measured_scale(cfg: CfgNode, model: EfficientSam3Train, loader: EpochLoader, run: RunContext) -> float:
    """On the first videos, the same on all ranks and when a run is continued."""
    scale = 0.0
    if run.is_main:
        clips = first_clips(loader, _SCALE_CLIPS, run.device)
        scale = measure_feature_scale(model, clips, cfg.FORWARD.FRAMES_AT_ONCE)
    return float(broadcast_object(scale))


def first_clips(loader: EpochLoader, num: int, device: torch.device) -> list[dict[str, Any]]:
    """Batches of one clip each, the same ones whenever it is asked.

    Raises:
        UserError: If one cannot be read, and no other takes its place.
    """
    dataset: Any = loader.dataset
    first = dataset.num_images  # positions of videos come behind those of images
    batches = [to_device(collate_clips([dataset[first + i]]), device) for i in range(num)]
    failed = next((batch["error"] for batch in batches if "error" in batch), None)
    if failed is not None:
        raise UserError(failed)
    return batches
