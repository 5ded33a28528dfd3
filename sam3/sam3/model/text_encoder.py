"""The text encoder: a causal CLIP text transformer whose tokens, not a pooled vector, become the prompt.

Layouts are batch-first inside, (n, L, width); results are sequence-first, (L, n, C), as the prompt is everywhere.
Parameter names are those of Meta's SAM 3 release (https://github.com/facebookresearch/sam3, commit 99d02f2). What
differs: the causal mask is not stored, and the projection that nothing reads is not computed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sam3.config import TextConfig
from sam3.model.attention_layers import MultiheadAttention
from sam3.model.tokenizer import PADDING_ID, SimpleTokenizer


class ResidualAttentionBlock(nn.Module):
    """Pre-norm block: causal self-attention, then two linear maps around an exact GELU."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.ln_1 = nn.LayerNorm(width)
        self.attn = MultiheadAttention(width, num_heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, hidden), gelu=nn.GELU(), c_proj=nn.Linear(hidden, width))
        )

    def forward(self, x_nlc: Tensor) -> Tensor:
        x = x_nlc + self.attn(self.ln_1(x_nlc), is_causal=True)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """The blocks, under the released name ``resblocks``."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(config.width, config.num_heads, config.mlp_ratio) for _ in range(config.depth)
        )

    def forward(self, x_nlc: Tensor) -> Tensor:
        for block in self.resblocks:
            x_nlc = block(x_nlc)
        return x_nlc


class TextTransformer(nn.Module):
    """Token ids to features of every token.

    Padding is not masked: thanks to causality it cannot influence the tokens before it, and later readers mask it.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.transformer = Transformer(config)
        self.ln_final = nn.LayerNorm(config.width)
        # Released files hold it; nothing reads it.
        self.text_projection = nn.Parameter(torch.empty(config.width, config.projection_dim))
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=config.width**-0.5)

    def forward(self, embeds_nlc: Tensor) -> Tensor:
        """Token embeddings without positions -> features, both (n, L, width)."""
        x = embeds_nlc + self.positional_embedding[: embeds_nlc.shape[1]]
        return self.ln_final(self.transformer(x))


class VETextEncoder(nn.Module):
    """Texts to prompt tokens of the detector's width."""

    def __init__(self, text: TextConfig, hidden_dim: int) -> None:
        super().__init__()
        self.tokenizer = SimpleTokenizer(text.context_length)
        self.encoder = TextTransformer(text)
        self.resizer = nn.Linear(text.width, hidden_dim)

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Ids on the CPU, (n, L)."""
        return self.tokenizer(texts)

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings without positions: (n, L) ids on any device -> (L, n, width) where the weights are."""
        weight = self.encoder.token_embedding.weight
        return self.encoder.token_embedding(ids.to(weight.device)).transpose(0, 1)

    def encode(self, embeds: Tensor) -> Tensor:
        """Token embeddings, (L, n, width) -> prompt tokens, (L, n, C)."""
        return self.resizer(self.encoder(embeds.transpose(0, 1))).transpose(0, 1)

    def forward(self, texts: str | Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            texts: One text or several.

        Returns:
            ``mask``, bool (n, L), True for padding; ``memory``, the prompt tokens, (L, n, C); ``embeds``, the token
            embeddings without positions, (L, n, width).

        Raises:
            TypeError: If something is not a string.
        """
        ids = self.tokenize(texts)
        embeds = self.embed(ids)
        return (ids == PADDING_ID).to(embeds.device), self.encode(embeds), embeds
