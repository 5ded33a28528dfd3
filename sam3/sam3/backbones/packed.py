"""Convolutions and linear layers for float32 inference on the CPU: oneDNN's own weight layout, activation inside.

PyTorch hands each weight to oneDNN in PyTorch's order, and oneDNN reorders it in every call; an activation after it is
another pass over memory. The operations that ``torch.compile`` uses for frozen weights have neither cost, and need no
compiler. Everywhere else (gradients, other devices and dtypes) these layers compute what their base classes do.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "relu": F.relu,
}
_OPERATIONS = (
    "_convolution_pointwise",
    "_linear_pointwise",
    "_reorder_convolution_weight",
    "_reorder_linear_weight",
)


def has_packed_operations() -> bool:
    """Whether this build of PyTorch has the operations, on a processor where they were measured (x86-64)."""
    return (
        torch.backends.mkldnn.is_available()
        and platform.machine().lower() in ("x86_64", "amd64")
        and all(hasattr(torch.ops.mkldnn, name) for name in _OPERATIONS)
    )


def runs_packed(x: Tensor) -> bool:
    """Whether an input is computed by the packed operations: float32 on the CPU, without gradients or autocast."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
    )


def reorder_linear(weight_oi: Tensor, rows: int) -> Tensor:
    """The weight of a linear layer in oneDNN's layout, which only `packed_linear` can read.

    Args:
        weight_oi: (C', C).
        rows: About how many vectors it will be multiplied by at a time: the layout is chosen for that many.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight_oi.contiguous(), rows)


def packed_linear(x: Tensor, weight_oi: Tensor, bias_o: Tensor | None = None, activation: str = "none") -> Tensor:
    """``activation(x @ weight.T + bias)`` with a weight from `reorder_linear`."""
    return torch.ops.mkldnn._linear_pointwise(x, weight_oi, bias_o, activation, [], _algorithm(activation))


def _algorithm(activation: str) -> str:
    return "none" if activation == "gelu" else ""  # of GELU: "none" is the exact one, "tanh" the approximation


class PackedWeight:
    """For layers that keep another form of their weight: it is made on first use, and again when the weight changes."""

    weight: Tensor
    _packed: tuple[Any, tuple[int, int]] | None = None

    def packed_weight(self, pack: Callable[[Tensor], Any]) -> Any:
        """What ``pack`` makes of the weight as it is now."""
        weight = self.weight
        state = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        if self._packed is None or self._packed[1] != state:
            self._packed = (pack(weight.detach()), state)
        return self._packed[0]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._packed = None
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packed = None
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None}  # oneDNN's tensors can neither be copied nor saved


class PackedConv2d(PackedWeight, nn.Conv2d):
    """A convolution with zero padding and the activation that follows it, as one operation.

    Attributes:
        activation: ``none``, ``gelu`` (the exact one), ``hardswish`` or ``relu``.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        """
        Args:
            conv: Its parameters are shared.
        """
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            stride=conv.stride,  # type: ignore[arg-type]
            padding=conv.padding,  # type: ignore[arg-type]
            dilation=conv.dilation,  # type: ignore[arg-type]
            groups=conv.groups,
            bias=conv.bias is not None,
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.activation = "none"
        self.train(conv.training)

    def forward(self, x_bchw: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        if not runs_packed(x_bchw) or self.weight.dtype != torch.float32:
            return _ACTIVATIONS[self.activation](super().forward(x_bchw))
        if self._is_pointwise:
            # The layout that a convolution wants depends on the size of the map, that of a linear layer does not.
            rows = x_bchw[:, 0].numel()
            weight = self.packed_weight(lambda w: reorder_linear(w.flatten(1), rows))
            return packed_linear(x_bchw.permute(0, 2, 3, 1), weight, self.bias, self.activation).permute(0, 3, 1, 2)
        weight = self.packed_weight(lambda w: self._pack(w, list(x_bchw.shape)))
        return torch.ops.mkldnn._convolution_pointwise(
            x_bchw,
            weight,
            self.bias,
            self.padding,
            self.stride,
            self.dilation,
            self.groups,
            self.activation,
            [],
            _algorithm(self.activation),
        )

    @property
    def _is_pointwise(self) -> bool:
        return self.kernel_size == self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1

    def _pack(self, weight: Tensor, input_size: list[int]) -> Tensor:
        return torch.ops.mkldnn._reorder_convolution_weight(
            weight, self.padding, self.stride, self.dilation, self.groups, input_size
        )


class PackedLinear(PackedWeight, nn.Linear):
    """A linear layer and the activation that follows it, as one operation.

    Attributes:
        activation: As of `PackedConv2d`.
    """

    def __init__(self, linear: nn.Linear) -> None:
        """
        Args:
            linear: Its parameters are shared.
        """
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.activation = "none"
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if not runs_packed(x) or self.weight.dtype != torch.float32:
            return _ACTIVATIONS[self.activation](super().forward(x))
        rows = x.numel() // self.in_features
        return packed_linear(x, self.packed_weight(lambda w: reorder_linear(w, rows)), self.bias, self.activation)


def pack_layers(root: nn.Module, pairs_of: Mapping[str, Iterable[tuple[str, str]]]) -> None:
    """Replace, in place, every convolution and linear layer below ``root`` by its packed form, under its name.

    Args:
        root: A folded network in eval mode.
        pairs_of: Module class -> (layer, activation) children where the one directly follows the other.
    """
    for module in list(root.modules()):
        for name, child in list(module.named_children()):
            packed = _packed(child)
            if packed is not None:
                setattr(module, name, packed)
        for pair in pairs_of.get(type(module).__name__, ()):
            join_activation(module, *pair)


def join_activation(module: nn.Module, layer_name: str, activation_name: str) -> None:
    """Let a packed layer compute the activation that follows it, if it can; an identity takes its place."""
    layer, activation = getattr(module, layer_name), _name_of(getattr(module, activation_name))
    if activation is not None and isinstance(layer, PackedConv2d | PackedLinear):
        layer.activation = activation
        setattr(module, activation_name, nn.Identity())


def _name_of(activation: nn.Module) -> str | None:
    """Name of an activation that a packed layer can compute, or None."""
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else None
    return {nn.Hardswish: "hardswish", nn.ReLU: "relu", nn.Identity: "none"}.get(type(activation))


def _packed(layer: nn.Module) -> nn.Module | None:
    """The packed form of a plain layer; None for anything else."""
    if type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return PackedConv2d(layer)
    if type(layer) is nn.Linear:
        return PackedLinear(layer)
    return None
