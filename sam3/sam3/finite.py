"""A model's answer that is NaN or infinite is an error: else it looks like an empty result or a black mask."""

from __future__ import annotations

import torch
from torch import Tensor


class NonFiniteError(ValueError):
    """A model's answer holds NaN or infinity; the message says which answer, and what makes such numbers."""


def require_finite(values: Tensor, what: str, dtype: torch.dtype) -> None:
    """Check a model's answer.

    Args:
        values: Any shape.
        what: What they are, in the plural, for the error.
        dtype: What they were computed in.

    Raises:
        NonFiniteError: If one of them is NaN or infinite.
    """
    if torch.isfinite(values).all():
        return
    raise NonFiniteError(
        f"the model's {what} are not finite (NaN) in {dtype}: its weights are damaged, or this dtype is too narrow for "
        "them (float16 overflows where bfloat16 does not)"
    )
