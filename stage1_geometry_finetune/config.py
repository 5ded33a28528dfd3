"""Settings of the geometry fine-tune: names, types and defaults.

Order of precedence: the defaults below, then the YAML files (``BASE`` first), then ``--opts KEY VALUE``, then the
dedicated flags. A key that is not here is an error, and so is a value of another type. A setting exists only if
something reads it. What other stages share is described in `sam3_train.distillation_config` and `sam3_train.config`.

Weights of loss terms are those of means over objects (or images, for the embedding), so that they mean the same at any
size of image, mask or batch.
"""

from __future__ import annotations

from yacs.config import CfgNode

from sam3_train.config import training_defaults
from sam3_train.distillation_config import data_defaults, model_defaults, source_defaults


def get_defaults() -> CfgNode:
    """A fresh tree with every setting of the stage at its default."""
    cfg = training_defaults()
    cfg.OUTPUT = ""  # run directory; empty: output/stage1_geometry/<name of the config>
    train = cfg.TRAIN
    train.EPOCHS = 30
    train.WARMUP_EPOCHS = 2.0
    train.BASE_LR, train.WARMUP_LR, train.MIN_LR = 5e-5, 1e-7, 1e-6
    train.LR_SCALING = "sqrt"  # as in stage 1 (D-95)
    train.LR_REFERENCE_BATCH = 256  # 8 GPUs x 4 images x 8 accumulated
    train.ACCUMULATION_STEPS = 8
    train.CLIP_GRAD = 1.0
    train.EVAL_BN_WHEN_TRAINING = True  # a few images per process would spoil the statistics that stage 1 has learnt
    train.KEEP_EVERY = 5  # every fifth epoch's checkpoint stays beside the last ones and the best
    train.CHANNELS_LAST = True  # memory format of the student's kernels and images
    cfg.DATA = data_defaults()
    cfg.DATA.BATCH_SIZE = 4
    cfg.DATA.VAL_NUM_SAMPLES = 256  # each image costs up to 2 x MAX_OBJECTS answers, of the student and of the teacher
    cfg.MODEL = _model_defaults()
    cfg.DISTILL = _distill_defaults()
    cfg.PROMPTS = _prompt_defaults()
    cfg.VAL = CfgNode()
    cfg.VAL.ENABLE = True  # validate on the val split; a store without it needs VAL.ENABLE False said aloud
    return cfg


def _model_defaults() -> CfgNode:
    model = model_defaults()
    # The student to start from: a merged file or a training checkpoint of stage 1. Random weights must be asked for by
    # name; nothing falls back to them.
    model.PRETRAINED = ""  # path of a file | random
    # SAM3_CHECKPOINT holds the frozen neck and heads, and must be the teacher that the embeddings are of.
    model.TRAIN_NECK = False  # train the necks of the routes too, from their released weights
    model.TRAIN_MASK_DECODER = False  # train the mask head of the detector, and the mask decoder of the SAM heads
    # Recompute activations of the frozen parts in the backward pass: at 1008 px 1.4 GB less per object. Same result.
    model.CHECKPOINT_FROZEN = True
    return model


def _distill_defaults() -> CfgNode:
    distill = source_defaults()
    distill.EMBEDDING = 1.0  # squared error of the features, mean over channels and valid cells, in units of NORMALIZE
    distill.MASK_BCE = 1.0  # cross entropy of mask logits with the teacher's mask probabilities
    distill.MASK_DICE = 1.0  # soft Dice of mask probabilities
    distill.SCORE = 0.2  # squared error of the scores of all queries (detector), of the predicted IoU (SAM heads)
    distill.PRESENCE = 0.1  # whether the object is in the image at all
    distill.BOX = 0.5  # L1 and GIoU of matched boxes (detector)
    distill.ROUTE_DETECTOR = 1.0  # weight of the route through geometry encoder, fusion, decoder and mask head; 0: none
    distill.ROUTE_SAM = 0.0  # weight of the route through prompt encoder and mask decoder; 0: none
    distill.MATCH_TOP = 8  # the teacher's detections per prompt that count, at most
    distill.MATCH_SCORE = 0.3  # from this score on; the best one always counts
    distill.MATCH_MASK_COST = 5.0  # of masks when student queries are matched, beside class 2, box 5, GIoU 2
    distill.OBJECTS_PER_PASS = 4  # objects that the detector answers at once; fewer take less memory
    # PROMPTS.FIXED: host memory per process for the teacher's answers; 0: no cache. At 1008 px 83 kB per kept mask, so
    # it serves a small set on few processes: each of N keeps its own, and is given other images every epoch.
    distill.TEACHER_CACHE_MB = 0
    return distill


def _prompt_defaults() -> CfgNode:
    prompts = CfgNode()
    prompts.MAX_OBJECTS = 16  # per image; of more a random subset is taken, another one each epoch
    prompts.BOX_SHARE = 1.0  # weight of asking an object with a box alone; the draw is per object
    prompts.POINT_SHARE = 1.0  # weight of asking it with points alone
    prompts.BOTH_SHARE = 1.0  # weight of asking it with both
    prompts.NUM_POINTS = [1, 1]  # fewest and most points of an object that is asked with points
    # distance (the deeper inside the likelier) | uniform | stored (the clicks of the annotation) | centre (the deepest)
    prompts.POINT_SAMPLING = "distance"
    prompts.BOX_JITTER = 0.1  # deviation of a box corner's shift as a share of the side; shifts end at twice that
    prompts.BOX_MAX_SHIFT_PX = 20.0  # no corner is shifted further, in pixels of the photo
    prompts.MIN_AREA = 0.0001  # objects that cover a smaller share of the view are left out
    prompts.FIXED = False  # the same objects and prompts in every epoch, so that the teacher's answers can be cached
    prompts.REFINE_ROUNDS = 0  # rounds with clicks where student and teacher disagree, after the first
    prompts.REFINE_POINTS = 1  # clicks per object and round
    return prompts
