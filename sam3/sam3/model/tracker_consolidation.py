"""Puts the objects of a frame together: for display, and as the conditioning record that tracking reads.

A prompt changes one object at a time; the others enter a prompted frame with what is known of them: their own prompt,
or the mask that tracking gave.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sam3.model.mask_rules import NO_OBJECT_LOGIT, video_to_square
from sam3.model.memory_bank import FrameRecord
from sam3.model.sam3_tracker import Sam3Tracker, TrackerFeatures
from sam3.model.tracker_state import ObjectGroup
from sam3.preprocess import Preprocess

_UNKNOWN_SCORE = 10.0
"""Object score that an object without anything on a prompted frame gets there, as released."""


def previous_logits(group: ObjectGroup, frame_idx: int, obj_id: int) -> Tensor | None:
    """Low-resolution logits of one object that a click on this frame corrects, (1, 1, 4 G, 4 G).

    None where there are none, and after a mask prompt that waits to be tracked.
    """
    if obj_id not in group.obj_ids:
        return None
    waiting = group.pending.get(frame_idx, {}).get(obj_id)
    if waiting is not None:
        return waiting.record.pred_masks
    record = group.stored_record(frame_idx)
    if record is None or record.pred_masks is None:
        return None
    row = group.obj_ids.index(obj_id)
    return record.pred_masks[row : row + 1]


def display_masks(
    group: ObjectGroup, frame_idx: int, low_res_size: int, preprocess: Preprocess, video_hw: tuple[int, int]
) -> Tensor:
    """What is known of all objects on a frame, as logits at the video's size, float32 (B, 1, H, W).

    Objects without anything on this frame are -1024 everywhere.
    """
    low_res = torch.full((len(group.obj_ids), 1, low_res_size, low_res_size), NO_OBJECT_LOGIT)
    prompted = {}
    for row, record, own_row, video_mask in _entries(group, frame_idx):
        if video_mask is not None:
            prompted[row] = video_mask
        elif record.pred_masks is not None:
            low_res = low_res.to(record.pred_masks.device)
            low_res[row] = record.pred_masks[own_row]
    masks = preprocess.masks_to_image(low_res, video_hw)
    for row, video_mask in prompted.items():
        masks[row, 0] = _mask_to_logits(video_mask)
    return masks


def consolidate(
    tracker: Sam3Tracker, group: ObjectGroup, frame_idx: int, features: TrackerFeatures, preprocess: Preprocess
) -> FrameRecord:
    """The record of a prompted frame for all objects of a group, without its spatial memory.

    Clicks, masks and what was only tracked count alike: the record says that it comes from points.

    Args:
        tracker: The network.
        group: Has at least one object; the record is not put into its bank.
        frame_idx: The frame.
        features: Of the frame.
        preprocess: How frames become the model's input.
    """
    device, num_objects, side = features.coarse.device, len(group.obj_ids), features.fine.shape[-1]
    masks = torch.full((num_objects, 1, side, side), NO_OBJECT_LOGIT, device=device)
    pointers = tracker.no_obj_ptr.detach().repeat(num_objects, 1)
    scores = torch.full((num_objects, 1), _UNKNOWN_SCORE, device=device)
    ious = torch.zeros(num_objects, device=device)
    for row, record, own_row, video_mask in _entries(group, frame_idx):
        if video_mask is not None:
            logits = _mask_to_logits(video_mask)[None, None]
            video_hw = (video_mask.shape[0], video_mask.shape[1])
            masks[row] = video_to_square(logits, preprocess, video_hw, side, NO_OBJECT_LOGIT)[0].to(device)
        elif record.pred_masks is not None:
            masks[row] = record.pred_masks[own_row].to(device)
        pointers[row] = record.obj_ptr[own_row].to(device)
        scores[row] = record.object_score_logits[own_row].to(device)
        if record.iou_score is not None:
            ious[row] = record.iou_score[own_row].to(device)
    return FrameRecord(masks, pointers, scores, iou_score=ious, is_from_points=True)


def _entries(group: ObjectGroup, frame_idx: int) -> Iterator[tuple[int, FrameRecord, int, Tensor | None]]:
    """For each object that has something on a frame: its row, a record, the row in that record, its mask prompt."""
    waiting = group.pending.get(frame_idx, {})
    stored = group.stored_record(frame_idx)
    for row, obj_id in enumerate(group.obj_ids):
        if obj_id in waiting:
            yield row, waiting[obj_id].record, 0, waiting[obj_id].video_mask
        elif stored is not None:
            yield row, stored, row, None


def _mask_to_logits(mask_hw: Tensor) -> Tensor:
    return torch.where(mask_hw, -NO_OBJECT_LOGIT, NO_OBJECT_LOGIT)
