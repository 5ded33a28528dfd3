"""From annotations to the prompts of a batch: what the loader's workers add to each photo.

Only the objects that are chosen are decoded: an SA-1B image has about a hundred masks of three million pixels each.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

from sam3.preprocess import Preprocess
from sam3_train.data.decode import UnreadableImageError
from sam3_train.data.distillation_dataset import Photo
from sam3_train.data.sa1b import AnnotationError, Sa1bObject
from sam3_train.distillation_config import teacher_config
from stage1_geometry_finetune.data.annotations import read_objects, require_size, stored_clicks
from stage1_geometry_finetune.data.object_mask import ObjectMask, mask_in_view, mask_on_model
from stage1_geometry_finetune.data.prompt_drawing import ObjectPrompt, PromptSpec, draw_prompt, prompt_spec
from stage1_geometry_finetune.prompts import PromptBatch, join_prompts, prompt_id

MASK_CELLS = 4
"""Cells of a mask along a cell of the feature grid, as in the model's own masks."""
_REPORTED = 10
_log = logging.getLogger(__name__)


class PromptExtras:
    """Adds ``prompts`` to photos and to their batches.

    An image whose annotation is missing, malformed as a whole, made for another image size, or without any mask that
    is not empty cannot be used: it is left out of its batch and counts as a bad image. A malformed object alone is
    passed over; `report` names the first ones. An image may have no object for another reason (all are smaller than
    ``min_area``, or a crop shows none): it stays, with no prompt.

    Args:
        spec: What to draw.
        preprocess: Of the data set.
        mask_side: M, the side of the ground-truth masks: four times the feature grid's.
        seed: Of the run.
    """

    def __init__(self, spec: PromptSpec, preprocess: Preprocess, mask_side: int, seed: int = 0) -> None:
        self.spec = spec
        self.preprocess = preprocess
        self.mask_side = mask_side
        self.seed = seed
        self.damaged: set[str] = set()
        """The first malformed objects that `report` was told of; of a whole data set's it would grow without end."""

    @classmethod
    def from_config(cls, cfg: CfgNode, preprocess: Preprocess, seed: int, is_train: bool) -> PromptExtras:
        """As ``PROMPTS`` asks for training; for validation every object with its exact box and its innermost pixel.

        Raises:
            UserError: If a setting is impossible.
        """
        spec = prompt_spec(cfg)
        side = MASK_CELLS * teacher_config(cfg).grid_size
        return cls(spec if is_train else spec.for_validation(), preprocess, side, seed)

    def load(self, photo: Photo) -> dict[str, Any]:
        """The item's ``prompts``, a `PromptBatch` of one image, and ``damaged``: malformed objects that were met.

        Raises:
            UnreadableImageError: If the image cannot be used.
        """
        damaged: list[str] = []
        try:
            objects = read_objects(photo.index, photo.position, damaged)
            for each in objects[:1]:
                require_size(each, photo.original_hw)
        except AnnotationError as error:
            raise UnreadableImageError(str(error)) from None
        epoch = 0 if self.spec.is_fixed else photo.epoch
        chosen = self._choose(objects, photo, epoch, damaged)
        return {"prompts": self._ask(chosen, photo, epoch), "damaged": damaged}

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch's ``prompts``, and the malformed objects met on the way."""
        return {
            "prompts": join_prompts([item["prompts"] for item in items]),
            "damaged": [reason for item in items for reason in item["damaged"]],
        }

    def report(self, batch: dict[str, Any]) -> None:
        """Name malformed objects of a batch, the first ten of a run; called in the main process."""
        for reason in batch.pop("damaged", ()):
            if len(self.damaged) == _REPORTED or reason in self.damaged:
                continue
            self.damaged.add(reason)
            last = "; further ones are left out without a word" if len(self.damaged) == _REPORTED else ""
            _log.warning("object left out: %s%s", reason, last)

    def _choose(
        self, objects: list[Sa1bObject], photo: Photo, epoch: int, damaged: list[str]
    ) -> list[tuple[Sa1bObject, ObjectMask]]:
        """Up to ``max_objects`` objects that the view shows, in the annotation's order."""
        smallest = self.spec.min_area * photo.view_hw[0] * photo.view_hw[1]
        order = [prompt_id("order", self.seed, epoch, photo.key, each.object_id) for each in objects]
        chosen: dict[int, ObjectMask] = {}
        any_mask = False
        for position in np.argsort(order, kind="stable").tolist():
            each = objects[position]
            if 0 < each.area_px < smallest:  # as the annotation has it; its mask needs no look
                any_mask = True
                continue
            try:
                whole = each.mask()
            except AnnotationError as error:
                damaged.append(str(error))
                continue
            if not whole.any():
                damaged.append(f"{each.where}: the mask is empty")
                continue
            any_mask = True
            shown = mask_in_view(whole, photo.view)
            if shown is not None and shown.area_px >= smallest:
                chosen[position] = shown
            if len(chosen) == self.spec.max_objects:
                break
        if not any_mask:
            where = photo.index.annotation_where(photo.position)
            raise UnreadableImageError(f"{where}: no valid mask, e.g. {damaged[0]}; leave this image out")
        return [(objects[position], chosen[position]) for position in sorted(chosen)]

    def _ask(self, chosen: list[tuple[Sa1bObject, ObjectMask]], photo: Photo, epoch: int) -> PromptBatch:
        prompts = []
        for each, mask in chosen:
            generator = torch.Generator().manual_seed(prompt_id("prompt", self.seed, epoch, photo.key, each.object_id))
            stored = stored_clicks(each, photo.view)
            prompts.append(draw_prompt(mask, stored, self.spec, self.preprocess, generator))
        masks = [mask_on_model(mask, self.preprocess, self.mask_side) for _, mask in chosen]
        return _batch_of_image(prompts, masks, self.mask_side, photo)


def _batch_of_image(prompts: list[ObjectPrompt], masks: list[np.ndarray], side: int, photo: Photo) -> PromptBatch:
    num, num_points = len(prompts), max((len(each.points_xy) for each in prompts), default=0)
    points, is_point = torch.zeros(num, num_points, 2), torch.zeros(num, num_points, dtype=torch.bool)
    boxes, has_box = torch.zeros(num, 4), torch.zeros(num, dtype=torch.bool)
    for i, each in enumerate(prompts):
        points[i, : len(each.points_xy)] = each.points_xy
        is_point[i, : len(each.points_xy)] = True
        if each.box_cxcywh is not None:
            boxes[i], has_box[i] = each.box_cxcywh, True
    return PromptBatch(
        image_of_object=torch.zeros(num, dtype=torch.int64),
        boxes_cxcywh=boxes,
        has_box=has_box,
        points_xy=points,
        point_labels=is_point.long(),
        is_point=is_point,
        masks=torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, side, side, dtype=torch.bool),
        prompt_ids=_ids(prompts, photo),
    )


def _ids(prompts: list[ObjectPrompt], photo: Photo) -> Tensor:
    question = [
        (None if each.box_cxcywh is None else each.box_cxcywh.tolist(), each.points_xy.tolist()) for each in prompts
    ]
    return torch.tensor([prompt_id(photo.key, photo.view, *each) for each in question], dtype=torch.int64)
