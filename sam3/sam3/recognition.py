"""Find out what a checkpoint holds, from its metadata record, else from its keys and shapes. Nothing is built but on
the meta device, and no weight is read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sam3.checkpoint_fit import RECOMPUTED_SUFFIX, check_fit
from sam3.checkpoint_io import CheckpointError, CheckpointFile
from sam3.checkpoint_keys import (
    BACKBONE_PREFIX,
    DETECTOR_PREFIX,
    EFFICIENT_PREFIX,
    STUDENT_PREFIX,
    TRACKER_PREFIX,
    TRUNK_PREFIX,
    UnknownLayoutError,
    identify_student_config,
    strip_prefixes,
)
from sam3.checkpoint_parts import (
    DETECTOR,
    EFFICIENT_MEMORY,
    FULL_MEMORY_PREFIXES,
    HEADS,
    MEMORY,
    NECK_PREFIX,
    PARTS,
    POINT_PROMPTS,
    SEGMENTATION,
    TEXT,
    Part,
    parts_in,
)
from sam3.config import PRESETS, EfficientMemoryConfig, Sam3Config, StudentConfig
from sam3.efficient_keys import (
    STAGE2_BACKBONE_PREFIX,
    identify_efficient_memory,
    is_stage2,
    stage2_to_released,
    tracker_to_released,
)
from sam3.hf_keys import POINT_PROJECTIONS, has_point_projections, hf_class, released_from_hf
from sam3.model.building import building_on
from sam3.model.sam3_image import Sam3Image
from sam3.model.vitdet import TABLE_KEY, Attention
from sam3.model_builder import assemble_image_model, build_heads
from sam3.preprocess import Preprocess
from sam3.released_names import absent_parts, released_layout, to_released, with_tracker_names

_LOG = logging.getLogger(__name__)
MEMORIES = ("efficient", "full")
"""Kinds of memory that a file may hold, both of them too; the first that is there is opened by default."""
_STAGE2 = "stage 2, published"
_NECK_KEY = NECK_PREFIX + "2.conv_1x1.weight"
_BARE = tuple(
    prefix.removeprefix(DETECTOR_PREFIX)
    for part in PARTS
    for prefix in part.prefixes
    if prefix.startswith(DETECTOR_PREFIX)
)
_SAM31 = ("freqs_cis_real", "freqs_cis_imag")


@dataclass(frozen=True)
class Recognised:
    """A checkpoint whose content is understood.

    Attributes:
        source: The file's name, for errors.
        layout: Whose names the file has, in words.
        weights: Under the released names.
        metadata: The record of this project's files; {} for others.
        config: What the model is, with the memory that is opened.
        preprocess: What the record says about images, or None.
        parts: What the file holds at least one tensor of.
        efficient_memory: The compressed memory that the file holds, opened or not, or None.
    """

    source: str
    layout: str
    weights: dict[str, Tensor]
    metadata: dict[str, Any]
    config: Sam3Config
    preprocess: Preprocess | None
    parts: tuple[Part, ...]
    efficient_memory: EfficientMemoryConfig | None = None

    @property
    def memories(self) -> tuple[str, ...]:
        """Those of `MEMORIES` that the file holds, with the SAM heads that they need."""
        has_full = any(key.startswith(FULL_MEMORY_PREFIXES) for key in self.weights)
        found = {"efficient": EFFICIENT_MEMORY in self.parts, "full": has_full}
        return tuple(kind for kind in MEMORIES if found[kind] and HEADS in self.parts)

    def with_memory(self, kind: str | None) -> Recognised:
        """The same file, to be opened with one of its memories; None: the compressed one if there is one.

        Raises:
            ValueError: If there is no such kind.
            CheckpointError: If the file does not hold it.
        """
        if kind is None:
            return self
        if kind not in MEMORIES:
            raise ValueError(f"memory {kind!r} is not one of {', '.join(MEMORIES)}, or None for what the file holds")
        if kind not in self.memories:
            found = " and ".join(self.memories) or "none"
            raise CheckpointError(f"{self.source}: holds no {kind} memory (it holds: {found})")
        memory = self.efficient_memory if kind == "efficient" else None
        return replace(self, config=self.config.replace(efficient_memory=memory))

    @property
    def has_point_prompts(self) -> bool:
        """Whether the detector takes points."""
        return has_point_projections(self.weights)

    @property
    def missing_parts(self) -> tuple[str, ...]:
        """Names of the parts that a whole model has and this one does not."""
        has_detector = DETECTOR in self.parts
        useless = set() if has_detector else {TEXT, SEGMENTATION}
        if HEADS not in self.parts:
            useless.add(MEMORY)  # and the compressed one, which no whole model has
        missing = [part.name for part in PARTS if part not in self.parts or part in useless]
        if self.metadata.get("model", {}).get("efficient_memory") and EFFICIENT_MEMORY not in self.parts:
            missing.append(EFFICIENT_MEMORY.name)
        return (*missing, *([POINT_PROMPTS] if has_detector and not self.has_point_prompts else []))

    def assemble(self, preprocess: Preprocess | None = None) -> Sam3Image:
        """The model with exactly the parts of the file, its weights on the meta device."""
        return assemble_image_model(
            self.config,
            preprocess or self.preprocess,
            enable_inst_interactivity=HEADS in self.parts,
            device="meta",
            enable_detector=DETECTOR in self.parts,
            enable_text_encoder=TEXT in self.parts,
            enable_segmentation=SEGMENTATION in self.parts,
            enable_tracker=HEADS in self.parts and (MEMORY in self.parts or EFFICIENT_MEMORY in self.parts),
        )

    def weights_for(self, model: Sam3Image) -> dict[str, Tensor]:
        """The weights, with zeros for the point prompts that the file may lack as a whole."""
        if any(key in self.weights for key in POINT_PROJECTIONS) or not model.has_detector:
            return self.weights
        own = to_released(model.state_dict(), self.config)
        return self.weights | {key: torch.zeros(own[key].shape, dtype=own[key].dtype) for key in POINT_PROJECTIONS}

    def check(self, model: Sam3Image) -> None:
        """Compare the file with the model that `assemble` made.

        Raises:
            CheckpointError: If a part is there only in half, or a tensor does not fit.
        """
        unread = absent_parts(model)
        weights = {key: value for key, value in self.weights_for(model).items() if not key.startswith(unread)}
        check_fit(weights, to_released(model.state_dict(), self.config), self.source, self.config)
        trunk = model.backbone.vision_backbone.trunk
        for name, module in trunk.named_modules():
            key = f"{TRUNK_PREFIX}{name}.{TABLE_KEY}"
            if isinstance(module, Attention) and key in weights:
                for problem in module.table_problems(weights[key], key):
                    raise CheckpointError(f"{self.source}: {problem}")
        self.check_other_memory()

    def other_memory(self) -> dict[str, Tensor]:
        """What the memory that is not opened should be: tensors without data by released name; {} if there is none."""
        if len(self.memories) < len(MEMORIES):
            return {}
        is_efficient_opened = self.config.efficient_memory is not None
        memory = None if is_efficient_opened else self.efficient_memory
        with building_on(torch.device("meta")):
            tracker = build_heads(self.config.replace(efficient_memory=memory), enable_tracker=True)
        own = FULL_MEMORY_PREFIXES if is_efficient_opened else (EFFICIENT_PREFIX,)
        return {k: v for k, v in tracker_to_released(tracker.state_dict()).items() if k.startswith(own)}

    def check_other_memory(self) -> None:
        """Make sure that a memory which stays in the file is whole.

        Raises:
            CheckpointError: If it is there only in half, or a tensor does not fit.
        """
        expected = self.other_memory()
        if expected:
            own = (EFFICIENT_PREFIX,) if self.config.efficient_memory is None else FULL_MEMORY_PREFIXES
            present = {key: value for key, value in self.weights.items() if key.startswith(own)}
            check_fit(present, expected, self.source, self.config)


def recognise(checkpoint: CheckpointFile) -> Recognised:
    """Understand a checkpoint.

    Raises:
        CheckpointError: If it is none of the known layouts; the message says what it is instead, or names the nearest
            layout and the first differing keys.
    """
    source = str(checkpoint.path)
    weights, layout = _released_names(checkpoint.state_dict, source)
    if checkpoint.is_nested:
        layout += ", under 'model'"
    config = _config_of_record(checkpoint.metadata, source) or identify_config(weights, source)
    preprocess = _preprocess_of_record(checkpoint.metadata, source)
    parts = parts_in(weights)
    memory = None
    if EFFICIENT_MEMORY in parts:
        compat = "published" if layout.startswith(_STAGE2) else None
        memory = config.efficient_memory or _identify_memory(weights, config, source, compat)
    config = config.replace(efficient_memory=memory)
    return Recognised(source, layout, weights, checkpoint.metadata, config, preprocess, parts, memory)


def _identify_memory(
    weights: Mapping[str, Tensor], config: Sam3Config, source: str, compat: str | None
) -> EfficientMemoryConfig:
    """The compressed memory of a file without a record of it."""
    try:
        memory = identify_efficient_memory(weights, config.name, compat)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    _LOG.warning(
        "%s does not describe its compressed memory; assuming the rules of %s and, by its shapes, %d tokens of a frame",
        source,
        "the published code" if compat else "this project",
        memory.num_tokens or config.grid_size**2,
    )
    return memory


def _released_names(state_dict: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], str]:
    """The weights under the released names, and the name of the layout they had."""
    try:
        names = strip_prefixes(state_dict, ("module.",))
    except UnknownLayoutError as error:
        raise CheckpointError(f"{source}: {error}") from error
    ddp = ", with DDP's module." if any(key.startswith("module.") for key in state_dict) else ""
    kind = hf_class(names)
    if kind is not None:
        try:
            return released_from_hf(names), f"Hugging Face ({kind}){ddp}"
        except UnknownLayoutError as error:
            raise CheckpointError(f"{source}: looks like a Hugging Face file, but {error}") from error
    if is_stage2(names):
        if not any(key.startswith(STAGE2_BACKBONE_PREFIX) for key in names):
            raise CheckpointError(f"{source}: {_STAGE2_ALONE}")
        return stage2_to_released(names), f"{_STAGE2}{ddp}"
    _refuse_other_files(names, source)
    names = with_tracker_names(names)
    if any(key.startswith(DETECTOR_PREFIX) for key in names) or not any(key.startswith(_BARE) for key in names):
        return names, f"released{ddp}"
    return released_layout(names, source), f"released, without detector.{ddp}"


def identify_config(released: Mapping[str, Tensor], source: str) -> Sam3Config:
    """The description of a checkpoint that has no record of it, from keys and shapes.

    Args:
        released: State dict in the released layout.
        source: The file's name, for errors.

    Raises:
        CheckpointError: If nothing fits; the message names the nearest layout and the first differing keys.
    """
    shape = tuple(released[_NECK_KEY].shape[:2]) if _NECK_KEY in released else None
    for config in PRESETS.values():
        if shape == (config.hidden_dim, config.trunk.embed_dim):
            return config.replace(student=_identify_student(released, source))
    raise CheckpointError(_nearest_layout(released, source))


def _identify_student(released: Mapping[str, Tensor], source: str) -> StudentConfig | None:
    if not any(key.startswith(STUDENT_PREFIX) for key in released):
        return None
    try:
        return identify_student_config({key: value.shape for key, value in released.items()})
    except UnknownLayoutError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _nearest_layout(released: Mapping[str, Tensor], source: str) -> str:
    layouts = {}
    for name, config in PRESETS.items():
        model = assemble_image_model(config, device="meta", enable_tracker=True)
        own = to_released(model.state_dict(), config)
        layouts[name] = {key: value.shape for key, value in own.items() if not key.endswith(RECOMPUTED_SUFFIX)}
    found = {key: value.shape for key, value in released.items()}
    name = max(layouts, key=lambda n: (len(layouts[n].items() & found.items()), len(layouts[n].keys() & found.keys())))
    missing = [key for key in layouts[name] if key not in released]
    unexpected = sorted(key for key in released if key not in layouts[name])
    others = f", the file has {len(unexpected)} others, first {unexpected[:2]}" if unexpected else ""
    return (
        f"{source}: not a layout that is known here. The nearest is {name!r}, with {len(missing)} of "
        f"{len(layouts[name])} keys missing, first {missing[:2]}{others}"
    )


# --- files that are something else ------------------------------------------------------------------------------------

Keys = Mapping[str, Tensor]
_STAGE2_ALONE = (
    "a compressed memory (stage 2) without the image backbone that it was trained with: give the file that it was "
    "merged into"
)
_OTHER_FILES: tuple[tuple[Callable[[Keys], bool], str], ...] = (
    (
        lambda keys: any(key.endswith(_SAM31) for key in keys),
        "rotary tables called freqs_cis_real and freqs_cis_imag: a file of SAM 3.1, or one that its code saved. Only "
        "SAM 3 is read here: give its sam3.pt",
    ),
    (
        lambda keys: any(key.startswith(("student_trunk.", "frozen_convs.")) for key in keys),
        "a training checkpoint of the geometry fine-tuning: convert it to a merged file first",
    ),
    (
        lambda keys: any(key.startswith("image_encoder.trunk.") for key in keys),
        "a SAM 2 checkpoint; only SAM 3 and its students are read here",
    ),
    (
        lambda keys: any(key.startswith("image_encoder.") for key in keys),
        "a checkpoint of the first SAM or of a model of its family; only SAM 3 and its students are read here",
    ),
    (
        lambda keys: any(k.removeprefix("detector.").startswith(BACKBONE_PREFIX) for k in keys),
        "a student's own checkpoint, without neck and heads: merge it into a SAM 3 checkpoint first "
        "(stage1/convert_stage1_weights.py)",
    ),
    (
        lambda keys: any("language_backbone.encoder.embedding_layer." in key for key in keys),
        "a model with a student text encoder (MobileCLIP), which is not read here: only SAM 3's own text encoder is",
    ),
    (
        lambda keys: bool(keys) and all(key.startswith((TRACKER_PREFIX, EFFICIENT_PREFIX)) for key in keys),
        "the tracker alone, without image trunk and neck: give the whole sam3.pt",
    ),
)


def _refuse_other_files(keys: Keys, source: str) -> None:
    for is_it, what in _OTHER_FILES:
        if is_it(keys):
            raise CheckpointError(f"{source}: {what}")


# --- the record of this project's files -------------------------------------------------------------------------------


def _config_of_record(metadata: Mapping[str, Any], source: str) -> Sam3Config | None:
    record = metadata.get("model")
    if record is None:
        return None
    try:
        return Sam3Config.from_dict(record)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{source}: the model description in the metadata cannot be read: {error}") from error


def _preprocess_of_record(metadata: Mapping[str, Any], source: str) -> Preprocess | None:
    record = metadata.get("preprocess")
    if record is None:
        return None
    try:
        return Preprocess.from_dict(record)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{source}: the preprocessing in the metadata cannot be read: {error}") from error
