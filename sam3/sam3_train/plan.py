"""What a run is about to do, in a line, and what looks wrong about it."""

from __future__ import annotations

from sam3_train.learner import Learner
from sam3_train.train_state import BatchLayout

_SMALL_BATCHNORM_BATCH = 8


def plan_line(learner: Learner, layout: BatchLayout, steps_per_epoch: int, num_samples: int) -> str:
    """Size of the model, batch, epochs and effective learning rate of one learner."""
    train = learner.cfg.TRAIN
    return (
        f"{type(learner.task).__name__} -> {learner.member.output}: {learner.num_trainable() / 1e6:.2f} M trainable "
        f"parameters on {learner.run.device} ({str(learner.dtype).removeprefix('torch.')}), global batch "
        f"{layout.global_batch_size} = {layout.micro_batch_size} x {layout.accumulation_steps} accumulated x "
        f"{layout.world_size} processes, {train.EPOCHS} epochs of {steps_per_epoch} steps ({num_samples} "
        f"{learner.task.samples}), "
        f"learning rate {learner.schedule.base_lr:.3g} ({learner.schedule.name}, {learner.schedule.warmup_steps} "
        f"warm-up steps, scaling {train.LR_SCALING})"
    )


def plan_warnings(learner: Learner, layout: BatchLayout) -> list[str]:
    """Lines about settings that are allowed and rarely meant."""
    warnings = [learner.lr_warning()]
    if layout.world_size > 1 and layout.micro_batch_size < _SMALL_BATCHNORM_BATCH and learner.has_batchnorm():
        warnings.append(
            f"BatchNorm sees {layout.micro_batch_size} images per process; --use-sync-bn (CUDA) or "
            "TRAIN.EVAL_BN_WHEN_TRAINING may train better"
        )
    return [warning for warning in warnings if warning]
