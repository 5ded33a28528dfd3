"""Videos on the demo's page: how the tracker follows objects with the teacher's trunk and with the student's."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from demo_drawing import fit
from demo_page_video import TrackedClip, Tracking, TrackingScore
from PIL import Image, ImageDraw
from tracker_eval import PROMPT_KINDS, EvalClip, clip_features, score_objects, stand_still, track_clip

from sam3.drawing import draw_overlay, object_color
from sam3_train.video_metrics import ClipScore, mean_score

SHOWN_KIND = "box"
STRIP_FRAMES = 7
TILE_WIDTH = 150
ANIMATION_WIDTH = 250
FRAMES_PER_SECOND = 12
KIND_WORDS = {"mask": "mask", "box": "box", "click": "one click"}


def compare_tracking(
    teacher: Any, student: Any, clips: Sequence[EvalClip], num_shown: int = 1, shares_trunk: bool = False
) -> Tracking:
    """Both models on clips: J&F for each kind of prompt, and pictures of the first clips.

    Args:
        teacher: With a tracker.
        student: Likewise.
        clips: What is tracked.
        num_shown: Clips with pictures.
        shares_trunk: The trunks are the same, so that features of frames are computed once.

    Raises:
        ValueError: If there is nothing to track.
    """
    models = (teacher, student)
    scores: dict[str, tuple[list[ClipScore], list[ClipScore]]] = {kind: ([], []) for kind in PROMPT_KINDS}
    still: list[ClipScore] = []
    shown = []
    for number, clip in enumerate(clips):
        masks = []
        features: dict[int, Any] = {}
        for which, model in enumerate(models):
            features = features if features and shares_trunk else clip_features(model, clip)
            for kind in PROMPT_KINDS:
                prompted, found = track_clip(model, clip, kind, features)
                scores[kind][which].extend(score_objects(clip, prompted, found))
                if kind == SHOWN_KIND:
                    masks.append(found)
        still += score_objects(clip, *stand_still(clip))
        if number < num_shown:
            shown.append(TrackedClip(clip.name, film_strip(clip, masks[0], masks[1]), animation(clip, masks)))
    rows = [
        TrackingScore(KIND_WORDS[kind], *(mean_score(one).j_and_f for one in scores[kind])) for kind in PROMPT_KINDS
    ]
    return Tracking(rows, mean_score(still).j_and_f, len(still), len(clips), shown)


def film_strip(clip: EvalClip, teacher_masks: np.ndarray, student_masks: np.ndarray) -> bytes:
    """Frames from the first to the last as a JPEG: with the prompts, then both models' masks below."""
    chosen = strip_frames(clip)
    rows = [[_with_prompts(clip, t) for t in chosen]]
    rows += [[_with_masks(clip, masks, t, TILE_WIDTH) for t in chosen] for masks in (teacher_masks, student_masks)]
    tile_w, tile_h = rows[0][0].size
    gap = 4
    strip = Image.new("RGB", (STRIP_FRAMES * (tile_w + gap) - gap, len(rows) * (tile_h + gap) - gap), (255, 255, 255))
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            strip.paste(tile, (x * (tile_w + gap), y * (tile_h + gap)))
    buffer = io.BytesIO()
    strip.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


def strip_frames(clip: EvalClip) -> list[int]:
    """Frames spread evenly from the first to the last, moved to where objects are prompted."""
    chosen = np.linspace(0, len(clip.frames) - 1, STRIP_FRAMES).round().astype(int)
    for first in clip.first_frames().values():
        if first not in chosen:
            chosen[1 + np.abs(chosen[1:-1] - first).argmin()] = first
    return sorted(int(t) for t in chosen)


def animation(clip: EvalClip, masks: Sequence[np.ndarray]) -> bytes:
    """Every frame with each model's masks, side by side, as an animated WebP."""
    pictures = []
    for t in range(len(clip.frames)):
        tiles = [_with_masks(clip, found, t, ANIMATION_WIDTH) for found in masks]
        width, height = tiles[0].size
        picture = Image.new("RGB", (len(tiles) * (width + 6) - 6, height), (255, 255, 255))
        for x, tile in enumerate(tiles):
            picture.paste(tile, (x * (width + 6), 0))
        pictures.append(picture)
    buffer = io.BytesIO()
    duration = round(1000 / FRAMES_PER_SECOND)
    pictures[0].save(
        buffer, format="WEBP", save_all=True, append_images=pictures[1:], duration=duration, loop=0, quality=72
    )
    return buffer.getvalue()


def _with_masks(clip: EvalClip, masks: np.ndarray, t: int, width: int) -> Image.Image:
    """A frame with every object's mask in its own colour."""
    visible = [index for index in range(masks.shape[1]) if masks[t, index].any()]
    boxes = [_box_of(masks[t, index]) for index in visible]
    overlay = draw_overlay(clip.frames[t], [masks[t, index] for index in visible], boxes, [""] * len(visible), visible)
    return _at_width(overlay, width)


def _with_prompts(clip: EvalClip, t: int) -> Image.Image:
    """A frame, with the boxes of the objects that are prompted on it."""
    picture, scale = fit(Image.fromarray(clip.frames[t]), _longest(clip, TILE_WIDTH))
    draw = ImageDraw.Draw(picture)
    for index, first in clip.first_frames().items():
        if first == t:
            corners = [value * scale for value in _box_of(clip.masks[t, index])]
            draw.rectangle(corners, outline=(0, 0, 0), width=4)
            draw.rectangle(corners, outline=object_color(index), width=2)
    return picture


def _at_width(picture: Image.Image, width: int) -> Image.Image:
    return fit(picture, round(max(picture.size) * width / picture.width))[0]


def _longest(clip: EvalClip, width: int) -> int:
    height_px, width_px = clip.frames[0].shape[:2]
    return round(max(height_px, width_px) * width / width_px)


def _box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return float(columns[0]), float(rows[0]), float(columns[-1]), float(rows[-1])
