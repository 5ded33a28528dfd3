"""The teacher's answers to prompts that come back, so that they are computed once (D-96).

Worth its memory only where prompts are the same every epoch (``PROMPTS.FIXED``). Then an epoch passes over all of them
before any comes back, which is why nothing is ever thrown out to make room: the oldest answer would be the next one
needed. Each process has a cache of its own, while an epoch deals the images out anew: of N processes, one meets an
image again that it knows in one of N epochs at first, and more often the more it has seen.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from sam3_train.task import to_device


class TeacherCache:
    """Answers on the host, up to a number of bytes; what does not fit is computed again each time.

    Attributes:
        max_bytes: Budget of the tensors.
        num_bytes: Used of it.
        hits, misses: Answers that were found and that were not.
    """

    def __init__(self, max_bytes: int) -> None:
        """
        Raises:
            ValueError: If the budget is not positive.
        """
        if max_bytes <= 0:
            raise ValueError(f"a teacher cache needs a positive number of bytes, got {max_bytes}")
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.hits = 0
        self.misses = 0
        self._answers: dict[Hashable, Any] = {}

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: Hashable, device: torch.device) -> Any:
        """The answer under a key on a device, or None."""
        answer = self._answers.get(key)
        if answer is None:
            self.misses += 1
            return None
        self.hits += 1
        return to_device(answer, device)

    def put(self, key: Hashable, answer: Any) -> bool:
        """Keep an answer, a NamedTuple of tensors, if there is room.

        Returns:
            Whether it was kept.
        """
        size = sum(tensor.numel() * tensor.element_size() for tensor in answer)
        if key in self._answers or self.num_bytes + size > self.max_bytes:
            return False
        # A copy: a row of a larger tensor would keep all of it alive.
        self._answers[key] = type(answer)(*(tensor.detach().to("cpu", copy=True) for tensor in answer))
        self.num_bytes += size
        return True

    @property
    def hit_rate(self) -> float:
        """Share of the answers that were found, in 0..1."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0
