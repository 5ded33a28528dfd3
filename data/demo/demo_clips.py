"""Clips of the demo world: shapes that drift, turn, cross, pass behind each other, leave and vanish.

A clip is a folder in SA-V's extracted layout: every frame at 24 fps as ``00000.jpg``, ``00001.jpg``, ... and
``<clip>_manual.json`` with one row of masks per annotated frame, every fourth one. An object that is absent has an
empty mask there.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from demo_backgrounds import SPLITS, random_background
from demo_rle import encode_mask
from demo_shapes import Pose, Shape, draw_sprite, paint, sample_shape
from PIL import Image

FPS = 24
ANNOTATED_EVERY = 4
CLIP_SIZES_HW = ((240, 320), (320, 240), (240, 360), (288, 288))
NUM_OBJECTS = (2, 4)
CLIP_STREAM = 77
"""Keeps the random streams of clips apart from those of scenes."""


@dataclass(frozen=True)
class MovingShape:
    """A shape with a path through the clip; drawn back to front in list order."""

    shape: Shape
    start_xy_px: tuple[float, float]
    velocity_xy_px: tuple[float, float]
    """Per frame."""
    sway_px: float
    sway_period: float
    """In frames."""
    radius_px: float
    growth: float
    """Relative change of the radius over the whole clip."""
    angle: float
    spin: float
    """Radians per frame."""
    visible_frames: tuple[int, int]
    """First frame in which it exists, and the first one in which it no longer does."""

    def pose(self, frame: int, num_frames: int) -> Pose | None:
        """Where it is in a frame; None while it does not exist."""
        if not self.visible_frames[0] <= frame < self.visible_frames[1]:
            return None
        sway = self.sway_px * math.sin(2 * math.pi * frame / self.sway_period)
        return Pose(
            self.start_xy_px[0] + self.velocity_xy_px[0] * frame,
            self.start_xy_px[1] + self.velocity_xy_px[1] * frame + sway,
            self.radius_px * (1 + self.growth * frame / max(1, num_frames - 1)),
            self.angle + self.spin * frame,
        )


def sample_motion(rng: np.random.Generator, image_hw: tuple[int, int], num_frames: int) -> MovingShape:
    """A shape that crosses the middle of the frame at some time, so that paths meet there."""
    height, width = image_hw
    side = min(image_hw)
    speed = rng.uniform(0.2, 1.1) * side / num_frames
    heading = rng.uniform(0, 2 * math.pi)
    velocity = (speed * math.cos(heading), speed * math.sin(heading))
    meeting = rng.uniform(0.2, 0.8) * num_frames
    middle = (width * rng.uniform(0.35, 0.65), height * rng.uniform(0.35, 0.65))
    first, last = 0, num_frames
    fate = rng.random()
    if fate < 0.2:
        last = int(num_frames * rng.uniform(0.4, 0.8))
    elif fate < 0.35:
        first = int(num_frames * rng.uniform(0.1, 0.4))
    return MovingShape(
        sample_shape(rng),
        (middle[0] - velocity[0] * meeting, middle[1] - velocity[1] * meeting),
        velocity,
        rng.uniform(0, 0.06) * side,
        rng.uniform(0.4, 1.2) * num_frames,
        rng.uniform(0.12, 0.26) * side,
        rng.uniform(-0.3, 0.3),
        rng.uniform(0, 2 * math.pi),
        rng.uniform(-0.06, 0.06),
        (first, last),
    )


def render_frame(
    background: np.ndarray, objects: list[MovingShape], frame: int, num_frames: int
) -> tuple[np.ndarray, np.ndarray]:
    """One frame: uint8 RGB (H, W, 3) and the visible masks, bool (N, H, W)."""
    image = background.copy()
    owner = np.full(image.shape[:2], -1, dtype=np.int8)
    for index, moving in enumerate(objects):
        pose = moving.pose(frame, num_frames)
        sprite = draw_sprite(moving.shape, pose, image.shape[:2]) if pose is not None else None
        if pose is None or sprite is None:
            continue
        paint(image, moving.shape, pose, sprite)
        owner[sprite.area][sprite.mask] = index
    masks = owner[None] == np.arange(len(objects), dtype=np.int8)[:, None, None]
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), masks


@dataclass(frozen=True)
class Clip:
    """A clip whose frames are drawn when they are asked for, in any order."""

    image_hw: tuple[int, int]
    num_frames: int
    objects: list[MovingShape]
    background: np.ndarray
    """float32 RGB, wider than a frame by what the camera pans."""
    photo: str
    """File name of the background."""

    def frame(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """uint8 RGB (H, W, 3) and the visible masks, bool (N, H, W)."""
        width = self.image_hw[1]
        pan = self.background.shape[1] - width
        shift = round(pan * index / max(1, self.num_frames - 1))
        return render_frame(self.background[:, shift : shift + width], self.objects, index, self.num_frames)


def make_clip(seed: int, split: str, index: int, num_frames: int) -> Clip:
    """Clip ``index`` of a split; the same arguments give the same pixels."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index, CLIP_STREAM])
    height, width = CLIP_SIZES_HW[rng.integers(len(CLIP_SIZES_HW))]
    pan = int(rng.integers(0, 25))
    wide, photo = random_background(rng, split, (height, width + pan))
    objects = [
        sample_motion(rng, (height, width), num_frames)
        for _ in range(int(rng.integers(NUM_OBJECTS[0], NUM_OBJECTS[1] + 1)))
    ]
    return Clip((height, width), num_frames, objects, wide, photo)


def write_clip(root: Path, seed: int, split: str, index: int, num_frames: int, jpeg_quality: int) -> str:
    """Write clip ``index`` of a split below ``root``; its folder appears whole or not at all.

    Returns:
        The clip's name.
    """
    name = f"sav_{SPLITS.index(split) + 1}{index:05d}"
    folder, partial = root / name, root / f".{name}.partial"
    if folder.is_dir():
        return name
    partial.mkdir(parents=True, exist_ok=True)
    clip = make_clip(seed, split, index, num_frames)
    rows: list[np.ndarray] = []
    for frame in range(num_frames):
        image, masks = clip.frame(frame)
        Image.fromarray(image).save(partial / f"{frame:05d}.jpg", quality=jpeg_quality)
        if frame % ANNOTATED_EVERY == 0:
            rows.append(masks)
    record = describe_clip(name, split, clip.image_hw, num_frames, clip.objects, rows, clip.photo)
    (partial / f"{name}_manual.json").write_text(json.dumps(record))
    partial.rename(folder)
    return name


def describe_clip(
    name: str,
    split: str,
    image_hw: tuple[int, int],
    num_frames: int,
    objects: list[MovingShape],
    rows: list[np.ndarray],
    photo: str,
) -> dict[str, Any]:
    """The JSON of a clip: SA-V's fields, and per object what it is.

    Args:
        name: The clip's name.
        split: "train", "val" or "test".
        image_hw: Size of its frames.
        num_frames: At 24 fps.
        objects: What moves in it.
        rows: Masks of each annotated frame, bool (N, H, W).
        photo: File name of the background.
    """
    height, width = image_hw
    areas = np.array([[int(mask.sum()) for mask in masks] for masks in rows])
    visible = areas > 0
    sizes = [float(areas[visible[:, i], i].mean()) if visible[:, i].any() else 0.0 for i in range(len(objects))]
    return {
        "video_id": name,
        "video_duration": num_frames / FPS,
        "video_frame_count": float(num_frames),
        "video_height": float(height),
        "video_width": float(width),
        "video_resolution": float(height * width),
        "video_environment": "Generated",
        "video_split": split,
        "masklet": [[encode_mask(mask) for mask in masks] for masks in rows],
        "masklet_id": list(range(len(objects))),
        "masklet_size_rel": [size / (height * width) for size in sizes],
        "masklet_size_abs": sizes,
        "masklet_size_bucket": ["small" if s < 32**2 else "medium" if s < 96**2 else "large" for s in sizes],
        "masklet_visibility_changes": [int((visible[1:, i] != visible[:-1, i]).sum()) for i in range(len(objects))],
        "masklet_first_appeared_frame": [float(visible[:, i].argmax()) for i in range(len(objects))],
        "masklet_frame_count": [len(rows)] * len(objects),
        "masklet_edited_frame_count": [0] * len(objects),
        "masklet_type": ["manual"] * len(objects),
        "masklet_stability_score": [None] * len(rows),
        "masklet_num": len(objects),
        "category": [moving.shape.category for moving in objects],
        "instance_id": [moving.shape.instance_id for moving in objects],
        "background": photo,
    }
