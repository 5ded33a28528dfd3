"""What a fine-tune can know to be wrong before it computes anything, beside its data: settings, heads, student.

Each check adds lines to a list; `sam3_train.errors.require_no_problems` makes one error of them. What the run reads is
checked in `sam3_train.training_data`, the student it starts from in `stage1_geometry_finetune.starting_student`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from yacs.config import CfgNode

from sam3.checkpoint_io import read_checkpoint
from sam3.checkpoint_parts import DETECTOR, HEADS, NECK, POINT_PROMPTS, SEGMENTATION, TEXT, TRUNK, Part, part_of
from sam3.config import Sam3Config
from sam3.recognition import Recognised, recognise
from sam3_train.errors import UserError
from sam3_train.feature_scale import NORMALIZATIONS
from stage1_geometry_finetune.frozen_heads import trained_part_sizes

LOSS_TERMS = ("EMBEDDING", "MASK_BCE", "MASK_DICE", "SCORE", "PRESENCE", "BOX")
LOSS_WEIGHTS = (*LOSS_TERMS, "ROUTE_DETECTOR", "ROUTE_SAM")


def check_settings(cfg: CfgNode, problems: list[str], is_main: bool = True) -> None:
    """Ranges and choices of this stage's own settings; those of the prompts and of the loop are checked there.

    Args:
        cfg: The settings.
        problems: Receives what is wrong.
        is_main: Whether this is the main process: it alone reads a checkpoint to continue from.
    """
    distill, prompts = cfg.DISTILL, cfg.PROMPTS
    if distill.NORMALIZE not in NORMALIZATIONS:
        problems.append(f"DISTILL.NORMALIZE {distill.NORMALIZE!r} is not one of {', '.join(NORMALIZATIONS)}")
    for key, value, is_fine in (
        ("DATA.BATCH_SIZE", cfg.DATA.BATCH_SIZE, cfg.DATA.BATCH_SIZE >= 1),
        ("DATA.NUM_WORKERS", cfg.DATA.NUM_WORKERS, cfg.DATA.NUM_WORKERS >= 0),
        ("DATA.PREFETCH_FACTOR", cfg.DATA.PREFETCH_FACTOR, cfg.DATA.PREFETCH_FACTOR >= 1),
        ("DISTILL.STATISTICS_IMAGES", distill.STATISTICS_IMAGES, distill.STATISTICS_IMAGES >= 1),
        ("DISTILL.MAX_MISSING_FRACTION", distill.MAX_MISSING_FRACTION, 0 <= distill.MAX_MISSING_FRACTION < 1),
        *((f"DISTILL.{name}", distill[name], 0 <= distill[name] < float("inf")) for name in LOSS_WEIGHTS),
        ("DISTILL.MATCH_TOP", distill.MATCH_TOP, distill.MATCH_TOP >= 1),
        ("DISTILL.MATCH_SCORE", distill.MATCH_SCORE, 0 <= distill.MATCH_SCORE <= 1),
        ("DISTILL.MATCH_MASK_COST", distill.MATCH_MASK_COST, distill.MATCH_MASK_COST >= 0),
        ("DISTILL.OBJECTS_PER_PASS", distill.OBJECTS_PER_PASS, distill.OBJECTS_PER_PASS >= 1),
        ("DISTILL.TEACHER_CACHE_MB", distill.TEACHER_CACHE_MB, distill.TEACHER_CACHE_MB >= 0),
        ("PROMPTS.REFINE_ROUNDS", prompts.REFINE_ROUNDS, prompts.REFINE_ROUNDS >= 0),
        ("PROMPTS.REFINE_POINTS", prompts.REFINE_POINTS, prompts.REFINE_POINTS >= 1),
    ):
        if not is_fine:
            problems.append(f"{key}: {value} is out of range")
    if not distill.ROUTE_DETECTOR > 0 and not distill.ROUTE_SAM > 0:
        problems.append("DISTILL.ROUTE_DETECTOR and DISTILL.ROUTE_SAM are both 0: no prompt would be answered")
    # The SAM heads predict no box.
    elif not any(distill[name] > 0 for name in LOSS_TERMS if name != "BOX" or distill.ROUTE_DETECTOR > 0):
        problems.append(
            f"all of DISTILL.{', '.join(LOSS_TERMS)} are 0, or BOX without ROUTE_DETECTOR is the only other one: there "
            "is no loss"
        )
    if distill.TEACHER_CACHE_MB > 0 and not prompts.FIXED:
        problems.append("DISTILL.TEACHER_CACHE_MB: prompts come back only with PROMPTS.FIXED True")
    if distill.TEACHER_CACHE_MB > 0 and distill.ONLINE_TEACHER and not distill.NO_RAND:
        problems.append("DISTILL.TEACHER_CACHE_MB: with an online teacher, views come back only with NO_RAND True")
    if is_main and cfg.MODEL.RESUME and not Path(cfg.MODEL.RESUME).is_file():
        problems.append(f"MODEL.RESUME: there is no checkpoint {cfg.MODEL.RESUME}")


def needed_parts(cfg: CfgNode) -> tuple[Part, ...]:
    """The parts of SAM 3 that the routes run through."""
    detector = (NECK, TEXT, DETECTOR, SEGMENTATION) if cfg.DISTILL.ROUTE_DETECTOR > 0 else ()
    return (*detector, *((HEADS,) if cfg.DISTILL.ROUTE_SAM > 0 else ()))


def require_heads(cfg: CfgNode, teacher: Sam3Config, path: str | Path, merged: Recognised | None) -> None:
    """Check that a file holds the frozen parts of the routes, and that they are those of a merged starting file.

    Args:
        cfg: The settings.
        teacher: The teacher's description.
        path: ``MODEL.SAM3_CHECKPOINT``.
        merged: The merged file that the student comes from, if it comes from one.

    Raises:
        UserError: If parts are missing, the file holds a student, or the merged file has other neck or heads: the
            fine-tuned student would be put in front of parts that it was not trained through.
        CheckpointError: If the file cannot be read or recognised.
    """
    file = recognise(read_checkpoint(path))
    where = f"MODEL.SAM3_CHECKPOINT {path}"
    if file.config.student is not None:
        raise UserError(
            f"{where}: a student stands in the trunk's place ({file.config.student.backbone}): name the SAM 3 file "
            "that the embeddings were exported with"
        )
    if file.config != teacher:
        raise UserError(f"{where} is {file.config.name!r}, but MODEL.PRESET is {teacher.name!r}")
    lacking = [part.name for part in needed_parts(cfg) if part not in file.parts]
    if lacking:
        raise UserError(
            f"{where} lacks {', '.join(lacking)}: name a whole SAM 3 file, or switch the route off "
            "(DISTILL.ROUTE_DETECTOR, DISTILL.ROUTE_SAM)"
        )
    asks_points = cfg.PROMPTS.POINT_SHARE > 0 or cfg.PROMPTS.BOTH_SHARE > 0 or cfg.PROMPTS.REFINE_ROUNDS > 0
    if cfg.DISTILL.ROUTE_DETECTOR > 0 and asks_points and POINT_PROMPTS in file.missing_parts:
        raise UserError(
            f"{where} has no weights for {POINT_PROMPTS} (a file of Hugging Face): name the released sam3.pt, or set "
            "PROMPTS.POINT_SHARE and PROMPTS.BOTH_SHARE to 0"
        )
    if merged is not None:
        _require_same_heads(file, merged, where)


def _require_same_heads(file: Recognised, merged: Recognised, where: str) -> None:
    compared = (part for part in file.parts if part not in (TRUNK, TEXT))
    names = {part.name for part in compared if part in merged.parts}
    differing = sorted(_differing(file.weights, merged.weights, names))
    if differing:
        parts = sorted({part.name for key in differing if (part := part_of(key)) is not None})
        raise UserError(
            f"{where} and MODEL.PRETRAINED {merged.source} have other weights in {', '.join(parts)} ({len(differing)} "
            f"tensors, first {differing[0]}): was the file merged from another SAM 3, or were these trained by an "
            "earlier fine-tune? Name the SAM 3 file that it was merged from, or start from stage 1's best.pth"
        )


def _differing(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], parts: Iterable[str]) -> list[str]:
    names = set(parts)
    wanted = [key for key in ours if (part := part_of(key)) is not None and part.name in names]
    return [
        key
        for key in wanted
        if key not in theirs
        or ours[key].shape != theirs[key].shape
        or not torch.equal(ours[key].to(theirs[key].dtype), theirs[key])  # a merged file may be stored in 16 bit
    ]


def num_trained_with_student(cfg: CfgNode, teacher: Sam3Config) -> int:
    """Values that are trained and saved beside the student (``MODEL.TRAIN_NECK``, ``MODEL.TRAIN_MASK_DECODER``)."""
    sizes = trained_part_sizes(
        teacher,
        detector=cfg.DISTILL.ROUTE_DETECTOR > 0,
        sam=cfg.DISTILL.ROUTE_SAM > 0,
        neck=cfg.MODEL.TRAIN_NECK,
        mask_decoder=cfg.MODEL.TRAIN_MASK_DECODER,
    )
    return sum(sizes.values())
