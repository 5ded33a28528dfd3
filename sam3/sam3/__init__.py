"""SAM 3 and its light students: build, load and predict.

Names are resolved on first use, so that importing the package costs little more than importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from sam3.version import __version__

_EXPORTS = {
    "build_efficientsam3_image_model": "sam3.model_builder",
    "build_sam3_image_model": "sam3.model_builder",
    "build_sam3_video_model": "sam3.model_builder",
    "build_sam3_video_predictor": "sam3.model_builder",
    "load_model": "sam3.loading",
    "Preprocess": "sam3.preprocess",
    "Sam3Config": "sam3.config",
    "Sam3Processor": "sam3.model.sam3_image_processor",
}

__all__ = [
    "Preprocess",
    "Sam3Config",
    "Sam3Processor",
    "__version__",
    "build_efficientsam3_image_model",
    "build_sam3_image_model",
    "build_sam3_video_model",
    "build_sam3_video_predictor",
    "load_model",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'sam3' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
