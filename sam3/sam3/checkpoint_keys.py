"""Key maps between checkpoint layouts: dict to dict, no model, file or GPU needed.

Files hold the names that the released students use ("published names"); modules inside use timm's. A student's own file
has ``backbone.model.*`` and ``head.*`` (and ``fusion.*`` where the student fuses stride 16); in a merged file the same
names follow `STUDENT_PREFIX`. What lies below ``backbone.model.`` is renamed by one rule per family:

- RepViT: published files number all blocks in one list ``features.N`` (0 is the stem); timm groups them in stages,
  where the block before each stride-2 block belongs to the next stage's ``downsample``. A block that owns
  ``token_mixer.2`` is a stride-2 block.
- TinyViT: timm puts a stage's downsampling at the start of the next stage and calls ``c`` ``conv``.
- EfficientViT: only the containers differ.

The rules also hold for folded students, where a Conv + BatchNorm pair is one convolution.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from sam3.backbones import BackboneSpec, backbone_names, backbone_spec
from sam3.checkpoint_io import CheckpointError
from sam3.config import StudentConfig

T = TypeVar("T")

DETECTOR_PREFIX = "detector."
TRACKER_PREFIX = "tracker."
EFFICIENT_PREFIX = "efficient_tracker."
"""What a compressed memory has instead of the released one; what both share is below `TRACKER_PREFIX`."""
TRUNK_PREFIX = "detector.backbone.vision_backbone.trunk."
STUDENT_PREFIX = TRUNK_PREFIX + "model."
BACKBONE_PREFIX = "backbone.model."
HEAD_PREFIX = "head."
FUSION_PREFIX = "fusion."


class UnknownLayoutError(CheckpointError):
    """Keys that belong to no known layout."""


def strip_prefixes(state_dict: Mapping[str, T], prefixes: Sequence[str] = ("module.", "detector.")) -> dict[str, T]:
    """Remove wrappers' prefixes (DDP's ``module.``, the full model's ``detector.``) from the front of each key.

    Args:
        state_dict: Any dict with string keys.
        prefixes: Removed one after the other, in this order, each at most once per key.

    Raises:
        UnknownLayoutError: If two keys become one; the message names both.
    """
    renamed: dict[str, T] = {}
    origin: dict[str, str] = {}
    for key, value in state_dict.items():
        short = key
        for prefix in prefixes:
            short = short.removeprefix(prefix)
        if short in renamed:
            raise UnknownLayoutError(
                f"keys {origin[short]!r} and {key!r} are both {short!r} without the prefixes {prefixes}"
            )
        renamed[short], origin[short] = value, key
    return renamed


def student_to_published(state_dict: Mapping[str, T], backbone: str) -> dict[str, T]:
    """Names inside our modules -> names in files, for ``backbone.model.*``; ``head.*`` and ``fusion.*`` stay.

    Args:
        state_dict: State dict of a `StudentEncoder` (values are passed through untouched).
        backbone: Backbone or released student name.

    Raises:
        UnknownBackboneError: If the backbone is not registered.
        UnknownLayoutError: If a key does not belong to the backbone.
    """
    return _rename(state_dict, backbone, _TO_PUBLISHED)


def student_from_published(state_dict: Mapping[str, T], backbone: str) -> dict[str, T]:
    """Inverse of `student_to_published`."""
    return _rename(state_dict, backbone, _FROM_PUBLISHED)


Rule = Callable[[list[str]], dict[str, str]]


def _rename(state_dict: Mapping[str, T], backbone: str, rules: Mapping[str, Rule]) -> dict[str, T]:
    inner = [key.removeprefix(BACKBONE_PREFIX) for key in state_dict if key.startswith(BACKBONE_PREFIX)]
    names = rules[backbone_spec(backbone).key_family](inner)
    renamed: dict[str, T] = {}
    for key, value in state_dict.items():
        if key.startswith(BACKBONE_PREFIX):
            key = BACKBONE_PREFIX + names[key.removeprefix(BACKBONE_PREFIX)]
        elif not key.startswith((HEAD_PREFIX, FUSION_PREFIX)):
            raise UnknownLayoutError(
                f"{key!r} is no student key: expected {BACKBONE_PREFIX}*, {HEAD_PREFIX}* or {FUSION_PREFIX}*"
            )
        if key in renamed:
            raise UnknownLayoutError(f"two keys of {backbone} would both be called {key!r}")
        renamed[key] = value
    return renamed


# --- rules: list of keys below backbone.model. -> {old: new} ----------------------------------------------------------


def _identity(keys: list[str]) -> dict[str, str]:
    return {key: key for key in keys}


def _substitute(
    keys: list[str], patterns: Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]
) -> dict[str, str]:
    """Apply the first pattern that matches the beginning of each key; no match is an error."""
    renamed = {}
    for key in keys:
        for pattern, replacement in patterns:
            new, count = re.subn(pattern, replacement, key, count=1)
            if count:
                renamed[key] = new
                break
        else:
            raise UnknownLayoutError(f"no rule for the backbone key {key!r}")
    return renamed


_EFFICIENTVIT_TO_PUBLISHED = (
    (r"^stem\.in_conv\.", "input_stem.op_list.0."),
    (r"^stem\.res(\d+)\.", lambda m: f"input_stem.op_list.{int(m[1]) + 1}."),
    (r"^stages\.(\d+)\.blocks\.", r"stages.\1.op_list."),
)
_EFFICIENTVIT_FROM_PUBLISHED = (
    (r"^input_stem\.op_list\.0\.", "stem.in_conv."),
    (r"^input_stem\.op_list\.(\d+)\.", lambda m: f"stem.res{int(m[1]) - 1}."),
    (r"^stages\.(\d+)\.op_list\.", r"stages.\1.blocks."),
)
_TINY_VIT_TO_PUBLISHED = (
    (r"^patch_embed\.conv1\.", "patch_embed.seq.0."),
    (r"^patch_embed\.conv2\.", "patch_embed.seq.2."),
    (r"^stages\.(\d+)\.blocks\.", r"layers.\1.blocks."),
    (r"^stages\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample."),
)
_TINY_VIT_FROM_PUBLISHED = (
    (r"^patch_embed\.seq\.0\.", "patch_embed.conv1."),
    (r"^patch_embed\.seq\.2\.", "patch_embed.conv2."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
)


def _tiny_vit_to_published(keys: list[str]) -> dict[str, str]:
    names = _substitute(keys, _TINY_VIT_TO_PUBLISHED)
    return {old: re.sub(r"\.conv\.weight$", ".c.weight", new) for old, new in names.items()}


def _tiny_vit_from_published(keys: list[str]) -> dict[str, str]:
    names = _substitute(keys, _TINY_VIT_FROM_PUBLISHED)
    return {old: re.sub(r"\.c\.weight$", ".conv.weight", new) for old, new in names.items()}


_REPVIT_STEM = {"stem.conv1.": "features.0.0.", "stem.conv2.": "features.0.2."}
# timm's name inside a block -> published name; a stride-2 block has other contents than a plain one.
_REPVIT_PLAIN = {
    "token_mixer.": "token_mixer.0.",
    "se.": "token_mixer.1.",
    "channel_mixer.conv1.": "channel_mixer.m.0.",
    "channel_mixer.conv2.": "channel_mixer.m.2.",
}
_REPVIT_STRIDE2 = {
    "spatial_downsample.": "token_mixer.0.",
    "channel_downsample.": "token_mixer.2.",
    "ffn.conv1.": "channel_mixer.m.0.",
    "ffn.conv2.": "channel_mixer.m.2.",
}


def _repvit_prefixes(blocks_per_stage: Sequence[int]) -> dict[str, str]:
    """timm prefix -> published prefix of everything in a RepViT with that many ``blocks`` in each stage."""
    prefixes = dict(_REPVIT_STEM)
    number = 0
    for stage, num_blocks in enumerate(blocks_per_stage):
        blocks = [f"stages.{stage}.blocks.{block}." for block in range(num_blocks)]
        if stage:
            blocks = [f"stages.{stage}.downsample.pre_block.", f"stages.{stage}.downsample.", *blocks]
        for block in blocks:
            number += 1
            leaves = _REPVIT_STRIDE2 if block.endswith(".downsample.") else _REPVIT_PLAIN
            for timm_leaf, published_leaf in leaves.items():
                prefixes[block + timm_leaf] = f"features.{number}.{published_leaf}"
    return prefixes


def _replace_prefixes(keys: list[str], prefixes: Mapping[str, str]) -> dict[str, str]:
    renamed = {}
    for key in keys:
        parts = key.split(".")
        for length in range(len(parts), 0, -1):
            prefix = ".".join(parts[:length]) + "."
            if prefix in prefixes:
                renamed[key] = prefixes[prefix] + key.removeprefix(prefix)
                break
        else:
            raise UnknownLayoutError(f"no rule for the backbone key {key!r}")
    return renamed


def _repvit_to_published(keys: list[str]) -> dict[str, str]:
    found = [re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", key) for key in keys]
    pairs = [(int(m[1]), int(m[2])) for m in found if m]
    num_stages = 1 + max((stage for stage, _ in pairs), default=-1)
    counts = [1 + max((b for s, b in pairs if s == stage), default=-1) for stage in range(num_stages)]
    return _replace_prefixes(keys, _repvit_prefixes(counts))


def _repvit_from_published(keys: list[str]) -> dict[str, str]:
    found = [re.match(r"features\.(\d+)\.(token_mixer\.2\.)?", key) for key in keys]
    last = max((int(m[1]) for m in found if m), default=0)
    strided = sorted({int(m[1]) for m in found if m and m[2]})
    # A stage's blocks lie between two stride-2 blocks; the last of them is the next stage's pre_block.
    starts, ends = [0, *strided], [*(number - 2 for number in strided), last]
    counts = [end - start for start, end in zip(starts, ends, strict=True)]
    inverse = {published: timm for timm, published in _repvit_prefixes(counts).items()}
    return _replace_prefixes(keys, inverse)


_TO_PUBLISHED: dict[str, Rule] = {
    "identity": _identity,
    "repvit": _repvit_to_published,
    "tiny_vit": _tiny_vit_to_published,
    "efficientvit": lambda keys: _substitute(keys, _EFFICIENTVIT_TO_PUBLISHED),
}
_FROM_PUBLISHED: dict[str, Rule] = {
    "identity": _identity,
    "repvit": _repvit_from_published,
    "tiny_vit": _tiny_vit_from_published,
    "efficientvit": lambda keys: _substitute(keys, _EFFICIENTVIT_FROM_PUBLISHED),
}


# --- recognising a student --------------------------------------------------------------------------------------------


def identify_student_config(keys_to_shapes: Mapping[str, Sequence[int]]) -> StudentConfig:
    """Recognise a student by its keys and shapes alone, for files that carry no description.

    The family follows from the first name below ``backbone.model.``, the size from the head's input width.

    Args:
        keys_to_shapes: Published names and shapes of a student file or of a merged file; other keys are ignored.

    Returns:
        Backbone, and whether stride 16 is fused and BatchNorm folded.

    Raises:
        UnknownLayoutError: If no registered student or more than one fits; the message names what was found.
    """
    shapes = _student_part(keys_to_shapes)
    width = _head_width(shapes)
    inner = [key.removeprefix(BACKBONE_PREFIX) for key in shapes if key.startswith(BACKBONE_PREFIX)]
    specs = [backbone_spec(name) for name in backbone_names()]
    family = [spec for spec in specs if any(key.startswith(spec.marker) for key in inner)]
    fitting = [spec for spec in family if spec.tap_channels[1] == width]
    if len(fitting) != 1:
        raise UnknownLayoutError(_why_not_identified(inner, width, family, fitting))
    return StudentConfig(
        backbone=fitting[0].name,
        fuse_stride16=any(key.startswith(FUSION_PREFIX) for key in shapes),
        fused="head.1.running_mean" not in shapes,
    )


def _student_part(keys_to_shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Only the student's keys, without whatever precedes ``backbone.model.`` and ``head.``."""
    for prefix in (STUDENT_PREFIX, STUDENT_PREFIX.removeprefix(DETECTOR_PREFIX), "module.", ""):
        if any(key.startswith(prefix + BACKBONE_PREFIX) for key in keys_to_shapes):
            part = {k.removeprefix(prefix): tuple(v) for k, v in keys_to_shapes.items() if k.startswith(prefix)}
            return {k: v for k, v in part.items() if k.startswith((BACKBONE_PREFIX, HEAD_PREFIX, FUSION_PREFIX))}
    first = sorted(keys_to_shapes)[:3]
    raise UnknownLayoutError(f"no student keys ({BACKBONE_PREFIX}*) among {len(keys_to_shapes)} keys, such as {first}")


def _head_width(shapes: Mapping[str, tuple[int, ...]]) -> int:
    shape = shapes.get("head.0.weight", ())
    if len(shape) != 4:
        raise UnknownLayoutError(f"head.0.weight has shape {shape or 'none (missing)'}, expected (C, C', 1, 1)")
    return shape[1]


def _why_not_identified(
    inner: Iterable[str], width: int, family: Sequence[BackboneSpec], fitting: Sequence[BackboneSpec]
) -> str:
    first = sorted(inner)[:3]
    if fitting:
        names = [spec.name for spec in fitting]
        return f"students {names} share these names and the width {width}: the file needs a description in its metadata"
    if family:
        nearest = ", ".join(f"{spec.name} ({spec.tap_channels[1]})" for spec in family)
        return (
            f"no student of this family has a head of input width {width}: nearest are {nearest}; keys such as {first}"
        )
    known = sorted({backbone_spec(name).marker for name in backbone_names()})
    return f"backbone keys such as {first} belong to no known student: their names begin with one of {known}"
