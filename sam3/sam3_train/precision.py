"""Which number format the forward pass runs in."""

from __future__ import annotations

import contextlib

import torch
from yacs.config import CfgNode

from sam3_train.errors import UserError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_dtype(cfg: CfgNode, device: torch.device) -> torch.dtype:
    """The autocast dtype of a config on a device.

    ``AMP_DTYPE auto`` is bf16 on CUDA GPUs that have it, fp16 (with loss scaling) on older ones, and fp32 elsewhere.

    Raises:
        UserError: If the name is unknown, or fp16 is asked for without CUDA.
    """
    name = cfg.AMP_DTYPE if cfg.AMP_ENABLE else "fp32"
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if name not in _DTYPES:
        raise UserError(f"AMP_DTYPE {name!r} is not one of auto, {', '.join(_DTYPES)}")
    if name == "fp16" and device.type != "cuda":
        raise UserError(f"AMP_DTYPE fp16 needs CUDA, this run is on {device.type}; use auto or bf16")
    return _DTYPES[name]


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """The context that the forward pass runs in; does nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)
