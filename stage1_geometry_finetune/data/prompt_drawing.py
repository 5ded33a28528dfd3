"""Boxes and clicks drawn from one object's mask.

What an object is asked with depends on the run's seed, the epoch, the image's key and the object alone: not on the
other objects, the batch, the worker or any global random state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

from sam3.model.prompt_sampling import jitter_boxes
from sam3.preprocess import Preprocess
from sam3_train.errors import UserError
from stage1_geometry_finetune.data.object_mask import ObjectMask, depth_map

POINT_SAMPLINGS = ("distance", "uniform", "stored", "centre")


@dataclass(frozen=True)
class PromptSpec:
    """Which prompts are drawn."""

    max_objects: int = 16
    """Per image; of more objects a random subset is taken."""
    box_share: float = 1.0
    """Weight of asking an object with a box alone."""
    point_share: float = 1.0
    """Weight of asking it with points alone."""
    both_share: float = 1.0
    """Weight of asking it with both."""
    num_points: tuple[int, int] = (1, 1)
    """Fewest and most points of an object that is asked with points; every count between is equally likely."""
    point_sampling: str = "distance"
    """``distance``: the deeper a pixel lies inside, the likelier; ``uniform``: all alike; ``stored``: the clicks of the
    annotation, then as ``distance``; ``centre``: the deepest pixel first, then as ``distance``."""
    box_jitter: float = 0.1
    """Standard deviation of a box corner's shift, as a share of the box's side; shifts end at twice that."""
    box_max_shift_px: float = 20.0
    """No corner is shifted further, in pixels of the photo."""
    min_area: float = 1e-4
    """Objects that cover less of the view are left out."""
    is_fixed: bool = False
    """The same objects and prompts in every epoch."""

    def __post_init__(self) -> None:
        shares = (self.box_share, self.point_share, self.both_share)
        problems = []
        if self.max_objects < 1:
            problems.append(f"MAX_OBJECTS must be positive, got {self.max_objects}")
        if min(shares) < 0 or not 0 < sum(shares) < float("inf"):
            problems.append(f"BOX_SHARE, POINT_SHARE and BOTH_SHARE must be 0 or more and not all 0, got {shares}")
        if len(self.num_points) != 2 or not 1 <= self.num_points[0] <= self.num_points[1]:
            problems.append(f"NUM_POINTS is a fewest (1 or more) and a most, got {self.num_points}")
        if self.point_sampling not in POINT_SAMPLINGS:
            problems.append(f"POINT_SAMPLING {self.point_sampling!r} is not one of {', '.join(POINT_SAMPLINGS)}")
        if not 0 <= self.box_jitter < 0.25:  # at a quarter, twice the deviation of both corners turns a box over
            problems.append(f"BOX_JITTER must lie in [0, 0.25), got {self.box_jitter}")
        if not self.box_max_shift_px >= 0:
            problems.append(f"BOX_MAX_SHIFT_PX must be 0 or more, got {self.box_max_shift_px}")
        if not 0 <= self.min_area < 1:
            problems.append(f"MIN_AREA must lie in [0, 1), got {self.min_area}")
        if problems:
            raise ValueError("; ".join(problems))

    def for_validation(self) -> PromptSpec:
        """Every object with its exact box and its innermost pixel, the same every time; compare each alone."""
        return PromptSpec(
            max_objects=self.max_objects,
            box_share=0.0,
            point_share=0.0,
            both_share=1.0,
            point_sampling="centre",
            box_jitter=0.0,
            min_area=self.min_area,
            is_fixed=True,
        )


def prompt_spec(cfg: CfgNode) -> PromptSpec:
    """What a config's ``PROMPTS`` node asks for.

    Raises:
        UserError: If a setting is impossible; the message says all that are.
    """
    node = cfg.PROMPTS
    try:
        return PromptSpec(
            max_objects=node.MAX_OBJECTS,
            box_share=node.BOX_SHARE,
            point_share=node.POINT_SHARE,
            both_share=node.BOTH_SHARE,
            num_points=tuple(node.NUM_POINTS),
            point_sampling=node.POINT_SAMPLING,
            box_jitter=node.BOX_JITTER,
            box_max_shift_px=node.BOX_MAX_SHIFT_PX,
            min_area=node.MIN_AREA,
            is_fixed=node.FIXED,
        )
    except ValueError as error:
        raise UserError(f"PROMPTS: {error}") from None


class ObjectPrompt(NamedTuple):
    """One object's prompt, as shares of the model's input."""

    box_cxcywh: Tensor | None
    """float32 (4,)."""
    points_xy: Tensor
    """float32 (n, 2), all inside the object."""


def draw_prompt(
    mask: ObjectMask,
    stored_xy_px: np.ndarray,
    spec: PromptSpec,
    preprocess: Preprocess,
    generator: torch.Generator,
) -> ObjectPrompt:
    """Ask for an object.

    Args:
        mask: In the view that the preprocessing is shown.
        stored_xy_px: The annotation's clicks, float (n, 2), continuous pixels of the view; some may lie outside.
        spec: What to draw.
        preprocess: Where the view lies in the model's input.
        generator: Of this object alone.
    """
    kind, count = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    box_end, point_end = spec.box_share, spec.box_share + spec.point_share
    kind *= point_end + spec.both_share
    has_box, has_points = not box_end <= kind < point_end, kind >= box_end
    fewest, most = spec.num_points
    num_points = fewest + int(count * (most - fewest + 1))
    # Both are always drawn, so that a share that changes does not change the prompts that stay.
    box = _draw_box(mask, spec, preprocess, generator)
    points = torch.from_numpy(draw_points(mask, stored_xy_px, spec.point_sampling, num_points, generator))
    return ObjectPrompt(
        box if has_box else None,
        _normalised(points, mask, preprocess) if has_points else torch.zeros(0, 2),
    )


def _draw_box(mask: ObjectMask, spec: PromptSpec, preprocess: Preprocess, generator: torch.Generator) -> Tensor:
    edges, last_pixel = torch.tensor([mask.box_xyxy_px]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    moved = jitter_boxes(edges - last_pixel, mask.view_hw, spec.box_jitter, spec.box_max_shift_px, generator)
    x0, y0, x1, y1 = preprocess.boxes_to_model(moved + last_pixel, mask.view_hw)[0] / preprocess.size_px
    return torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])


def draw_points(
    mask: ObjectMask, stored_xy_px: np.ndarray, sampling: str, num_points: int, generator: torch.Generator
) -> np.ndarray:
    """Places inside a mask: float32 (n, 2), continuous pixels of the view, in the order they were drawn.

    Drawn pixels differ as long as there are enough of them.
    """
    first: list[tuple[float, float]] = []
    if sampling == "stored":
        first = [(float(x), float(y)) for x, y in stored_xy_px if mask.contains(float(x), float(y))][:num_points]
    missing = num_points - len(first)
    if not missing:
        return np.array(first, np.float32)
    if sampling == "uniform":
        pixels, step = _draw_evenly(mask.inside, missing, generator), 1
        shape = mask.inside.shape
    else:
        depths, step = depth_map(mask)
        pixels = _draw_by_weight(depths, missing, sampling == "centre", generator)
        shape = depths.shape
    rows, columns = np.divmod(np.array(pixels), shape[1])
    middles = np.stack([columns, rows], axis=1) * step + step // 2 + 0.5 + (mask.left, mask.top)
    return np.array([*first, *middles.tolist()], np.float32)


def _draw_evenly(inside_hw: np.ndarray, num: int, generator: torch.Generator) -> list[int]:
    """Flat positions of pixels, all equally likely; different ones while there are any."""
    in_row = np.cumsum(np.count_nonzero(inside_hw, axis=1))
    chosen: list[int] = []
    ranks: list[int] = []
    for draw in torch.rand(num, generator=generator, dtype=torch.float64).tolist():
        if len(ranks) == in_row[-1]:
            ranks.clear()
        rank = int(draw * (int(in_row[-1]) - len(ranks)))
        for taken in sorted(ranks):  # counted among the pixels that are not taken
            rank += rank >= taken
        ranks.append(rank)
        row = int(np.searchsorted(in_row, rank, side="right"))
        column = np.flatnonzero(inside_hw[row])[rank - (int(in_row[row - 1]) if row else 0)]
        chosen.append(row * inside_hw.shape[1] + int(column))
    return chosen


def _draw_by_weight(weights_hw: np.ndarray, num: int, heaviest_first: bool, generator: torch.Generator) -> list[int]:
    """Flat positions, drawn with a probability in proportion to their weight; different ones while there are any."""
    positions = np.flatnonzero(weights_hw)
    weights = weights_hw.ravel()[positions].astype(np.float64)
    draws = torch.rand(num, generator=generator, dtype=torch.float64).tolist()
    chosen: list[int] = []
    for draw in draws:
        if not weights.any():
            weights[:] = 1.0
        total = np.cumsum(weights)
        if heaviest_first and not chosen:
            pick = int(weights.argmax())
        else:
            pick = int(np.searchsorted(total, draw * total[-1], side="right"))
        chosen.append(int(positions[pick]))
        weights[pick] = 0.0
    return chosen


def _normalised(points_xy_px: Tensor, mask: ObjectMask, preprocess: Preprocess) -> Tensor:
    return preprocess.coords_to_model(points_xy_px, mask.view_hw) / preprocess.size_px
