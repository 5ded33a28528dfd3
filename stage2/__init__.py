"""Stage 2: a compressed memory trained between a frozen backbone and frozen heads, and merged into a whole model.

Names are resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_BUILDERS = "sam3.model.efficient_sam3_model_builder"
_EXPORTS = {
    "EfficientSam3Train": "sam3.model.efficient_sam3_train",
    "build_efficient_sam3_predictor": _BUILDERS,
    "build_efficient_sam3_tracker": _BUILDERS,
    "build_efficient_sam3_train": _BUILDERS,
    "load_efficient_sam3_checkpoint": _BUILDERS,
    "save_efficient_sam3_checkpoint": _BUILDERS,
}

__all__ = [
    "EfficientSam3Train",
    "build_efficient_sam3_predictor",
    "build_efficient_sam3_tracker",
    "build_efficient_sam3_train",
    "load_efficient_sam3_checkpoint",
    "save_efficient_sam3_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'stage2' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
