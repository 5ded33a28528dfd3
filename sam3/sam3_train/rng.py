"""Random number generators: seed them all, take their states and put them back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (all devices) with any non-negative integer."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_deterministic(is_on: bool) -> None:
    """Choose between deterministic kernels (an operation that has none warns) and the fastest ones, autotuned."""
    torch.use_deterministic_algorithms(is_on, warn_only=True)
    torch.backends.cudnn.deterministic = is_on
    torch.backends.cudnn.benchmark = not is_on


def mix_seed(*numbers: int) -> int:
    """One seed in [0, 2^63) from several integers, e.g. (seed, epoch, index): a pure function, the same everywhere."""
    # numpy ignores trailing zeros, so the count of numbers goes in as well.
    entropy = [len(numbers), *(number % 2**64 for number in numbers)]
    words = np.random.SeedSequence(entropy).generate_state(2, np.uint32)
    return (int(words[0]) << 31) ^ int(words[1])


def rng_state_dict(device: torch.device | None = None) -> dict[str, Any]:
    """States of this process's generators, as plain types and tensors that a weights-only load accepts.

    Args:
        device: The device whose generator to include beside the CPU's.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [str(name), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if device is not None and device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def load_rng_state_dict(state: dict[str, Any], device: torch.device | None = None) -> None:
    """Put the states of `rng_state_dict` back; a device's state is skipped where the device is of another type."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if device is not None and device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    if device is not None and device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"].cpu())
