"""What a checkpoint may hold: plain types and tensors, so that reading one never runs code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def plain_state(value: Any, where: str) -> Any:
    """A value with its tensors detached on the CPU.

    Args:
        value: Plain types, tensors, and dicts, lists and tuples of them.
        where: What the value is, for the message.

    Raises:
        TypeError: If there is anything else in it.
    """
    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous() if not isinstance(value, nn.Parameter) else value.data.cpu()
    if isinstance(value, Mapping):
        return {_plain_key(key, where): plain_state(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = (plain_state(item, f"{where}[{i}]") for i, item in enumerate(value))
        return list(items) if isinstance(value, list) else tuple(items)
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{where} is a {type(value).__name__}: a checkpoint holds plain types and tensors only")


def _plain_key(key: Any, where: str) -> Any:
    if type(key) in (str, int):
        return key
    raise TypeError(f"{where} has a key of type {type(key).__name__}: use str or int")
