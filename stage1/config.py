"""Settings of stage 1: one tree of names, types and defaults for export, training and merge.

Order of precedence: the defaults below, then the YAML files (``BASE`` first), then ``--opts KEY VALUE``, then the
dedicated flags. A key that is not here is an error, and so is a value of another type. A setting exists only if
something reads it. What other stages share is described in `sam3_train.distillation_config`.
"""

from __future__ import annotations

from yacs.config import CfgNode

from sam3_train.config import training_defaults
from sam3_train.distillation_config import data_defaults, model_defaults, source_defaults


def get_defaults() -> CfgNode:
    """A fresh tree with every setting of stage 1 at its default.

    The settings that the training loop reads (TRAIN, SAVE_FREQ, ...) are described in `sam3_train.config`.
    """
    cfg = training_defaults()
    cfg.OUTPUT = ""  # run directory; empty: output/stage1/<MODEL.NAME>, so that two students never share one
    cfg.TRAIN.LR_SCALING = "sqrt"  # AdamW: with a linear rule a small global batch would hardly learn
    cfg.TRAIN.KEEP_EVERY = 10  # every tenth epoch's checkpoint stays beside the last ones and the best
    cfg.TRAIN.CHANNELS_LAST = True  # memory format of the student's kernels and images
    cfg.DATA = data_defaults()
    cfg.MODEL = model_defaults()
    # Where the backbone starts from: timm (ImageNet weights through timm's hub), a local file, or random. Random
    # must be asked for by name; nothing falls back to it.
    cfg.MODEL.PRETRAINED = "timm"  # timm | random | path of a file
    cfg.DISTILL = source_defaults()
    cfg.DISTILL.CODEC = "fp16"  # how an export stores an embedding: fp16 | int8
    cfg.DISTILL.MSE = 1.0  # weight of the squared error (mean over channels and valid cells)
    cfg.DISTILL.COSINE = 1.0  # weight of 1 - cosine along channels (mean over valid cells)
    cfg.VAL = _val_defaults()
    return cfg


def _val_defaults() -> CfgNode:
    val = CfgNode()
    val.ENABLE = True  # validate on the val split; a store without it needs VAL.ENABLE False said aloud
    val.MASK_AGREEMENT = False  # IoU of student's and teacher's masks through the SAM heads of MODEL.SAM3_CHECKPOINT
    val.MASK_PROMPTS = 4  # prompts per side of the grid of clicks that mask agreement uses
    return val
