"""Key map between the released layout and the layouts of Hugging Face's SAM 3 classes, dict to dict.

``Sam3VideoModel`` holds everything, and files on the Hub have its names; the other classes are views of it, with other
prefixes (`to_video_names`). All 1,465 released keys are covered, in both directions; `sam3.hf_rules` is the table. What
the layout of Hugging Face cannot hold:

- the rotary tables (``*.freqs_cis``), which both sides recompute;
- the class token's row of the trunk's position table, which nothing reads: it comes back as zeros;
- the six weights of the geometry encoder for point prompts (`POINT_PROJECTIONS`), because that implementation has no
  point prompts for the detector: they do not come back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sam3.checkpoint_keys import UnknownLayoutError
from sam3.hf_rules import SECTIONS, Op, Rule, fill

HF_PREFIXES = ("detector_model.", "tracker_model.", "tracker_neck.")
POINT_PROJECTIONS = tuple(
    f"detector.geometry_encoder.points_{name}_project.{leaf}"
    for name in ("direct", "pool", "pos_enc")
    for leaf in ("weight", "bias")
)
"""Released keys that Hugging Face's geometry encoder has no place for."""

_ROTARY_SUFFIX = ".attn.freqs_cis"
_TWINS = {rule.hf_again: rule.hf for section in SECTIONS for rule in section.rules if rule.op is Op.TWICE}
# Class -> a key that only it has, and what its keys are called in Sam3VideoModel.
_VIEWS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "Sam3Model": ("detr_decoder.query_embed.weight", (("", "detector_model."),)),
    "Sam3TrackerModel": (
        "mask_decoder.iou_token.weight",
        (
            ("vision_encoder.neck.", "tracker_neck."),
            ("vision_encoder.backbone.", "detector_model.vision_encoder.backbone."),
            ("", "tracker_model."),
        ),
    ),
}


def is_hf_layout(keys: Mapping[str, object]) -> bool:
    """Whether these are the keys of one of Hugging Face's classes."""
    return hf_class(keys) is not None


def hf_class(keys: Mapping[str, object]) -> str | None:
    """The class whose names these are (``Sam3TrackerModel`` also stands for its video form), or None."""
    if any(key.startswith(HF_PREFIXES) for key in keys):
        return "Sam3VideoModel"
    for name, (mark, _) in _VIEWS.items():
        if mark in keys:
            return name
    return None


def has_point_projections(released: Mapping[str, Tensor]) -> bool:
    """Whether there are weights for point prompts: files of Hugging Face lack them, conversions write zeros."""
    found = [released[key] for key in POINT_PROJECTIONS if key in released]
    return any(tensor.is_meta or bool(tensor.any()) for tensor in found)


def to_video_names(hf: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of any of the four classes -> those of ``Sam3VideoModel``, the ones that files on the Hub have."""
    name = hf_class(hf)
    if name not in _VIEWS:
        return dict(hf)
    renamed = {}
    for key, value in hf.items():
        old, new = next(pair for pair in _VIEWS[name][1] if key.startswith(pair[0]))
        renamed[new + key.removeprefix(old)] = value
    return renamed


def is_in_hf(key: str) -> bool:
    """Whether a released key has a place in Hugging Face's layout."""
    return not key.endswith(_ROTARY_SUFFIX) and key not in POINT_PROJECTIONS


def released_to_hf(released: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Released names -> ``Sam3VideoModel`` names. Tensors are renamed or become views; only stacked rows are copied.

    Raises:
        UnknownLayoutError: If a key is none of the released model's, such as a student's; or rows are missing.
    """
    renamed: dict[str, Tensor] = {}
    rows: dict[str, dict[int, Tensor]] = {}
    for key, value in released.items():
        if not is_in_hf(key):
            continue
        rule, name = _match(key, lambda section: section.released, lambda rule: rule.released_regex)
        if rule.op is Op.SPLIT:
            for letter, part in zip("qkv", _thirds(key, value), strict=True):
                renamed[name(rule.hf, letter)] = part
        elif rule.op is Op.ROWS:
            rows.setdefault(rule.hf, {})[int(key.split(".")[-2])] = value
        else:
            renamed[name(rule.hf)] = _CHANGE_TO_HF[rule.op](value)
        if rule.op is Op.TWICE:
            renamed[rule.hf_again] = value
    for target, tables in rows.items():
        if sorted(tables) != list(range(len(tables))):
            raise UnknownLayoutError(f"{target!r} needs consecutive rows from 0, there are {sorted(tables)}")
        renamed[target] = torch.cat([tables[index] for index in range(len(tables))])
    return renamed


def released_from_hf(hf: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of any of the four classes -> released names. Fused tensors are copied, all others are views.

    Raises:
        UnknownLayoutError: If a key belongs to no known part, or a tensor that is stored in pieces is incomplete.
    """
    hf = to_video_names(hf)
    renamed: dict[str, Tensor] = {}
    for key, value in hf.items():
        if key in _TWINS and _TWINS[key] in hf:
            continue  # the other one is taken
        rule, name = _match(_TWINS.get(key, key), lambda section: section.hf, lambda rule: rule.hf_regex)
        if rule.op is Op.SPLIT:
            target = name(rule.released)
            if target not in renamed:
                renamed[target] = _fused(hf, [name(rule.hf, letter) for letter in "qkv"])
        elif rule.op is Op.ROWS:
            renamed.update({rule.released.replace("#", str(i)): row[None] for i, row in enumerate(value)})
        else:
            renamed[name(rule.released)] = _CHANGE_FROM_HF[rule.op](value)
    return renamed


def _match(key: str, prefix: Callable, regex: Callable) -> tuple[Rule, Callable[..., str]]:
    """The rule of a key, and a function that fills in one of the rule's patterns."""
    for section in SECTIONS:
        if not key.startswith(prefix(section)):
            continue
        for rule in section.rules:
            match = regex(rule).fullmatch(key)
            if match:
                return rule, lambda pattern, letter="", m=match: fill(pattern, m, qkv=letter)
        break
    raise UnknownLayoutError(f"no rule for the key {key!r}")


def _thirds(key: str, value: Tensor) -> tuple[Tensor, ...]:
    if value.ndim == 0 or value.shape[0] % 3:
        raise UnknownLayoutError(f"{key!r} of shape {tuple(value.shape)} is not queries, keys and values")
    return value.chunk(3)


def _fused(hf: Mapping[str, Tensor], names: list[str]) -> Tensor:
    missing = [name for name in names if name not in hf]
    if missing:
        raise UnknownLayoutError(f"the key {missing[0]!r} is missing beside {next(n for n in names if n in hf)!r}")
    shapes = {tuple(hf[name].shape) for name in names}
    if len(shapes) > 1:
        raise UnknownLayoutError(f"{', '.join(names)} differ in shape: {sorted(shapes)}")
    return torch.cat([hf[name] for name in names])


def _without_class_token(table: Tensor) -> Tensor:
    return table[:, 1:]


def _with_class_token(table: Tensor) -> Tensor:
    if table.ndim != 3:
        raise UnknownLayoutError(f"the trunk's position table has shape {tuple(table.shape)}, expected (1, N, C)")
    return torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)


def _unchanged(value: Tensor) -> Tensor:
    return value


_CHANGE_TO_HF: dict[Op, Callable[[Tensor], Tensor]] = {
    Op.COPY: _unchanged,
    Op.TWICE: _unchanged,
    Op.TRANSPOSE: lambda matrix: matrix.mT,
    Op.NO_CLASS_TOKEN: _without_class_token,
}
_CHANGE_FROM_HF: dict[Op, Callable[[Tensor], Tensor]] = {
    Op.COPY: _unchanged,
    Op.TWICE: _unchanged,
    Op.TRANSPOSE: lambda matrix: matrix.mT,
    Op.NO_CLASS_TOKEN: _with_class_token,
}
