"""What the settings of `stage2.config` mean: the objects that model, data and task are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from yacs.config import CfgNode

from sam3.config import EfficientMemoryConfig
from sam3.efficient_memory_config import efficient_memory_preset
from sam3.model.clip_forward import PROMPT_KINDS, ClipPrompting
from sam3_train.errors import UserError
from stage2.config import PRESETS_OWN
from stage2.data.clip_choice import ClipSpec
from stage2.data.clip_look import LookSpec
from stage2.data.video_set import VideoSettings
from stage2.distill import DistillWeights
from stage2.losses import Stage2LossWeights
from stage2.task import Stage2Options

T = TypeVar("T")


def memory_config(cfg: CfgNode, preset: str) -> EfficientMemoryConfig:
    """The compressed memory that a run trains.

    Args:
        cfg: The settings.
        preset: Name of the checkpoint's model description, which gives what ``MODEL.MEMORY`` leaves open.

    Raises:
        UserError: If a value is impossible.
    """
    memory = cfg.MODEL.MEMORY
    given = {
        "num_latents": memory.NUM_LATENTS,
        "num_latents_2d": memory.NUM_LATENTS_2D,
        "perceiver_depth": memory.PERCEIVER_DEPTH,
        "perceiver_heads": memory.PERCEIVER_HEADS,
        "perceiver_head_dim": memory.PERCEIVER_HEAD_DIM,
        "perceiver_expansion": memory.PERCEIVER_EXPANSION,
        "hidden_dropout": memory.HIDDEN_DROPOUT,
        "attention_dropout": memory.ATTENTION_DROPOUT,
        "num_layers": memory.NUM_LAYERS,
        "num_heads": memory.NUM_HEADS,
        "mlp_dim": memory.MLP_DIM,
        "dropout": memory.DROPOUT,
        "attention": memory.ATTENTION,
        "pool_size": memory.POOL_SIZE,
        "initial_frames": memory.INITIAL_FRAMES,
    }
    changes = {name: value for name, value in given.items() if value not in (PRESETS_OWN, "")}
    own = _named("MODEL.MEMORY", lambda: efficient_memory_preset(preset, memory.COMPAT or None))
    contrary = [f"{name.upper()} {value}" for name, value in changes.items() if getattr(own, name) != value]
    if memory.COMPAT and contrary:
        raise UserError(
            f"MODEL.MEMORY.COMPAT {memory.COMPAT} is a memory of {own.num_latents} + {own.num_latents_2d} tokens with "
            f"sizes of its own, but {', '.join(contrary)} is given too: set that to {PRESETS_OWN} (texts to empty)"
        )
    return _named("MODEL.MEMORY", lambda: own.replace(**changes))


def curriculum(cfg: CfgNode) -> tuple[tuple[int, int], ...]:
    """(first epoch, frames of a clip from then on), ascending.

    Raises:
        UserError: If ``CLIPS.LENGTHS`` is empty, or ``CLIPS.LENGTH_EPOCHS`` has another number of entries.
    """
    lengths, epochs = cfg.CLIPS.LENGTHS, cfg.CLIPS.LENGTH_EPOCHS
    if not lengths:
        raise UserError("CLIPS.LENGTHS is empty: name at least one number of frames")
    if min(lengths) < 1:
        raise UserError(f"CLIPS.LENGTHS {list(lengths)}: a clip has at least one frame")
    if not epochs:
        epochs = [i * cfg.TRAIN.EPOCHS // len(lengths) for i in range(len(lengths))]
        return tuple(dict(zip(epochs, lengths, strict=True)).items())  # a short run leaves lengths out
    if len(epochs) != len(lengths):
        raise UserError(
            f"CLIPS.LENGTH_EPOCHS {list(epochs)} must name a first epoch for each of CLIPS.LENGTHS {list(lengths)}, or "
            "be empty"
        )
    return tuple(zip(epochs, lengths, strict=True))


def clip_spec(cfg: CfgNode) -> ClipSpec:
    """Which clips are drawn for training.

    Raises:
        UserError: If a value is impossible.
    """
    clips, lengths = cfg.CLIPS, curriculum(cfg)
    return _named(
        "CLIPS",
        lambda: ClipSpec(
            lengths=lengths,
            strides=tuple(clips.STRIDES),
            reverse_share=clips.REVERSE_SHARE,
            gap_share=clips.GAP_SHARE,
            max_gap=clips.MAX_GAP,
            max_objects=clips.MAX_OBJECTS,
            min_area=clips.MIN_AREA,
        ),
    )


def val_clip_spec(cfg: CfgNode) -> ClipSpec:
    """Which clip of each held-out video is tracked.

    Raises:
        UserError: If a value is impossible.
    """
    val, min_area = cfg.VAL, cfg.CLIPS.MIN_AREA
    return _named("VAL", lambda: ClipSpec(max_objects=val.MAX_OBJECTS, min_area=min_area).for_validation(val.LENGTH))


def look_spec(cfg: CfgNode) -> LookSpec | None:
    """How clips are changed; None if nothing is.

    Raises:
        UserError: If a value is impossible.
    """
    augment = cfg.AUGMENT
    values = {
        "flip_share": augment.FLIP_SHARE,
        "brightness": augment.BRIGHTNESS,
        "contrast": augment.CONTRAST,
        "saturation": augment.SATURATION,
        "hue": augment.HUE,
        "grey_share": augment.GREY_SHARE,
    }
    return _named("AUGMENT", lambda: LookSpec(**values)) if any(values.values()) else None


def video_settings(cfg: CfgNode, is_val_set: bool = False) -> VideoSettings:
    """Where the videos are.

    Args:
        cfg: The settings.
        is_val_set: Of ``DATA.VAL_PATH``: all of its videos, or those that it lists as its val split itself.
    """
    data = cfg.DATA
    return VideoSettings(
        data.VAL_PATH if is_val_set else data.DATA_PATH,
        data.VAL_DATASET if is_val_set else data.DATASET,
        annotations=data.ANNOTATIONS,
        subset_fraction=data.SUBSET_FRACTION,
        subset_seed=data.SUBSET_SEED,
        val_fraction=1.0 if is_val_set else data.VAL_FRACTION,
        on_bad=data.ON_BAD,
        max_bad_fraction=data.MAX_BAD_FRACTION,
        cache_dir=data.INDEX_CACHE,
    )


def prompting(cfg: CfgNode) -> ClipPrompting:
    """Which prompts are simulated.

    Raises:
        UserError: If a value is impossible.
    """
    prompts = cfg.PROMPTS
    total = prompts.MASK_SHARE + prompts.BOX_SHARE + prompts.CLICK_SHARE
    if abs(total - 1.0) > 1e-6:
        raise UserError(
            f"PROMPTS: MASK_SHARE {prompts.MASK_SHARE:g}, BOX_SHARE {prompts.BOX_SHARE:g} and CLICK_SHARE "
            f"{prompts.CLICK_SHARE:g} add up to {total:g}, not to 1"
        )
    for name in ("NUM_PROMPTED", "NUM_CORRECTED"):
        if len(prompts[name]) != 2:
            raise UserError(f"PROMPTS.{name} {list(prompts[name])} must be two numbers: fewest and most")
    return _named(
        "PROMPTS",
        lambda: ClipPrompting(
            mask_share=prompts.MASK_SHARE,
            box_share=prompts.BOX_SHARE,
            num_prompted=(prompts.NUM_PROMPTED[0], prompts.NUM_PROMPTED[1]),
            num_corrected=(prompts.NUM_CORRECTED[0], prompts.NUM_CORRECTED[1]),
            clicks_per_frame=prompts.CLICKS_PER_FRAME,
            click_from_truth_share=prompts.CLICK_FROM_TRUTH_SHARE,
            box_noise=prompts.BOX_NOISE,
            max_box_shift=prompts.MAX_BOX_SHIFT,
        ),
    )


def loss_weights(cfg: CfgNode) -> Stage2LossWeights:
    """What the terms of the loss count.

    Raises:
        UserError: If a weight is impossible.
    """
    loss = cfg.LOSS
    return _named(
        "LOSS",
        lambda: Stage2LossWeights(
            focal=loss.FOCAL,
            dice=loss.DICE,
            iou=loss.IOU,
            object_score=loss.OBJECT_SCORE,
            others=loss.OTHERS,
            absent=loss.ABSENT,
            temporal=loss.TEMPORAL,
            reconstruction=loss.RECONSTRUCTION,
            focal_alpha=loss.FOCAL_ALPHA,
            focal_gamma=loss.FOCAL_GAMMA,
        ),
    )


def distill_weights(cfg: CfgNode) -> DistillWeights:
    """What is learnt from the full memory.

    Raises:
        UserError: If a weight is impossible.
    """
    distill = cfg.DISTILL
    return _named(
        "DISTILL",
        lambda: DistillWeights(mask=distill.MASK, features=distill.FEATURES, pointers=distill.POINTERS),
    )


def task_options(
    cfg: CfgNode, num_batches: int = 1, feature_dtype: torch.dtype | None = None, feature_scale: float = 1.0
) -> Stage2Options:
    """Everything that the task is told.

    Args:
        cfg: The settings.
        num_batches: Of this rank in the whole run, for shares of it.
        feature_dtype: The frozen backbone computes in it; None: in that of its weights.
        feature_scale: ``FORWARD.FEATURE_SCALE``, or what was measured in its place.

    Raises:
        UserError: If a value is impossible.
    """
    forward, kinds = cfg.FORWARD, tuple(cfg.VAL.PROMPTS)
    unknown = [kind for kind in kinds if kind not in PROMPT_KINDS]
    if unknown or not kinds:
        raise UserError(f"VAL.PROMPTS {list(kinds)} must be some of {', '.join(PROMPT_KINDS)}")
    if not 0.0 <= cfg.DISTILL.FORCED_SHARE < 1.0:
        raise UserError(
            f"DISTILL.FORCED_SHARE must lie in [0, 1), got {cfg.DISTILL.FORCED_SHARE}: masks are learnt in the rest"
        )
    prompts, losses, distill = prompting(cfg), loss_weights(cfg), distill_weights(cfg)
    return _named(
        "FORWARD",
        lambda: Stage2Options(
            prompting=prompts,
            losses=losses,
            distill=distill,
            video_frames=forward.VIDEO_FRAMES,
            presence_batches=forward.PRESENCE_STEPS * max(1, cfg.TRAIN.ACCUMULATION_STEPS),
            forced_batches=math.ceil(cfg.DISTILL.FORCED_SHARE * num_batches),
            through_masks=forward.THROUGH_MASKS,
            still_frames=forward.STILL_FRAMES,
            frames_at_once=forward.FRAMES_AT_ONCE,
            feature_dtype=feature_dtype,
            feature_scale=feature_scale,
            val_kinds=kinds,
        ),
    )


def _named(section: str, build: Callable[[], T]) -> T:
    """What is built; impossible values are the user's, and the message names their section."""
    try:
        return build()
    except (TypeError, ValueError) as error:
        raise UserError(f"{section}: {error}") from None
