"""Whether weights are still the ones that a kept result was computed with."""

from __future__ import annotations

from torch import nn


def weights_state(*modules: nn.Module) -> tuple[int, ...]:
    """Numbers that change when a parameter is replaced, moved or written to.

    Parameters made in inference mode do not count their changes; of those a replacement alone is seen.
    """
    state: list[int] = []
    for module in modules:
        for parameter in module.parameters():
            state += [parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version]
    return tuple(state)
