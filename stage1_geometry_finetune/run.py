"""A fine-tune from its flags to its end: settings, preflight, plan, training."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from yacs.config import CfgNode

from sam3.backbones import backbone_spec
from sam3.hub import download_ckpt_from_hf
from sam3_train.config import read_run_config, write_run_record
from sam3_train.distillation_config import preprocess_config, teacher_config
from sam3_train.distributed import RunContext
from sam3_train.errors import UserError, attempt, require_no_problems
from sam3_train.feature_scale import error_scale
from sam3_train.learner import Member
from sam3_train.loop import fit_many
from sam3_train.run_lock import RunLock
from sam3_train.teacher import require_teacher_file, require_teacher_of_store
from sam3_train.training_data import LISTED_KEYS, TrainingData, check_data, check_disk
from sam3_train.training_plan import TrainingPlan, build_plan, check_resume, run_identity
from sam3_train.training_source import TrainingSource, build_source
from stage1_geometry_finetune.config import get_defaults
from stage1_geometry_finetune.data import PromptExtras, annotation_problems, prompt_spec
from stage1_geometry_finetune.frozen_heads import FrozenHeads
from stage1_geometry_finetune.preflight import LOSS_TERMS, check_settings, num_trained_with_student, require_heads
from stage1_geometry_finetune.starting_student import StartingStudent, read_starting_student
from stage1_geometry_finetune.task import GeometryTask

MISSING_FILE = "missing_embeddings.txt"
"""Lists the images that the store has no embedding of: a run leaves them out, or does not start."""


@dataclass(frozen=True)
class PreparedRun:
    """Settings that passed the preflight, and what it opened."""

    cfg: CfgNode
    output: Path
    data: TrainingData
    start: StartingStudent
    plan: TrainingPlan
    world_size: int

    def lines(self) -> list[str]:
        """The plan as a person reads it."""
        first, *rest = self.plan.lines()
        return [first, f"start     {self.start.origin}", *_describe_settings(self.cfg), *self._notes(), *rest]

    def _notes(self) -> list[str]:
        notes = [
            f"warning: {len(keys)} {split} images have no embedding and are left out (DISTILL.MAX_MISSING_FRACTION)"
            for split, keys in self.data.missing.items()
        ]
        store = self.data.store
        learned, stored = self.start.teacher_sha256, None if store is None else store.spec.teacher.get("sha256")
        if learned and stored and learned != stored:
            notes.append(
                f"warning: the student learned from a teacher with sha256 {learned[:12]}, the embeddings are of one "
                f"with {stored[:12]}"
            )
        if self.cfg.DISTILL.TEACHER_CACHE_MB > 0 and self.world_size > 1:
            notes.append(
                f"warning: each of {self.world_size} processes has a teacher cache of its own and other images every "
                f"epoch: after n epochs about 1 - (1 - 1/{self.world_size})^n of the answers are known "
                "(DISTILL.TEACHER_CACHE_MB)"
            )
        return notes


def _describe_settings(cfg: CfgNode) -> list[str]:
    distill, prompts, model = cfg.DISTILL, cfg.PROMPTS, cfg.MODEL
    routes = [
        f"{name} x {weight:g}"
        for name, weight in (("detector", distill.ROUTE_DETECTOR), ("SAM heads", distill.ROUTE_SAM))
        if weight
    ]
    also = [name for name, on in (("neck", model.TRAIN_NECK), ("mask decoder", model.TRAIN_MASK_DECODER)) if on]
    fewest, most = prompts.NUM_POINTS
    return [
        f"routes    {', '.join(routes)}" + (f"; {' and '.join(also)} trained too" if also else ""),
        "loss      " + " + ".join(f"{distill[name]:g} {name.lower()}" for name in LOSS_TERMS if distill[name]),
        f"prompts   up to {prompts.MAX_OBJECTS} objects per image, box : points : both = {prompts.BOX_SHARE:g} : "
        f"{prompts.POINT_SHARE:g} : {prompts.BOTH_SHARE:g}, {fewest} to {most} points ({prompts.POINT_SAMPLING}), "
        f"{prompts.REFINE_ROUNDS} refinement rounds, "
        + ("the same every epoch" if prompts.FIXED else "others every epoch"),
    ]


def read_config(args: argparse.Namespace) -> CfgNode:
    """The settings, flags applied.

    Raises:
        UserError: If a file, key or value is wrong.
    """
    return read_run_config(get_defaults(), args.cfg, args, "output/stage1_geometry")


def prepare_run(args: argparse.Namespace, run: RunContext) -> PreparedRun:
    """Check everything that can be checked before computing.

    Raises:
        UserError: With all problems at once.
    """
    cfg = read_config(args)
    output, problems = Path(cfg.OUTPUT), list[str]()
    check_settings(cfg, problems, run.is_main)
    attempt(problems, lambda: prompt_spec(cfg))
    start = _check_model(cfg, problems, run.is_main)
    found, missing = list[str](), dict[str, list[str]]()
    data = check_data(cfg, run.world_size, found, cfg.MODEL.SAM3_CHECKPOINT if run.is_main else "", missing=missing)
    problems += found
    if run.is_main and data is None and any(len(keys) > LISTED_KEYS for keys in missing.values()):
        attempt(problems, lambda: problems.append(f"all of them are listed in {write_missing(output, missing)}"))
    if data is not None:
        for index in filter(None, (data.train, data.val)):
            problems += attempt(problems, lambda: annotation_problems(index, cfg.DATA.MAX_BAD_FRACTION)) or []  # noqa: B023
    if data is None or start is None:
        require_no_problems(problems)
        raise AssertionError("the preflight found no data or no student, and no problem")
    models, outputs = [start.model], [output]
    if run.is_main:  # rank 0 alone reads checkpoints, the others may lack them
        more = {"initial_student_sha256": start.sha256}
        problems += attempt(problems, lambda: check_resume([cfg], models, data, outputs, run.world_size, more)) or []
    trained = num_trained_with_student(cfg, teacher_config(cfg))
    plan = attempt(problems, lambda: build_plan([cfg], models, outputs, data, run, trained))
    if plan is not None:
        check_disk(output, plan.disk_bytes, "the checkpoints", problems)
    require_no_problems(problems)
    assert plan is not None
    return PreparedRun(cfg, output, data, start, plan, run.world_size)


def _check_model(cfg: CfgNode, problems: list[str], is_main: bool) -> StartingStudent | None:
    """Read the student to start from and check the heads' file; None if the student cannot be read."""
    teacher = attempt(problems, lambda: teacher_config(cfg))
    preprocess = attempt(problems, lambda: preprocess_config(cfg)) if teacher is not None else None
    num_before = len(problems)
    attempt(problems, lambda: require_teacher_file(cfg))
    has_file = len(problems) == num_before
    if teacher is None or preprocess is None or not _names_backbone(cfg, problems):
        return None
    start = attempt(problems, lambda: read_starting_student(cfg, preprocess))
    if has_file and is_main and cfg.MODEL.SAM3_CHECKPOINT:
        merged = start.merged if start is not None else None
        attempt(problems, lambda: require_heads(cfg, teacher, cfg.MODEL.SAM3_CHECKPOINT, merged))
    return start


def _names_backbone(cfg: CfgNode, problems: list[str]) -> bool:
    try:
        backbone_spec(cfg.MODEL.BACKBONE)
    except ValueError as error:
        problems.append(f"MODEL.BACKBONE: {error}")
        return False
    return True


def train(prepared: PreparedRun, run: RunContext) -> None:
    """Train a prepared run. Collective.

    Raises:
        UserError: If another run writes to its folder; nothing of that run is touched.
    """
    lock = RunLock(prepared.output) if run.is_main else None
    try:
        _train_locked(prepared, run)
    finally:
        if lock is not None:
            lock.release()


def _train_locked(prepared: PreparedRun, run: RunContext) -> None:
    cfg, data, start = prepared.cfg, prepared.data, prepared.start
    extras = [PromptExtras.from_config(cfg, data.preprocess, cfg.SEED, is_train) for is_train in (True, False)]
    source = build_source(cfg, data, run, prepared.output, *extras)
    member = Member(
        build_task(prepared, source, run),
        cfg,
        prepared.output,
        run_identity(start.model, data.preprocess, data.train, source.teacher, initial_student_sha256=start.sha256),
        Path(cfg.MODEL.RESUME) if cfg.MODEL.RESUME else None,
    )

    def write_records() -> None:
        if not run.is_main:
            return
        facts = {
            "identity": member.identity,
            "start": start.origin,
            "world_size": run.world_size,
            "num_train_images": len(data.train),
            "num_val_images": prepared.plan.num_val,
            "num_missing_embeddings": {split: len(keys) for split, keys in data.missing.items()},
        }
        write_run_record(prepared.output, cfg, facts)
        if data.missing:
            write_missing(prepared.output, data.missing)

    fit_many([member], source.train, source.val, run, prepare_batch=source.prepare_batch, on_ready=write_records)


def write_missing(output: Path, missing: Mapping[str, Sequence[str]]) -> Path:
    """List the images without an embedding, key and split on a line.

    Raises:
        UserError: If the file cannot be written.
    """
    path = output / MISSING_FILE
    try:
        output.mkdir(parents=True, exist_ok=True)
        lines = [f"{key}\t{split}\n" for split, keys in missing.items() for key in keys]
        path.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"OUTPUT: cannot write {path}: {error.strerror}") from None
    return path


def build_task(prepared: PreparedRun, source: TrainingSource, run: RunContext) -> GeometryTask:
    """The student in front of the frozen heads.

    Raises:
        UserError: If the heads' file, fetched from the hub, is not the embeddings' teacher.
        CheckpointError: If the file cannot be read or does not fit.
    """
    cfg, data = prepared.cfg, prepared.data
    teacher, path = teacher_config(cfg), cfg.MODEL.SAM3_CHECKPOINT
    if not path:  # a file that is named has been compared in the preflight
        path = download_ckpt_from_hf()
        require_heads(cfg, teacher, path, prepared.start.merged)
        require_teacher_of_store(path, teacher, data.preprocess, data.store)
    heads = FrozenHeads.from_checkpoint(
        path,
        teacher,
        run.device,
        detector=cfg.DISTILL.ROUTE_DETECTOR > 0,
        sam=cfg.DISTILL.ROUTE_SAM > 0,
        checkpointing=cfg.MODEL.CHECKPOINT_FROZEN,
    )
    scale = error_scale(source.variance_c, cfg.DISTILL.NORMALIZE)
    has_padding = data.preprocess.mode == "letterbox"
    return GeometryTask.from_config(prepared.start.build(), heads, scale, cfg, has_padding)
