"""The detector's decoder: object queries and a presence token read prompt and image, and refine boxes layer by layer.

Restates the decoder of Meta's SAM 3 package 0.1.4, a DETR decoder with boxes as queries
(DAB-DETR, https://arxiv.org/abs/2201.12329) and a bias from box edges to image rows and columns
(after Plain-DETR, https://arxiv.org/abs/2308.01904).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sam3.config import DecoderConfig
from sam3.devices import without_autocast
from sam3.model.attention_layers import MultiheadAttention
from sam3.model.box_ops import cxcywh_to_xyxy, inverse_sigmoid
from sam3.model.fusion_encoder import TransformerEncoderFusion
from sam3.model.position_encoding import box_sine_embedding
from sam3.sam.layers import MLP

# Matrices that no Xavier initialisation reaches; embeddings are N(0, 1) by default.
_KEEP_DEFAULT = ("bbox_embed", "query_embed", "reference_points")


class DecoderOutput(NamedTuple):
    """What the heads read. D layers: the last one in eval, all of them in training."""

    hs: Tensor
    """Normed queries, (D, B, N, C). With one-to-many queries N is doubled and they are the second half."""
    boxes: Tensor
    """Refined boxes as normalised cxcywh, float32, (D, B, N, 4)."""
    presence_logits: Tensor
    """Whether the concept is in the image at all, (D, 1, B)."""
    presence_feats: Tensor
    """Presence token of the last layer, (1, B, C)."""
    num_one_to_one: int
    """Queries of the one-to-one part; equal to N unless there are one-to-many queries."""


def log_offsets(edges: Tensor, size: int) -> Tensor:
    """Signed offsets of the grid lines of an axis from two edges, on a logarithmic scale.

    Args:
        edges: Normalised positions of two edges along the axis, float32, (..., 2).
        size: Cells along the axis. A cell is at its left or top line, i / size.

    Returns:
        (..., size, 2): 0 at the edge, +-1 when 7/8 of the image away.
    """
    lines = torch.arange(size, device=edges.device, dtype=edges.dtype) / size
    offsets = 8 * (lines[:, None] - edges[..., None, :])
    return offsets.sign() * torch.log2(offsets.abs() + 1) / 3


def _linear_float32(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in float32 (or float64), whatever its weights are stored in."""
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    return F.linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))


class TransformerDecoderLayer(nn.Module):
    """Self-attention, prompt, image, MLP; a residual around each and a norm after it.

    The names of the norms are the released ones and do not follow their order.
    """

    def __init__(self, config: DecoderConfig, hidden_dim: int) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(hidden_dim, config.num_heads, config.dropout)
        self.ca_text = MultiheadAttention(hidden_dim, config.num_heads, config.dropout)
        self.cross_attn = MultiheadAttention(hidden_dim, config.num_heads, config.dropout)
        self.linear1 = nn.Linear(hidden_dim, config.mlp_dim)
        self.linear2 = nn.Linear(config.mlp_dim, hidden_dim)
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.norm3 = nn.LayerNorm(hidden_dim)
        self.catext_norm = nn.LayerNorm(hidden_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        pos: Tensor,
        prompt: Tensor,
        prompt_mask: Tensor | None,
        memory: Tensor,
        placed_memory: Tensor,
        image_bias: Tensor,
        num_self: int,
    ) -> Tensor:
        """
        Args:
            x: Presence token and queries, (B, 1 + N, C).
            pos: Position code of the same, (B, 1 + N, C).
            prompt: (B, T, C).
            prompt_mask: bool, (B, T), True for padding.
            memory: Fused image tokens, (B, L, C).
            placed_memory: The same with their position code.
            image_bias: Added to the logits of the attention to the image, (B, heads, 1 + N, L).
            num_self: Tokens at the front that take part in self-attention. The rest, the one-to-many queries of a
                training step, skip it.

        Returns:
            (B, 1 + N, C).
        """
        first, rest = x[:, :num_self], x[:, num_self:]
        placed = first + pos[:, :num_self]
        first = first + self.dropout(self.self_attn(placed, placed, first))
        x = self.norm2(torch.cat([first, rest], dim=1) if rest.shape[1] else first)
        x = self.catext_norm(x + self.dropout(self.ca_text(x + pos, prompt, prompt, prompt_mask)))
        x = self.norm1(x + self.dropout(self.cross_attn(x + pos, placed_memory, memory, attn_bias=image_bias)))
        return self.norm3(x + self.dropout(self._mlp(x)))

    def _mlp(self, x: Tensor) -> Tensor:
        """In float32 under any autocast, as the released model was trained."""
        with without_autocast(x.device.type):
            hidden = self.dropout(F.relu(_linear_float32(self.linear1, x)))
            return _linear_float32(self.linear2, hidden).to(x.dtype)


class TransformerDecoder(nn.Module):
    """All layers with the heads that boxes and presence come from.

    Attributes:
        use_dac: "Divide and conquer": in training the queries appear twice, and the second time (one-to-many) they
            take no part in self-attention. Off: training sees the queries that inference sees.
        use_checkpointing: Recompute each layer, and the bias that it reads, in the backward pass instead of keeping
            them; acts in training alone and changes no result.
    """

    def __init__(
        self, config: DecoderConfig, hidden_dim: int, use_dac: bool = True, use_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.num_queries = config.num_queries
        self.use_dac = use_dac
        self.use_checkpointing = use_checkpointing
        self.layers = nn.ModuleList(TransformerDecoderLayer(config, hidden_dim) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(hidden_dim)
        self.query_embed = nn.Embedding(config.num_queries, hidden_dim)
        self.reference_points = nn.Embedding(config.num_queries, 4)
        self.ref_point_head = MLP(2 * hidden_dim, hidden_dim, hidden_dim, 2)
        self.bbox_embed = MLP(hidden_dim, hidden_dim, 4, 3)
        self.boxRPB_embed_x = MLP(2, hidden_dim, config.num_heads, 2)
        self.boxRPB_embed_y = MLP(2, hidden_dim, config.num_heads, 2)
        self.presence_token = nn.Embedding(1, hidden_dim)
        self.presence_token_head = MLP(hidden_dim, hidden_dim, 1, 3)
        self.presence_token_out_norm = nn.LayerNorm(hidden_dim)

    def forward(
        self,
        memory: Tensor,
        pos_embed: Tensor,
        prompt: Tensor,
        prompt_mask: Tensor | None,
        size_hw: tuple[int, int],
    ) -> DecoderOutput:
        """
        Args:
            memory: Fused image tokens, (L, B, C); L = H * W, row by row.
            pos_embed: Their position code, (L, B, C).
            prompt: Text and geometry tokens, (T, B, C).
            prompt_mask: bool, (B, T), True for padding.
            size_hw: Height and width of the grid that the L tokens are the rows of.

        Raises:
            ValueError: If the grid has another number of tokens.
        """
        num_tokens, batch, _ = memory.shape
        if num_tokens != size_hw[0] * size_hw[1]:
            raise ValueError(f"decoder: {num_tokens} image tokens are no grid of {size_hw[0]} x {size_hw[1]}")
        context = (prompt.transpose(0, 1), prompt_mask, memory.transpose(0, 1), (memory + pos_embed).transpose(0, 1))
        x, boxes = self._start(batch)
        states: list[Tensor] = []
        all_boxes: list[Tensor] = []
        presence: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            if self.training and self.use_checkpointing:
                x = checkpoint(self._run_layer, layer, x, boxes, context, size_hw, use_reentrant=False)
            else:
                x = self._run_layer(layer, x, boxes, context, size_hw)
            hs = self.norm(x[:, 1:])
            refined = (inverse_sigmoid(boxes) + self.bbox_embed(hs)).sigmoid()
            boxes = refined.detach()
            if self.training or i == len(self.layers) - 1:
                states.append(hs)
                all_boxes.append(refined)
                presence.append(self.presence_token_head(self.presence_token_out_norm(x[:, :1])).squeeze(-1).T)
        return DecoderOutput(
            hs=torch.stack(states),
            boxes=torch.stack(all_boxes),
            presence_logits=torch.stack(presence),
            presence_feats=x[:, :1].transpose(0, 1),
            num_one_to_one=self.num_queries,
        )

    def _start(self, batch: int) -> tuple[Tensor, Tensor]:
        """Tokens (B, 1 + N, C) and reference boxes (B, N, 4) before the first layer."""
        repeats = 2 if self.training and self.use_dac else 1
        queries = self.query_embed.weight.repeat(repeats, 1)
        tokens = torch.cat([self.presence_token.weight, queries])
        points = self.reference_points.weight.repeat(repeats, 1)
        boxes = points.to(torch.promote_types(points.dtype, torch.float32)).sigmoid()
        return tokens.expand(batch, -1, -1), boxes.expand(batch, -1, -1)

    def _run_layer(
        self,
        layer: nn.Module,
        x: Tensor,
        boxes: Tensor,
        context: tuple[Tensor, Tensor | None, Tensor, Tensor],
        size_hw: tuple[int, int],
    ) -> Tensor:
        """One layer. The bias, the largest tensor of the decoder, lives no longer than this call."""
        pos = F.pad(self.query_positions(boxes), (0, 0, 1, 0))
        return layer(x, pos, *context, self.box_bias(boxes, size_hw), 1 + self.num_queries)

    def query_positions(self, boxes: Tensor) -> Tensor:
        """Position code of queries with these boxes: (B, N, 4) -> (B, N, C)."""
        dim = self.query_embed.embedding_dim
        waves = box_sine_embedding(boxes, dim)
        return self.ref_point_head(waves.to(self.query_embed.weight.dtype))

    def box_bias(self, boxes: Tensor, size_hw: tuple[int, int]) -> Tensor:
        """Bias of the attention to the image: a term of each image row plus a term of each image column.

        Args:
            boxes: Normalised cxcywh, (B, N, 4); may reach outside of the image.
            size_hw: Height and width of the grid.

        Returns:
            (B, heads, 1 + N, H * W); zero in the first row, the presence token's.
        """
        height, width = size_hw
        x0, y0, x1, y1 = cxcywh_to_xyxy(boxes).unbind(-1)
        columns = self._axis_bias(self.boxRPB_embed_x, torch.stack([x0, x1], dim=-1), width)
        rows = self._axis_bias(self.boxRPB_embed_y, torch.stack([y0, y1], dim=-1), height)
        return (rows[..., :, None] + columns[..., None, :]).flatten(-2)

    @staticmethod
    def _axis_bias(embed: MLP, edges: Tensor, size: int) -> Tensor:
        """(B, N, 2) edges -> (B, heads, 1 + N, size), with the presence token's zeros in front."""
        offsets = log_offsets(edges, size)
        bias = embed(offsets.to(next(embed.parameters()).dtype))
        # Contiguous, or the sum over rows and columns would be laid out heads last and attention would copy it.
        return F.pad(bias.permute(0, 3, 1, 2), (0, 0, 1, 0)).contiguous()


class TransformerWrapper(nn.Module):
    """Holds fusion encoder and decoder under their released names, with fresh weights of `init_transformer`."""

    def __init__(self, encoder: TransformerEncoderFusion, decoder: TransformerDecoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        init_transformer(self)


def init_transformer(transformer: nn.Module) -> None:
    """Fresh weights for training, in place, as the original begins; whatever the weights were.

    Matrices are Xavier-uniform, but for the hidden layers of the box head, which keep PyTorch's default; queries and
    reference points are N(0, 1). The box head's last layer is zero: the first boxes are the reference points.

    Args:
        transformer: A `TransformerWrapper`, or its decoder or encoder alone.
    """
    for module in transformer.modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm, nn.Embedding)):
            module.reset_parameters()
    for name, parameter in transformer.named_parameters():
        if name.endswith(("in_proj_bias", "out_proj.bias")):
            nn.init.zeros_(parameter)
        elif parameter.dim() > 1 and not any(kept in name for kept in _KEEP_DEFAULT):
            nn.init.xavier_uniform_(parameter)
    for module in transformer.modules():
        if isinstance(module, TransformerDecoder):
            for parameter in module.bbox_embed.layers[-1].parameters():
                nn.init.zeros_(parameter)
