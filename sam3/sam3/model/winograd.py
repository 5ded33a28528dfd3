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

TILE = 4
_PATCH = TILE + 2

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


class WinogradConv2d(nn.Conv2d):
    """A 3x3 convolution of stride 1 and padding 1, for inference.

    Holds the transformed weights (four times the size of the original ones) as a buffer that no file contains.
    """

    weight_tci: Tensor
    input_transform: Tensor
    output_transform: Tensor

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
        device = conv.weight.device
        input_1d = torch.tensor(_INPUT, dtype=torch.float64, device=device)
        output_1d = torch.tensor(_OUTPUT, dtype=torch.float64, device=device)
        # A transform along both axes at once: rows and columns of a patch are flattened.
        self.register_buffer("input_transform", torch.kron(input_1d, input_1d).float(), persistent=False)
        self.register_buffer("output_transform", torch.kron(output_1d, output_1d).float(), persistent=False)
        self.register_buffer("weight_tci", self._transformed_weight(), persistent=False)
        self.register_load_state_dict_post_hook(_transform_again)
        self.train(conv.training)

    @torch.no_grad()
    def _transformed_weight(self) -> Tensor:
        """(36, C_in, C_out)."""
        transform = torch.tensor(_WEIGHT, dtype=torch.float64, device=self.weight.device)
        weight = torch.einsum("ik,ockl,jl->ijco", transform, self.weight.double(), transform)
        return weight.reshape(_PATCH * _PATCH, self.in_channels, self.out_channels).to(self.weight.dtype)

    def forward(self, x_bchw: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H, W)."""
        if torch.is_grad_enabled() or x_bchw.dtype != torch.float32:
            return super().forward(x_bchw)
        batch, _, height, width = x_bchw.shape
        rows, columns = -(-height // TILE), -(-width // TILE)
        padding = (0, 0, 1, columns * TILE + 1 - width, 1, rows * TILE + 1 - height)
        x_bhwc = F.pad(x_bchw.permute(0, 2, 3, 1), padding)
        # (B, rows, columns, C, 6, 6) -> (36, B * rows * columns, C)
        patches = x_bhwc.unfold(1, _PATCH, TILE).unfold(2, _PATCH, TILE).permute(4, 5, 0, 1, 2, 3)
        patches = (self.input_transform @ patches.reshape(_PATCH * _PATCH, -1)).view(
            _PATCH * _PATCH, -1, self.in_channels
        )
        tiles = torch.bmm(patches, self.weight_tci)
        tiles = (self.output_transform @ tiles.view(_PATCH * _PATCH, -1)).view(
            TILE, TILE, batch, rows, columns, self.out_channels
        )
        if self.bias is not None:
            tiles = tiles + self.bias
        y_bhwc = tiles.permute(2, 3, 0, 4, 1, 5).reshape(batch, rows * TILE, columns * TILE, self.out_channels)
        return y_bhwc[:, :height, :width].permute(0, 3, 1, 2)


def _transform_again(module: nn.Module, _incompatible_keys: object) -> None:
    assert isinstance(module, WinogradConv2d)
    module.weight_tci = module._transformed_weight()
