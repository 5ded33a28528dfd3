"""SA-1B annotations: every way a mask is written gives the same mask, and what is broken says where."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fixtures_data import make_annotation
from pycocotools import mask as coco_mask

from sam3_train.data.sa1b import AnnotationError, decode_segmentation, load_sa1b_annotation, parse_sa1b_annotation


def compressed(mask: np.ndarray) -> dict:
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def test_compressed_masks_equal_those_of_pycocotools() -> None:
    rng = np.random.default_rng(0)
    blocks = np.kron(rng.random((5, 7)) > 0.5, np.ones((40, 30), bool))
    masks = [rng.random((37, 53)) > 0.5, blocks, np.zeros((9, 4), bool), np.ones((9, 4), bool), ~blocks]
    for mask in masks:
        assert np.array_equal(decode_segmentation(compressed(mask), mask.shape, "here"), mask)


def test_polygons_and_uncompressed_counts_are_read(tmp_path: Path) -> None:
    path = tmp_path / "sa_5.json"
    path.write_text(json.dumps(make_annotation(5)))
    by_counts, by_polygon = load_sa1b_annotation(path)
    expected = np.zeros((32, 48), bool)
    expected[4:12, 8:20] = True
    assert np.array_equal(by_counts.mask(), expected)
    assert by_counts.box_xyxy_px == (8, 4, 20, 12) and by_counts.area_px == expected.sum()
    expected[:] = False
    expected[16:28, 20:40] = True
    assert (by_polygon.mask() ^ expected).sum() <= 40, "the outline may be rasterised either way"
    assert by_polygon.points_xy_px == ((30.0, 20.0),) and by_polygon.predicted_iou == 0.9


def test_masks_are_decoded_only_when_asked_for() -> None:
    """D-19: reading boxes or clicks does not pay for a hundred masks."""
    record = make_annotation(1)
    record["annotations"][0]["segmentation"] = {"size": [32, 48], "counts": "no counts at all"}
    objects = parse_sa1b_annotation(json.dumps(record).encode(), "sa_1.json")
    assert objects[0].area_px == 96
    with pytest.raises(AnnotationError, match=r"sa_1\.json: object 0: RLE counts hold the character"):
        objects[0].mask()


def edited(**changes: object) -> bytes:
    record = make_annotation(1)
    for path, value in changes.items():
        node, *rest = path.split("__")
        if not rest:
            record[node] = value
        elif value is KeyError:
            del record[node][rest[0]]
        else:
            record[node][rest[0]] = value
    return json.dumps(record).encode()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the annotation file is empty"),
        (b"   \n", "the annotation file is empty"),
        (b'{"image": {', "not valid JSON"),
        (b"[1, 2]", "not an SA-1B annotation"),
        (edited(image__height=KeyError), "no field 'height'"),
        (edited(annotations=[]), "has no object"),
        (edited(annotations=[{"id": 1}]), "object 0 is malformed: no field 'bbox'"),
        (edited(annotations=["text"]), "object 0 is malformed"),
    ],
)
def test_broken_annotations_name_file_and_reason(tmp_path: Path, content: bytes, said: str) -> None:
    """D-22: an empty or malformed annotation is one clear line and not a stack of errors in a worker."""
    path = tmp_path / "sa_1.json"
    path.write_bytes(content)
    with pytest.raises(AnnotationError, match=said) as caught:
        load_sa1b_annotation(path)
    assert str(path) in str(caught.value)


def test_no_objects_can_be_allowed_and_a_missing_file_is_named(tmp_path: Path) -> None:
    """D-22"""
    (tmp_path / "sa_1.json").write_bytes(edited(annotations=[]))
    assert load_sa1b_annotation(tmp_path / "sa_1.json", allow_empty=True) == []
    with pytest.raises(AnnotationError, match=r"sa_2\.json: the annotation cannot be read"):
        load_sa1b_annotation(tmp_path / "sa_2.json")


@pytest.mark.parametrize(
    ("segmentation", "said"),
    [
        ({"size": [4, 4], "counts": [16]}, "mask size"),
        ({"size": 8, "counts": [48]}, "mask size 8"),
        ({"counts": [48]}, "mask size None"),
        ({"size": [8, 6], "counts": [40]}, "do not fill"),
        ({"size": [8, 6], "counts": [50, -2]}, "do not fill"),
        ({"size": [8, 6], "counts": [40.0, 8]}, "do not fill"),
        ({"size": [8, 6], "counts": compressed(np.eye(8, 6) > 0)["counts"][:-2]}, "do not fill|cut off"),
        ({"size": [8, 6], "counts": ""}, "cut off"),
        ({"size": [8, 6], "counts": "o" * 9 + "2"}, "10 digits"),
        ({"size": [8, 6], "counts": "oooooooo0"}, "do not fill"),
        ({"size": [8, 6], "counts": None}, "must be a string or a list"),
        ([], "must be RLE or polygons"),
        ([[1.0, 2.0, 3.0, 4.0]], "three or more"),
        ([[1.0, 2.0, 3.0, 4.0, 5.0, "x"]], "other than numbers"),
        *(([[0.0, 0.0, far, 0.0, far, 3.0]], "far outside") for far in (1e9, -1e300, float("inf"), float("nan"))),
        ("0123", "must be RLE or polygons"),
    ],
)
def test_broken_segmentations_are_refused(segmentation: object, said: str) -> None:
    with pytest.raises(AnnotationError, match=said):
        decode_segmentation(segmentation, (8, 6), "here")


def test_malformed_objects_can_be_set_aside() -> None:
    record = make_annotation(1)
    del record["annotations"][0]["area"]
    content = json.dumps(record).encode()
    with pytest.raises(AnnotationError, match="object 0"):
        parse_sa1b_annotation(content, "sa_1.json")
    malformed: list[str] = []
    assert [each.object_id for each in parse_sa1b_annotation(content, "sa_1.json", malformed=malformed)] == [2]
    assert len(malformed) == 1 and "sa_1.json: object 0 is malformed: no field 'area'" in malformed[0]


@pytest.mark.parametrize(
    "edit",
    [{"area": float("inf")}, {"bbox": [0.0, 0.0, float("nan"), 1.0]}, {"point_coords": [[1.0, float("inf")]]}],
    ids=["area", "bbox", "click"],
)
def test_numbers_that_are_not_finite_make_an_object_malformed(edit: dict) -> None:
    """JSON as Python reads it has them; a click at infinity is on no pixel."""
    record = make_annotation(1)
    record["annotations"][0].update(edit)
    malformed: list[str] = []
    objects = parse_sa1b_annotation(json.dumps(record).encode(), "sa_1.json", malformed=malformed)
    assert [each.object_id for each in objects] == [2]
    assert len(malformed) == 1 and "sa_1.json: object 0 is malformed" in malformed[0]


def test_an_image_of_no_finite_size_and_json_without_end_are_refused() -> None:
    record = make_annotation(1)
    record["image"]["height"] = float("inf")
    for content in (json.dumps(record).encode(), b"[" * 200_000):
        with pytest.raises(AnnotationError, match=r"sa_1\.json: not "):
            parse_sa1b_annotation(content, "sa_1.json")
