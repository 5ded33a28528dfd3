"""What ``python -m sam3.track`` is told about objects: clicks, boxes and masks, from options or from a JSON file.

The file is a list, or ``{"prompts": [...]}``, of entries such as::

    {"object": 1, "frame": 0, "points": [[210, 350], [250, 220, 0]], "box": [90, 60, 300, 420]}
    {"object": 2, "frame": 12, "mask": "second.png"}

Coordinates are pixels of the video; a point's third number is 1 on the object (the default) and 0 off it. A mask is a
picture of the video's size, named from the JSON file's folder: the object is where it is not black, or, with
``"value": k``, where a picture with a palette has the value k.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sam3.drawing import MAX_INDEXED_MASKS
from sam3.image_input import ImageInputError, open_image
from sam3.video.frame_source import FrameSource, describe_count, describe_size

_KEYS = ("object", "frame", "points", "box", "mask", "value")


@dataclass(frozen=True)
class ObjectPrompt:
    """What is said of one object on one frame: clicks, a box or both, or a mask."""

    where: str
    """How messages call it, such as ``prompts.json: entry 2``."""
    obj_id: int
    frame_idx: int
    points_xy_px: tuple[tuple[float, float], ...] = ()
    labels: tuple[int, ...] = ()
    """1 on the object, 0 off it."""
    box_xyxy_px: tuple[float, ...] | None = None
    mask: np.ndarray | None = None
    """Bool, (H, W)."""


def read_prompts(path: Path, problems: list[str]) -> list[ObjectPrompt]:
    """Prompts of a JSON file; what is wrong with it goes to ``problems``, entry by entry."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"--prompts {path}: cannot be read ({error.strerror})")
        return []
    except UnicodeDecodeError:
        problems.append(f"--prompts {path}: is no text file in UTF-8")
        return []
    except json.JSONDecodeError as error:
        problems.append(f"--prompts {path}: is no JSON ({error.msg}, line {error.lineno} column {error.colno})")
        return []
    entries = content.get("prompts") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries:
        problems.append(f'--prompts {path}: must be a list of prompts, or {{"prompts": [...]}}, with at least one')
        return []
    found: list[ObjectPrompt] = []
    for number, entry in enumerate(entries, start=1):
        where = f"{path.name}: entry {number}"
        try:
            prompt = _parse_entry(entry, where, path.parent)
            if any((prompt.obj_id, prompt.frame_idx) == (other.obj_id, other.frame_idx) for other in found):
                raise _WrongError(
                    f"object {prompt.obj_id} has another entry for frame {prompt.frame_idx}: put them together"
                )
            found.append(prompt)
        except _WrongError as error:
            problems.append(f"{where}: {error}")
    return found


def read_mask_prompts(path: Path, frame_idx: int, problems: list[str]) -> list[ObjectPrompt]:
    """One object for each value of a picture with a palette, as DAVIS has them, or one for a picture without."""
    try:
        picture = _open_mask(path)
        if picture.mode != "P":
            return [ObjectPrompt(str(path), 1, frame_idx, mask=_where_not_black(picture))]
        values = np.asarray(picture)
        ids = [int(value) for value in np.unique(values) if 0 < value <= MAX_INDEXED_MASKS]
        if not ids:
            raise _WrongError("the mask is empty")
        return [ObjectPrompt(str(path), obj_id, frame_idx, mask=values == obj_id) for obj_id in ids]
    except _WrongError as error:
        problems.append(f"--mask {path}: {error}")
        return []


def check_prompts(prompts: Sequence[ObjectPrompt], frames: FrameSource) -> list[str]:
    """What does not fit the video: frames it does not have, places outside it, masks of another size."""
    problems = []
    height, width = frames.size_hw
    size = describe_size((height, width))
    for prompt in prompts:
        if not frames.has_frame(prompt.frame_idx):
            count = describe_count(frames.num_frames)
            problems.append(f"{prompt.where}: there is no frame {prompt.frame_idx}: the video has {count}")
        for x, y in prompt.points_xy_px:
            if not (0 <= x <= width and 0 <= y <= height):
                problems.append(f"{prompt.where}: point {x:g},{y:g} lies outside the video ({size})")
        if prompt.box_xyxy_px is not None:
            x0, y0, x1, y1 = prompt.box_xyxy_px
            if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
                text = ",".join(f"{value:g}" for value in prompt.box_xyxy_px)
                problems.append(f"{prompt.where}: box {text} lies outside the video ({size})")
        if prompt.mask is not None and prompt.mask.shape != (height, width):
            problems.append(f"{prompt.where}: the mask has {describe_size(prompt.mask.shape)}, the video {size}")
    return problems


def are_prompted_together(prompts: Sequence[ObjectPrompt]) -> bool:
    """Whether each frame with a prompt has one for every object.

    Objects that are tracked jointly share their prompted frames: one without a prompt there would count as absent.
    """
    obj_ids = {prompt.obj_id for prompt in prompts}
    frames = {prompt.frame_idx for prompt in prompts}
    return len({(prompt.obj_id, prompt.frame_idx) for prompt in prompts}) == len(obj_ids) * len(frames)


def clip_box(prompt: ObjectPrompt, size_hw: tuple[int, int]) -> ObjectPrompt:
    """The prompt with its box cut at the video's edges, as a mouse that leaves the picture draws one over them."""
    if prompt.box_xyxy_px is None:
        return prompt
    limits = (size_hw[1], size_hw[0]) * 2
    box = tuple(min(max(value, 0.0), float(limit)) for value, limit in zip(prompt.box_xyxy_px, limits, strict=True))
    return replace(prompt, box_xyxy_px=box)


class _WrongError(Exception):
    """Something in an entry that cannot be used."""


def _parse_entry(entry: Any, where: str, folder: Path) -> ObjectPrompt:
    if not isinstance(entry, dict):
        raise _WrongError(f"must be an object in braces, got {_shown(entry)}")
    unknown = sorted(set(entry) - set(_KEYS))
    if unknown:
        raise _WrongError(f"unknown key {unknown[0]!r}; known are {', '.join(_KEYS)}")
    obj_id = _parse_number(entry, "object", 1, MAX_INDEXED_MASKS)
    frame_idx = _parse_number(entry, "frame", 0, None) if "frame" in entry else 0
    points, labels = _parse_points(entry.get("points", []))
    box = _parse_box(entry["box"]) if entry.get("box") is not None else None
    mask = _parse_mask(entry, folder)
    if not points and box is None and mask is None:
        raise _WrongError("has neither points nor a box nor a mask")
    if mask is not None and (points or box is not None):
        raise _WrongError("has a mask and points or a box: a frame takes a mask alone")
    return ObjectPrompt(where, obj_id, frame_idx, points, labels, box, mask)


def _parse_number(entry: dict[str, Any], key: str, lowest: int, highest: int | None) -> int:
    value = entry.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < lowest or value > (highest or value):
        bounds = f"from {lowest} to {highest}" if highest else f"from {lowest} on"
        raise _WrongError(f'"{key}" must be a whole number {bounds}, got {_shown(value)}')
    return value


def _parse_points(points: Any) -> tuple[tuple[tuple[float, float], ...], tuple[int, ...]]:
    if not isinstance(points, list):
        raise _WrongError(f'"points" must be a list of [x, y] or [x, y, label], got {_shown(points)}')
    places, labels = [], []
    for point in points:
        if not _are_numbers(point, (2, 3)) or (len(point) == 3 and point[2] not in (0, 1)):
            raise _WrongError(f"a point must be [x, y], or [x, y, label] with the label 1 or 0, got {_shown(point)}")
        places.append((float(point[0]), float(point[1])))
        labels.append(int(point[2]) if len(point) == 3 else 1)
    return tuple(places), tuple(labels)


def _parse_box(box: Any) -> tuple[float, ...]:
    if not _are_numbers(box, (4,)) or box[2] <= box[0] or box[3] <= box[1]:
        raise _WrongError(f'"box" must be [x0, y0, x1, y1] with x0 < x1 and y0 < y1, got {_shown(box)}')
    return tuple(map(float, box))


def _parse_mask(entry: dict[str, Any], folder: Path) -> np.ndarray | None:
    name = entry.get("mask")
    if name is None:
        if "value" in entry:
            raise _WrongError('"value" belongs to a mask, and there is none')
        return None
    if not isinstance(name, str):
        raise _WrongError(f'"mask" must be the name of a picture, got {_shown(name)}')
    picture = _open_mask(folder / name)
    if "value" not in entry:
        return _where_not_black(picture)
    value = _parse_number(entry, "value", 1, MAX_INDEXED_MASKS)
    if picture.mode not in ("P", "L"):
        raise _WrongError(f'{name} has no palette (mode {picture.mode}), so "value" has no meaning')
    mask = np.asarray(picture) == value
    if not mask.any():
        raise _WrongError(f"{name} has no pixel with the value {value}")
    return mask


def _open_mask(path: Path) -> Image.Image:
    try:
        return open_image(path)
    except ImageInputError as error:
        raise _WrongError(str(error)) from None


def _where_not_black(picture: Image.Image) -> np.ndarray:
    mask = np.asarray(picture if picture.mode in ("1", "L", "P") else picture.convert("RGB")) != 0
    if mask.ndim == 3:
        mask = mask.any(axis=-1)
    if not mask.any():
        raise _WrongError("the mask is empty")
    return mask


def _are_numbers(values: Any, lengths: tuple[int, ...]) -> bool:
    return (
        isinstance(values, list)
        and len(values) in lengths
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) and np.isfinite(v) for v in values)
    )


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
