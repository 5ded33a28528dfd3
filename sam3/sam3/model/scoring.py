"""How well each object query fits the prompt, and what a detection step returns."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sam3.config import ScoringConfig
from sam3.model.box_ops import cxcywh_to_xyxy, inverse_sigmoid
from sam3.model.decoder import DecoderOutput
from sam3.sam.layers import MLP

MAX_JOINT_LOGIT = 10.0
ONE_TO_MANY = "_o2m"
"""Suffix of the keys of the one-to-many half of the queries, which exists in training alone."""


class PromptMlp(MLP):
    """Two linear maps around a ReLU with a residual, then a norm: ``layers.{0,1}`` and ``out_norm``."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__(dim, hidden_dim, dim, 2)
        self.dropout = nn.Dropout(dropout)
        self.out_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(F.relu(self.layers[0](x)))
        return self.out_norm(x + self.layers[1](hidden))


class DotProductScoring(nn.Module):
    """Class logits: scaled dot products of the queries with the mean of the prompt's tokens."""

    def __init__(self, config: ScoringConfig, hidden_dim: int) -> None:
        super().__init__()
        self.max_logit = config.max_logit
        self.prompt_mlp = PromptMlp(hidden_dim, config.mlp_dim, config.dropout)
        self.prompt_proj = nn.Linear(hidden_dim, hidden_dim)
        self.hs_proj = nn.Linear(hidden_dim, hidden_dim)

    def pool_prompt(self, prompt: Tensor, prompt_mask: Tensor | None) -> Tensor:
        """Mean over the tokens that are no padding: (T, B, C) and bool (B, T) -> (B, C).

        Zeros for an item that is all padding. What padding holds has no influence, not even NaN.
        """
        tokens = self.prompt_mlp(prompt)
        if prompt_mask is None:
            return tokens.mean(dim=0)
        tokens = tokens.masked_fill(prompt_mask.T[..., None], 0)
        count = (~prompt_mask).sum(dim=1, keepdim=True).clamp(min=1)
        return tokens.sum(dim=0) / count.to(tokens.dtype)

    def forward(self, hs: Tensor, prompt: Tensor, prompt_mask: Tensor | None) -> Tensor:
        """
        Args:
            hs: Normed queries of D decoder layers, (D, B, N, C).
            prompt: Text and geometry tokens, (T, B, C).
            prompt_mask: bool, (B, T), True for padding.

        Returns:
            Logits, (D, B, N, 1), clamped to the configured range.
        """
        pooled = self.prompt_proj(self.pool_prompt(prompt, prompt_mask))
        logits = self.hs_proj(hs) @ pooled[..., None]
        return (logits * hs.shape[-1] ** -0.5).clamp(-self.max_logit, self.max_logit)


def joint_logits(logits: Tensor, presence_logits: Tensor) -> Tensor:
    """Logit of "the concept is in the image, and this query is it": the product of both probabilities.

    Because of the tolerance of `inverse_sigmoid` the result lies within +-6.9078.

    Args:
        logits: Class logits, (..., N, 1).
        presence_logits: Broadcasts to them.
    """
    return inverse_sigmoid(logits.sigmoid() * presence_logits.sigmoid()).clamp(-MAX_JOINT_LOGIT, MAX_JOINT_LOGIT)


def update_scores_and_boxes(
    decoded: DecoderOutput,
    scoring: DotProductScoring,
    prompt: Tensor,
    prompt_mask: Tensor | None,
    supervise_joint_box_scores: bool = False,
) -> dict[str, Any]:
    """Scores and boxes of the layers that the decoder returned.

    Args:
        decoded: Output of the decoder: the last layer in eval, all layers in training.
        scoring: Makes the class logits.
        prompt: Text and geometry tokens, (T, B, C).
        prompt_mask: bool, (B, T), True for padding.
        supervise_joint_box_scores: Return `joint_logits` as class logits (the video model does, the image model not).

    Returns:
        ``pred_logits`` (B, N, 1), ``pred_boxes`` (B, N, 4) as normalised cxcywh, ``pred_boxes_xyxy``,
        ``presence_logit_dec`` (B, 1), ``queries`` (B, N, C) and ``presence_feats`` (1, B, C) of the last layer. In
        training, ``aux_outputs`` is a list with the first four of them for each earlier layer, and with
        one-to-many queries the first three exist again with the suffix ``_o2m``.
    """
    logits = scoring(decoded.hs, prompt, prompt_mask)
    presence = decoded.presence_logits.transpose(1, 2)  # (D, B, 1)
    if supervise_joint_box_scores:
        logits = joint_logits(logits, presence[..., None])
    num_one_to_one = decoded.num_one_to_one
    per_query = {"pred_logits": logits, "pred_boxes": decoded.boxes, "pred_boxes_xyxy": cxcywh_to_xyxy(decoded.boxes)}
    stacked = {key: value[:, :, :num_one_to_one] for key, value in per_query.items()}
    if num_one_to_one < logits.shape[2]:
        stacked |= {key + ONE_TO_MANY: value[:, :, num_one_to_one:] for key, value in per_query.items()}
    stacked["presence_logit_dec"] = presence
    layers = [{key: value[i] for key, value in stacked.items()} for i in range(len(logits))]
    out: dict[str, Any] = dict(layers[-1])
    out["queries"] = decoded.hs[-1][:, :num_one_to_one]
    out["presence_feats"] = decoded.presence_feats
    if len(layers) > 1:
        out["aux_outputs"] = layers[:-1]
    return out
