"""Settings of the memory's training: names, types and defaults.

Order of precedence: the defaults below, then the YAML files (``BASE`` first), then ``--opts KEY VALUE``, then the
dedicated flags. A key that is not here is an error, and so is a value of another type. A setting exists only if
something reads it. What other stages share is described in `sam3_train.config`.
"""

from __future__ import annotations

from yacs.config import CfgNode

from sam3_train.config import training_defaults

PRESETS_OWN = -1
"""A number of ``MODEL.MEMORY`` that is left to the model's preset."""


def get_defaults() -> CfgNode:
    """A fresh tree with every setting of the stage at its default."""
    cfg = training_defaults()
    cfg.OUTPUT = ""  # run directory; empty: output/stage2/<name of the config>
    train = cfg.TRAIN
    train.EPOCHS = 10
    train.WARMUP_EPOCHS = 0.2
    train.BASE_LR, train.WARMUP_LR, train.MIN_LR = 2e-4, 1e-6, 2e-6
    train.LR_SCALING = "sqrt"
    train.LR_REFERENCE_BATCH = 8  # clips of a step: 8 GPUs x 1
    train.WEIGHT_DECAY = 0.1  # that of SAM 2; not for biases, norms, tables and latents
    train.CLIP_GRAD = 1.0
    cfg.MODEL = _model_defaults()
    cfg.DATA = _data_defaults()
    cfg.CLIPS = _clip_defaults()
    cfg.AUGMENT = _augment_defaults()
    cfg.PROMPTS = _prompt_defaults()
    cfg.FORWARD = _forward_defaults()
    cfg.LOSS = _loss_defaults()
    cfg.DISTILL = _distill_defaults()
    cfg.VAL = _val_defaults()
    return cfg


def _model_defaults() -> CfgNode:
    model = CfgNode()
    model.NAME = ""  # short name of the run; names the default run directory
    # SAM 3 itself, or a student of an earlier stage merged into it: its backbone is the one that is tracked with.
    model.SAM3_CHECKPOINT = ""
    # How a new memory starts: full (as near to the full memory of the file as can be written down) | fresh (memory
    # encoder and norm alone from it). A memory that the file or PRETRAINED holds is trained on.
    model.START = "full"
    model.START_CLIPS = 12  # of one video each, that the full memory plays for its start
    model.PRETRAINED = ""  # a memory of an earlier run to start from, such as its model_final.pth; empty: SAM 3's start
    model.RESUME = ""  # training checkpoint to continue from; empty: the run directory's own, if TRAIN.AUTO_RESUME
    model.MEMORY = _memory_defaults()
    return model


def _memory_defaults() -> CfgNode:
    """Sizes of the compressed memory; -1 (or an empty text) is what the preset of the checkpoint's model has.

    The fields are described in `sam3.efficient_memory_config.EfficientMemoryConfig`.
    """
    memory = CfgNode()
    memory.COMPAT = ""  # published: the rules of the published code (320 tokens of a frame, no positions, dropout)
    memory.NUM_LATENTS = PRESETS_OWN  # tokens of a frame that read all of it: 64
    memory.NUM_LATENTS_2D = PRESETS_OWN  # tokens that each read a window: 0; a square number
    memory.PERCEIVER_DEPTH = PRESETS_OWN  # layers of the resampler: 2
    memory.PERCEIVER_HEADS = PRESETS_OWN
    memory.PERCEIVER_HEAD_DIM = PRESETS_OWN
    memory.PERCEIVER_EXPANSION = PRESETS_OWN
    memory.HIDDEN_DROPOUT = float(PRESETS_OWN)
    memory.ATTENTION_DROPOUT = float(PRESETS_OWN)
    memory.NUM_LAYERS = PRESETS_OWN  # of the memory attention: 2
    memory.NUM_HEADS = PRESETS_OWN
    memory.MLP_DIM = PRESETS_OWN
    memory.DROPOUT = float(PRESETS_OWN)
    memory.ATTENTION = ""  # softmax | linear
    memory.POOL_SIZE = PRESETS_OWN  # 1; more only for uncompressed memory (no latents)
    memory.INITIAL_FRAMES = ""  # no_mem_embed | zero_token
    return memory


def _data_defaults() -> CfgNode:
    data = CfgNode()
    # auto | sav | sav_frames | sav_png | davis | mose | youtube_vos | lvos | demo (never chosen by auto)
    data.DATASET = "auto"
    data.DATA_PATH = ""  # root of the data set
    data.ANNOTATIONS = "any"  # of SA-V: any | both | manual | auto
    data.BATCH_SIZE = 1  # clips per process and step
    data.NUM_WORKERS = 8  # loader processes per rank; 0 loads in the training process
    data.PREFETCH_FACTOR = 2  # batches each worker prepares ahead
    data.PIN_MEMORY = True  # page-locked batches; only where there is a CUDA device
    data.CLIPS_PER_VIDEO = 1  # clips of each video in an epoch
    data.SUBSET_FRACTION = 1.0  # share of the training videos, chosen by hash of the name; one at least
    data.SUBSET_SEED = 0  # another seed chooses another subset
    data.VAL_FRACTION = 0.01  # share of a data set without a val split that is held out, by hash of the name
    data.VAL_PATH = ""  # validate on this data set's val split instead; empty: on DATA_PATH's
    data.VAL_DATASET = "auto"  # kind of that one
    data.VAL_NUM_VIDEOS = 64  # first N val videos; -1 takes all
    data.ON_BAD = "skip"  # skip bad videos up to MAX_BAD_FRACTION, or fail at the first
    data.MAX_BAD_FRACTION = 0.01
    data.INDEX_CACHE = ""  # folder for the indices of videos; empty: in the data set's folder
    data.IMAGES_PATH = ""  # annotated images to train on too, as still clips (FORWARD.STILL_FRAMES); empty: none
    data.IMAGES_DATASET = "sa1b"  # sa1b (images/{train,val}) | sa1b_tar
    data.IMAGE_SHARE = 0.0  # share of the batches that hold images
    # Folder for the frozen backbone's features, computed once: then no step runs the backbone, and AUGMENT has to be
    # off. In half precision, 10.6 MB for a frame of sam3. Empty: no cache.
    data.FEATURE_CACHE = ""
    return data


def _clip_defaults() -> CfgNode:
    clips = CfgNode()
    clips.LENGTHS = [4, 8, 16]  # the curriculum: frames of a clip
    clips.LENGTH_EPOCHS = []  # the first epoch of each length; empty: equal parts of the run
    clips.STRIDES = [1]  # distances of frames in annotated frames, one drawn for each clip
    clips.REVERSE_SHARE = 0.5  # clips that run backwards in time
    clips.GAP_SHARE = 0.25  # clips that lose a run of frames, as if everything had been hidden for a while
    clips.MAX_GAP = 4  # the longest such run, in annotated frames
    clips.MAX_OBJECTS = 3  # of a clip; of more visible ones a random subset is taken
    clips.MIN_AREA = 1e-4  # share of the frame that an object covers at least on a clip's first frame
    return clips


def _augment_defaults() -> CfgNode:
    """Drawn once for each clip, the same on all its frames. All 0: none."""
    augment = CfgNode()
    augment.FLIP_SHARE = 0.5  # clips that are mirrored left to right
    augment.BRIGHTNESS = 0.1  # factors lie in 1 - this .. 1 + this, and so for the next two
    augment.CONTRAST = 0.1
    augment.SATURATION = 0.1
    augment.HUE = 0.03  # largest turn, as a share of the colour circle
    augment.GREY_SHARE = 0.05  # clips that lose their colours
    return augment


def _prompt_defaults() -> CfgNode:
    prompts = CfgNode()
    prompts.MASK_SHARE = 0.5  # clips that start with masks; the three shares add up to 1
    prompts.BOX_SHARE = 0.25  # with boxes
    prompts.CLICK_SHARE = 0.25  # with one click on each object
    prompts.NUM_PROMPTED = [1, 2]  # fewest and most frames that start with a prompt; the first frame always does
    prompts.NUM_CORRECTED = [1, 2]  # fewest and most frames with correction clicks; none after masks
    prompts.CLICKS_PER_FRAME = 7  # corrections on each of them
    prompts.CLICK_FROM_TRUTH_SHARE = 0.1  # of them that fall anywhere on the object, not where the answer is wrong
    prompts.BOX_NOISE = 0.1  # deviation of a box corner's shift as a share of the side
    prompts.MAX_BOX_SHIFT = 20 / 1008  # no corner is shifted further, as a share of the frame's side
    return prompts


def _forward_defaults() -> CfgNode:
    forward = CfgNode()
    forward.FRAMES_AT_ONCE = 8  # images that pass the frozen backbone together; fewer take less memory
    forward.VIDEO_FRAMES = 16  # length of the videos that clips stand for at least: scales the pointers' places in time
    # For so many first steps, memories are written as if the object score were right: a head that finds an object
    # absent by mistake otherwise stops every gradient through its masks.
    forward.PRESENCE_STEPS = 0
    forward.THROUGH_MASKS = False  # gradients pass from later frames into the masks that memories are made of
    forward.STILL_FRAMES = 2  # an image is played as a still clip of so many frames
    # Factor on the learning rate of what is added to the coarse features, which grow large where features are; 0: as
    # many times as they are larger than what layers give, measured before the first step.
    forward.FEATURE_SCALE = 1.0
    return forward


def _loss_defaults() -> CfgNode:
    """Weights of means over answers and objects; the first six are SAM 2's."""
    loss = CfgNode()
    loss.FOCAL = 20.0
    # Share of an object's pixels in it, and how far easy pixels are discounted. 0.5 and 0.0 are a cross entropy, with
    # which a small model's masks do not shrink from frame to frame (FOCAL 8.0 then).
    loss.FOCAL_ALPHA = 0.25
    loss.FOCAL_GAMMA = 2.0
    loss.DICE = 1.0
    loss.IOU = 1.0  # L1 of the predicted IoU
    loss.OBJECT_SCORE = 1.0  # cross entropy of whether the object is there
    loss.OTHERS = 0.0  # masks of the candidates that are not the best, relative to it
    loss.ABSENT = 0.0  # cross entropy of the object score over absent objects alone, which are few
    loss.TEMPORAL = 0.0  # masks of neighbouring frames change as the truth does
    loss.RECONSTRUCTION = 0.0  # the dense memory from its tokens, by a head that is thrown away
    return loss


def _distill_defaults() -> CfgNode:
    """Weights of what is learnt from the full memory of the same checkpoint; 0: not at all."""
    distill = CfgNode()
    distill.MASK = 0.0  # cross entropy and Dice with its mask probabilities
    distill.FEATURES = 0.0  # squared error of the conditioned features, in units of their variance
    distill.POINTERS = 0.0  # one minus the cosine of the object pointers
    # In this share of the run's steps, the first ones, the memory stores what the full one has stored, compressed, and
    # FEATURES alone is learnt: cheap steps, because no mask is decoded.
    distill.FORCED_SHARE = 0.0
    return distill


def _val_defaults() -> CfgNode:
    val = CfgNode()
    val.ENABLE = True  # track the videos of the val split after each epoch; False must be said aloud
    val.LENGTH = 16  # frames of each
    val.MAX_OBJECTS = 3
    val.PROMPTS = ["mask", "box", "click"]  # what the first frame is given, each in turn: mask | box | click
    return val
