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
from sam3_train.errors import UserError


def get_defaults() -> CfgNode:
    """A fresh tree with every setting of stage 1 at its default."""
    cfg = CfgNode()
    cfg.OUTPUT = ""  # run directory; empty: output/stage1/<MODEL.NAME>, so that two students never share one
    cfg.SEED = 0  # seeds weights, sampler and augmentation
    cfg.PRINT_FREQ = 10  # optimizer steps between log lines
    cfg.SAVE_FREQ = 1  # epochs between ckpt_epoch_N.pth; the last epoch is always saved
    cfg.AMP_ENABLE = True  # autocast on a CUDA device; the CPU always computes in float32
    cfg.AMP_DTYPE = "bf16"  # bf16 | fp16 (fp16 uses a gradient scaler)
    cfg.DATA = _data_defaults()
    cfg.MODEL = _model_defaults()
    cfg.DISTILL = _distill_defaults()
    cfg.TRAIN = _train_defaults()
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
    distill.TEACHER_EMBED_PATH = "output/stage1_teacher/embeddings"  # where the export writes and training reads
    distill.CODEC = "fp16"  # how an export stores an embedding: fp16 | int8
    distill.ONLINE_TEACHER = False  # compute the teacher's features in every step; no store is read
    distill.NO_RAND = True  # False: flips and crops, replayed from the stored seed so that student and teacher agree
    distill.MSE = 1.0  # weight of the squared error (mean over channels and valid cells)
    distill.COSINE = 1.0  # weight of 1 - cosine along channels (mean over valid cells)
    distill.NORMALIZE = True  # divide the squared error by the teacher features' variance: 1 = predicting the mean
    return distill


def _train_defaults() -> CfgNode:
    train = CfgNode()
    train.EPOCHS = 50
    train.MAX_STEPS = 0  # stop after this many optimizer steps in all; 0: no limit
    train.WARMUP_EPOCHS = 5.0  # epochs from WARMUP_LR up to BASE_LR
    train.BASE_LR = 1e-3  # at a global batch of LR_REFERENCE_BATCH
    train.WARMUP_LR = 1e-6  # the same
    train.MIN_LR = 1e-5  # the same
    train.LR_SCALING = "sqrt"  # sqrt | linear | none: how the three follow global batch / LR_REFERENCE_BATCH
    train.LR_REFERENCE_BATCH = 512  # images
    train.WEIGHT_DECAY = 0.01  # matrices and kernels; vectors, norms and biases get none
    train.CLIP_GRAD = 5.0  # global gradient norm; 0: no clipping
    train.ACCUMULATION_STEPS = 1  # micro batches per optimizer step
    train.AUTO_RESUME = True  # continue the run found in OUTPUT
    train.SYNC_BN = False  # BatchNorm statistics over all ranks
    train.EVAL_BN_WHEN_TRAINING = False  # keep BatchNorm's running statistics frozen
    train.FIND_UNUSED_PARAMETERS = False  # DistributedDataParallel's flag
    train.EMA_DECAY = 0.0  # decay per optimizer step of an averaged copy of the weights, e.g. 0.9998; 0: none
    train.CHANNELS_LAST = True  # memory format of images and kernels
    train.DETERMINISTIC = False  # torch.use_deterministic_algorithms on CUDA
    train.MAX_NONFINITE_STEPS = 10  # non-finite losses or gradients in a row that end the run
    train.REPLICA_CHECK_STEPS = 500  # steps between comparisons of the ranks' parameters; 0: never
    train.SAVE_EVERY_STEPS = 0  # steps between checkpoints inside an epoch; 0: none
    train.SAVE_EVERY_MINUTES = 30.0  # the same by time; 0: none
    train.KEEP_LAST = 3  # newest checkpoints that stay on disk
    train.KEEP_EVERY = 10  # every n-th epoch's checkpoint stays as well; 0: none
    train.OPTIMIZER = CfgNode()
    train.OPTIMIZER.NAME = "adamw"  # adamw | sgd
    train.OPTIMIZER.EPS = 1e-8
    train.OPTIMIZER.BETAS = [0.9, 0.999]
    train.OPTIMIZER.MOMENTUM = 0.9  # sgd only
    train.LR_SCHEDULER = CfgNode()
    train.LR_SCHEDULER.NAME = "cosine"  # cosine | linear | step
    train.LR_SCHEDULER.DECAY_EPOCHS = 30.0  # step only
    train.LR_SCHEDULER.DECAY_RATE = 0.1  # step only
    return train


def _val_defaults() -> CfgNode:
    val = CfgNode()
    val.ENABLE = True  # validate on the val split; a store without it needs VAL.ENABLE False said aloud
    val.FREQ = 1  # epochs between validations
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
