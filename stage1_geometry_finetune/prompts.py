"""What the objects of a batch are asked with.

A batch has B images and K objects in all. Objects are not padded: they lie one after another, and each names its image.
Every object is a query of its own (one prompt set per object, many objects per image), never an exemplar of another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Mixed into the ids of prompts that were cut down; arbitrary, non-negative and different.
_BOX_ONLY, _POINTS_ONLY = 0x35A1D7C24E9B6F03, 0x1C6F93E05B28D4A7


class PromptBatch(NamedTuple):
    """The prompts of K objects on B images; a tuple of tensors, so that it is pinned and moved like any batch.

    Coordinates are shares of the model's square input, padding of a letterbox included: x and y in 0..1. (0, 0) is the
    corner of the top-left pixel, so the middle of pixel i of S lies at (i + 0.5) / S, and what counts pixels by their
    middles (the SAM heads) gets x S - 0.5.
    """

    image_of_object: Tensor
    """int64 (K,): which image of the batch, ascending."""
    boxes_cxcywh: Tensor
    """float32 (K, 4): centre and size; zeros where there is no box."""
    has_box: Tensor
    """bool (K,)."""
    points_xy: Tensor
    """float32 (K, P, 2); zeros where padded. P is the most points of any object, and may be 0."""
    point_labels: Tensor
    """int64 (K, P): 1 inside the object, 0 outside; 0 where padded."""
    is_point: Tensor
    """bool (K, P): False where padded, which is on the right."""
    masks: Tensor
    """bool (K, M, M): the annotated masks over the model's input, M being 4 G."""
    prompt_ids: Tensor
    """int64 (K,): equal ids ask the same thing of the same view of the same image."""

    @property
    def num_objects(self) -> int:
        """K."""
        return len(self.image_of_object)

    def select(self, objects: Tensor) -> PromptBatch:
        """The prompts of some objects: int64 (N,) positions, or bool (K,)."""
        return PromptBatch(*(field[objects] for field in self))

    def boxes_only(self) -> PromptBatch:
        """The same without points; ids are other ones, because another thing is asked."""
        return self._asking(self.has_box, torch.zeros_like(self.is_point), _BOX_ONLY)

    def points_only(self) -> PromptBatch:
        """The same without boxes."""
        return self._asking(torch.zeros_like(self.has_box), self.is_point, _POINTS_ONLY)

    def _asking(self, has_box: Tensor, is_point: Tensor, id_bits: int) -> PromptBatch:
        return self._replace(
            boxes_cxcywh=self.boxes_cxcywh * has_box[:, None],
            has_box=has_box,
            points_xy=self.points_xy * is_point[..., None],
            point_labels=self.point_labels * is_point,
            is_point=is_point,
            prompt_ids=self.prompt_ids ^ id_bits,
        )


def join_prompts(prompts: Sequence[PromptBatch]) -> PromptBatch:
    """Prompts of several images as those of a batch.

    Args:
        prompts: One for each image of the batch, in order; ``image_of_object`` is ignored.

    Raises:
        ValueError: If there is none at all.
    """
    if not prompts:
        raise ValueError("prompts of no image can't be joined: the side of the masks would be unknown")
    num_points = max(each.points_xy.shape[1] for each in prompts)
    padded = [_pad_points(each, num_points) for each in prompts]
    joined = [torch.cat(fields) for fields in zip(*padded, strict=True)]
    images = torch.arange(len(prompts)).repeat_interleave(torch.tensor([each.num_objects for each in prompts]))
    return PromptBatch(images, *joined[1:])


def prompt_id(*parts: object) -> int:
    """A non-negative int64 that stands for its arguments, the same in every process and on every machine."""
    text = "\n".join(repr(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _pad_points(prompts: PromptBatch, num_points: int) -> PromptBatch:
    missing = num_points - prompts.points_xy.shape[1]
    if not missing:
        return prompts
    pad = torch.nn.functional.pad
    return prompts._replace(
        points_xy=pad(prompts.points_xy, (0, 0, 0, missing)),
        point_labels=pad(prompts.point_labels, (0, missing)),
        is_point=pad(prompts.is_point, (0, missing)),
    )
