"""The training task that teaches the tiny teacher's trunk what shapes and colours are called.

The promptable task alone teaches edges and objects: from such features a linear probe names nearly all colours and of
the 13 kinds of shapes no more than chance. Here the trunk learns kinds too, while the SAM heads go on learning what
they know, so that both halves of the teacher read one trunk.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from teacher_data import COLOUR_NAMES, KINDS, flip
from teacher_task import PromptableTask
from torch import Tensor, nn

from sam3.model.sam3_image import Sam3Image
from sam3_train.task import Task

OUTLINE_WEIGHT = 10.0
NUM_RAYS = 16
RAY_STEPS = 32
LONGEST_RAY = 0.6
"""Of the image's side."""


class NamesTask(Task):
    """Batch of scenes in, losses out: names and outlines in all scenes, masks of prompts in the first ones."""

    best_metric: ClassVar[str] = "right_kind"
    best_mode: ClassVar[str] = "max"

    def __init__(self, model: Sam3Image, prompted_scenes: int = 1, prompts_per_scene: int = 5) -> None:
        """
        Args:
            model: With SAM heads.
            prompted_scenes: So many scenes of each batch train the SAM heads, which costs three times as much.
            prompts_per_scene: Prompts in each of those, with one correction each.
        """
        super().__init__()
        self.promptable = PromptableTask(model, prompts_per_scene, num_corrections=1)
        self.prompted_scenes = prompted_scenes
        self.names = NameHeads(model.config.trunk.embed_dim)

    @property
    def model(self) -> Sam3Image:
        """What is trained."""
        return self.promptable.model

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of a batch of scenes, flipped at random.

        Args:
            batch: Collated items of a `teacher_data.ScenePool`.
        """
        turned = flip(batch)
        terms = self.names(self._embed(turned["image"]), turned)
        loss = terms["kind"] + terms["colour"] + OUTLINE_WEIGHT * terms["outline"]
        if self.prompted_scenes:
            prompted = self.promptable({name: values[: self.prompted_scenes] for name, values in batch.items()})
            loss = loss + prompted["loss"]
            terms |= {name: prompted[name] for name in ("iou", "iou_corrected")}
        return {"loss": loss, **terms}

    def validate(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the promptable task measures, and the shares of objects and cells that are named right."""
        values = self.promptable.validate(batch)
        return values | self.names.accuracy(self._embed(batch["image"]), batch)

    def batch_size(self, batch: Any) -> int:
        """Number of scenes."""
        return len(batch["image"])

    def _embed(self, images_u8: Tensor) -> Tensor:
        images = self.model.preprocess.normalize(images_u8)
        return self.model.backbone.vision_backbone.trunk(images)[-1]


class NameHeads(nn.Module):
    """Throw-away heads on the trunk's output: kind and colour of each cell and of each whole object, and outlines.

    Outlines are what makes kinds learnable in so few steps: each cell inside an object must know how far its border is
    in 16 directions, where its box ends and how large it is.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        names = len(KINDS) + len(COLOUR_NAMES)
        self.cell_norm, self.cell = nn.LayerNorm(dim), nn.Linear(dim, names)
        self.whole_norm, self.whole = nn.LayerNorm(dim), nn.Linear(dim, names)
        self.outline_norm, self.outline = nn.LayerNorm(dim), nn.Linear(dim, NUM_RAYS + 5)

    def forward(self, map_bchw: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses ``kind``, ``colour`` (cross entropies of cells plus those of objects) and ``outline``."""
        cells = inner_cells(batch["coverage"], map_bchw.shape[-1])
        features = map_bchw.permute(0, 2, 3, 1)[cells.scene, cells.row, cells.column]
        wanted = outline_of_cells(batch, cells, map_bchw.shape[-1])
        outline = nn.functional.smooth_l1_loss(self.outline(self.outline_norm(features)), 4 * wanted, beta=0.1)
        losses = {"outline": outline}
        logits = self._logits(map_bchw, features, batch)
        names = (batch["categories"][cells.scene, cells.owner], _real_names(batch))
        for i, name in enumerate(("kind", "colour")):
            by_cell, whole = (
                nn.functional.cross_entropy(one[i], truth[:, i]) for one, truth in zip(logits, names, strict=True)
            )
            losses[name] = by_cell + whole
        return losses

    def accuracy(self, map_bchw: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``right_kind`` and ``right_colour`` of whole objects, ``right_kind_cells`` of cells."""
        cells = inner_cells(batch["coverage"], map_bchw.shape[-1])
        features = map_bchw.permute(0, 2, 3, 1)[cells.scene, cells.row, cells.column]
        by_cell, whole = self._logits(map_bchw, features, batch)
        names = _real_names(batch)
        in_cells = batch["categories"][cells.scene, cells.owner]
        return {
            "right_kind": (whole[0].argmax(-1) == names[:, 0]).float().mean(),
            "right_colour": (whole[1].argmax(-1) == names[:, 1]).float().mean(),
            "right_kind_cells": (by_cell[0].argmax(-1) == in_cells[:, 0]).float().mean(),
        }

    def _logits(
        self, map_bchw: Tensor, features_mc: Tensor, batch: dict[str, Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Logits of kinds and of colours, for cells and for objects; an object is the mean of the cells it touches."""
        coverage = nn.functional.adaptive_avg_pool2d(batch["coverage"].float() / 255.0, map_bchw.shape[-1])
        touched = (coverage > 0.02).float()
        pooled = torch.einsum("bnhw,bchw->bnc", touched, map_bchw) / touched.sum((2, 3))[..., None].clamp(min=1)
        sizes = (len(KINDS), len(COLOUR_NAMES))
        whole = self.whole(self.whole_norm(pooled[_is_real(batch)]))
        return self.cell(self.cell_norm(features_mc)).split(sizes, dim=-1), whole.split(sizes, dim=-1)


class Cells:
    """The cells that lie inside an object by half or more, with that object's number."""

    def __init__(self, scene: Tensor, row: Tensor, column: Tensor, owner: Tensor) -> None:
        self.scene, self.row, self.column, self.owner = scene, row, column, owner


def inner_cells(coverage_bnhw: Tensor, side: int) -> Cells:
    """Of a grid of ``side`` cells over each scene."""
    most, owner = nn.functional.adaptive_avg_pool2d(coverage_bnhw.float() / 255.0, side).max(dim=1)
    scene, row, column = (most > 0.5).nonzero(as_tuple=True)
    return Cells(scene, row, column, owner[scene, row, column])


def _is_real(batch: dict[str, Tensor]) -> Tensor:
    numbers = torch.arange(batch["coverage"].shape[1], device=batch["count"].device)
    return numbers < batch["count"][:, None]


def _real_names(batch: dict[str, Tensor]) -> Tensor:
    return batch["categories"][_is_real(batch)]


@torch.no_grad()
def outline_of_cells(batch: dict[str, Tensor], cells: Cells, side: int) -> Tensor:
    """What each cell should know of the object that it lies in, in units of the image's side: (M, 16 + 5).

    Distances to the object's border in 16 directions, to its box's left, top, right and bottom edge, and the square
    root of its visible area.
    """
    masks = batch["coverage"][cells.scene, cells.owner] > 127
    size = masks.shape[-1]
    centre = (torch.stack([cells.column, cells.row], dim=-1) + 0.5) / side
    angles = torch.arange(NUM_RAYS, device=masks.device) * (2 * math.pi / NUM_RAYS)
    directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
    steps = torch.arange(1, RAY_STEPS + 1, device=masks.device) * (LONGEST_RAY / RAY_STEPS)
    places = centre[:, None, None] + directions[:, None] * steps[:, None]
    index = (places * size).floor().long()
    is_inside = ((index >= 0) & (index < size)).all(dim=-1)
    index = index.clamp(0, size - 1)
    of_cell = torch.arange(len(masks), device=masks.device)[:, None, None]
    is_inside &= masks[of_cell, index[..., 1], index[..., 0]]
    reach = is_inside.long().cumprod(dim=-1).sum(dim=-1) * (LONGEST_RAY / RAY_STEPS)
    boxes = batch["boxes"][cells.scene, cells.owner] / batch["image"].shape[-1]
    area = masks.float().mean(dim=(1, 2)).sqrt()[:, None]
    return torch.cat([reach, centre - boxes[:, :2], boxes[:, 2:] - centre, area], dim=-1)
