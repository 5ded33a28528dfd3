"""What a batch of prompts on a batch of images consists of, and what comes back.

The batch axis of the detector is prompts, not images: every prompt says which image and which text it belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class FindStage:
    """B prompts: an image, a text and, on request, boxes and points for each.

    Boxes are normalised (cx, cy, w, h), points normalised (x, y). Sequences come first, (n, B, ...); masks are (B, n),
    True where a slot is padding; labels are 1 for an example and 0 for a counter-example.
    """

    img_ids: Tensor
    """Row of the image of each prompt, int64, (B,)."""
    text_ids: Tensor
    """Row of the text of each prompt, int64, (B,)."""
    input_boxes: Tensor | None = None
    input_boxes_mask: Tensor | None = None
    input_boxes_label: Tensor | None = None
    input_points: Tensor | None = None
    input_points_mask: Tensor | None = None
    object_ids: list[Any] | None = None
    input_points_label: Tensor | None = None

    @classmethod
    def of(cls, img_ids: list[int], text_ids: list[int], device: torch.device | str | None = None) -> FindStage:
        """Prompts whose boxes and points, if any, come as a `Prompt` beside them."""
        images, texts = (torch.tensor(ids, dtype=torch.int64, device=device) for ids in (img_ids, text_ids))
        return cls(images, texts)


@dataclass
class FindMetadata:
    """What the B prompts of a stage were asked of; read when results are gathered, not by the model."""

    coco_image_id: Sequence[int] | Tensor
    """What results are listed under: one id for each image, or for each prompt, (B,)."""
    original_image_id: Sequence[int] | Tensor
    """Number of the image in its data set, (B,)."""
    original_category_id: Sequence[int] | Tensor
    """Number of what the prompt names in its data set, (B,)."""
    original_size: Sequence[Sequence[int]] | Tensor
    """Height and width of the image in pixels, (B, 2)."""


@dataclass
class BatchedDatapoint:
    """Images, texts and prompts of one forward pass of the whole model."""

    img_batch: Tensor
    """Preprocessed images, (I, 3, S, S)."""
    find_text_batch: list[str]
    """The texts that ``FindStage.text_ids`` counts."""
    find_inputs: list[FindStage]
    """One stage; several belong to video."""
    find_targets: list[Any]
    """What the prompts should find, for a matcher; as many as stages, or an empty list."""
    find_metadatas: list[Any]
    """A `FindMetadata` for each stage, or an empty list; the model does not read them."""
    raw_images: list[Any] | None = None


class SAM3Output:
    """Results by stage and, within it, by step. Iterating gives the last step of each stage."""

    def __init__(self, stages: list[list[dict[str, Any]]]) -> None:
        self.stages = stages
        """All steps."""

    def __len__(self) -> int:
        return len(self.stages)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (steps[-1] for steps in self.stages)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.stages[index][-1]
