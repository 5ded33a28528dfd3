"""Whether the tensors of a file are those of a model, and the one line that says why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor

from sam3.checkpoint_io import CheckpointError
from sam3.checkpoint_keys import BACKBONE_PREFIX, STUDENT_PREFIX, TRUNK_PREFIX
from sam3.checkpoint_parts import part_of
from sam3.config import Sam3Config

RECOMPUTED_SUFFIX = ".attn.freqs_cis"


def check_fit(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str, config: Sam3Config) -> None:
    """Compare keys, shapes and kinds of numbers; rotary tables may be missing, because they are recomputed.

    Args:
        weights: Of a file, under the released names.
        expected: Of the model, which may be on the meta device.
        source: The file's name, for the error.
        config: What the model is.

    Raises:
        CheckpointError: If anything differs; one line with counts and the first keys.
    """
    problems = fit_problems(weights, expected)
    if problems:
        model = config.name if config.student is None else f"{config.name} with student {config.student.backbone}"
        raise CheckpointError(
            f"{source}: the file does not fit the model {model!r} ({describe_trunk(weights)}): {'; '.join(problems)}"
        )


def fit_problems(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """What differs, a phrase for each kind of difference; empty if the weights fit."""
    missing = [key for key in expected if key not in weights and not key.endswith(RECOMPUTED_SUFFIX)]
    unexpected = [key for key in weights if key not in expected]
    shared = [key for key in expected if key in weights]
    misshapen = [
        f"{key}: file {tuple(weights[key].shape)}, model {tuple(expected[key].shape)}"
        for key in shared
        if weights[key].shape != expected[key].shape
    ]
    mistyped = [
        f"{key}: file {_dtype(weights[key])}, model {_dtype(expected[key])}"
        for key in shared
        if _kind(weights[key]) != _kind(expected[key]) and not key.endswith(RECOMPUTED_SUFFIX)
    ]
    problems = _missing_by_part(missing, expected)
    for what, found in (("unexpected", unexpected), ("of another shape", misshapen), ("of another type", mistyped)):
        if found:
            problems.append(f"{len(found)} {what}: {first(found)}")
    return problems


def describe_trunk(weights: Mapping[str, Tensor]) -> str:
    """What stands in the trunk's place, as part of a sentence."""
    if any(key.startswith(STUDENT_PREFIX + BACKBONE_PREFIX) for key in weights):
        return "it holds a student in the trunk's place"
    patch = weights.get(TRUNK_PREFIX + "patch_embed.proj.weight")
    if patch is not None and patch.ndim:
        return f"it holds a ViT trunk of width {patch.shape[0]}"
    if any(key.startswith(TRUNK_PREFIX) for key in weights):
        return "it holds a trunk of an unknown kind"
    return f"it holds no trunk: no key begins with {TRUNK_PREFIX}"


def first(keys: Sequence[str], count: int = 3) -> str:
    """The first few of many."""
    return ", ".join(keys[:count]) + (", ..." if len(keys) > count else "")


def _missing_by_part(missing: Sequence[str], expected: Mapping[str, Tensor]) -> list[str]:
    names = {key: part.name for key in expected if (part := part_of(key)) is not None}
    total = Counter(names.get(key, "rest") for key in expected if not key.endswith(RECOMPUTED_SUFFIX))
    groups: dict[str, list[str]] = {}
    for key in missing:
        groups.setdefault(names.get(key, "rest"), []).append(key)
    return [f"{name}: {len(keys)} of {total[name]} missing: {first(keys)}" for name, keys in groups.items()]


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    return "float" if tensor.is_floating_point() else "integer"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
