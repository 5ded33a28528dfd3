"""The image trunk: a plain ViT with windowed and global blocks, tiled absolute and axial rotary positions.

Layouts: images (B, 3, S, S); inside the trunk everything is channels last, (B, H, W, C); the result is (B, C, H, W).

Parameter names are those of Meta's SAM 3 release (https://github.com/facebookresearch/sam3, commit 99d02f2). What
differs: the rotary table is recomputed for whatever grid comes in, so any input size that is a multiple of the patch
works and ``.to(torch.bfloat16)`` cannot damage it; the released key ``attn.freqs_cis`` is still written on saving, and
checked on loading.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3.config import TrunkConfig

TABLE_KEY = "freqs_cis"
_MLP_PIECE = 1024


def rotary_table(
    head_dim: int, grid_hw: tuple[int, int], scale: float, theta: float, device: torch.device | None = None
) -> Tensor:
    """Axial rotary positions of a grid as unit complex numbers.

    The first half of the ``head_dim / 2`` pairs turns with the column, the second half with the row; the frequencies
    of a half are ``theta ** (-4 j / head_dim)``.

    Args:
        head_dim: Channels of one attention head.
        grid_hw: Rows and columns of the grid; tokens are row-major.
        scale: Factor on the integer positions (1 in windows; window / grid in global blocks, which compresses the
            grid into the range that windows have seen).
        theta: Base of the frequencies.
        device: Where to make it.

    Returns:
        complex64, (H * W, head_dim / 2).
    """
    height, width = grid_hw
    exponents = torch.arange(0, head_dim, 4, device=device, dtype=torch.float32) / head_dim
    frequencies = theta**-exponents
    columns = torch.arange(width, device=device, dtype=torch.float32) * scale
    rows = torch.arange(height, device=device, dtype=torch.float32) * scale
    angles_x = (columns[:, None] * frequencies)[None].expand(height, -1, -1)
    angles_y = (rows[:, None] * frequencies)[:, None].expand(-1, width, -1)
    angles = torch.cat([angles_x, angles_y], dim=-1).flatten(0, 1)
    return torch.complex(angles.cos(), angles.sin())


def apply_rotary(x_bt2hd: Tensor, table: Tensor) -> Tensor:
    """Turn adjacent channel pairs of queries and keys by the positions' angles, in float32.

    Args:
        x_bt2hd: Queries and keys of each token, (B, T, 2, heads, D). Overwritten if it is float32 and needs no
            gradient: at 1008 px it is the largest tensor of a block's attention.
        table: `rotary_table`, (T, D / 2).

    Returns:
        The same shape and dtype.
    """
    pairs = x_bt2hd.to(torch.float32).unflatten(-1, (-1, 2))
    table = table[:, None, None]
    if torch.compiler.is_compiling():  # inductor has no complex arithmetic but fuses this into the neighbours
        real, imag = pairs.unbind(-1)
        turned = torch.stack((real * table.real - imag * table.imag, real * table.imag + imag * table.real), -1)
    elif torch.is_grad_enabled() and x_bt2hd.requires_grad:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * table)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs).mul_(table))
    return turned.flatten(-2).to(x_bt2hd.dtype)


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one linear map: (B, 3, S, S) -> (B, H, W, C)."""

    def __init__(self, patch_size_px: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, patch_size_px, stride=patch_size_px, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).permute(0, 2, 3, 1)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions on queries and keys."""

    def __init__(self, dim: int, num_heads: int, table_side: int, table_scale: float, theta: float) -> None:
        """``table_side`` and ``table_scale`` describe the rotary table that a released checkpoint stores."""
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.table_side = table_side
        self.table_scale = table_scale
        self.theta = theta
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_btc: Tensor, table: Tensor) -> Tensor:
        """(B, T, C) and the positions' `rotary_table` -> (B, T, C)."""
        batch, tokens, dim = x_btc.shape
        qkv = self.qkv(x_btc).view(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k = apply_rotary(qkv[:, :, :2], table).permute(2, 0, 3, 1, 4)
        v = qkv[:, :, 2].transpose(1, 2)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).reshape(batch, tokens, dim))

    def released_table(self, device: torch.device | None = None) -> Tensor:
        """The table as released checkpoints store it under ``freqs_cis``."""
        if device is not None and device.type == "meta":  # nothing to compute
            return torch.empty(self.table_side**2, self.head_dim // 2, dtype=torch.complex64, device=device)
        return rotary_table(self.head_dim, (self.table_side,) * 2, self.table_scale, self.theta, device)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + TABLE_KEY] = self.released_table(self.qkv.weight.device)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        table = state_dict.pop(prefix + TABLE_KEY, None)
        if table is not None:
            errors += self.table_problems(table, prefix + TABLE_KEY)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def table_problems(self, table: Tensor, key: str) -> list[str]:
        """A table made for other positions means weights of another model. A table cast to real says nothing."""
        shape = (self.table_side**2, self.head_dim // 2)
        if tuple(table.shape) != shape:
            return [f"{key}: the rotary table has shape {tuple(table.shape)}, this model's is {shape}"]
        if not table.is_complex() or table.is_meta:
            return []
        difference = float((table - self.released_table(table.device)).abs().max())
        if difference < 1e-3:
            return []
        return [f"{key}: the rotary table differs from this model's by up to {difference:.3g}"]


class Mlp(nn.Module):
    """Two linear maps around an exact GELU."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.fc2(F.gelu(self.fc1(x)))
        # Without gradients the hidden activations, five times the tokens' size, need not exist all at once: pieces save
        # 190 MB at 1008 px, and a little time.
        tokens = x.flatten(0, -2)
        result = torch.empty_like(tokens)
        for piece, target in zip(tokens.split(_MLP_PIECE), result.split(_MLP_PIECE), strict=True):
            target.copy_(self.fc2(F.gelu(self.fc1(piece))))
        return result.view_as(x)


def drop_path(x: Tensor, probability: float, training: bool) -> Tensor:
    """Stochastic depth: zero a residual branch of whole samples, and scale the others to keep the mean."""
    if not training or probability == 0.0:
        return x
    keep = 1.0 - probability
    mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
    return x * (mask / keep)


def split_windows(x_bhwc: Tensor, window: int) -> Tensor:
    """(B, H, W, C) -> (B * windows, window * window, C), zero-padded at the bottom and right where needed."""
    height, width, dim = x_bhwc.shape[1:]
    x = x_bhwc
    if height % window or width % window:  # padding by nothing would still copy
        x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return x.transpose(2, 3).reshape(-1, window * window, dim)


def join_windows(windows: Tensor, window: int, grid_hw: tuple[int, int]) -> Tensor:
    """Inverse of `split_windows`: (B * windows, window * window, C) -> (B, H, W, C)."""
    height, width = grid_hw
    rows, columns = math.ceil(height / window), math.ceil(width / window)
    x = windows.view(-1, rows, columns, window, window, windows.shape[-1]).transpose(2, 3)
    return x.reshape(-1, rows * window, columns * window, windows.shape[-1])[:, :height, :width]


class Block(nn.Module):
    """Pre-norm transformer block over one window at a time (``window``) or the whole grid (``window`` 0)."""

    def __init__(self, config: TrunkConfig, window: int, drop_path_rate: float, grid_size: int) -> None:
        super().__init__()
        self.window = window
        self.drop_path_rate = drop_path_rate
        dim = config.embed_dim
        side, scale = (window, 1.0) if window else (grid_size, config.window_size / grid_size)
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = Attention(dim, config.num_heads, side, scale, config.rope_theta)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, config.mlp_dim)

    def forward(self, x_bhwc: Tensor, table: Tensor) -> Tensor:
        """(B, H, W, C) and the rotary table of one window or of the grid -> (B, H, W, C)."""
        grid_hw = (x_bhwc.shape[1], x_bhwc.shape[2])
        y = self.norm1(x_bhwc)
        if self.window:
            y = join_windows(self.attn(split_windows(y, self.window), table), self.window, grid_hw)
        else:
            y = self.attn(y.flatten(1, 2), table).unflatten(1, grid_hw)
        x = x_bhwc + drop_path(y, self.drop_path_rate, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path_rate, self.training)


class ViT(nn.Module):
    """SAM 3's image trunk."""

    def __init__(self, config: TrunkConfig, image_size_px: int) -> None:
        """
        Args:
            config: Sizes.
            image_size_px: Side the model is meant for. Only the rotary tables written into state dicts depend on it.
        """
        super().__init__()
        self.config = config
        self.pretrain_side = config.pretrain_img_size_px // config.patch_size_px
        grid_size = image_size_px // config.patch_size_px
        self.patch_embed = PatchEmbed(config.patch_size_px, config.embed_dim)
        # The first row belonged to a class token of the pretraining and is never read.
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.pretrain_side**2, config.embed_dim))
        self.ln_pre = nn.LayerNorm(config.embed_dim, eps=1e-5)
        drop_rates = [config.drop_path_rate * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(
            Block(config, 0 if i in config.global_blocks else config.window_size, drop_rates[i], grid_size)
            for i in range(config.depth)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initialisation for training from scratch; overwritten when a checkpoint is loaded."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def tiled_positions(self, grid_hw: tuple[int, int]) -> Tensor:
        """Absolute positions for a grid, (1, H, W, C): the pretraining grid is repeated, never interpolated."""
        height, width = grid_hw
        side = self.pretrain_side
        grid = self.pos_embed[:, 1:].unflatten(1, (side, side))
        return grid.repeat(1, math.ceil(height / side), math.ceil(width / side), 1)[:, :height, :width]

    def rotary_tables(self, grid_hw: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Tables for a window and for the whole grid. They cost about a millisecond, so nothing is cached."""
        config = self.config
        head_dim = config.embed_dim // config.num_heads
        window = config.window_size
        in_window = rotary_table(head_dim, (window, window), 1.0, config.rope_theta, device)
        in_grid = rotary_table(head_dim, grid_hw, window / max(grid_hw), config.rope_theta, device)
        return in_window, in_grid

    def forward(self, images: Tensor) -> list[Tensor]:
        """The embedding of each image.

        Args:
            images: Preprocessed images, (B, 3, S, S) in the dtype of the weights; S a multiple of the patch size.

        Returns:
            A list with one map, (B, C, G, G).
        """
        patch = self.config.patch_size_px
        if images.shape[-1] % patch or images.shape[-2] % patch:
            raise ValueError(f"image size {tuple(images.shape[-2:])} is not a multiple of the patch size {patch} px")
        x = self.patch_embed(images)
        grid_hw = (x.shape[1], x.shape[2])
        window_table, grid_table = self.rotary_tables(grid_hw, x.device)
        x = self.ln_pre(x + self.tiled_positions(grid_hw))
        for block in self.blocks:
            x = block(x, window_table if block.window else grid_table)
        return [x.permute(0, 3, 1, 2)]
