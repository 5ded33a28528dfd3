"""What a run can know to be wrong before it computes anything, beside its videos: settings, and its checkpoint.

Each check adds lines to a list; `sam3_train.errors.require_no_problems` makes one error of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from yacs.config import CfgNode

from sam3.checkpoint_io import read_checkpoint
from sam3.checkpoint_parts import HEADS, MEMORY
from sam3.config import Sam3Config
from sam3.loading import choose_preprocess, find_checkpoint
from sam3.preprocess import Preprocess
from sam3.recognition import Recognised, recognise
from sam3_train.errors import UserError, attempt
from stage2.settings import clip_spec, distill_weights, look_spec, memory_config, task_options, val_clip_spec
from stage2.trained_memory import tracker_on_meta

STARTS = ("full", "fresh")


@dataclass(frozen=True)
class BaseFile:
    """The file whose backbone and heads a memory is trained with."""

    path: Path
    recognised: Recognised
    model: Sam3Config
    """With the memory that is trained."""
    preprocess: Preprocess

    @property
    def is_new(self) -> bool:
        """Whether the memory is new, and not one that the file holds."""
        return self.recognised.efficient_memory != self.model.efficient_memory

    @property
    def backbone(self) -> str:
        """What is tracked with, in words."""
        student = self.model.student
        return f"SAM 3's own ({self.model.name})" if student is None else f"student {student.backbone}"


def check_settings(cfg: CfgNode, problems: list[str], is_main: bool = True) -> None:
    """Ranges, choices and combinations of this stage's own settings.

    Args:
        cfg: The settings.
        problems: Receives what is wrong.
        is_main: Whether this is the main process: it alone reads a checkpoint to continue from.
    """
    checks: tuple[Callable[[], object], ...] = (
        lambda: clip_spec(cfg),
        lambda: look_spec(cfg),
        lambda: task_options(cfg),
        *((lambda: val_clip_spec(cfg),) if cfg.VAL.ENABLE else ()),
    )
    for check in checks:
        attempt(problems, check)
    data = cfg.DATA
    for key, value, is_fine in (
        ("DATA.BATCH_SIZE", data.BATCH_SIZE, data.BATCH_SIZE >= 1),
        ("DATA.NUM_WORKERS", data.NUM_WORKERS, data.NUM_WORKERS >= 0),
        ("DATA.PREFETCH_FACTOR", data.PREFETCH_FACTOR, data.PREFETCH_FACTOR >= 1),
        ("DATA.CLIPS_PER_VIDEO", data.CLIPS_PER_VIDEO, data.CLIPS_PER_VIDEO >= 1),
        ("DATA.IMAGE_SHARE", data.IMAGE_SHARE, 0 <= data.IMAGE_SHARE < 1),
        ("DATA.VAL_NUM_VIDEOS", data.VAL_NUM_VIDEOS, data.VAL_NUM_VIDEOS == -1 or data.VAL_NUM_VIDEOS >= 1),
        ("MODEL.START_CLIPS", cfg.MODEL.START_CLIPS, cfg.MODEL.START_CLIPS >= 1),
        ("FORWARD.FRAMES_AT_ONCE", cfg.FORWARD.FRAMES_AT_ONCE, cfg.FORWARD.FRAMES_AT_ONCE >= 1),
        ("FORWARD.FEATURE_SCALE", cfg.FORWARD.FEATURE_SCALE, 0 <= cfg.FORWARD.FEATURE_SCALE < float("inf")),
    ):
        if not is_fine:
            problems.append(f"{key}: {value} is out of range")
    if cfg.MODEL.START not in STARTS:
        problems.append(f"MODEL.START {cfg.MODEL.START!r} is not one of {', '.join(STARTS)}")
    if cfg.MODEL.START == "full" and cfg.FORWARD.STILL_FRAMES == 1 and list(cfg.CLIPS.LENGTHS[:1]) == [1]:
        problems.append(
            "MODEL.START full looks at frames that read a memory, and the first clips have one frame: set "
            "CLIPS.LENGTHS or FORWARD.STILL_FRAMES to 2 or more, or MODEL.START to fresh"
        )
    if data.IMAGE_SHARE > 0 and not data.IMAGES_PATH:
        problems.append(f"DATA.IMAGE_SHARE {data.IMAGE_SHARE:g}: images are asked for, but DATA.IMAGES_PATH is empty")
    if data.IMAGES_PATH and not data.IMAGE_SHARE > 0:
        problems.append(f"DATA.IMAGES_PATH {data.IMAGES_PATH} is never read: DATA.IMAGE_SHARE is 0")
    if data.FEATURE_CACHE and any(cfg.AUGMENT.values()):
        changed = [f"AUGMENT.{name}" for name, value in cfg.AUGMENT.items() if value]
        problems.append(
            f"DATA.FEATURE_CACHE keeps the features of unchanged frames: set {', '.join(changed)} to 0, or leave the "
            "cache out"
        )
    if is_main:
        for name in ("RESUME", "PRETRAINED"):
            path = cfg.MODEL[name]
            if path and not Path(path).is_file():
                problems.append(f"MODEL.{name}: there is no checkpoint {path}")


def read_base(cfg: CfgNode) -> BaseFile:
    """Recognise ``MODEL.SAM3_CHECKPOINT``; no weights are read yet.

    Raises:
        UserError: If there is none, or it lacks what a memory is trained with.
        CheckpointError: If it cannot be read or recognised.
    """
    if not cfg.MODEL.SAM3_CHECKPOINT:
        raise UserError(
            "MODEL.SAM3_CHECKPOINT is empty: name sam3.pt, or a student that was merged into it (--sam3_checkpoint)"
        )
    path = find_checkpoint(cfg.MODEL.SAM3_CHECKPOINT)
    where = f"MODEL.SAM3_CHECKPOINT {cfg.MODEL.SAM3_CHECKPOINT}"
    if not path.exists():
        raise UserError(f"{where}: there is no such file (--sam3_checkpoint)")
    recognised = recognise(read_checkpoint(path))
    lacking = [part.name for part in (HEADS, MEMORY) if part not in recognised.parts]
    if lacking:
        raise UserError(
            f"{where} lacks {' and '.join(lacking)}, so nothing in it can track: name sam3.pt, or a student that was "
            "merged into it with its tracker"
        )
    memory = memory_config(cfg, recognised.config.name)
    if "full" not in recognised.memories and recognised.efficient_memory != memory:
        raise UserError(
            f"{where} holds a compressed memory of other sizes than MODEL.MEMORY asks for, and not SAM 3's own, "
            "which a new one starts from"
        )
    if distill_weights(cfg).is_on and "full" not in recognised.memories:
        raise UserError(f"{where} does not hold SAM 3's own memory, which is the teacher: set DISTILL's weights to 0")
    if cfg.LOSS.RECONSTRUCTION and not memory.is_compressed:
        raise UserError(
            f"LOSS.RECONSTRUCTION {cfg.LOSS.RECONSTRUCTION:g}: a memory without latents is not compressed, so there is "
            "nothing to reconstruct: set it to 0, or MODEL.MEMORY.NUM_LATENTS or NUM_LATENTS_2D"
        )
    config = recognised.config.with_efficient_memory(memory)
    try:
        tracker_on_meta(config)
    except ValueError as error:
        raise UserError(f"MODEL.MEMORY does not fit the model {config.name!r}: {error}") from None
    given = choose_preprocess(recognised, None)
    return BaseFile(path, recognised, config, given or Preprocess(size_px=config.image_size_px))


def check_cache_room(folder: Path, num_bytes: int, problems: list[str]) -> None:
    """A problem if the file system of the feature cache is too small for what it lacks."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        problems.append(
            f"DATA.FEATURE_CACHE: features take {num_bytes / 1e9:.1f} GB more, {existing} has {free / 1e9:.1f} GB "
            "free: train on fewer videos (DATA.SUBSET_FRACTION), name a folder on a larger disk, or leave it empty"
        )
