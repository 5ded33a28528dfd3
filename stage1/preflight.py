"""Everything a training run can know to be wrong before it computes anything, found in one go.

Each check adds lines to a list; `sam3_train.errors.require_no_problems` makes one error of them. What the run reads is
checked in `sam3_train.training_data`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from yacs.config import CfgNode

from sam3.backbones import backbone_spec
from sam3.config import Sam3Config
from sam3_train.config import config_changes, config_to_dict
from sam3_train.distillation_config import RANDOM_INIT, model_config
from sam3_train.errors import UserError, attempt
from sam3_train.feature_scale import NORMALIZATIONS

AGREEMENT_REMEDY = ", or set VAL.MASK_AGREEMENT False"
"""Ends the message about a teacher's file that is not the store's."""
PER_STUDENT_KEYS = frozenset({"OUTPUT", *(f"MODEL.{k}" for k in ("NAME", "BACKBONE", "FUSE_STRIDE16", "PRETRAINED"))})
"""Settings in which students of one run may differ; all else belongs to the pass over the data."""


def student_names(cfgs: Sequence[CfgNode]) -> list[str]:
    """Names of the students of a run, in the order of the configs: MODEL.NAME, or else the backbone."""
    return [cfg.MODEL.NAME or cfg.MODEL.BACKBONE for cfg in cfgs]


def default_output(cfg_files: Sequence[str]) -> str:
    """The run directory where neither config nor flag names one: one per config file, or set of them (D-43)."""
    return "output/stage1/" + "+".join(Path(cfg_file).stem for cfg_file in cfg_files)


def check_students(cfgs: Sequence[CfgNode], problems: list[str]) -> list[Sam3Config]:
    """Check what the configs say about the students, and that several of them can share one pass.

    Returns:
        Model descriptions of those that are fine.
    """
    names = student_names(cfgs)
    models = []
    for name, cfg in zip(names, cfgs, strict=True):
        if not name.replace("_", "").replace("-", "").isalnum():
            problems.append(f"MODEL.NAME {name!r}: use letters, digits, '_' and '-': it names a folder")
        model = attempt(problems, lambda cfg=cfg: _checked_model(cfg))  # type: ignore[misc]
        if model is not None:
            models.append(model)
        _check_pretrained(cfg.MODEL.PRETRAINED, problems)
        differing = config_changes(config_to_dict(cfg), config_to_dict(cfgs[0])).keys() - PER_STUDENT_KEYS
        if differing:
            problems.append(
                f"students {names[0]} and {name} cannot share a run: they differ in {', '.join(sorted(differing))}"
            )
    if len(set(names)) < len(names):
        problems.append(f"two configs name the same student: {names}; give each its own MODEL.NAME")
    return models


def _checked_model(cfg: CfgNode) -> Sam3Config:
    try:
        backbone_spec(cfg.MODEL.BACKBONE)
    except ValueError as error:
        raise UserError(f"MODEL.BACKBONE: {error}") from None
    return model_config(cfg)


def check_settings(cfg: CfgNode, problems: list[str], is_main: bool = True) -> None:
    """Ranges and choices of this stage's own settings; those of the loop are the loop's to check.

    Args:
        cfg: The settings.
        problems: Receives what is wrong.
        is_main: Whether this is the main process: it alone reads a checkpoint to continue from.
    """
    if cfg.DISTILL.NORMALIZE not in NORMALIZATIONS:
        problems.append(f"DISTILL.NORMALIZE {cfg.DISTILL.NORMALIZE!r} is not one of {', '.join(NORMALIZATIONS)}")
    for key, value, is_fine in (
        ("DATA.BATCH_SIZE", cfg.DATA.BATCH_SIZE, cfg.DATA.BATCH_SIZE >= 1),
        ("DATA.NUM_WORKERS", cfg.DATA.NUM_WORKERS, cfg.DATA.NUM_WORKERS >= 0),
        ("DATA.PREFETCH_FACTOR", cfg.DATA.PREFETCH_FACTOR, cfg.DATA.PREFETCH_FACTOR >= 1),
        ("DISTILL.STATISTICS_IMAGES", cfg.DISTILL.STATISTICS_IMAGES, cfg.DISTILL.STATISTICS_IMAGES >= 1),
        ("DISTILL.MSE", cfg.DISTILL.MSE, cfg.DISTILL.MSE >= 0),
        ("DISTILL.COSINE", cfg.DISTILL.COSINE, cfg.DISTILL.COSINE >= 0),
        ("DISTILL.MSE + DISTILL.COSINE", 0, cfg.DISTILL.MSE + cfg.DISTILL.COSINE > 0),
        ("VAL.MASK_PROMPTS", cfg.VAL.MASK_PROMPTS, cfg.VAL.MASK_PROMPTS >= 1),
    ):
        if not is_fine:
            problems.append(f"{key}: {value} is out of range")
    reads_teacher = cfg.VAL.MASK_AGREEMENT or cfg.DISTILL.ONLINE_TEACHER
    if reads_teacher and not cfg.MODEL.SAM3_CHECKPOINT and cfg.MODEL.PRESET != "sam3":
        problems.append(
            "VAL.MASK_AGREEMENT and DISTILL.ONLINE_TEACHER read the teacher: name its file in MODEL.SAM3_CHECKPOINT "
            f"(the hub has one for the preset sam3 alone, not for {cfg.MODEL.PRESET})"
        )
    if reads_teacher and cfg.MODEL.SAM3_CHECKPOINT and not Path(cfg.MODEL.SAM3_CHECKPOINT).is_file():
        problems.append(f"MODEL.SAM3_CHECKPOINT: there is no file {cfg.MODEL.SAM3_CHECKPOINT}")
    if is_main and cfg.MODEL.RESUME and not Path(cfg.MODEL.RESUME).is_file():
        problems.append(f"MODEL.RESUME: there is no checkpoint {cfg.MODEL.RESUME}")


def _check_pretrained(source: str, problems: list[str]) -> None:
    if not source:
        problems.append(f"MODEL.PRETRAINED is empty: say timm, {RANDOM_INIT}, or name a file")
    elif source != RANDOM_INIT and source.partition(":")[0] != "timm" and not Path(source).is_file():
        problems.append(f"MODEL.PRETRAINED: there is no file {source}; say timm, {RANDOM_INIT}, or name a file")
