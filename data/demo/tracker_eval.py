"""How well a model tracks: J&F on clips with exact masks, through the predictor that a user calls."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_clips import ANNOTATED_EVERY, make_clip
from PIL import Image
from torch import Tensor

from sam3.coco_rle import decode_mask
from sam3.model.prompt_sampling import boxes_from_masks, centre_clicks
from sam3.model.sam3_tracking_predictor import Sam3TrackerPredictor
from sam3_train.video_metrics import ClipScore, mean_score, score_clip

CLIP_FRAMES = 48
FRAME_STEP = 2
"""Every second frame is tracked, at 12 frames a second."""
PROMPT_KINDS = ("mask", "box", "click")
MIN_PROMPTED_SHARE = 0.01
"""Of the image: an object gets its prompt on the first frame that shows at least so much of it."""
MIN_TRACKED_FRAMES = 4


@dataclass(frozen=True)
class EvalClip:
    """A clip and the masks that a tracker should find in it."""

    name: str
    frames: list[np.ndarray]
    """uint8 RGB, (H, W, 3)."""
    masks: np.ndarray
    """bool (T, N, H, W); empty on frames that are not annotated."""
    annotated: np.ndarray
    """bool (T,)."""
    categories: tuple[str, ...]

    def every(self, step: int) -> EvalClip:
        """The clip at a lower frame rate."""
        return dataclasses.replace(
            self, frames=self.frames[::step], masks=self.masks[::step], annotated=self.annotated[::step]
        )

    def first_frames(self) -> dict[int, int]:
        """The objects that can be tracked, by index, and the frame on which each gets its prompt."""
        areas = self.masks.mean(axis=(2, 3))
        found = {}
        for index in range(areas.shape[1]):
            large = np.flatnonzero(areas[:, index] >= MIN_PROMPTED_SHARE)
            if len(large) and large[0] + MIN_TRACKED_FRAMES < len(self.frames):
                found[index] = int(large[0])
        return found


def generate_test_clips(count: int, num_frames: int = CLIP_FRAMES, seed: int = 0) -> list[EvalClip]:
    """The first ``count`` clips of the demo world's test split, before they are compressed, at 12 frames a second."""
    clips = []
    for index in range(count):
        clip = make_clip(seed, "test", index, num_frames)
        drawn = [clip.frame(t) for t in range(num_frames)]
        names = tuple(moving.shape.category for moving in clip.objects)
        masks = np.stack([masks for _, masks in drawn])
        whole = EvalClip(f"test {index}", [i for i, _ in drawn], masks, np.ones(num_frames, bool), names)
        clips.append(whole.every(FRAME_STEP))
    return clips


def read_clips(folder: Path, limit: int | None = None) -> list[EvalClip]:
    """Clips that `demo_clips.write_clip` wrote below ``folder``, sorted by name, at 12 frames a second."""
    clips = []
    for path in sorted(folder.glob("sav_*"))[:limit]:
        record = json.loads((path / f"{path.name}_manual.json").read_text())
        frames = [np.asarray(Image.open(file).convert("RGB")) for file in sorted(path.glob("*.jpg"))]
        masks = np.zeros((len(frames), record["masklet_num"], *frames[0].shape[:2]), bool)
        annotated = np.zeros(len(frames), bool)
        for row, masklets in enumerate(record["masklet"]):
            masks[row * ANNOTATED_EVERY] = np.stack([decode_mask(one) for one in masklets])
            annotated[row * ANNOTATED_EVERY] = True
        clips.append(EvalClip(path.name, frames, masks, annotated, tuple(record["category"])).every(FRAME_STEP))
    return clips


@torch.inference_mode()
def clip_features(model: Any, clip: EvalClip) -> dict[int, Any]:
    """What the tracker reads of each frame, by index, for `Sam3TrackerPredictor.init_state`."""
    weight = next(model.parameters())
    features = {}
    for t, frame in enumerate(clip.frames):
        pixels, _ = model.preprocess.prepare([frame])
        features[t] = model.tracker_features(pixels.to(weight.device, weight.dtype))
    return features


def track_clip(
    model: Any, clip: EvalClip, kind: str, features: dict[int, Any] | None = None
) -> tuple[dict[int, int], np.ndarray]:
    """Prompt each object on its first frame, then follow all of them to the end.

    Args:
        model: With a tracker.
        clip: The clip.
        kind: ``mask``: the exact mask. ``box``: the tightest box. ``click``: one click on the innermost pixel.
        features: From `clip_features`, to share between calls.

    Returns:
        The prompted frame of each object that was tracked, by its index, and masks, bool (T, N, H, W), empty before
        the prompt.
    """
    predictor = Sam3TrackerPredictor(model, objects="independent")
    height, width = clip.frames[0].shape[:2]
    state = predictor.init_state(
        video_height=height,
        video_width=width,
        num_frames=len(clip.frames),
        cached_features=features if features is not None else clip_features(model, clip),
    )
    prompted = clip.first_frames()
    found = np.zeros_like(clip.masks)
    if not prompted:
        return prompted, found
    for index, t in prompted.items():
        truth = torch.from_numpy(clip.masks[t, index])[None]
        if kind == "mask":
            predictor.add_new_mask(state, t, index, truth[0], need_output=False)
        elif kind == "box":
            box = _as_shares(boxes_from_masks(truth).reshape(2, 2), (height, width)).flatten()
            predictor.add_new_points_or_box(state, t, index, box=box, need_output=False)
        elif kind == "click":
            point = _as_shares(centre_clicks(truth).points_xy_px[0], (height, width))
            predictor.add_new_points_or_box(state, t, index, points=point, labels=[1], need_output=False)
        else:
            raise ValueError(f"prompt {kind!r} is not one of {PROMPT_KINDS}")
    for t, object_ids, _, logits, _ in predictor.propagate_in_video(state):
        for object_id, mask in zip(object_ids, logits[:, 0] > 0, strict=True):
            if t >= prompted[object_id]:
                found[t, object_id] = mask.cpu().numpy()
    return prompted, found


def score_objects(clip: EvalClip, prompted: dict[int, int], found: np.ndarray) -> list[ClipScore]:
    """J and F of each object on the annotated frames after the one with its prompt."""
    scores = []
    for index, first in prompted.items():
        after = (torch.arange(len(clip.frames)) > first) & torch.from_numpy(clip.annotated)
        masks, truth = torch.from_numpy(found[:, index]), torch.from_numpy(clip.masks[:, index])
        scores.append(score_clip(masks, truth, after))
    return scores


def stand_still(clip: EvalClip) -> tuple[dict[int, int], np.ndarray]:
    """The baseline: each object's exact first mask, kept as it is."""
    prompted = clip.first_frames()
    found = np.zeros_like(clip.masks)
    for index, first in prompted.items():
        found[first:, index] = clip.masks[first, index]
    return prompted, found


def evaluate_tracking(
    model: Any, clips: Iterable[EvalClip], kinds: Sequence[str] = PROMPT_KINDS
) -> dict[str, dict[str, float]]:
    """Mean J, F and J&F over objects for each kind of prompt, and for masks that stand still.

    Args:
        model: With a tracker.
        clips: From `generate_test_clips`.
        kinds: Of `PROMPT_KINDS`.

    Returns:
        By kind, and ``stand_still``: ``j``, ``f``, ``j_and_f``, ``num_objects``.

    Raises:
        ValueError: If there is nothing to track.
    """
    found: dict[str, list[ClipScore]] = {kind: [] for kind in (*kinds, "stand_still")}
    for clip in clips:
        features = clip_features(model, clip)
        for kind in kinds:
            found[kind] += score_objects(clip, *track_clip(model, clip, kind, features))
        found["stand_still"] += score_objects(clip, *stand_still(clip))
    return {kind: _summary(scores) for kind, scores in found.items()}


def _summary(scores: list[ClipScore]) -> dict[str, float]:
    mean = mean_score(scores)
    return {"j": mean.region, "f": mean.boundary, "j_and_f": mean.j_and_f, "num_objects": len(scores)}


def _as_shares(points_xy_px: Tensor, image_hw: tuple[int, int]) -> Tensor:
    """Pixel coordinates as fractions of the frame."""
    return points_xy_px / points_xy_px.new_tensor([image_hw[1], image_hw[0]])
