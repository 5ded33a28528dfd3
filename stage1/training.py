"""Put a training run together from checked settings: students, data loaders, the teacher's features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from yacs.config import CfgNode

from sam3.config import Sam3Config
from sam3.hub import download_ckpt_from_hf
from sam3.model.student_encoder import StudentEncoder, build_student
from sam3.model.student_init import init_backbone_from
from sam3.preprocess import Preprocess
from sam3_train.checkpoint import CheckpointManager
from sam3_train.data.bad_images import BAD_IMAGES_FILE, BadImageLog, bad_image_limit
from sam3_train.data.image_index import ImageIndex, require_same_on_all_ranks
from sam3_train.data.samplers import PartitionSampler, ResumableDistributedSampler
from sam3_train.distributed import RunContext, barrier, broadcast_object
from sam3_train.learner import Member
from sam3_train.task import to_device
from stage1.config import RANDOM_INIT, model_config, teacher_config
from stage1.data.build import Stage1Loader, build_loader, left_out_images
from stage1.data.sa1b_dataset import Stage1Dataset
from stage1.feature_scale import error_scale, measure_channel_variance
from stage1.mask_agreement import MaskAgreement, require_teacher_of_store
from stage1.model import LossWeights, Stage1Task, online_features, stored_features
from stage1.preflight import TrainingData
from stage1.teacher import Teacher

PrepareBatch = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class TrainingSource:
    """The batches of a run, for all its students."""

    train: Stage1Loader
    val: Stage1Loader | None
    prepare_batch: PrepareBatch
    """Adds ``teacher`` to a batch that is on the device."""
    variance_c: Tensor
    """The teacher's variance per channel."""
    teacher: dict[str, Any]
    """What is known about the teacher: name, hash of its weights, precision."""


def build_source(cfg: CfgNode, data: TrainingData, run: RunContext, output: Path) -> TrainingSource:
    """Open loaders and teacher, and measure the scale of its features. Collective.

    Args:
        cfg: The settings that all students share.
        data: From the preflight.
        run: This process.
        output: Where unreadable images are listed.

    Raises:
        CheckpointError: If an online teacher's weights do not fit.
        UserError: If too many images are unreadable, or the ranks see different images.
    """
    for index in filter(None, (data.train, data.val)):
        require_same_on_all_ranks(index)
    if data.store is None:
        teacher = Teacher.from_config(cfg, run.device)
        prepare, description = online_features(teacher), dict(teacher.description)
    else:
        prepare, description = stored_features(data.store.codec), dict(data.store.spec.teacher)
    limit = bad_image_limit(cfg.DATA.MAX_BAD_FRACTION, len(data.train))
    bad_log = BadImageLog(output / BAD_IMAGES_FILE, limit, left_out_images(cfg.DATA))
    train_sampler = ResumableDistributedSampler(len(data.train), cfg.SEED, run.rank, run.world_size)
    train = _loader(cfg, data, data.train, train_sampler, bad_log, drop_last=True)
    val = None
    if data.val is not None:
        val_sampler = PartitionSampler(len(data.val), run.rank, run.world_size)
        val = _loader(cfg, data, data.val, val_sampler, bad_log, drop_last=False)
    variance_c = _measure_scale(cfg, data, prepare, run, bad_log)
    return TrainingSource(train, val, prepare, variance_c, description)


def _loader(
    cfg: CfgNode, data: TrainingData, index: ImageIndex, sampler: Any, bad_log: BadImageLog, drop_last: bool
) -> Stage1Loader:
    dataset = Stage1Dataset(
        index,
        data.preprocess,
        "online" if data.store is None else "train",
        data.grid_size,
        store=data.store,
        augment=data.augment,
        seed=cfg.SEED,
    )
    return build_loader(
        dataset,
        sampler,
        cfg.DATA.BATCH_SIZE,
        num_workers=cfg.DATA.NUM_WORKERS,
        prefetch_factor=cfg.DATA.PREFETCH_FACTOR,
        pin_memory=cfg.DATA.PIN_MEMORY,
        drop_last=drop_last,
        bad_log=bad_log,
    )


def _measure_scale(
    cfg: CfgNode, data: TrainingData, prepare: PrepareBatch, run: RunContext, bad_log: BadImageLog
) -> Tensor:
    """The variance per channel over the first images in key order, measured by the main process for all."""
    variance_c = None
    if run.is_main:
        count = min(cfg.DISTILL.STATISTICS_IMAGES, len(data.train))
        dataset = _loader(cfg, data, data.train, range(count), bad_log, drop_last=False).dataset
        loader = build_loader(dataset, range(count), min(8, count), num_workers=0, bad_log=bad_log)

        def features() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in loader:
                ready = prepare(to_device(batch, run.device))
                yield ready["teacher"], ready["valid"]

        with torch.no_grad():
            variance_c = measure_channel_variance(features()).cpu()
    measured = broadcast_object(variance_c)
    assert measured is not None
    return measured


def run_identity(
    model: Sam3Config, preprocess: Preprocess, train: ImageIndex, teacher: dict[str, Any]
) -> dict[str, Any]:
    """What must stay the same for a run to be continued; stored in its checkpoints."""
    return {
        "model": model.to_dict(),
        "preprocess": preprocess.to_dict(),
        "teacher": teacher,
        "train_images_sha256": train.sha256,
    }


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
            require_teacher_of_store(path, teacher_config(cfg), data.preprocess, data.store)
        agreement = MaskAgreement.from_checkpoint(path, teacher_config(cfg), run.device, cfg.VAL.MASK_PROMPTS)
    members = []
    # Only rank 0's machine may have the folders, and what follows has barriers: all ranks must agree.
    runs = list(zip(cfgs, outputs, strict=True)) if run.is_main else []
    resumed = broadcast_object([_has_checkpoint(*of_student) for of_student in runs])
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


def _has_checkpoint(cfg: CfgNode, output: Path) -> bool:
    if cfg.MODEL.RESUME:
        return True
    # After a crash in the first save there is a pointer that names no checkpoint.
    return bool(cfg.TRAIN.AUTO_RESUME and output.is_dir() and CheckpointManager(output).newest is not None)


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
