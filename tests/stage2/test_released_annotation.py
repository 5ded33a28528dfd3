"""SA-V's annotation as it is released: the shape of a real file, and a real file where there is one.

``SAV_ANNOTATION=sav_000001_manual.json pytest tests/stage2/test_released_annotation.py`` checks a file of yours.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sam3.coco_rle import encode_mask
from stage2.data.sav_annotation import ANNOTATED_EVERY, read_sav_annotation

NUM_FRAMES, SIZE_HW, NUM_OBJECTS = 483, (848, 480), 5
"""Of the released example sav_000001, a portrait video."""
FIRST_ROW_OF_LATE_OBJECT = 113


def released_record() -> tuple[dict[str, Any], np.ndarray]:
    """The fields and types of that file, and areas (rows, objects): the fourth object comes late, and nobody annotated
    the third one on some frames."""
    num_rows = -(-NUM_FRAMES // ANNOTATED_EVERY)
    rows: list[list[Any]] = []
    areas = np.zeros((num_rows, NUM_OBJECTS), np.int64)
    for row in range(num_rows):
        rows.append([])
        for column in range(NUM_OBJECTS):
            mask = np.zeros(SIZE_HW, bool)
            if column != 3 or row >= FIRST_ROW_OF_LATE_OBJECT:
                mask[100 * column : 100 * column + 20, row : row + 30] = True
            is_unknown = column == 2 and row % 40 == 7
            areas[row, column] = -1 if is_unknown else mask.sum()
            rows[-1].append(None if is_unknown else {"size": list(SIZE_HW), "counts": encode_mask(mask)["counts"]})
    each = [0.0] * NUM_OBJECTS
    return {
        "video_id": "sav_000001",
        "video_duration": 20.125,
        "video_frame_count": float(NUM_FRAMES),
        "video_height": float(SIZE_HW[0]),
        "video_width": float(SIZE_HW[1]),
        "video_resolution": float(SIZE_HW[0] * SIZE_HW[1]),
        "video_environment": "Indoor",
        "video_split": "train",
        "masklet": rows,
        "masklet_id": list(range(NUM_OBJECTS)),
        "masklet_size_rel": each,
        "masklet_size_abs": each,
        "masklet_size_bucket": ["medium"] * NUM_OBJECTS,
        "masklet_visibility_changes": [2, 0, 10, 0, 0],
        "masklet_first_appeared_frame": [0.0, 0.0, 0.0, float(FIRST_ROW_OF_LATE_OBJECT), 0.0],
        "masklet_frame_count": [num_rows] * NUM_OBJECTS,
        "masklet_edited_frame_count": [41, 11, 22, 4, 115],
        "masklet_type": ["manual"] * NUM_OBJECTS,
        "masklet_stability_score": [None] * NUM_OBJECTS,
        "masklet_num": NUM_OBJECTS,
    }, areas


def test_a_file_of_the_released_shape_is_read(tmp_path: Path) -> None:
    """Counts are floats there, sizes (height, width), and 483 frames have 121 rows."""
    record, areas = released_record()
    path = tmp_path / "sav_000001_manual.json"
    path.write_text(json.dumps(record))
    annotation = read_sav_annotation(path)
    assert (annotation.num_frames, annotation.size_hw, annotation.num_objects) == (NUM_FRAMES, SIZE_HW, NUM_OBJECTS)
    assert len(annotation.rows) == 121
    assert np.array_equal(annotation.areas(), areas)
    late = record["masklet_first_appeared_frame"][3]  # an index of rows, and not of frames
    assert not annotation.mask(int(late) - 1, 3).any() and annotation.mask(int(late), 3).sum() == 600
    assert annotation.mask(5, 1)[100:120, 5:35].all() and annotation.mask(5, 1).sum() == 600


@pytest.mark.skipif("SAV_ANNOTATION" not in os.environ, reason="SAV_ANNOTATION names no annotation file of SA-V")
def test_a_real_file_says_of_its_masks_what_is_read_from_them() -> None:
    path = Path(os.environ["SAV_ANNOTATION"])
    record, annotation = json.loads(path.read_text()), read_sav_annotation(path)
    assert annotation.num_objects == record["masklet_num"]
    areas = annotation.areas()
    shown = np.where(areas > 0, areas, 0).sum(axis=0) / np.maximum((areas > 0).sum(axis=0), 1)
    assert np.allclose(shown, record["masklet_size_abs"], rtol=1e-6)
    first = [int(np.flatnonzero(areas[:, column] > 0)[0]) for column in range(annotation.num_objects)]
    assert first == [int(row) for row in record["masklet_first_appeared_frame"]]
    for column, row in enumerate(first):
        assert annotation.mask(row, column).sum() == areas[row, column]
