"""Assign object queries to the objects of a prompt: what the set losses of the detector start from.

The costs are those that SAM 3's detector is trained with (class 2, L1 5, GIoU 2; focal alpha 0.25, gamma 2); the
assignment itself is scipy's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class SetTargets:
    """The objects that a batch of prompts asks for, padded to the largest number of them.

    Attributes:
        boxes_btx: Normalised (cx, cy, w, h), (B, T, 4); any values where padded.
        valid_bt: True for objects, False for padding, (B, T).
        asked_bt: Which of the objects a prompt really asks for, (B, T); None: all of them. The others still get queries
            whose boxes and masks can be judged, and whose scores should be low.
    """

    boxes_btx: Tensor
    valid_bt: Tensor
    asked_bt: Tensor | None = None

    @property
    def answers_bt(self) -> Tensor:
        """True for the objects that the prompt asks for, (B, T)."""
        return self.valid_bt if self.asked_bt is None else self.valid_bt & self.asked_bt

    @property
    def num_objects_b(self) -> Tensor:
        """Objects that each prompt asks for, (B,); 0 for a prompt that nothing in the image answers."""
        return self.answers_bt.sum(dim=1)


@dataclass(frozen=True)
class Matches:
    """Pairs of a query and an object, over the whole batch: three index tensors of shape (M,)."""

    prompt: Tensor
    query: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.prompt)


class BinaryHungarianMatcherV2(nn.Module):
    """The cheapest one-to-one assignment of objects to queries, prompt by prompt. It has no weights."""

    def __init__(
        self,
        cost_class: float = 2.0,
        cost_bbox: float = 5.0,
        cost_giou: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        """
        Args:
            cost_class: Weight of the focal class cost.
            cost_bbox: Weight of the L1 distance of normalised (cx, cy, w, h).
            cost_giou: Weight of the negative generalised IoU.
            alpha: Focal weight of positives.
            gamma: Focal exponent.
        """
        super().__init__()
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou
        self.alpha = alpha
        self.gamma = gamma

    @torch.no_grad()
    def forward(
        self,
        logits_bq: Tensor,
        boxes_bqx: Tensor,
        targets: SetTargets,
        repeats: int = 1,
        more_costs_bqt: Tensor | None = None,
    ) -> Matches:
        """
        Args:
            logits_bq: Class logits, (B, Q).
            boxes_bqx: Predicted boxes, normalised (cx, cy, w, h), (B, Q, 4).
            targets: Objects per prompt.
            repeats: How many queries each object gets (more than 1 for a one-to-many branch), as far as there are
                queries.
            more_costs_bqt: Added to the costs of giving each query each object, e.g. of their masks, (B, Q, T).

        Returns:
            The pairs, ordered by prompt.

        Raises:
            ValueError: If a box or a logit is not finite, so that no assignment exists.
        """
        from scipy.optimize import linear_sum_assignment

        costs_bqt = self._costs(logits_bq.float(), boxes_bqx.float(), targets)
        if more_costs_bqt is not None:
            costs_bqt = costs_bqt + more_costs_bqt
        counts = targets.valid_bt.sum(dim=1).tolist()
        order = targets.valid_bt.long().argsort(dim=1, descending=True, stable=True)
        costs_bqt = costs_bqt.gather(2, order[:, None].expand_as(costs_bqt)).cpu()
        order = order.cpu()
        if not torch.isfinite(costs_bqt).all():
            raise ValueError(
                "matching: a predicted box or score is not finite, so objects cannot be assigned to queries"
            )
        prompts, queries, chosen = [], [], []
        for b, count in enumerate(counts):
            if not count:
                continue
            cost = costs_bqt[b, :, :count]
            copies = max(1, min(repeats, cost.shape[0] // count))
            query, column = linear_sum_assignment(cost.repeat(1, copies).numpy())
            query, column = torch.as_tensor(query), torch.as_tensor(column) % count
            prompts.append(torch.full_like(query, b))
            queries.append(query)
            chosen.append(order[b, column])
        device = logits_bq.device
        empty = [torch.zeros(0, dtype=torch.long)]
        return Matches(*(torch.cat(rows or empty).to(device) for rows in (prompts, queries, chosen)))

    def _costs(self, logits_bq: Tensor, boxes_bqx: Tensor, targets: SetTargets) -> Tensor:
        """Cost of giving each query each object, (B, Q, T). The class speaks for objects alone that are asked for."""
        targets_btx = targets.boxes_btx.float()
        log_p, log_not_p = nn.functional.logsigmoid(logits_bq), nn.functional.logsigmoid(-logits_bq)
        p = log_p.exp()
        as_object = -self.alpha * (1 - p) ** self.gamma * log_p
        as_nothing = -(1 - self.alpha) * p**self.gamma * log_not_p
        distance = (boxes_bqx[:, :, None] - targets_btx[:, None]).abs().sum(-1)
        giou = pairwise_giou(boxes_bqx, targets_btx)
        by_class = (as_object - as_nothing)[..., None] * targets.answers_bt[:, None]
        return self.cost_class * by_class + self.cost_bbox * distance - self.cost_giou * giou


def pairwise_giou(boxes_bqx: Tensor, targets_btx: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al., 2019) of each box with each target of the same batch item.

    Args:
        boxes_bqx: (cx, cy, w, h), (B, Q, 4).
        targets_btx: (cx, cy, w, h), (B, T, 4).

    Returns:
        (B, Q, T) in [-1, 1].
    """
    a, b = _corners(boxes_bqx)[:, :, None], _corners(targets_btx)[:, None]
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    outer = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inner
    tiny = torch.finfo(union.dtype).eps
    return inner / union.clamp(min=tiny) - (outer - union) / outer.clamp(min=tiny)


def _corners(boxes: Tensor) -> Tensor:
    centre, half = boxes[..., :2], boxes[..., 2:].clamp(min=0) / 2
    return torch.cat([centre - half, centre + half], dim=-1)
