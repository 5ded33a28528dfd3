"""Run lengths are those of pycocotools, both ways."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sam3.coco_rle import decode_mask, decode_runs, encode_mask


def masks() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    blob = np.zeros((300, 200), bool)
    blob[40:260, 30:170] = True
    blob[100:150, 60:90] = False
    return [
        *(rng.random((rng.integers(1, 40), rng.integers(1, 40))) < p for p in (0.0, 0.02, 0.5, 0.98, 1.0) * 4),
        np.ones((1, 1), bool),
        np.zeros((1, 1), bool),
        np.eye(700, dtype=bool),
        blob,
    ]


@pytest.mark.parametrize("mask", masks(), ids=lambda m: f"{m.shape[0]}x{m.shape[1]}")
def test_the_string_is_that_of_pycocotools(mask: np.ndarray) -> None:
    expected = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    rle = encode_mask(mask)
    assert rle == {"size": list(expected["size"]), "counts": expected["counts"].decode("ascii")}
    np.testing.assert_array_equal(decode_mask(rle), mask)
    np.testing.assert_array_equal(coco_mask.decode(rle).astype(bool), mask)


def test_what_is_no_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="bool array"):
        encode_mask(np.zeros((3, 3), np.uint8))
    with pytest.raises(ValueError, match="add up to 9, not to 3 x 4"):
        decode_mask({"size": [3, 4], "counts": encode_mask(np.eye(3, dtype=bool))["counts"]})


def test_many_masks_are_read_at_once_as_one_by_one() -> None:
    strings = [encode_mask(mask)["counts"] for mask in masks()]
    runs, offsets = decode_runs(strings)
    for i, mask in enumerate(masks()):
        own = runs[offsets[i] : offsets[i + 1]]
        assert own[1::2].sum() == mask.sum()
        np.testing.assert_array_equal(own, decode_runs([strings[i]])[0])
    assert [len(part) for part in decode_runs([])] == [0, 1]


@pytest.mark.parametrize(
    ("damaged", "message"), [("9 9", "string 1 holds the character ' '"), ("99o", "string 1 ends inside a number")]
)
def test_a_damaged_string_is_named(damaged: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_runs(["9", damaged, "9"])
