"""The annotated objects of an index's images, and whether a data set has any at all."""

from __future__ import annotations

import numpy as np

from sam3_train.data.augmentation import View
from sam3_train.data.bad_images import bad_image_limit
from sam3_train.data.image_index import ImageIndex
from sam3_train.data.sa1b import AnnotationError, Sa1bObject, parse_sa1b_annotation

_LOOKED_AT = 200
_NAMED = 5


def read_objects(index: ImageIndex, position: int, damaged: list[str] | None = None) -> list[Sa1bObject]:
    """The annotated objects of an image.

    Args:
        index: The images.
        position: Which.
        damaged: Malformed objects are left out and the reasons added here; None raises.

    Raises:
        AnnotationError: If there is no annotation, or no object in it.
    """
    where = index.annotation_where(position) or index.where(position)
    content = index.read_annotation(position)
    if content is None:
        raise AnnotationError(
            f"{where}: image {index.key(position)} has no annotation; unpack it again or leave it out"
        )
    objects = parse_sa1b_annotation(content, where, malformed=damaged)
    if not objects:
        assert damaged
        raise AnnotationError(f"{where}: no valid object, e.g. {damaged[0]}; leave this image out")
    return objects


def stored_clicks(each: Sa1bObject, view: View) -> np.ndarray:
    """The clicks that made an object's mask, as continuous pixels of a view: float64 (n, 2)."""
    top, left, _, width = view.window(each.size_hw)
    clicks = np.array(each.points_xy_px, np.float64).reshape(-1, 2) - (left, top)
    if view.is_flipped:
        clicks[:, 0] = width - clicks[:, 0]
    return clicks


def require_size(each: Sa1bObject, image_hw: tuple[int, int]) -> None:
    """Check that an object is of an image of this size.

    Raises:
        AnnotationError: If it is not.
    """
    if each.size_hw != image_hw:
        raise AnnotationError(
            f"{each.where}: is of an image of {each.size_hw[0]} x {each.size_hw[1]} pixels, but this one has "
            f"{image_hw[0]} x {image_hw[1]}: the annotation belongs to another image"
        )


def annotation_problems(index: ImageIndex, max_bad_fraction: float) -> list[str]:
    """What is wrong with the annotations of a data set, before any compute.

    Up to 200 images are looked at, spread evenly, and none of their masks: an image's own faults are found while
    training, this finds a data set that is not annotated or only in parts.

    Args:
        index: The images.
        max_bad_fraction: Share of unusable images that a run tolerates (``DATA.MAX_BAD_FRACTION``).

    Returns:
        One message, or none.
    """
    if index.annotation_where(0) is None:
        return [
            f"{index.root}: a data set of kind {index.kind} has no annotations to draw prompts from: use one of kind "
            "sa1b or sa1b_tar (DATA.DATASET)"
        ]
    positions = np.unique(np.linspace(0, len(index) - 1, min(len(index), _LOOKED_AT)).astype(int))
    reasons = []
    for position in positions.tolist():
        try:
            read_objects(index, position, [])
        except AnnotationError as error:
            reasons.append(str(error))
    # Of a part of the images a few may be bad by chance; of all of them the run's own limit holds.
    limit = bad_image_limit(max_bad_fraction, len(positions)) if len(positions) == len(index) else 2
    if len(reasons) <= max(limit, round(max_bad_fraction * len(positions))):
        return []
    named = "; ".join(reasons[:_NAMED]) + ("; ..." if len(reasons) > _NAMED else "")
    return [
        f"{index.root}: {len(reasons)} of {len(positions)} {index.split} images that were looked at have no usable "
        f"annotation, more than DATA.MAX_BAD_FRACTION {max_bad_fraction} allows: {named}"
    ]
