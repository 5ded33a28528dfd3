"""The form of a trunk that prediction runs: a student in its fastest form, made again when its weights change."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn

from sam3.model.deployment import optimize_for_deployment
from sam3.model.student_encoder import StudentTrunk


class DeployedTrunk:
    """Keeps `optimize_for_deployment` of a student beside the student itself.

    The student in the model stays as its file has it, so that it can be saved, compared and trained further, and the
    predictor is as fast as it can be. The copy costs about the student's own memory.
    """

    _copy: nn.Module | None = None
    _tensors: Sequence[Tensor] = ()
    _states: Sequence[tuple[int, int]] = ()

    def reset(self) -> None:
        """Forget the copy; the next `of` makes it again."""
        self.__dict__.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copied or saved model makes its own

    def of(self, trunk: nn.Module) -> nn.Module:
        """What to run in ``trunk``'s place, under ``torch.no_grad()``.

        A ViT, a trunk in training mode and one that was compiled are run as they are.
        """
        if not isinstance(trunk, StudentTrunk) or trunk.training or trunk._compiled_call_impl is not None:
            return trunk
        tensors = list(chain(trunk.parameters(), trunk.buffers()))
        states = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
        is_current = len(tensors) == len(self._tensors) and all(
            a is b for a, b in zip(tensors, self._tensors, strict=True)
        )
        if self._copy is None or not is_current or states != self._states:
            self._copy = optimize_for_deployment(trunk)
            self._tensors, self._states = tensors, states
        return self._copy
