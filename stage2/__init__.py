"""Stage 2: a compressed memory trained between a frozen backbone and frozen heads, and merged into a whole model.

Names are resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "EfficientSam3Train": "sam3.model.efficient_sam3_train",
    "build_efficient_sam3_predictor": "sam3.model.efficient_sam3_model_builder",
    "build_efficient_sam3_tracker": "sam3.model.efficient_sam3_model_builder",
    "build_efficient_sam3_train": "sam3.model.efficient_sam3_model_builder",
    "load_efficient_sam3_checkpoint": "sam3.model.efficient_sam3_model_builder",
    "save_efficient_sam3_checkpoint": "sam3.model.efficient_sam3_model_builder",
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
