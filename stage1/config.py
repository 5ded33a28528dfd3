"""Settings of stage 1: one tree of names, types and defaults for export, training and merge.

Order of precedence: the defaults below, then the YAML files (``BASE`` first), then ``--opts KEY VALUE``, then the
dedicated flags. A key that is not here is an error, and so is a value of another type. A setting exists only if
something reads it.
"""

from __future__ import annotations

from typing import Any

from yacs.config import CfgNode

from sam3.config import Sam3Config, StudentConfig
from sam3.preprocess import Preprocess
from sam3_train.config import training_defaults
from sam3_train.errors import UserError

RANDOM_INIT = "random"
"""MODEL.PRETRAINED for fresh weights: they have to be asked for by this name."""


def get_defaults() -> CfgNode:
    """A fresh tree with every setting of stage 1 at its default.

    The settings that the training loop reads (TRAIN, SAVE_FREQ, ...) are described in `sam3_train.config`.
    """
    cfg = training_defaults()
    cfg.OUTPUT = ""  # run directory; empty: output/stage1/<MODEL.NAME>, so that two students never share one
    cfg.TRAIN.LR_SCALING = "sqrt"  # AdamW: with a linear rule a small global batch would hardly learn
    cfg.TRAIN.KEEP_EVERY = 10  # every tenth epoch's checkpoint stays beside the last ones and the best
    cfg.TRAIN.CHANNELS_LAST = True  # memory format of the student's kernels and images
    cfg.DATA = _data_defaults()
    cfg.MODEL = _model_defaults()
    cfg.DISTILL = _distill_defaults()
    cfg.VAL = _val_defaults()
    return cfg


def _data_defaults() -> CfgNode:
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


def _model_defaults() -> CfgNode:
    model = CfgNode()
    model.NAME = ""  # short name of the run, e.g. es_rv_m; names the default run directory
    model.PRESET = "sam3"  # sam3 | tiny: the teacher whose trunk is imitated
    model.BACKBONE = "repvit_m0_9"  # a name in sam3.backbones
    model.FUSE_STRIDE16 = False  # fuse the last two stages at stride 16 instead of reading stride 32 alone
    # Where the backbone starts from: timm (ImageNet weights through timm's hub), a local file, or random. Random
    # must be asked for by name; nothing falls back to it.
    model.PRETRAINED = "timm"  # timm | random | path of a file
    model.RESUME = ""  # training checkpoint to continue from; empty: the run directory's own, if TRAIN.AUTO_RESUME
    model.SAM3_CHECKPOINT = ""  # teacher weights: export, online teacher and mask agreement; empty: the gated hub file
    return model


def _distill_defaults() -> CfgNode:
    distill = CfgNode()
    distill.TEACHER_EMBED_PATH = (
        "output/stage1_teacher/embeddings"  # training reads here: OUTPUT/embeddings of an export
    )
    distill.CODEC = "fp16"  # how an export stores an embedding: fp16 | int8
    distill.ONLINE_TEACHER = False  # compute the teacher's features in every step; no store is read
    distill.NO_RAND = True  # False: flips and crops, replayed from the stored seed so that student and teacher agree
    distill.FLIP_PROB = 0.5  # NO_RAND False: probability of a left-right flip
    distill.MIN_CROP_AREA = 0.5  # NO_RAND False: smallest crop as a share of the image's area
    distill.MSE = 1.0  # weight of the squared error (mean over channels and valid cells)
    distill.COSINE = 1.0  # weight of 1 - cosine along channels (mean over valid cells)
    # What the squared error is divided by: the teacher's variance per channel (channel) or over all channels (global),
    # so that predicting the mean costs about 1; or nothing (none).
    distill.NORMALIZE = "channel"
    distill.STATISTICS_IMAGES = 64  # training images that the teacher's variance is measured on
    return distill


def _val_defaults() -> CfgNode:
    val = CfgNode()
    val.ENABLE = True  # validate on the val split; a store without it needs VAL.ENABLE False said aloud
    val.MASK_AGREEMENT = False  # IoU of student's and teacher's masks through the SAM heads of MODEL.SAM3_CHECKPOINT
    val.MASK_PROMPTS = 4  # prompts per side of the grid of clicks that mask agreement uses
    return val


def model_config(cfg: CfgNode) -> Sam3Config:
    """The model description that a stage-1 config stands for: the preset with its trunk replaced by the student.

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
