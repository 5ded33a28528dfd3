"""Between a built model's state dict and the released layout (``detector.*``, ``tracker.*``).

The model's own names are the released ones without ``detector.``; SAM heads and tracker, ``tracker.*`` in a file, live
under ``inst_interactive_predictor.model.``, where a compressed memory, ``efficient_tracker.*`` in a file, takes the
place of the released one; a student's network has timm's names inside and published names in a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

from sam3.checkpoint_fit import check_fit, first
from sam3.checkpoint_io import CheckpointError
from sam3.checkpoint_keys import (
    DETECTOR_PREFIX,
    EFFICIENT_PREFIX,
    STUDENT_PREFIX,
    TRACKER_PREFIX,
    TRUNK_PREFIX,
    strip_prefixes,
    student_from_published,
    student_to_published,
)
from sam3.checkpoint_parts import (
    DETECTOR_CORE_PREFIXES,
    FULL_MEMORY_PREFIXES,
    MEMORY_PREFIXES,
    POINT_PROMPTS,
    SAM2_NECK_PREFIX,
    SEGMENTATION_PREFIX,
    TEXT_PREFIX,
)
from sam3.config import Sam3Config
from sam3.efficient_keys import tracker_from_released, tracker_to_released
from sam3.hf_keys import has_point_projections, hf_class
from sam3.model.sam3_image import Sam3Image

T = TypeVar("T")

HEADS_PREFIX = "inst_interactive_predictor.model."
_TRACKERS = (TRACKER_PREFIX, EFFICIENT_PREFIX)


def absent_parts(model: Sam3Image) -> tuple[str, ...]:
    """Beginnings of the released names that a file may hold and this model was built without."""
    absent: tuple[str, ...] = ()
    if model.inst_interactive_predictor is None:
        absent += (SAM2_NECK_PREFIX, TRACKER_PREFIX, EFFICIENT_PREFIX)
    elif not model.has_tracker:
        absent += (*MEMORY_PREFIXES, EFFICIENT_PREFIX)
    else:
        absent += (EFFICIENT_PREFIX,) if model.config.efficient_memory is None else FULL_MEMORY_PREFIXES
    if not model.has_detector:
        absent += DETECTOR_CORE_PREFIXES
    if model.segmentation_head is None:
        absent += (SEGMENTATION_PREFIX,)
    if model.backbone.language_backbone is None:
        absent += (TEXT_PREFIX,)
    return absent


def released_layout(state_dict: Mapping[str, T], source: str) -> dict[str, T]:
    """Bring a file's keys into the released layout: without DDP's ``module.``, with ``detector.`` and ``tracker.``.

    Args:
        state_dict: As read from a file.
        source: The file's name, for errors.

    Raises:
        CheckpointError: If two keys become one, or the names are those of Hugging Face.
    """
    try:
        names = with_tracker_names(strip_prefixes(state_dict, ("module.",)))
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error
    kind = hf_class(names)
    if kind is not None:
        raise CheckpointError(
            f"{source}: has the names of Hugging Face's {kind}. sam3.load_model opens it; where the released names are "
            f"needed, write such a file first: python -m sam3.convert {source} sam3.pt"
        )
    if any(key.startswith(DETECTOR_PREFIX) for key in names):
        return names
    return {k if k.startswith(_TRACKERS) else DETECTOR_PREFIX + k: v for k, v in names.items()}


def with_tracker_names(names: Mapping[str, T]) -> dict[str, T]:
    """A saved `Sam3Image` has SAM heads and tracker under the predictor's name, a released file under the tracker's."""
    tracker = {k.removeprefix(HEADS_PREFIX): v for k, v in names.items() if k.startswith(HEADS_PREFIX)}
    others = {key: value for key, value in names.items() if not key.startswith(HEADS_PREFIX)}
    return others | tracker_to_released(tracker)


def to_released(state_dict: Mapping[str, T], config: Sam3Config) -> dict[str, T]:
    """The state dict of a `Sam3Image` under the released names (published names for a student)."""
    released = {
        key if key.startswith(_TRACKERS) else DETECTOR_PREFIX + key: value
        for key, value in with_tracker_names(state_dict).items()
    }
    return _rename_student(released, config, student_to_published)


def from_released(released: Mapping[str, T], config: Sam3Config) -> dict[str, T]:
    """Inverse of `to_released`: of one memory, not of both that a file may hold."""
    released = _rename_student(released, config, student_from_published)
    names: dict[str, T] = {}
    for key, value in released.items():
        if key.startswith(_TRACKERS):
            names[HEADS_PREFIX + tracker_from_released(key)] = value
        else:
            names[key.removeprefix(DETECTOR_PREFIX)] = value
    return names


def _rename_student(released: Mapping[str, T], config: Sam3Config, rename) -> dict[str, T]:
    if config.student is None:
        return dict(released)
    student = {k.removeprefix(STUDENT_PREFIX): v for k, v in released.items() if k.startswith(STUDENT_PREFIX)}
    others = {k: v for k, v in released.items() if not k.startswith(STUDENT_PREFIX)}
    return others | {STUDENT_PREFIX + k: v for k, v in rename(student, config.student.backbone).items()}


def released_state_dict(model: Sam3Image) -> dict[str, Tensor]:
    """A model's weights under the released names: what `write_merged` stores."""
    return to_released(model.state_dict(), model.config)


def load_released(model: Sam3Image, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Load a file's weights into a model, which may be on the meta device.

    Strict: every weight of the model must be in the file with the right shape, and what the file holds beyond the
    model must belong to a part that the model was built without (`absent_parts`). Each tensor takes the dtype and
    device of the parameter it replaces; on the CPU and in the same dtype it stays memory-mapped. A file that came from
    Hugging Face's layout holds zeros in place of point prompts: ``model.missing_parts`` then says so.

    Args:
        model: The model; its ``config`` says what it is.
        state_dict: As read from a file: with or without ``detector.``, with or without DDP's ``module.``.
        source: The file's name, for errors.

    Raises:
        CheckpointError: If the file does not fit; the message lists the first differing keys.
    """
    released = released_layout(state_dict, source)
    absent = absent_parts(model)
    weights = {key: value for key, value in released.items() if not key.startswith(absent)}
    expected = to_released(model.state_dict(), model.config)
    check_fit(weights, expected, source, model.config)
    _assign(model, from_released(weights, model.config), source)
    model.missing_parts = (POINT_PROMPTS,) if model.has_detector and not has_point_projections(weights) else ()


def load_trunk(trunk: nn.Module, config: Sam3Config, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Load a file's trunk into a trunk that `build_trunk` made; other keys of the file are not looked at.

    Raises:
        CheckpointError: If the file has no trunk or another one.
    """
    released = released_layout(state_dict, source)
    weights = {key: value for key, value in released.items() if key.startswith(TRUNK_PREFIX)}
    own = {TRUNK_PREFIX + key: value for key, value in trunk.state_dict().items()}
    expected = _rename_student(own, config, student_to_published)
    check_fit(weights, expected, source, config)
    weights = _rename_student(weights, config, student_from_published)
    _assign(trunk, {key.removeprefix(TRUNK_PREFIX): value for key, value in weights.items()}, source)


def _assign(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    own = module.state_dict()
    placed = {key: _like(value, own[key]) for key, value in weights.items()}
    try:
        module.load_state_dict(placed, strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{source}: {' '.join(str(error).split())}") from error
    leftover = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if leftover:
        raise RuntimeError(f"{source}: {first(leftover)} got no value while loading (a bug: the keys were checked)")


def _like(tensor: Tensor, own: Tensor) -> Tensor:
    dtype = own.dtype if tensor.dtype.is_floating_point and own.dtype.is_floating_point else tensor.dtype
    return tensor.to(dtype=dtype, device=tensor.device if own.is_meta else own.device)
