"""Splice a student into a SAM 3 state dict: dict to dict, no file, model or GPU needed.

The teacher's trunk is replaced as a whole: every key under ``replace_prefix`` goes, every student key comes in under
``target_prefix``, and all else is kept untouched (the same tensor objects, so memory-mapped weights stay on disk until
they are written). Nothing is forgiven: the student's keys must be exactly those of the described student, the keys that
go exactly those of the described teacher trunk, shapes included, and no two tensors may want the same name. In a merged
file a student trained further takes the place of the one that is there, key by key, with the same strictness.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sam3.checkpoint_keys import STUDENT_PREFIX, TRUNK_PREFIX
from sam3.checkpoint_parts import NECK_PREFIX, SAM2_NECK_PREFIX, SEGMENTATION_PREFIX

Shapes = Mapping[str, Sequence[int]]

TRUNK_MARK = "vision_backbone.trunk."
"""Part of the name of every trunk parameter, whatever precedes it."""
REPLACEABLE_PARTS = {
    NECK_PREFIX: "detector neck",
    SAM2_NECK_PREFIX: "SAM neck",
    SEGMENTATION_PREFIX: "segmentation head",
    "tracker.sam_mask_decoder.": "SAM mask decoder",
}
"""What a fine-tuning may train beside the student: beginnings of released names, and what people call it."""
_SHOWN = 5


class MergeError(ValueError):
    """The student and the SAM 3 weights cannot be spliced; the message names the first keys that stand in the way."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. Bytes are those of the tensors as they were given."""

    num_student: int
    """Student keys that came in."""
    num_replaced: int
    """Teacher trunk keys that went."""
    num_appended: int
    """SAM 3 keys outside the trunk that were kept."""
    student_bytes: int
    replaced_bytes: int
    appended_bytes: int

    @property
    def num_total(self) -> int:
        """Keys of the merged state dict."""
        return self.num_student + self.num_appended

    @property
    def total_bytes(self) -> int:
        """Bytes of the merged state dict."""
        return self.student_bytes + self.appended_bytes

    def lines(self) -> list[str]:
        """The report as a person reads it."""
        return [
            f"student keys in     {self.num_student:6d}  {_megabytes(self.student_bytes)}",
            f"teacher trunk out   {self.num_replaced:6d}  {_megabytes(self.replaced_bytes)}",
            f"other SAM 3 keys    {self.num_appended:6d}  {_megabytes(self.appended_bytes)}",
            f"merged              {self.num_total:6d}  {_megabytes(self.total_bytes)}",
        ]


def merge_student(
    student: Mapping[str, Tensor],
    sam3: Mapping[str, Tensor],
    student_shapes: Shapes,
    trunk_shapes: Shapes,
    target_prefix: str = STUDENT_PREFIX,
    replace_prefix: str = TRUNK_PREFIX,
) -> tuple[dict[str, Tensor], MergeReport]:
    """Replace the trunk of SAM 3 by a student.

    Args:
        student: The student's state dict under its published names (``backbone.model.*``, ``head.*``).
        sam3: State dict of SAM 3; tensors on the meta device will do.
        student_shapes: Names and shapes that this student must have.
        trunk_shapes: Names and shapes, without prefix, that the teacher's trunk must have.
        target_prefix: Put before each student key. A missing dot at the end is added, here and below.
        replace_prefix: SAM 3 keys below it are the teacher's trunk.

    Returns:
        The merged state dict (student first) and the report.

    Raises:
        MergeError: If a key or shape is not as described, a trunk key would be left behind, or two keys would collide.
    """
    target_prefix, replace_prefix = with_dot(target_prefix), with_dot(replace_prefix)
    _require_same("the student checkpoint", student, student_shapes)
    trunk = {key.removeprefix(replace_prefix): value for key, value in sam3.items() if key.startswith(replace_prefix)}
    kept = {key: value for key, value in sam3.items() if not key.startswith(replace_prefix)}
    _require_trunk(trunk, trunk_shapes, replace_prefix, sam3)
    incoming = {target_prefix + key: value for key, value in student.items()}
    overlap = sorted(incoming.keys() & kept.keys())
    if overlap:
        raise MergeError(
            f"{len(overlap)} student keys under {target_prefix!r} would overwrite SAM 3 keys that are kept, such as "
            f"{_some(overlap)}: choose a --target-prefix below --replace-prefix {replace_prefix!r}"
        )
    left = sorted(key for key in kept if TRUNK_MARK in key)
    if left:
        raise MergeError(
            f"{len(left)} teacher trunk keys would be left behind, such as {_some(left)}: --replace-prefix "
            f"{replace_prefix!r} does not cover them"
        )
    report = MergeReport(len(incoming), len(trunk), len(kept), _bytes(incoming), _bytes(trunk), _bytes(kept))
    return {**incoming, **kept}, report


@dataclass(frozen=True)
class ReplaceReport:
    """What a replacement did; keys are counted."""

    num_student: int
    """Student keys that were given."""
    num_matched: int
    """Of these, those that the merged file has with the same shape."""
    num_replaced: int
    """Of these, those whose tensor is now the given one."""
    parts: Mapping[str, int]
    """Replaced keys of each other part, by the name in `REPLACEABLE_PARTS`."""
    num_total: int
    """Keys of the result."""


def replace_weights(
    student: Mapping[str, Tensor],
    parts: Mapping[str, Tensor],
    merged: Mapping[str, Tensor],
    student_shapes: Shapes,
) -> tuple[dict[str, Tensor], ReplaceReport]:
    """Put a student that was trained further, and parts trained with it, in the place of what a merged file holds.

    Args:
        student: The student's state dict under its published names.
        parts: Other trained weights under their released names, whole ones of `REPLACEABLE_PARTS`; {} for none.
        merged: State dict of the merged file; tensors on the meta device will do.
        student_shapes: Names and shapes that this student must have.

    Returns:
        The state dict with the same keys in the same order, each new tensor in the dtype of the one it replaces, all
        others the same objects; and the report.

    Raises:
        MergeError: If the student's keys are not exactly the file's, shapes included, the file holds another trunk
            beside its student, or a trained part is not exactly the file's, shapes included.
    """
    inside = {k.removeprefix(STUDENT_PREFIX): v for k, v in merged.items() if k.startswith(STUDENT_PREFIX)}
    _require_same("the fine-tuned student", student, student_shapes)
    _require_same("the student in the merged file", inside, student_shapes)
    stale = sorted(k for k in merged if TRUNK_MARK in k and not k.startswith(STUDENT_PREFIX))
    if stale:
        raise MergeError(f"{len(stale)} keys of another trunk would stay in the file, such as {_some(stale)}")
    incoming = {STUDENT_PREFIX + key: value for key, value in student.items()}
    matched = sum(key in merged and merged[key].shape == value.shape for key, value in incoming.items())
    num_parts = _count_parts(parts, merged)
    replaced = dict(merged)
    for key, value in {**incoming, **parts}.items():
        is_float = value.is_floating_point() and merged[key].is_floating_point()
        replaced[key] = value.to(merged[key].dtype) if is_float else value
    num_replaced = sum(replaced[key] is not merged[key] for key in incoming)
    return replaced, ReplaceReport(len(student), matched, num_replaced, num_parts, len(replaced))


def _count_parts(parts: Mapping[str, Tensor], merged: Mapping[str, Tensor]) -> dict[str, int]:
    """How many keys of each part are given; a part must be whole: exactly the merged file's keys, shapes included."""
    strange = sorted(key for key in parts if not key.startswith(tuple(REPLACEABLE_PARTS)))
    if strange:
        raise MergeError(f"{len(strange)} trained keys are of no part that can be replaced, such as {_some(strange)}")
    counts = {}
    for prefix, name in REPLACEABLE_PARTS.items():
        given = {key: value for key, value in parts.items() if key.startswith(prefix)}
        if given:
            own = shapes_of({key: value for key, value in merged.items() if key.startswith(prefix)})
            _require_same(f"the trained {name}, beside the merged file's,", given, own)
            counts[name] = len(given)
    return counts


def shapes_of(state_dict: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {key: tuple(value.shape) for key, value in state_dict.items()}


def require_representable(
    state_dict: Mapping[str, Tensor], dtype: torch.dtype, remedy: str = "use --dtype bf16 or fp32"
) -> None:
    """Check that converting to a smaller float type would turn no weight into infinity.

    Args:
        state_dict: Weights; only floating-point tensors are looked at, one at a time.
        dtype: The type they will be stored in.
        remedy: What to do about a weight that is too large.

    Raises:
        MergeError: If a weight is not finite already, or is beyond the type's range.
    """
    limit = torch.finfo(dtype).max
    for key, value in state_dict.items():
        if not value.is_floating_point() or value.numel() == 0:
            continue
        largest = float(value.abs().max())
        if not largest <= limit:  # also true for NaN
            raise MergeError(
                f"{key}: largest magnitude {largest:g} cannot be stored as {dtype} (limit {limit:g}): "
                + (remedy if largest < torch.finfo(torch.float32).max else "the weights are broken")
            )


def with_dot(prefix: str) -> str:
    """The prefix with exactly one dot at its end; an empty prefix stays empty."""
    stripped = prefix.strip().rstrip(".")
    return f"{stripped}." if stripped else ""


def _require_trunk(trunk: Mapping[str, Tensor], expected: Shapes, prefix: str, sam3: Mapping[str, Tensor]) -> None:
    if not trunk:
        raise MergeError(
            f"no SAM 3 key lies under --replace-prefix {prefix!r}: "
            f"the file's {len(sam3)} keys are such as {_some(sorted(sam3))}"
        )
    if any(key.startswith("model.") for key in trunk) and not any(key.startswith("model.") for key in expected):
        raise MergeError(f"the SAM 3 file already holds a student under {prefix}model.: give the original sam3.pt")
    _require_same(f"the SAM 3 file's trunk ({prefix}*)", trunk, expected)


def _require_same(what: str, actual: Mapping[str, Tensor], expected: Shapes) -> None:
    missing = sorted(expected.keys() - actual.keys())
    unexpected = sorted(actual.keys() - expected.keys())
    shapes = [
        f"{key} has shape {tuple(actual[key].shape)}, expected {tuple(expected[key])}"
        for key in sorted(expected.keys() & actual.keys())
        if tuple(actual[key].shape) != tuple(expected[key])
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} keys are missing, such as {_some(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} keys do not belong, such as {_some(unexpected)}")
    if shapes:
        problems.append(f"{len(shapes)} shapes differ: {'; '.join(shapes[:_SHOWN])}")
    if problems:
        raise MergeError(f"{what} is not what its description says ({len(expected)} keys): " + "; ".join(problems))


def _bytes(state_dict: Mapping[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in state_dict.values())


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:10.1f} MB"


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")
