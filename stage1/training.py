"""The students of a training run, put together from checked settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from yacs.config import CfgNode

from sam3.config import Sam3Config
from sam3.hub import download_ckpt_from_hf
from sam3.model.student_encoder import StudentEncoder, build_student
from sam3.model.student_init import init_backbone_from
from sam3_train.distillation_config import RANDOM_INIT, model_config, teacher_config
from sam3_train.distributed import RunContext, barrier, broadcast_object
from sam3_train.feature_scale import error_scale
from sam3_train.learner import Member
from sam3_train.teacher import require_teacher_of_store
from sam3_train.training_data import TrainingData
from sam3_train.training_plan import resumes, run_identity
from sam3_train.training_source import TrainingSource
from stage1.mask_agreement import MaskAgreement
from stage1.model import LossWeights, Stage1Task
from stage1.preflight import AGREEMENT_REMEDY


def build_members(
    cfgs: Sequence[CfgNode],
    outputs: Sequence[Path],
    data: TrainingData,
    source: TrainingSource,
    run: RunContext,
    log: Callable[[str], None],
) -> list[Member]:
    """One `Member` per student, each initialised as in a run of its own. Collective.

    Raises:
        CheckpointError: If initial weights cannot be read or do not fit.
    """
    cfg = cfgs[0]
    agreement = None
    if cfg.VAL.MASK_AGREEMENT and source.val is not None:
        path = cfg.MODEL.SAM3_CHECKPOINT
        if not path:  # a file that is named has been compared in the preflight
            path = download_ckpt_from_hf()
            require_teacher_of_store(path, teacher_config(cfg), data.preprocess, data.store, AGREEMENT_REMEDY)
        agreement = MaskAgreement.from_checkpoint(path, teacher_config(cfg), run.device, cfg.VAL.MASK_PROMPTS)
    members = []
    # Only rank 0's machine may have the folders, and what follows has barriers: all ranks must agree.
    runs = list(zip(cfgs, outputs, strict=True)) if run.is_main else []
    resumed = broadcast_object([resumes(*of_student) for of_student in runs])
    for student_cfg, output, is_resumed in zip(cfgs, outputs, resumed, strict=True):
        model = model_config(student_cfg)
        student = build_initial_student(student_cfg, model, run, log, is_resumed)
        task = Stage1Task(
            student,
            error_scale(source.variance_c, cfg.DISTILL.NORMALIZE),
            LossWeights(cfg.DISTILL.MSE, cfg.DISTILL.COSINE),
            agreement,
            cfg.TRAIN.CHANNELS_LAST,
        )
        identity = run_identity(model, data.preprocess, data.train, source.teacher)
        resume = Path(student_cfg.MODEL.RESUME) if student_cfg.MODEL.RESUME else None
        members.append(Member(task, student_cfg, output, identity, resume))
    return members


def build_initial_student(
    cfg: CfgNode, model: Sam3Config, run: RunContext, log: Callable[[str], None], is_resumed: bool = False
) -> StudentEncoder:
    """A student with the weights that training starts from, and a line that says where they came from.

    Args:
        cfg: ``SEED`` decides the fresh weights, ``MODEL.PRETRAINED`` where the backbone's come from.
        model: The model description.
        run: This process; the main one reads first, so that a download happens once.
        log: Gets the line.
        is_resumed: A checkpoint will replace the weights, so none are read here.

    Raises:
        CheckpointError: If the weights cannot be read or are not the backbone's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.SEED)
        student = build_student(model)
    source = cfg.MODEL.PRETRAINED
    if is_resumed:
        log(f"{cfg.MODEL.NAME}: initial weights come from the checkpoint that is resumed")
    elif source == RANDOM_INIT:
        log(
            f"{cfg.MODEL.NAME}: {cfg.MODEL.BACKBONE} starts from RANDOM weights, as MODEL.PRETRAINED {RANDOM_INIT} says"
        )
    else:
        if not run.is_main:
            barrier()
        report = init_backbone_from(student, source)
        if run.is_main:
            barrier()
        log(f"{cfg.MODEL.NAME}: {report.summary()}")
    return student
