"""Settings that every stage which distils a student shares: what is read, which model, where the teacher is.

A stage builds its tree from these nodes and `sam3_train.config.training_defaults`, and adds what it alone reads. The
same name means the same in each stage.
"""

from __future__ import annotations

from typing import Any

from yacs.config import CfgNode

from sam3.config import Sam3Config, StudentConfig
from sam3.preprocess import Preprocess
from sam3_train.data.augmentation import AugmentSpec
from sam3_train.errors import UserError

RANDOM_INIT = "random"
"""MODEL.PRETRAINED for fresh weights: they have to be asked for by this name."""


def data_defaults() -> CfgNode:
    """``DATA``: the images and how they become inputs."""
    data = CfgNode()
    data.DATASET = "sa1b"  # sa1b (images/{train,val}) | sa1b_tar (tars in place) | coco | folder (any photos)
    data.DATA_PATH = ""  # root of the data set
    data.BATCH_SIZE = 64  # images per process and step (micro batch)
    data.NUM_WORKERS = 8  # loader processes per rank; 0 loads in the training process
    data.PREFETCH_FACTOR = 2  # batches each worker prepares ahead
    data.PIN_MEMORY = True  # page-locked batches; only where there is a CUDA device
    data.NUM_SAMPLES = -1  # first N training images in sorted key order; -1 takes all
    data.VAL_NUM_SAMPLES = -1  # the same for the val split
    data.SUBSET = 1.0  # share of the training images, chosen by hash of the name; a share holds all smaller ones
    data.SUBSET_SEED = 0  # another seed chooses another subset
    data.BAD_IMAGES = ""  # list of unreadable images to leave out (python -m sam3_train.data.validate makes it)
    data.MAX_BAD_FRACTION = 0.001  # share of unreadable images that a run skips and reports; beyond it the run ends
    data.INDEX_CACHE = ""  # sa1b_tar: folder for the tars' offset tables; empty: beside the tars
    data.VAL_FRACTION = 0.05  # share of a data set without a val split that is held out, by hash of the name
    data.PREPROCESS = CfgNode()  # pixels -> tensor; the side is the model preset's image size
    data.PREPROCESS.MODE = "stretch"  # stretch (what SAM 3 does) | letterbox
    data.PREPROCESS.MEAN = [0.5, 0.5, 0.5]  # R, G, B for pixel values in 0..1
    data.PREPROCESS.STD = [0.5, 0.5, 0.5]
    data.PREPROCESS.INTERPOLATION = "bilinear"  # bilinear | bicubic | nearest
    return data


def model_defaults() -> CfgNode:
    """``MODEL``: the student and the files around it; a stage says what its PRETRAINED may be."""
    model = CfgNode()
    model.NAME = ""  # short name of the run, e.g. es_rv_m; names the default run directory
    model.PRESET = "sam3"  # sam3 | tiny: the teacher whose trunk is imitated
    model.BACKBONE = "repvit_m0_9"  # a name in sam3.backbones
    model.FUSE_STRIDE16 = False  # fuse the last two stages at stride 16 instead of reading stride 32 alone
    model.PRETRAINED = ""  # where the student starts from
    model.RESUME = ""  # training checkpoint to continue from; empty: the run directory's own, if TRAIN.AUTO_RESUME
    model.SAM3_CHECKPOINT = ""  # teacher weights, where a run reads them; empty: the gated hub file
    return model


def source_defaults() -> CfgNode:
    """The part of ``DISTILL`` that says where the teacher's features come from."""
    distill = CfgNode()
    distill.TEACHER_EMBED_PATH = (
        "output/stage1_teacher/embeddings"  # training reads here: OUTPUT/embeddings of an export
    )
    distill.MAX_MISSING_FRACTION = 0.0  # share of images without an embedding that a run leaves out; beyond it: error
    distill.ONLINE_TEACHER = False  # compute the teacher's features in every step; no store is read
    distill.NO_RAND = True  # False: flips and crops, replayed from the stored seed so that student and teacher agree
    distill.FLIP_PROB = 0.5  # NO_RAND False: probability of a left-right flip
    distill.MIN_CROP_AREA = 0.5  # NO_RAND False: smallest crop as a share of the image's area
    # What the squared error is divided by: the teacher's variance per channel (channel) or over all channels (global),
    # so that predicting the mean costs about 1; or nothing (none).
    distill.NORMALIZE = "channel"
    distill.STATISTICS_IMAGES = 64  # training images that the teacher's variance is measured on
    return distill


def model_config(cfg: CfgNode) -> Sam3Config:
    """The model description that a config stands for: the preset with its trunk replaced by the student.

    Raises:
        UserError: If the preset is unknown.
    """
    return teacher_config(cfg).replace(student=StudentConfig(cfg.MODEL.BACKBONE, cfg.MODEL.FUSE_STRIDE16))


def teacher_config(cfg: CfgNode) -> Sam3Config:
    """The teacher's description: the preset alone.

    Raises:
        UserError: If the preset is unknown.
    """
    try:
        return Sam3Config.preset(cfg.MODEL.PRESET)
    except ValueError as error:
        raise UserError(f"MODEL.PRESET: {error}") from None


def preprocess_config(cfg: CfgNode) -> Preprocess:
    """The preprocessing that a config asks for, at the model preset's input size.

    Raises:
        UserError: If a value is impossible.
    """
    node = cfg.DATA.PREPROCESS
    values: dict[str, Any] = {"mean": tuple(node.MEAN), "std": tuple(node.STD)}
    try:
        return Preprocess(teacher_config(cfg).image_size_px, mode=node.MODE, interpolation=node.INTERPOLATION, **values)
    except ValueError as error:
        raise UserError(f"DATA.PREPROCESS: {error}") from None


def augment_config(cfg: CfgNode) -> AugmentSpec | None:
    """The views that a config asks for; None for the whole image.

    Raises:
        UserError: If a value is impossible.
    """
    if cfg.DISTILL.NO_RAND:
        return None
    try:
        return AugmentSpec(cfg.DISTILL.FLIP_PROB, cfg.DISTILL.MIN_CROP_AREA)
    except ValueError as error:
        raise UserError(f"DISTILL: {error}") from None
