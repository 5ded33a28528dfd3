"""The form of a trunk that prediction runs: a student in its fastest form, made again when its weights change."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from sam3.model.deployment import has_cpp_compiler, optimize_for_deployment
from sam3.model.student_encoder import StudentTrunk

_LOG = logging.getLogger(__name__)


class DeployedTrunk:
    """Keeps `optimize_for_deployment` of a student beside the student itself.

    The student in the model stays as its file has it, so that it can be saved, compared and trained further, and the
    predictor is as fast as it can be. The copy costs about the student's own memory.
    """

    _copy: nn.Module | None = None
    _tensors: Sequence[Tensor] = ()
    _states: Sequence[Any] = ()

    def reset(self) -> None:
        """Forget the copy; the next `of` makes it again."""
        self.__dict__.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copied or saved model makes its own

    def of(self, trunk: nn.Module) -> nn.Module:
        """What to run in ``trunk``'s place, under ``torch.no_grad()``.

        A ViT, a trunk in training mode and one that is being traced are run as they are. After ``trunk.compile()`` the
        fast form is compiled too, where there is a compiler.
        """
        if not isinstance(trunk, StudentTrunk) or trunk.training or _is_traced():
            return trunk
        compile = trunk._compiled_call_impl is not None
        tensors = list(chain(trunk.parameters(), trunk.buffers()))
        states = [compile, *((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)]
        is_current = len(tensors) == len(self._tensors) and all(
            a is b for a, b in zip(tensors, self._tensors, strict=True)
        )
        if self._copy is None or not is_current or states != self._states:
            self._copy = optimize_for_deployment(trunk, compile=compile and _can_compile(tensors))
            self._tensors, self._states = tensors, states
        return self._copy


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _can_compile(tensors: Sequence[Tensor]) -> bool:
    if has_cpp_compiler() or any(tensor.device.type != "cpu" for tensor in tensors):
        return True
    _LOG.warning("compile=True has no effect: no C++ compiler was found (g++, clang++ or CXX); running without it")
    return False
