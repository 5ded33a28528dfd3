"""Parameters of the released SAM 3, component by component: facts, for reports.

Counted on the model of Meta's ``sam3`` package 0.1.4 built on the meta device; buffers are not parameters. The names
are those of the released file; `compare_built` holds a built model against them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from sam3.checkpoint_parts import HEADS_PREFIXES, MEMORY_PREFIXES

TRUNK = 446_237_696
NECK = 7_802_112
VISION_ENCODER = TRUNK + 2 * NECK
"""Trunk and both necks: the 461.84M that published savings refer to."""
TOTAL = 860_055_224


@dataclass(frozen=True)
class Component:
    """A part of the released model."""

    name: str
    prefix: str
    """Where its parameters are in a released file."""
    parameters: int
    built_as: tuple[str, ...]
    """Where its parameters are in a `Sam3Image`."""


_VISION = "backbone.vision_backbone."
_TRACKER = "inst_interactive_predictor.model."


def _in_tracker(prefixes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_TRACKER + prefix.removeprefix("tracker.") for prefix in prefixes)


COMPONENTS = (
    Component("vision trunk (ViT)", "detector.backbone.vision_backbone.trunk.", TRUNK, (f"{_VISION}trunk.",)),
    Component("vision neck, detector", "detector.backbone.vision_backbone.convs.", NECK, (f"{_VISION}convs.",)),
    Component(
        "vision neck, tracker", "detector.backbone.vision_backbone.sam2_convs.", NECK, (f"{_VISION}sam2_convs.",)
    ),
    Component("text encoder", "detector.backbone.language_backbone.", 353_724_672, ("backbone.language_backbone.",)),
    Component("geometry encoder", "detector.geometry_encoder.", 8_215_808, ("geometry_encoder.",)),
    Component("detector transformer", "detector.transformer.", 21_047_605, ("transformer.",)),
    Component("segmentation head", "detector.segmentation_head.", 2_298_881, ("segmentation_head.",)),
    Component("text scoring", "detector.dot_prod_scoring.", 1_182_976, ("dot_prod_scoring.",)),
    Component("SAM heads", "tracker.sam_* and tracker.no_mem_embed", 4_221_585, _in_tracker(HEADS_PREFIXES)),
    Component("tracker memory", "tracker.*, the rest", 7_521_777, _in_tracker(MEMORY_PREFIXES)),
)


def compare_built(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Component name -> (parameters in the table, parameters built).

    Args:
        model: A model with all parts, of the ``sam3`` preset; may be on the meta device.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    built = {}
    for part in COMPONENTS:
        built[part.name] = (part.parameters, sum(n for name, n in sizes.items() if name.startswith(part.built_as)))
    return built
