"""scripts/bench_data.py measures what it says it measures."""

from __future__ import annotations

import bench_data
import torch

from sam3_train.data.decode import decode_image


def test_all_rows_are_measured() -> None:
    rows = bench_data.bench(quick=True, device=torch.device("cpu"))
    names = [row["name"] for row in rows]
    assert "decode and preprocess, one core" in names and "loader, workers: 1" in names
    assert all(row["value"] > 0 and row["unit"] in ("ms", "images/s") for row in rows)


def test_the_photo_is_of_the_stated_size_and_as_heavy_as_a_photo() -> None:
    photo = bench_data.make_photo((450, 300))
    assert decode_image(photo, "photo").size == (450, 300)
    assert 0.5 < 8 * len(photo) / (450 * 300) < 6, "bits per pixel of JPEG photos"
