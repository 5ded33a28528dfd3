"""The table of backbones: what a student has to know about a network, and the lookup by name."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

KeyFamily = Literal["identity", "repvit", "tiny_vit", "efficientvit"]
_BACKBONES: dict[str, BackboneSpec] = {}
_discovered = False


class UnknownBackboneError(ValueError):
    """A backbone or student name that nothing registered."""


@dataclass(frozen=True)
class BackboneSpec:
    """What the student adapter, the key maps and the reports need to know about one backbone."""

    name: str
    """Name in configs and checkpoints, e.g. ``repvit_m1_1``."""
    build: Callable[[], nn.Module]
    """Builds the network with random weights and without its classifier; also runs under ``torch.device("meta")``."""
    forward_taps: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
    """(network, image batch) -> maps of the last two stages, (B, C, H, W) each, the finer one first."""
    tap_channels: tuple[int, int]
    """Channels of the two maps."""
    tap_strides_px: tuple[int, int]
    """Stride of the two maps in input pixels; (16, 32) for the released nine."""
    marker: str
    """Beginning of a published parameter name that tells this family from every other one."""
    student_name: str | None = None
    """Name of the released student with this backbone, e.g. ``es_rv_m``; None for an extra one."""
    timm_name: str | None = None
    """timm's name of the network, where ImageNet weights come from; None if there are none."""
    key_family: KeyFamily = "identity"
    """Rule in ``sam3.checkpoint_keys`` between module names and published names."""
    classifier_prefixes: tuple[str, ...] = ()
    """Beginnings of the timm classifier's parameter names: dropped when ImageNet weights are loaded."""
    activation_pairs: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    """Module class -> (layer, activation) children where, once BatchNorm is folded, the one directly follows the
    other: deployment on the CPU joins them."""
    strip_blocks: Callable[[], Mapping[type[nn.Module], type[nn.Module]]] | None = None
    """Classes of blocks -> their subclasses that run strip by strip on the CPU (``sam3.backbones.strip_blocks``)."""
    fold: Callable[[nn.Module], None] | None = None
    """Folds, in place, parallel branches that the general Conv + BatchNorm folding cannot see."""


def register(spec: BackboneSpec) -> BackboneSpec:
    """Add a backbone to the table.

    Raises:
        ValueError: If the name or the student name is taken.
    """
    for other in _BACKBONES.values():
        if spec.name == other.name or (spec.student_name and spec.student_name == other.student_name):
            raise ValueError(f"backbone {spec.name!r} ({spec.student_name}) is already registered as {other.name!r}")
    _BACKBONES[spec.name] = spec
    return spec


def _discover() -> None:
    """Import every module of this package once, so that each one registers its backbones."""
    global _discovered
    if _discovered:
        return
    package = importlib.import_module("sam3.backbones")
    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda item: item.name):
        importlib.import_module(f"sam3.backbones.{module.name}")
    _discovered = True


def backbone_names() -> list[str]:
    """All registered backbones, sorted."""
    _discover()
    return sorted(_BACKBONES)


def student_names() -> dict[str, str]:
    """Released student name -> backbone name, sorted: nine entries, ``es_ev_l`` to ``es_tv_s``."""
    _discover()
    return {spec.student_name: spec.name for spec in sorted(_BACKBONES.values(), key=_student_key) if spec.student_name}


def _student_key(spec: BackboneSpec) -> str:
    return spec.student_name or ""


def backbone_spec(name: str) -> BackboneSpec:
    """The spec for a backbone name (``repvit_m1_1``) or a released student name (``es_rv_m``).

    Raises:
        UnknownBackboneError: If nothing is registered under that name; the message lists the nearest and all names.
    """
    _discover()
    students = student_names()
    spec = _BACKBONES.get(students.get(name, name))
    if spec is None:
        known = [*sorted(students), *backbone_names()]
        near = difflib.get_close_matches(name, known, n=2)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise UnknownBackboneError(f"unknown student or backbone {name!r}{hint}; known are: {', '.join(known)}")
    return spec


def build_backbone(name: str) -> nn.Module:
    """The network of a backbone with random weights and without its classifier.

    Raises:
        UnknownBackboneError: See `backbone_spec`.
    """
    return backbone_spec(name).build()
