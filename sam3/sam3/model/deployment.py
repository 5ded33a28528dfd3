"""The fastest form of a student for running it: same features, weights that no longer change.

What `optimize_for_deployment` does, and why (measured with `scripts/bench_students.py`, 1008 px on CPU):

- BatchNorm and RepViT's branches are folded into convolutions (`fuse_for_inference`);
- ``channels_last``: the students' depthwise convolutions are limited by memory, and this layout reads it in order;
- on the CPU, blocks run strip by strip, so that what lies between their layers stays in the cache
  (`sam3.backbones.strips`), with weights in oneDNN's layout and activations inside the convolutions
  (`sam3.backbones.packed`); the head's 3x3 convolution over 1024 channels, which is most of the work of the smallest
  student, is computed by Winograd's method with a quarter of the multiplications (`sam3.model.winograd`);
- on request ``torch.compile`` for the backbone, which takes tens of seconds at the first image.

Names in the state dict are those of the folded student.
"""

from __future__ import annotations

import copy
import os
import shutil

import torch
from torch import nn

from sam3.backbones.packed import has_packed_operations, join_activation, pack_layers
from sam3.backbones.strip_blocks import use_subclasses
from sam3.model.student_encoder import StudentEncoder, StudentTrunk, fuse_for_inference
from sam3.model.winograd import WinogradConv2d

_MIN_WINOGRAD_CHANNELS = 256  # below, the transforms cost more than the multiplications they save


def optimize_for_deployment(
    module: nn.Module, channels_last: bool = True, fuse: bool = True, compile: bool = False
) -> nn.Module:
    """A copy of a student in the form that runs fastest, in eval mode and without gradients.

    Args:
        module: A `StudentTrunk` or `StudentEncoder` with its final weights. Anything else, such as the teacher's ViT,
            has no special form: it is returned as it is (compiled in place, if asked for).
        channels_last: Keep weights and features in channels-last order. Inputs may be in either.
        fuse: Fold BatchNorm and branches, and use the CPU kernels named above.
        compile: Compile with ``torch.compile``; run the result under ``torch.no_grad()``.

    Returns:
        A module that is called like ``module``. Outputs are equal within 1e-3 where they are of order 1.

    Raises:
        ValueError: If ``compile`` is asked for on the CPU and there is no C++ compiler.
    """
    if compile and _runs_on_cpu(module) and not has_cpp_compiler():
        raise ValueError("torch.compile needs a C++ compiler on the CPU: install g++ or clang++, or set CXX")
    deployed = module
    if isinstance(module, StudentTrunk):
        deployed = StudentTrunk(_deploy(module.model, channels_last, fuse, compile)).eval()
    elif isinstance(module, StudentEncoder):
        deployed = _deploy(module, channels_last, fuse, compile)
    elif compile:
        deployed.compile()
    return deployed


def has_cpp_compiler() -> bool:
    """Whether ``torch.compile`` will find a C++ compiler for CPU code."""
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name)


def _runs_on_cpu(module: nn.Module) -> bool:
    return all(parameter.device.type == "cpu" for parameter in module.parameters())


def _is_float32(module: nn.Module) -> bool:
    return all(parameter.dtype == torch.float32 for parameter in module.parameters())


def _deploy(student: StudentEncoder, channels_last: bool, fuse: bool, compile: bool) -> StudentEncoder:
    deployed = copy.deepcopy(student).eval().requires_grad_(False)
    if fuse:
        deployed = fuse_for_inference(deployed)
        if _runs_on_cpu(deployed) and _is_float32(deployed):
            _use_cpu_kernels(deployed, with_backbone=not compile)
    if channels_last:
        deployed.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compile:
        deployed.backbone.compile(options={"freezing": True} if _runs_on_cpu(deployed) else None)
    return deployed


def _use_cpu_kernels(student: StudentEncoder, with_backbone: bool) -> None:
    """Change a folded student, in place, to run with the kernels and in the order that are fastest on the CPU."""
    _use_winograd(student.head)
    if not has_packed_operations():
        return
    spec = student.backbone.spec
    pack_layers(student if with_backbone else student.head, spec.activation_pairs)
    join_activation(student.head, "0", "2")  # the BatchNorm between them is folded
    if with_backbone and spec.strip_blocks is not None:
        use_subclasses(student.backbone.model, spec.strip_blocks())


def _use_winograd(head: nn.Sequential) -> None:
    conv = head[3]
    if type(conv) is nn.Conv2d and min(conv.in_channels, conv.out_channels) >= _MIN_WINOGRAD_CHANNELS:
        head[3] = WinogradConv2d(conv)
