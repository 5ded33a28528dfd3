"""Prompts for the detector of the tiny teacher: phrases, exemplar boxes and points, and which objects answer them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from teacher_data import COLOUR_NAMES, KINDS
from torch import Tensor

from sam3.model.prompt import Prompt
from sam3.model.prompt_sampling import jitter_boxes

VISUAL = "visual"
"""The phrase that stands for "what the boxes and points show"."""
ANYTHING = "shape"
BOX_SLOTS = 2
# How often each kind of prompt is drawn.
SHARES = {"category": 0.42, "kind": 0.06, "colour": 0.14, "absent": 0.16, "exemplar": 0.2, "excluding": 0.02}


@dataclass
class Queries:
    """Prompts of a batch of scenes, Q per scene, in the order of the scenes."""

    texts: list[str]
    """B * Q phrases."""
    members: Tensor
    """Which objects of its scene answer each prompt, bool (B * Q, MAX_OBJECTS)."""
    boxes: Tensor
    """Normalised (cx, cy, w, h), (B * Q, BOX_SLOTS, 4)."""
    box_labels: Tensor
    """1 for "like this", 0 for "not like this", -1 for an empty slot, (B * Q, BOX_SLOTS)."""
    points: Tensor
    """Normalised (x, y), (B * Q, 1, 2)."""
    point_labels: Tensor
    """As ``box_labels``, (B * Q, 1)."""

    def to_prompt(self) -> Prompt:
        """The geometric part, as the model takes it."""
        return Prompt(
            box_embeddings=self.boxes.transpose(0, 1),
            box_mask=self.box_labels < 0,
            box_labels=self.box_labels.clamp(min=0).T,
            point_embeddings=self.points.transpose(0, 1),
            point_mask=self.point_labels < 0,
            point_labels=self.point_labels.clamp(min=0).T,
        )


def normalised_boxes(boxes_xyxy: Tensor, size_px: int) -> Tensor:
    """Pool boxes (first and last pixel) to normalised (cx, cy, w, h) of the outer edges."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:] + 1.0
    return torch.cat([(low + high) / 2, high - low], dim=-1) / size_px


def draw_queries(batch: dict[str, Tensor], per_image: int, kinds: dict[str, float] | None = None) -> Queries:
    """Draw prompts at random (torch's global generator).

    Args:
        batch: Collated items of a `ScenePool`.
        per_image: Q.
        kinds: Shares of the kinds of prompts; default `SHARES`.
    """
    shares = kinds or SHARES
    names, weights = list(shares), torch.tensor(list(shares.values()))
    size_px = batch["image"].shape[-1]
    drawn = []
    for i, count in enumerate(batch["count"].tolist()):
        scene = Scene(
            batch["categories"][i, :count].cpu(),
            batch["boxes"][i, :count].float().cpu(),
            batch["coverage"][i, :count].cpu(),
            size_px,
            batch["boxes"].shape[1],
        )
        for choice in torch.multinomial(weights, per_image, replacement=True).tolist():
            drawn.append(scene.draw(names[choice]))
    texts, *parts = zip(*drawn, strict=True)
    device = batch["image"].device
    return Queries(list(texts), *(torch.stack(part).to(device) for part in parts))


class Scene:
    """Draws the prompts of one scene."""

    def __init__(self, categories: Tensor, boxes: Tensor, coverage: Tensor, size_px: int, max_objects: int) -> None:
        self.categories = categories
        self.boxes_px = boxes
        self.coverage = coverage
        self.size_px = size_px
        self.max_objects = max_objects

    def draw(self, kind: str) -> tuple[str, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One prompt: phrase, members, boxes, box labels, points, point labels."""
        boxes, box_labels = torch.full((BOX_SLOTS, 4), 0.5), torch.full((BOX_SLOTS,), -1)
        points, point_labels = torch.full((1, 2), 0.5), torch.full((1,), -1)
        seed = int(torch.randint(len(self.categories), ()))
        shape, colour = self.categories[seed].tolist()
        alike = (self.categories == self.categories[seed]).all(dim=1)
        if kind == "absent":
            text, members = self._absent(shape, colour)
        elif kind == "kind":
            text, members = KINDS[shape], self.categories[:, 0] == shape
        elif kind == "colour":
            text, members = f"{COLOUR_NAMES[colour]} {ANYTHING}", self.categories[:, 1] == colour
        elif kind == "excluding":
            # "All of that kind, but not like this one."
            text, members = KINDS[shape], (self.categories[:, 0] == shape) & ~alike
            boxes[0], box_labels[0] = self._box(seed), 0
        elif kind == "exemplar":
            text, members = VISUAL, alike
            if torch.rand(()) < 0.25:
                points[0], point_labels[0] = self._point(seed), 1
            else:
                boxes[0], box_labels[0] = self._box(seed), 1
                other = self._other(seed, alike)
                if other is not None:
                    boxes[1], box_labels[1] = self._box(other), int(alike[other])
        else:
            text, members = f"{COLOUR_NAMES[colour]} {KINDS[shape]}", alike
            if torch.rand(()) < 0.1:  # a phrase with an example
                boxes[0], box_labels[0] = self._box(seed), 1
        padded = torch.zeros(self.max_objects, dtype=torch.bool)
        padded[: len(members)] = members
        return text, padded, boxes, box_labels, points, point_labels

    def _absent(self, shape: int, colour: int) -> tuple[str, Tensor]:
        """A phrase that nothing answers: mostly right in one word and wrong in the other."""
        what = float(torch.rand(()))
        for _ in range(20):
            other_shape = int(torch.randint(len(KINDS), ())) if what < 0.75 else shape
            other_colour = int(torch.randint(len(COLOUR_NAMES), ())) if what > 0.35 else colour
            wanted = torch.tensor([other_shape, other_colour])
            if not (self.categories == wanted).all(dim=1).any():
                break
        members = (self.categories == wanted).all(dim=1)
        return f"{COLOUR_NAMES[other_colour]} {KINDS[other_shape]}", members

    def _other(self, seed: int, alike: Tensor) -> int | None:
        """A second exemplar for some prompts: another one alike, or one that is not meant."""
        if len(alike) < 2 or torch.rand(()) > 0.3:
            return None
        index = int(torch.randint(len(alike) - 1, ()))
        return index + (index >= seed)

    def _box(self, index: int) -> Tensor:
        box = jitter_boxes(self.boxes_px[index][None], (self.size_px, self.size_px), 0.05)
        return normalised_boxes(box, self.size_px)[0].clamp(0, 1)

    def _point(self, index: int) -> Tensor:
        """A random place well inside the object."""
        flat = self.coverage[index].flatten().float()
        cell = int(torch.multinomial((flat >= 0.9 * flat.max()).float(), 1))
        side = self.coverage.shape[-1]
        return (torch.tensor([cell % side, cell // side]) + 0.5) / side
