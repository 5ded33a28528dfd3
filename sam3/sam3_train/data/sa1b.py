"""SA-1B annotations: one JSON file per image, about a hundred masks in it.

Distilling the trunk reads none of this; stages with prompts and evaluations do.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sam3_train.errors import UserError

_MOST_DIGITS = 9
"""Of a number in a compressed RLE: 45 bits hold any run of pixels, and the arithmetic of 64 bits holds their sums."""

_FARTHEST = 10
"""How many image sides from its corner a polygon's point may lie."""


class AnnotationError(UserError):
    """An annotation that is missing, malformed or empty; the message names the file."""


@dataclass(frozen=True)
class Sa1bObject:
    """One object of an image. Its mask is decoded when it is asked for."""

    object_id: int
    size_hw: tuple[int, int]
    """Of the image, in pixels."""
    bbox_xywh_px: tuple[float, float, float, float]
    area_px: int
    predicted_iou: float
    """Quality guess of the model that drew the mask."""
    stability_score: float
    points_xy_px: tuple[tuple[float, float], ...]
    """The clicks that produced the mask."""
    segmentation: Any
    """COCO compressed RLE, uncompressed RLE or a list of polygons, as in the file."""
    where: str
    """File and object, for messages."""

    @property
    def box_xyxy_px(self) -> tuple[float, float, float, float]:
        """The bounding box by its corners."""
        x, y, width, height = self.bbox_xywh_px
        return (x, y, x + width, y + height)

    def mask(self) -> np.ndarray:
        """The mask, bool, (H, W).

        Raises:
            AnnotationError: If the segmentation is malformed or of another image size.
        """
        return decode_segmentation(self.segmentation, self.size_hw, self.where)


def load_sa1b_annotation(path: str | Path, allow_empty: bool = False) -> list[Sa1bObject]:
    """Read an annotation file.

    Args:
        path: ``sa_*.json``.
        allow_empty: An image without objects gives an empty list instead of an error.

    Raises:
        AnnotationError: If the file is missing, no such JSON, or has no object.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise AnnotationError(f"{path}: the annotation cannot be read ({error.strerror})") from error
    return parse_sa1b_annotation(content, str(path), allow_empty)


def parse_sa1b_annotation(
    content: bytes, where: str, allow_empty: bool = False, malformed: list[str] | None = None
) -> list[Sa1bObject]:
    """The objects in an annotation file's bytes; see `load_sa1b_annotation`.

    Args:
        content: The JSON text.
        where: What messages call the file.
        allow_empty: An image without objects gives an empty list instead of an error.
        malformed: If given, a malformed object is left out and the reason added here, instead of raising.
    """
    if not content.strip():
        raise AnnotationError(f"{where}: the annotation file is empty; unpack it again or remove it")
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{where}: not valid JSON ({error}); unpack it again or remove it") from None
    try:
        size_hw = (int(record["image"]["height"]), int(record["image"]["width"]))
        entries = list(record["annotations"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise AnnotationError(
            f"{where}: not an SA-1B annotation ({_describe(error)}); expected image.height, image.width and annotations"
        ) from None
    if not entries and not allow_empty:
        raise AnnotationError(f"{where}: has no object (annotations is empty); leave this image out")
    objects = []
    for position, entry in enumerate(entries):
        try:
            objects.append(_parse_object(entry, size_hw, f"{where}: object {position}"))
        except AnnotationError as error:
            if malformed is None:
                raise
            malformed.append(str(error))
    return objects


def _parse_object(entry: Any, size_hw: tuple[int, int], where: str) -> Sa1bObject:
    try:
        x, y, width, height = (float(value) for value in entry["bbox"])
        points = tuple((float(px), float(py)) for px, py in entry.get("point_coords", ()))
        if not all(map(math.isfinite, (x, y, width, height, *itertools.chain(*points)))):
            raise ValueError("bbox or point_coords hold a number that is not finite")
        return Sa1bObject(
            object_id=int(entry["id"]),
            size_hw=size_hw,
            bbox_xywh_px=(x, y, width, height),
            area_px=int(entry["area"]),
            predicted_iou=float(entry.get("predicted_iou", 1.0)),
            stability_score=float(entry.get("stability_score", 1.0)),
            points_xy_px=points,
            segmentation=entry["segmentation"],
            where=where,
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise AnnotationError(f"{where} is malformed: {_describe(error)}") from None


def decode_segmentation(segmentation: Any, size_hw: tuple[int, int], where: str) -> np.ndarray:
    """Decode a COCO segmentation.

    Args:
        segmentation: Compressed RLE (``counts`` a string), uncompressed RLE (``counts`` a list) or a list of polygons
            (each x0, y0, x1, y1, ... in pixels, three points at least).
        size_hw: The image's size.
        where: What messages call the object.

    Returns:
        bool, (H, W).

    Raises:
        AnnotationError: If it is malformed or of another size.
    """
    from pycocotools import mask as coco_mask

    height, width = size_hw
    if isinstance(segmentation, dict):
        size = segmentation.get("size")
        if not isinstance(size, (list, tuple)) or list(size) != [height, width]:
            raise AnnotationError(f"{where}: mask size {str(size)[:60]} is not the image's {[height, width]}")
        counts = segmentation.get("counts")
        if isinstance(counts, list):
            return _decode_counts(counts, size_hw, where)
        if not isinstance(counts, (str, bytes)):
            raise AnnotationError(f"{where}: RLE counts must be a string or a list, got {type(counts).__name__}")
        return _decode_counts(_counts_of_string(counts, where), size_hw, where)
    if not isinstance(segmentation, list) or not segmentation:
        raise AnnotationError(f"{where}: segmentation must be RLE or polygons, got {str(segmentation)[:60]!r}")
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise AnnotationError(f"{where}: a polygon needs three or more x, y pairs, got {str(polygon)[:60]!r}")
        if not all(isinstance(value, (int, float)) for value in polygon):
            raise AnnotationError(f"{where}: a polygon holds something other than numbers: {str(polygon)[:60]!r}")
        # Also false for NaN. pycocotools ends the process at such numbers.
        if not all(abs(value) <= _FARTHEST * max(height, width) for value in polygon):
            raise AnnotationError(f"{where}: a polygon lies far outside the image: {str(polygon)[:60]!r}")
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))).astype(bool)


def _counts_of_string(text: str | bytes, where: str) -> np.ndarray:
    """Run lengths of a compressed RLE, int64.

    COCO's format: digits of 5 bits offset by 48, least significant first; bit 5 says that more follow, bit 4 of the
    last digit is the sign; from the fourth number on each is the difference to the one two before. Decoded here because
    pycocotools accepts a string that ends too early and fills the rest of the mask.
    """
    data = text.encode("ascii", "replace") if isinstance(text, str) else text
    digits = np.frombuffer(data, np.uint8).astype(np.int64) - 48
    strange = (digits < 0) | (digits > 63)
    if strange.any():
        raise AnnotationError(f"{where}: RLE counts hold the character {chr(data[int(strange.argmax())])!r}")
    ends = np.flatnonzero(digits < 32)
    if not len(ends) or ends[-1] != len(digits) - 1:
        raise AnnotationError(f"{where}: RLE counts are cut off")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _MOST_DIGITS:
        raise AnnotationError(f"{where}: RLE counts hold a number of {lengths.max()} digits, more than any image needs")
    shifts = 5 * (np.arange(len(digits)) - np.repeat(starts, lengths))
    values = np.add.reduceat((digits & 31) << shifts, starts)
    values -= np.where(digits[ends] & 16, np.int64(1) << 5 * lengths, 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def _decode_counts(counts: list[Any] | np.ndarray, size_hw: tuple[int, int], where: str) -> np.ndarray:
    height, width = size_hw
    if isinstance(counts, list):
        fits = all(isinstance(count, int) and 0 <= count <= height * width for count in counts)
        counts = np.array(counts if fits else [-1], np.int64)
    # Each by itself first: the sum of absurd ones may overflow to anything.
    if ((counts < 0) | (counts > height * width)).any() or counts.sum() != height * width:
        raise AnnotationError(f"{where}: RLE runs do not fill the image of {height} x {width} pixels")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def _describe(error: Exception) -> str:
    return f"no field {error.args[0]!r}" if isinstance(error, KeyError) else str(error)
