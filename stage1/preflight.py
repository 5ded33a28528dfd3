"""Everything a training run can know to be wrong before it computes anything, found in one go.

Each check adds lines to a list; `sam3_train.errors.require_no_problems` makes one error of them. What the checks open
(image indices, the embedding store) is what the run then reads.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from yacs.config import CfgNode

from sam3.backbones import backbone_spec
from sam3.config import Sam3Config
from sam3.preprocess import Preprocess
from sam3_train.config import config_changes, config_to_dict
from sam3_train.data.augmentation import AugmentSpec
from sam3_train.data.image_index import ImageIndex
from sam3_train.embeddings import EmbeddingStore
from sam3_train.errors import UserError, attempt
from stage1.config import RANDOM_INIT, model_config, preprocess_config, teacher_config
from stage1.data.build import image_index_from_config
from stage1.export_data import augment_config
from stage1.feature_scale import NORMALIZATIONS
from stage1.mask_agreement import require_teacher_of_store

PER_STUDENT_KEYS = frozenset({"OUTPUT", *(f"MODEL.{k}" for k in ("NAME", "BACKBONE", "FUSE_STRIDE16", "PRETRAINED"))})
"""Settings in which students of one run may differ; all else belongs to the pass over the data."""


@dataclass(frozen=True)
class TrainingData:
    """What a run reads, opened and checked against each other."""

    preprocess: Preprocess
    grid_size: int
    train: ImageIndex
    val: ImageIndex | None
    store: EmbeddingStore | None
    """None with an online teacher."""
    augment: AugmentSpec | None


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


def check_data(cfg: CfgNode, world_size: int, problems: list[str], is_main: bool = True) -> TrainingData | None:
    """Open images and embeddings and check that they belong together.

    Args:
        cfg: The settings.
        world_size: Processes that share an epoch.
        problems: Receives what is wrong.
        is_main: Whether this is the main process: it alone compares the teacher's file with the store.

    Returns:
        None if anything is wrong; the reasons are then among the problems.
    """
    teacher = attempt(problems, lambda: teacher_config(cfg))
    preprocess = attempt(problems, lambda: preprocess_config(cfg)) if teacher else None
    train = attempt(problems, lambda: image_index_from_config(cfg.DATA, "train"))
    val = attempt(problems, lambda: _val_index(cfg)) if cfg.VAL.ENABLE and train is not None else None
    store = None
    if teacher and not cfg.DISTILL.ONLINE_TEACHER:
        store = attempt(problems, lambda: EmbeddingStore(cfg.DISTILL.TEACHER_EMBED_PATH, shape=teacher.embedding_shape))
        if store is None:
            return None
    if not (teacher and preprocess and train):
        return None
    augment = attempt(problems, lambda: augment_config(cfg))
    if augment is None and not cfg.DISTILL.NO_RAND:
        return None
    if store is not None:
        _check_store(store, preprocess, augment, problems)
        train = _covered(store, train, problems)
        val = _covered(store, val, problems) if val is not None else None
        if train is None:
            return None
    path = cfg.MODEL.SAM3_CHECKPOINT
    if cfg.VAL.ENABLE and cfg.VAL.MASK_AGREEMENT and is_main and Path(path).is_file():
        attempt(problems, lambda: require_teacher_of_store(path, teacher, preprocess, store))
    if len(train) < cfg.DATA.BATCH_SIZE * world_size:
        problems.append(
            f"DATA.BATCH_SIZE {cfg.DATA.BATCH_SIZE} over {world_size} processes is more than the {len(train)} training "
            "images: an epoch would have no step"
        )
    return TrainingData(preprocess, teacher.grid_size, train, val, store, augment) if not problems else None


def _val_index(cfg: CfgNode) -> ImageIndex:
    try:
        return image_index_from_config(cfg.DATA, "val")
    except UserError as error:
        raise UserError(f"{error} (VAL.ENABLE False trains without validation)") from None


def _check_store(
    store: EmbeddingStore, preprocess: Preprocess, augment: AugmentSpec | None, problems: list[str]
) -> None:
    where = f"the embedding store {store.directory}"
    if store.info is None:
        return  # the public layout says nothing about itself
    theirs = Preprocess.from_dict(store.spec.preprocess)
    attempt(problems, lambda: preprocess.require_equal(theirs, "the training config (DATA.PREPROCESS)", where))
    stored = None if store.spec.augmentation is None else AugmentSpec.from_dict(store.spec.augmentation)
    if stored != augment:
        problems.append(
            f"{where} was exported with views {_views(stored)}, the training config asks for {_views(augment)}: set "
            "DISTILL.NO_RAND, FLIP_PROB and MIN_CROP_AREA to the export's"
        )


def _views(augment: AugmentSpec | None) -> str:
    return "NO_RAND True" if augment is None else f"NO_RAND False {augment.to_dict()}"


def _covered(store: EmbeddingStore, index: ImageIndex, problems: list[str]) -> ImageIndex | None:
    """The index without the images that the export quarantined; a problem if others lack an embedding (D-42)."""
    coverage = store.check_coverage(index.keys)
    if coverage.missing:
        hint = " (or VAL.ENABLE False)" if index.split == "val" else ""
        problems.append(
            f"{store.directory}: {len(coverage.missing)} of {coverage.num_wanted} {index.split} images have no "
            f"embedding, first {', '.join(coverage.missing[:3])}: run the export for the {index.split} split again"
            f"{hint}; it adds what is missing"
        )
        return None
    return index.without(coverage.quarantined)


def check_disk(output: Path, num_bytes: int, what: str, problems: list[str]) -> None:
    """A problem if the file system of ``output`` has less than ``num_bytes`` free."""
    existing = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        problems.append(
            f"OUTPUT {output}: {what} take {num_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free: choose another "
            "folder or lower TRAIN.KEEP_LAST"
        )
