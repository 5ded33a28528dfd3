"""Small annotated videos in all layouts: a frame's brightness says which one it is, bright squares are the objects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from sam3.coco_rle import encode_mask

SIZE_HW = (48, 64)
NUM_FRAMES = 33
FPS = 24
SIDE_PX = 12


def object_mask(number: int, index: int, size_hw: tuple[int, int] = SIZE_HW) -> np.ndarray:
    """Object 0 walks right along the top, object 1 walks left below it and is there from frame 8 on; bool (H, W)."""
    mask = np.zeros(size_hw, bool)
    if index == 0:
        mask[4 : 4 + SIDE_PX, number : number + SIDE_PX] = True
    elif number >= 8:
        right = size_hw[1] - number
        mask[28 : 28 + SIDE_PX, right - SIDE_PX : right] = True
    return mask


def frame_pixels(number: int, size_hw: tuple[int, int] = SIZE_HW) -> np.ndarray:
    """uint8 RGB (H, W, 3): as bright as its number says, objects in red and green."""
    pixels = np.full((*size_hw, 3), 40 + 4 * number, np.uint8)
    for index, colour in enumerate(((250, 20, 20), (20, 250, 20))):
        pixels[object_mask(number, index, size_hw)] = colour
    return pixels


def frame_number(background: float) -> int:
    """Which frame has a background of this brightness."""
    return round((background - 40) / 4)


def sav_record(name: str, num_frames: int = NUM_FRAMES, size_hw: tuple[int, int] = SIZE_HW) -> dict[str, Any]:
    """What SA-V's JSON of a video holds."""
    numbers = range(0, num_frames, 4)
    rows = [[dict(encode_mask(object_mask(number, index, size_hw))) for index in (0, 1)] for number in numbers]
    return {
        "video_id": name,
        "video_duration": num_frames / FPS,
        "video_frame_count": float(num_frames),
        "video_height": float(size_hw[0]),
        "video_width": float(size_hw[1]),
        "video_resolution": float(size_hw[0] * size_hw[1]),
        "video_environment": "Indoor",
        "video_split": "train",
        "masklet": rows,
        "masklet_id": [0, 1],
        "masklet_size_rel": [0.05, 0.05],
        "masklet_size_abs": [144.0, 144.0],
        "masklet_size_bucket": ["small", "small"],
        "masklet_visibility_changes": [0, 1],
        "masklet_first_appeared_frame": [0.0, 2.0],
        "masklet_frame_count": [len(rows)] * 2,
        "masklet_edited_frame_count": [0, 0],
        "masklet_type": ["manual", "manual"],
        "masklet_stability_score": [None] * len(rows),
        "masklet_num": 2,
    }


def write_mp4(path: Path, num_frames: int = NUM_FRAMES, size_hw: tuple[int, int] = SIZE_HW) -> Path:
    """Frames of a video, nearly without loss, a key frame at every tenth."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = size_hw[1], size_hw[0], "yuv420p"
        stream.options = {"g": "10", "crf": "4"}
        stream.codec_context.time_base = Fraction(1, FPS)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(frame_pixels(number, size_hw), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_json(path: Path, record: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    return path


def write_sav(root: Path, names: Sequence[str] = ("sav_000001", "sav_000002"), num_frames: int = NUM_FRAMES) -> Path:
    """mp4 and manual JSON of some videos; returns ``root``."""
    for name in names:
        write_mp4(root / f"{name}.mp4", num_frames)
        write_json(root / f"{name}_manual.json", sav_record(Path(name).name, num_frames))
    return root


def write_pictures(folder: Path, numbers: Sequence[int], digits: int = 5) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        Image.fromarray(frame_pixels(number)).save(folder / f"{number:0{digits}d}.jpg", quality=95)
    return folder


def write_sav_frames(root: Path, names: Sequence[str] = ("sav_000001", "sav_000002"), every: int = 1) -> Path:
    """Extracted frames beside the manual JSON; returns ``root``."""
    for name in names:
        write_pictures(root / name, range(0, NUM_FRAMES, every))
        write_json(root / name / f"{name}_manual.json", sav_record(name))
    return root


def palette_labels(number: int) -> np.ndarray:
    """uint8 (H, W): the objects are called 1 and 3, and a stripe is void."""
    labels = np.zeros(SIZE_HW, np.uint8)
    labels[object_mask(number, 0)] = 1
    labels[object_mask(number, 1)] = 3
    labels[46:] = 255
    return labels


def write_palette(path: Path, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels, "P")
    image.putpalette([value for index in range(256) for value in (index, 255 - index, 7 * index % 256)])
    image.save(path)


def write_palette_set(
    root: Path, names: Sequence[str] = ("bear", "bike"), every: int = 1, mask_digits: int = 5, resolution: str = ""
) -> Path:
    """DAVIS and its kin; masks may be named with another number of digits than pictures."""
    for name in names:
        write_pictures(root / "JPEGImages" / resolution / name, range(NUM_FRAMES))
        for number in range(0, NUM_FRAMES, every):
            path = root / "Annotations" / resolution / name / f"{number:0{mask_digits}d}.png"
            write_palette(path, palette_labels(number))
    return root


def write_object_png_set(root: Path, names: Sequence[str] = ("sav_000100", "sav_000101")) -> Path:
    """SA-V's val: one binary PNG per object for every fourth frame."""
    for name in names:
        write_pictures(root / "JPEGImages_24fps" / name, range(NUM_FRAMES))
        for index in (0, 1):
            folder = root / "Annotations_6fps" / name / f"{index:03d}"
            folder.mkdir(parents=True)
            for number in range(0, NUM_FRAMES, 4):
                mask = object_mask(number, index).astype(np.uint8) * 255
                Image.fromarray(mask).save(folder / f"{number:05d}.png")
    return root
