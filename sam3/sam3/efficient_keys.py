"""Names of a compressed memory in files, dict to dict: beside the released memory in one file, and as published.

A released file has its tracker below ``tracker.``. A compressed memory has other weights than that for some parts
(`OWN_PREFIXES`), which lie below ``efficient_tracker.``, so that one file holds both memories; SAM heads and pointers
are the same for both and stay where they are. A published stage-2 checkpoint has no prefix at all: the tracker's names
at the top, and the image backbone, if it holds one, below ``backbone.``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import Tensor

from sam3.checkpoint_io import CheckpointError
from sam3.checkpoint_keys import DETECTOR_PREFIX, EFFICIENT_PREFIX, TRACKER_PREFIX
from sam3.efficient_memory_config import EfficientMemoryConfig, efficient_memory_preset

T = TypeVar("T")

OWN_PREFIXES = (
    "spatial_perceiver.",
    "memory_attention.",
    "mem_proj.",
    "mem_pos_proj.",
    "maskmem_backbone.",
    "maskmem_tpos_enc",
    "no_obj_embed_spatial",
)
"""What a tracker with a compressed memory does not share with the released tracker, under the tracker's own names."""
STAGE2_BACKBONE_PREFIX = "backbone."
_MARK = "memory_attention."


def has_compressed_memory(names: Iterable[str], prefix: str = "") -> bool:
    """Whether these are names of a tracker with a compressed memory, each below ``prefix``."""
    return any(name.startswith(prefix + _MARK) for name in names)


def tracker_to_released(tracker: Mapping[str, T]) -> dict[str, T]:
    """A tracker's own names -> the released ones, with either memory."""
    own = OWN_PREFIXES if has_compressed_memory(tracker) else ()
    return {(EFFICIENT_PREFIX if name.startswith(own) else TRACKER_PREFIX) + name: v for name, v in tracker.items()}


def tracker_from_released(key: str) -> str:
    """The tracker's own name of a released key of either memory."""
    return key.removeprefix(EFFICIENT_PREFIX).removeprefix(TRACKER_PREFIX)


def own_weights(tracker: Mapping[str, T]) -> dict[str, T]:
    """What a compressed memory adds to a file, under its released names, from a tracker's state dict.

    Raises:
        CheckpointError: If the tracker has none.
    """
    if not has_compressed_memory(tracker):
        raise CheckpointError(f"no compressed memory: none of {len(tracker)} names begins with {_MARK!r}")
    return {key: v for key, v in tracker_to_released(tracker).items() if key.startswith(EFFICIENT_PREFIX)}


def stage2_to_released(stage2: Mapping[str, T]) -> dict[str, T]:
    """A published stage-2 checkpoint's names -> the released ones."""
    backbone = {DETECTOR_PREFIX + k: v for k, v in stage2.items() if k.startswith(STAGE2_BACKBONE_PREFIX)}
    tracker = {k: v for k, v in stage2.items() if not k.startswith(STAGE2_BACKBONE_PREFIX)}
    return backbone | tracker_to_released(tracker)


def is_stage2(names: Iterable[str]) -> bool:
    """Whether these are the names of a published stage-2 checkpoint, with or without an image backbone."""
    return any(name.startswith("mem_proj.") for name in names)


def identify_efficient_memory(
    released: Mapping[str, Tensor], preset: str, compat: str | None = None
) -> EfficientMemoryConfig:
    """Sizes of a compressed memory from its tensors; the rules, which no tensor shows, are the preset's.

    Args:
        released: Under the released names.
        preset: Name of the model description, whose preset gives the rest.
        compat: ``published`` for the published code's rules.

    Raises:
        CheckpointError: If tensors that show the sizes are missing.
    """
    shapes = {key.removeprefix(EFFICIENT_PREFIX): tuple(v.shape) for key, v in released.items()}
    memory = efficient_memory_preset(preset, compat)
    latents, windows = (shapes.get(f"spatial_perceiver.{name}", (0,))[0] for name in ("latents", "latents_2d"))
    try:
        memory = memory.replace(
            num_latents=latents,
            num_latents_2d=windows,
            num_layers=_count_layers(shapes, "memory_attention."),
            mlp_dim=shapes["memory_attention.layers.0.linear1.weight"][0],
        )
        if not memory.is_compressed:
            return memory
        inner, dim = shapes["spatial_perceiver.layers.0.attn.to_q.weight"]
        head_dim = memory.perceiver_head_dim if inner % memory.perceiver_head_dim == 0 else inner
        return memory.replace(
            perceiver_depth=_count_layers(shapes, "spatial_perceiver."),
            perceiver_heads=inner // head_dim,
            perceiver_head_dim=head_dim,
            perceiver_expansion=shapes["spatial_perceiver.layers.0.ff.1.weight"][0] // dim,
        )
    except KeyError as error:
        raise CheckpointError(f"a compressed memory without {EFFICIENT_PREFIX}{error.args[0]}") from error
    except ValueError as error:
        raise CheckpointError(f"the tensors below {EFFICIENT_PREFIX} fit no compressed memory: {error}") from error


def _count_layers(shapes: Iterable[str], prefix: str) -> int:
    """1 + the largest index of ``layers`` below the prefix; 0 if there are none."""
    found = [re.match(re.escape(prefix) + r"layers\.(\d+)\.", key) for key in shapes]
    return max((int(m[1]) + 1 for m in found if m), default=0)
