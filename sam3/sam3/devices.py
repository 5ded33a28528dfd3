"""Where a model computes, checked before anything is read or built."""

from __future__ import annotations

import contextlib

import torch


class DeviceError(ValueError):
    """A device that torch does not know or this machine does not have; the message names it."""


def parse_device(device: torch.device | str) -> torch.device:
    """The device of that name, whether this machine has it or not.

    Raises:
        DeviceError: If torch knows none such.
    """
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise DeviceError(f"device {device}: torch knows devices such as cpu, cuda, cuda:1 and mps") from None


def find_device(device: torch.device | str | None) -> torch.device:
    """The device that is meant; None: CUDA where there is one, else the CPU.

    Raises:
        DeviceError: If torch knows none such, or it is not available on this machine.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = parse_device(device)
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DeviceError(f"device {device}: is not available here ({str(error).splitlines()[0]})") from None
    return wanted


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """A context in which nothing is cast, whatever surrounds it."""
    if torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type):  # the latter is not traceable
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
