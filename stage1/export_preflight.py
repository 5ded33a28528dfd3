"""Everything an export can know to be wrong before it computes anything, found in one go."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from yacs.config import CfgNode

from sam3_train.config import apply_flags, load_config, set_key
from sam3_train.data.bad_images import BAD_IMAGES_FILE, BadImageLog, bad_image_limit
from sam3_train.data.distillation_loader import left_out_images
from sam3_train.data.splits import SPLITS
from sam3_train.distillation_config import preprocess_config, teacher_config
from sam3_train.distributed import RunContext
from sam3_train.embeddings import (
    CODECS,
    EmbeddingStore,
    StoreError,
    StoreSpec,
    count_missing,
    require_continuable,
    require_unique,
)
from sam3_train.embeddings.spec import STORE_FILE, read_store_info
from sam3_train.errors import attempt, require_no_problems
from sam3_train.precision import pick_dtype
from sam3_train.teacher import dtype_name, require_teacher_file, trunk_file_sha256
from stage1.config import get_defaults
from stage1.export_data import ExportData, build_export_data, parse_splits
from stage1.export_report import ExportEstimate, free_bytes

DEFAULT_OUTPUT = "output/stage1_teacher"
EMBEDDINGS_FOLDER = "embeddings"
UNKNOWN = ""
"""The hash of a teacher that has to be downloaded before it can be known."""


@dataclass(frozen=True)
class PreparedExport:
    """An export that passed the preflight."""

    cfg: CfgNode
    data: ExportData
    spec: StoreSpec
    """The store's description; the hash of the teacher is final once the teacher is loaded."""
    estimate: ExportEstimate

    @property
    def directory(self) -> Path:
        """Where the store is."""
        return embeddings_folder(self.cfg)


def embeddings_folder(cfg: CfgNode) -> Path:
    """Where the store is: below the run's folder, so that two runs never share one."""
    return Path(cfg.OUTPUT) / EMBEDDINGS_FOLDER


def prepare_export(args: argparse.Namespace, run: RunContext) -> PreparedExport:
    """Check settings, images, disk and what is stored already; nothing is written and no teacher is built.

    Args:
        args: The command line; with ``check_saved_embed`` a finished store is wanted and no space for a new one.
        run: This process; the main one alone compares the teacher's file with the store.

    Raises:
        UserError: With all problems at once.
    """
    cfg = _read_config(args)
    problems = _setting_problems(cfg, args)
    attempt(problems, lambda: require_teacher_file(cfg))
    dtype = attempt(problems, lambda: pick_dtype(cfg, run.device))
    splits = attempt(problems, lambda: parse_splits(args.split or "train,val")) or SPLITS
    data = build_export_data(cfg, splits, not args.split, problems)
    spec = None
    if data is not None and dtype is not None and cfg.DISTILL.CODEC in CODECS:
        teacher = {"name": teacher_config(cfg).name, "sha256": UNKNOWN, "dtype": dtype_name(dtype)}
        augmentation = None if data.augment is None else data.augment.to_dict()
        shape = teacher_config(cfg).embedding_shape
        spec = StoreSpec(shape, cfg.DISTILL.CODEC, teacher, preprocess_config(cfg).to_dict(), augmentation)
    if data is None or spec is None:
        require_no_problems(problems)
        raise AssertionError("the preflight found no images and no problem")
    directory = embeddings_folder(cfg)
    if run.is_main:
        attempt(problems, lambda: require_unique(data.keys))
        check_store = require_same_export if args.check_saved_embed is not None else require_continuable
        attempt(problems, lambda: check_store(directory, _with_teacher_hash(cfg, spec, directory)))
    num_missing = attempt(problems, lambda: count_missing(directory, data.keys)) or 0
    estimate = ExportEstimate(len(data.keys), num_missing, spec.record_bytes, free_bytes(directory))
    if args.check_saved_embed is None:
        problems += filter(None, [estimate.problem(directory, spec)])
        attempt(problems, lambda: open_bad_log(cfg, data).check())
    require_no_problems(problems)
    return PreparedExport(cfg, data, spec, estimate)


def open_bad_log(cfg: CfgNode, data: ExportData) -> BadImageLog:
    """The run's list of unreadable images; those that an earlier start settled are not met again, but count."""
    limit = bad_image_limit(cfg.DATA.MAX_BAD_FRACTION, len(data.keys))
    return BadImageLog(Path(cfg.OUTPUT) / BAD_IMAGES_FILE, limit, left_out_images(cfg.DATA))


def require_same_export(directory: Path, spec: StoreSpec) -> None:
    """Check that a store was made by this teacher from these inputs; the number format may differ.

    Raises:
        StoreError: Naming each difference, or if there is no store that says what it is.
    """
    with EmbeddingStore(directory) as store:
        if store.info is None:
            raise StoreError(f"{directory}: no store.json, so there is nothing to compare the settings with")
        stored = store.spec
    comparable = replace(spec, teacher={**spec.teacher, "dtype": stored.teacher.get("dtype")})
    differences = stored.differences(comparable)
    if differences:
        raise StoreError(f"{directory}: the store is of another export (store != now):\n  " + "\n  ".join(differences))


def _with_teacher_hash(cfg: CfgNode, spec: StoreSpec, directory: Path) -> StoreSpec:
    """The description with the hash of the teacher's file, where there is a store to compare it with."""
    if not (directory / STORE_FILE).exists():
        return spec
    path = cfg.MODEL.SAM3_CHECKPOINT
    stored = read_store_info(directory)
    if not path and stored is not None:  # the hub's file is compared when it has been fetched
        return replace(spec, teacher={**spec.teacher, "sha256": stored.spec.teacher.get("sha256")})
    return replace(spec, teacher={**spec.teacher, "sha256": trunk_file_sha256(path, teacher_config(cfg))})


def _read_config(args: argparse.Namespace) -> CfgNode:
    cfg = load_config(get_defaults(), args.cfg, args.opts)
    apply_flags(cfg, args)
    if not cfg.OUTPUT:
        cfg.OUTPUT = DEFAULT_OUTPUT
    if args.codec:
        set_key(cfg, "DISTILL.CODEC", args.codec, "--codec")
    return cfg


def _setting_problems(cfg: CfgNode, args: argparse.Namespace) -> list[str]:
    """What is wrong with the settings alone."""
    problems = []
    if cfg.MODEL.RESUME:
        problems.append(
            f"MODEL.RESUME (--resume) {cfg.MODEL.RESUME}: an export resumes by itself from what is in OUTPUT; the "
            "teacher's weights are MODEL.SAM3_CHECKPOINT"
        )
    for flag, value in (("--max-steps", args.max_steps), ("--pretrained", args.pretrained)):
        if value is not None:
            problems.append(f"{flag} {value}: an export has no such setting; DATA.NUM_SAMPLES limits the images")
    if cfg.DISTILL.TEACHER_EMBED_PATH != get_defaults().DISTILL.TEACHER_EMBED_PATH:
        problems.append(
            f"DISTILL.TEACHER_EMBED_PATH {cfg.DISTILL.TEACHER_EMBED_PATH}: training reads there; an export writes to "
            f"{EMBEDDINGS_FOLDER}/ in its OUTPUT ({cfg.OUTPUT})"
        )
    if args.dry_run and args.check_saved_embed is not None:
        problems.append("--dry-run and --check-saved-embed exclude each other: a check writes nothing anyway")
    if args.check_saved_embed is not None and args.check_saved_embed < 1:
        problems.append(f"--check-saved-embed {args.check_saved_embed} must be at least 1")
    if cfg.DISTILL.CODEC not in CODECS:
        problems.append(f"DISTILL.CODEC {cfg.DISTILL.CODEC!r} is not one of {', '.join(sorted(CODECS))}")
    for key, least in (("BATCH_SIZE", 1), ("NUM_WORKERS", 0), ("PREFETCH_FACTOR", 1)):
        if cfg.DATA[key] < least:
            problems.append(f"DATA.{key} {cfg.DATA[key]} must be at least {least}")
    return problems
