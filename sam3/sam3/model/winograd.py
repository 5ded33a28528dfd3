"""Winograd's minimal filtering for a 3x3 convolution whose weights are fixed.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015, https://arxiv.org/abs/1509.09308: the output
is computed in tiles of 4x4 from input tiles of 6x6; with both transformed, 36 matrix products over the channels replace
144 of the direct method. PyTorch's CPU convolutions do not use it. In float32 the result differs from the direct
convolution by about 1e-6 of its scale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3.backbones.packed import PackedWeight, has_packed_operations, packed_linear, reorder_linear, runs_packed

TILE = 4
_PATCH = TILE + 2
_POINTS = _PATCH * _PATCH

# The matrices of F(4, 3): y = A^T [(G g) * (B^T d)], for the points 0, 1, -1, 2, -2 and infinity.
_INPUT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_WEIGHT = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


class WinogradConv2d(PackedWeight, nn.Conv2d):
    """A 3x3 convolution of stride 1 and padding 1, for inference.

    From its first forward on it holds the transformed weights (four times the size of the original ones).
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        """
        Args:
            conv: Its parameters are shared.

        Raises:
            ValueError: If it is another kind of convolution.
        """
        settings = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
        if settings != ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros"):
            raise ValueError(f"Winograd convolution needs kernel 3, stride 1, padding 1, one group; got {conv}")
        super().__init__(conv.in_channels, conv.out_channels, 3, padding=1, bias=conv.bias is not None, device="meta")
        self.weight, self.bias = conv.weight, conv.bias
        self.train(conv.training)

    def forward(self, x_bchw: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H, W)."""
        is_float32 = x_bchw.dtype == self.weight.dtype == torch.float32
        if torch.is_grad_enabled() or not is_float32 or torch.is_autocast_enabled(x_bchw.device.type):
            return super().forward(x_bchw)
        batch, _, height, width = x_bchw.shape
        rows, columns = -(-height // TILE), -(-width // TILE)
        padding = (0, 0, 1, columns * TILE + 1 - width, 1, rows * TILE + 1 - height)
        x_bhwc = F.pad(x_bchw.permute(0, 2, 3, 1), padding)
        # (B, rows, columns, C, 6, 6) -> (36, B * rows * columns, C)
        patches = x_bhwc.unfold(1, _PATCH, TILE).unfold(2, _PATCH, TILE).permute(4, 5, 0, 1, 2, 3)
        patches = (_on_both_axes(_INPUT, x_bchw) @ patches.reshape(_POINTS, -1)).view(_POINTS, -1, self.in_channels)
        tiles = self._products(patches).view(_POINTS, -1)
        tiles = (_on_both_axes(_OUTPUT, x_bchw) @ tiles).view(TILE, TILE, batch, rows, columns, self.out_channels)
        if self.bias is not None:
            tiles = tiles + self.bias
        y_bhwc = tiles.permute(2, 3, 0, 4, 1, 5).reshape(batch, rows * TILE, columns * TILE, self.out_channels)
        return y_bhwc[:, :height, :width].permute(0, 3, 1, 2)

    def _products(self, patches_pti: Tensor) -> Tensor:
        """(36, tiles, C_in) -> (36, tiles, C_out)."""
        if not (runs_packed(patches_pti) and has_packed_operations()):
            return torch.bmm(patches_pti, self.packed_weight(self._transform).transpose(1, 2))
        rows = patches_pti.shape[1]
        weights = self.packed_weight(lambda weight: [reorder_linear(w, rows) for w in self._transform(weight)])
        # One by one: each has the size at which oneDNN is at its best, and a batched product is slower.
        return torch.stack([packed_linear(*pair) for pair in zip(patches_pti, weights, strict=True)])

    @torch.no_grad()
    def _transform(self, weight: Tensor) -> Tensor:
        """(36, C_out, C_in); computed on the CPU, because not every device has float64 (MPS)."""
        kernels = weight.cpu().double()
        transform = kernels.new_tensor(_WEIGHT)
        points = torch.einsum("ik,ockl,jl->ijoc", transform, kernels, transform)
        return points.reshape(_POINTS, self.out_channels, self.in_channels).to(weight.dtype).to(weight.device)


def _on_both_axes(matrix: tuple[tuple[float, ...], ...], like: Tensor) -> Tensor:
    """A transform along both axes at once, for patches whose rows and columns are flattened."""
    one_axis = torch.tensor(matrix, dtype=like.dtype, device=like.device)
    return torch.kron(one_axis, one_axis)
