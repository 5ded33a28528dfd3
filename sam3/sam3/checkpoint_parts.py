"""The parts of a released file: what a file may hold as a whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sam3.checkpoint_keys import EFFICIENT_PREFIX, TRUNK_PREFIX

NECK_PREFIX = "detector.backbone.vision_backbone.convs."
SAM2_NECK_PREFIX = "detector.backbone.vision_backbone.sam2_convs."
TEXT_PREFIX = "detector.backbone.language_backbone."
SEGMENTATION_PREFIX = "detector.segmentation_head."
DETECTOR_CORE_PREFIXES = ("detector.geometry_encoder.", "detector.transformer.", "detector.dot_prod_scoring.")
"""What every detector has: they are built together or not at all."""
HEADS_PREFIXES = ("tracker.sam_prompt_encoder.", "tracker.sam_mask_decoder.", "tracker.no_mem_embed")
POINTER_PREFIXES = (
    "tracker.no_mem_pos_enc",
    "tracker.no_obj_ptr",
    "tracker.mask_downsample.",
    "tracker.obj_ptr_proj.",
    "tracker.obj_ptr_tpos_proj.",
)
"""Object pointers and mask prompts, which a compressed memory takes from the released one."""
FULL_MEMORY_PREFIXES = (
    "tracker.maskmem_tpos_enc",
    "tracker.no_obj_embed_spatial",
    "tracker.transformer.",
    "tracker.maskmem_backbone.",
)
"""Memory encoder and memory attention with their tables, in whose place a compressed memory has its own."""
MEMORY_PREFIXES = POINTER_PREFIXES + FULL_MEMORY_PREFIXES
"""What a tracker has beyond the SAM heads."""


@dataclass(frozen=True)
class Part:
    """A group of tensors that only make sense together.

    Attributes:
        name: As people read it, and as ``model.missing_parts`` lists it.
        prefixes: Beginnings of its released names.
        is_optional: Whether a model can be built without it.
    """

    name: str
    prefixes: tuple[str, ...]
    is_optional: bool = True


TRUNK = Part("trunk", (TRUNK_PREFIX,), is_optional=False)
NECK = Part("detector neck", (NECK_PREFIX,), is_optional=False)
TEXT = Part("text encoder", (TEXT_PREFIX,))
DETECTOR = Part("detector", DETECTOR_CORE_PREFIXES)
SEGMENTATION = Part("segmentation head", (SEGMENTATION_PREFIX,))
HEADS = Part("SAM heads", (SAM2_NECK_PREFIX, *HEADS_PREFIXES))
MEMORY = Part("tracker memory", MEMORY_PREFIXES)
"""Needs the SAM heads."""
EFFICIENT_MEMORY = Part("efficient memory", (EFFICIENT_PREFIX,))
"""Needs the SAM heads and the pointers of the tracker memory."""
PARTS = (TRUNK, NECK, TEXT, DETECTOR, SEGMENTATION, HEADS, MEMORY)
"""What a whole model has."""
ALL_PARTS = (*PARTS, EFFICIENT_MEMORY)
"""What a file may hold."""
POINT_PROMPTS = "point prompts of the detector"
"""Stands in ``missing_parts`` for `sam3.hf_keys.POINT_PROJECTIONS`, which files of Hugging Face lack."""


def part_of(key: str, parts: Sequence[Part] = ALL_PARTS) -> Part | None:
    """The part that a released key belongs to, or None."""
    return next((part for part in parts if key.startswith(part.prefixes)), None)


def parts_in(keys: Iterable[str]) -> tuple[Part, ...]:
    """The parts of which at least one key is there, in the order of `ALL_PARTS`.

    The detector of the released file, saved without its tracker, has the whole neck of the SAM heads and nothing that
    reads it: that is no part.
    """
    keys = list(keys)
    found = {part_of(key) for key in keys}
    if not any(key.startswith(HEADS_PREFIXES) for key in keys):
        necks = [{k.removeprefix(p) for k in keys if k.startswith(p)} for p in (NECK_PREFIX, SAM2_NECK_PREFIX)]
        if necks[0] == necks[1]:
            found.discard(HEADS)
    return tuple(part for part in ALL_PARTS if part in found)
