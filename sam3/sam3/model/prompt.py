"""Geometric prompts: boxes, points and masks of several prompts, as right-padded sequences.

Embeddings and labels are sequence-first, (n, B, ...); padding masks are batch-first, (B, n), True where padded.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Coordinates are normalised, but may leave the image: a box drawn over its edge is legal, one in pixels is not.
_COORDINATE_RANGE = (-1.0, 2.0)
_FIELDS = tuple(f"{kind}_{what}" for kind in ("box", "point", "mask") for what in ("embeddings", "mask", "labels"))


def concat_padded_sequences(seq1: Tensor, mask1: Tensor, seq2: Tensor, mask2: Tensor) -> tuple[Tensor, Tensor]:
    """Join right-padded sequences so that the result is right-padded again.

    The valid part of the second follows the valid part of the first directly: ``1 2 pad`` and ``10 pad`` give
    ``1 2 10 pad pad``.

    Args:
        seq1: (n1, B, ...).
        mask1: bool, (B, n1), True for padding, which is on the right.
        seq2: (n2, B, ...); its dtype is the result's.
        mask2: bool, (B, n2).

    Returns:
        The sequence, (n1 + n2, B, ...), with unspecified values where it is padding; its mask, (B, n1 + n2).
    """
    total = seq1.shape[0] + seq2.shape[0]
    length1, length2 = (~mask1).sum(1), (~mask2).sum(1)
    target = torch.arange(seq2.shape[0], device=seq2.device)[:, None] + length1
    target = target.view(*target.shape, *(1,) * (seq2.ndim - 2)).expand_as(seq2)
    joined = torch.cat((seq1.to(seq2.dtype), torch.zeros_like(seq2))).scatter(0, target, seq2)
    mask = torch.arange(total, device=seq2.device) >= (length1 + length2)[:, None]
    return joined, mask


class Prompt:
    """Geometric prompts of B queries. All fields are None if nothing was given: nothing can be encoded then.

    Attributes:
        box_embeddings: Normalised (cx, cy, w, h), (n, B, 4), zeros where padded.
        box_mask: bool, (B, n).
        box_labels: int64, (n, B), 1 for "like this", 0 for "not like this".
        point_embeddings: Normalised (x, y), (n, B, 2), zeros where padded; with ``point_mask`` and ``point_labels``.
        mask_embeddings: (n, B, 1, h, w), or None, with ``mask_mask`` and ``mask_labels``. The released geometry encoder
            reads no masks.
    """

    box_embeddings: Tensor | None
    box_mask: Tensor | None
    box_labels: Tensor | None
    point_embeddings: Tensor | None
    point_mask: Tensor | None
    point_labels: Tensor | None
    mask_embeddings: Tensor | None
    mask_mask: Tensor | None
    mask_labels: Tensor | None

    def __init__(
        self,
        *,
        box_embeddings: Tensor | None = None,
        box_mask: Tensor | None = None,
        box_labels: Tensor | None = None,
        point_embeddings: Tensor | None = None,
        point_mask: Tensor | None = None,
        point_labels: Tensor | None = None,
        mask_embeddings: Tensor | None = None,
        mask_mask: Tensor | None = None,
        mask_labels: Tensor | None = None,
    ) -> None:
        """Missing boxes or points are empty sequences, missing labels positive, missing masks without padding.

        Raises:
            ValueError: If shapes disagree, a label is neither 0 nor 1, or a coordinate is not a normalised one.
        """
        given = next((e for e in (box_embeddings, point_embeddings, mask_embeddings) if e is not None), None)
        for name in _FIELDS:
            setattr(self, name, None)
        if given is None:
            return
        if given.ndim < 3:
            raise ValueError(f"prompt: embeddings are (n, B, ...), got shape {tuple(given.shape)}")
        nothing = torch.zeros((0, given.shape[1]), device=given.device)
        boxes = nothing.new_zeros((*nothing.shape, 4)) if box_embeddings is None else box_embeddings
        points = nothing.new_zeros((*nothing.shape, 2)) if point_embeddings is None else point_embeddings
        batch = given.shape[1]
        self.box_embeddings, self.box_mask, self.box_labels = _checked("boxes", boxes, box_mask, box_labels, batch, 4)
        self.point_embeddings, self.point_mask, self.point_labels = _checked(
            "points", points, point_mask, point_labels, batch, 2
        )
        if mask_embeddings is not None:
            self.append_masks(mask_embeddings, mask_labels, mask_mask)

    @property
    def is_null(self) -> bool:
        """Whether nothing was given, not even empty sequences."""
        return self.box_embeddings is None

    def append_boxes(self, boxes: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Add boxes, (n, B, 4), their labels, (n, B), and padding, (B, n), each as in the constructor."""
        self._append(Prompt(box_embeddings=boxes, box_labels=labels, box_mask=mask))

    def append_points(self, points: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Add points, (n, B, 2), like `append_boxes`."""
        self._append(Prompt(point_embeddings=points, point_labels=labels, point_mask=mask))

    def append_masks(self, masks: Tensor, labels: Tensor | None = None, attn_mask: Tensor | None = None) -> None:
        """Set the mask prompt, (1, B, 1, h, w).

        Raises:
            ValueError: If there is one already, or several are given.
        """
        if self.mask_embeddings is not None or masks.shape[0] != 1:
            raise ValueError("prompt: one mask prompt of shape (1, B, 1, h, w) is supported")
        batch = masks.shape[1]
        if self.is_null:
            self._append(Prompt(point_embeddings=masks.new_zeros((0, batch, 2))))
        self.mask_embeddings = masks
        self.mask_labels = masks.new_ones((1, batch), dtype=torch.long) if labels is None else labels.long()
        self.mask_mask = masks.new_zeros((batch, 1), dtype=torch.bool) if attn_mask is None else attn_mask

    def clone(self) -> Prompt:
        """A copy that shares no tensor with this one."""
        copy = Prompt()
        for name in _FIELDS:
            value = getattr(self, name)
            setattr(copy, name, None if value is None else value.clone())
        return copy

    def _append(self, other: Prompt) -> None:
        for kind in ("box", "point"):
            names = [f"{kind}_{what}" for what in ("embeddings", "mask", "labels")]
            embeddings, mask, labels = (getattr(other, name) for name in names)
            if not self.is_null and getattr(self, names[0]) is not None:
                own_embeddings, own_mask, own_labels = (getattr(self, name) for name in names)
                if own_embeddings.shape[1] != embeddings.shape[1]:
                    raise ValueError(
                        f"prompt: this one is for {own_embeddings.shape[1]} queries, what is added is for "
                        f"{embeddings.shape[1]}"
                    )
                labels, _ = concat_padded_sequences(own_labels, own_mask, labels, mask)
                embeddings, mask = concat_padded_sequences(own_embeddings, own_mask, embeddings, mask)
            for name, value in zip(names, (embeddings, mask, labels), strict=True):
                setattr(self, name, value)


def _checked(
    what: str, embeddings: Tensor, mask: Tensor | None, labels: Tensor | None, batch: int, channels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, mask and labels with defaults filled in and padding zeroed, so that nothing odd hides in it."""
    num = embeddings.shape[0]
    if mask is None:
        mask = torch.zeros((batch, num), dtype=torch.bool, device=embeddings.device)
    if labels is None:
        labels = torch.ones((num, batch), dtype=torch.long, device=embeddings.device)
    for name, tensor, shape in (
        (what, embeddings, (num, batch, channels)),
        (f"mask of {what}", mask, (batch, num)),
        (f"labels of {what}", labels, (num, batch)),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"prompt: {name} must have shape {shape}, got {tuple(tensor.shape)}")
    padded = mask.T
    embeddings = embeddings.masked_fill(padded[..., None], 0)
    labels = labels.to(torch.long).masked_fill(padded, 0)
    if num and not embeddings.is_meta:
        _check_values(what, embeddings, labels)
    return embeddings, mask, labels


def _check_values(what: str, embeddings: Tensor, labels: Tensor) -> None:
    low, high = _COORDINATE_RANGE
    if not bool(((embeddings >= low) & (embeddings <= high)).all()):  # false for NaN, too
        raise ValueError(
            f"prompt: {what} are normalised to [0, 1]; got coordinates from {embeddings.min().item():.4g} to "
            f"{embeddings.max().item():.4g}. Divide pixels by the image's width and height."
        )
    if not bool(((labels == 0) | (labels == 1)).all()):
        raise ValueError(
            f"prompt: labels of {what} are 1 (positive) or 0 (negative); got {sorted({*labels.flatten().tolist()})}"
        )
