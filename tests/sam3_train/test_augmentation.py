"""A seed of four bytes brings back the view that the teacher saw."""

from __future__ import annotations

import struct
import subprocess
import sys

import pytest
import torch

from sam3_train.data.augmentation import MAX_SEED, AugmentSpec, View, seed_of_key, view_of_seed

SPEC = AugmentSpec()


def photo(height: int = 30, width: int = 45) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_a_seed_replays_its_view_bit_for_bit() -> None:
    """D-27: the stored seed decides what the student is shown."""
    pixels = photo()
    for key in ("sa_1", "sa_2", "sa_3"):
        seed = seed_of_key(7, key)
        (restored,) = struct.unpack("<i", struct.pack("<i", seed))
        first, second = (view_of_seed(SPEC, s).apply(pixels) for s in (seed, restored))
        assert torch.equal(first, second)


def test_views_are_the_same_on_every_machine() -> None:
    """These are the views of the first release; a change would pair old embeddings with other pixels."""
    view = view_of_seed(SPEC, 12345)
    assert view.is_flipped
    assert (view.left, view.top, view.side) == pytest.approx((0.1503785999, 0.1275377929, 0.8114056752), abs=1e-9)
    assert seed_of_key(0, "sa_223750") == 2009389014


def test_seeds_need_no_state_of_the_process() -> None:
    """Another process, with another hash seed and another random state, gives the same seed."""
    code = "from sam3_train.data.augmentation import seed_of_key; print(seed_of_key(3, 'a/b', 2))"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "1"}
    ).stdout
    assert int(printed) == seed_of_key(3, "a/b", 2)


def test_seeds_differ_by_key_run_and_epoch_and_fit_four_bytes() -> None:
    seeds = [seed_of_key(run, f"sa_{i}", epoch) for run in range(3) for i in range(50) for epoch in range(3)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed <= MAX_SEED for seed in seeds)


def test_views_vary_and_stay_inside_the_image() -> None:
    views = [view_of_seed(SPEC, seed_of_key(0, str(i))) for i in range(400)]
    assert 140 < sum(view.is_flipped for view in views) < 260
    areas = [view.side**2 for view in views]
    assert 0.5 <= min(areas) < 0.52 and 0.98 < max(areas) <= 1.0
    for view in views:
        assert 0 <= view.left <= 1 - view.side + 1e-12 and 0 <= view.top <= 1 - view.side + 1e-12


def test_flip_and_crop_do_what_they_say() -> None:
    pixels = photo(20, 40)
    assert torch.equal(View(is_flipped=True).apply(pixels), pixels.flip(-1))
    corner = View(left=0.5, top=0.5, side=0.5).apply(pixels)
    assert torch.equal(corner, pixels[:, 10:, 20:])
    assert torch.equal(View(True, 0.5, 0.0, 0.5).apply(pixels), pixels[:, :10, 20:].flip(-1))
    assert View(left=0.9, top=0.9, side=0.1).apply(photo(1, 1)).shape == (3, 1, 1)


def test_without_a_spec_the_whole_image_is_shown() -> None:
    pixels = photo()
    assert torch.equal(view_of_seed(None, 99).apply(pixels), pixels)
    plain = AugmentSpec(flip_prob=0.0, min_crop_area=1.0)
    assert torch.equal(view_of_seed(plain, 99).apply(pixels), pixels)


def test_a_spec_travels_as_plain_types_and_refuses_nonsense() -> None:
    assert AugmentSpec.from_dict(SPEC.to_dict()) == SPEC
    with pytest.raises(ValueError, match="unknown field 'rotate'"):
        AugmentSpec.from_dict({"rotate": 1})
    with pytest.raises(ValueError, match="flip_prob must lie in"):
        AugmentSpec(flip_prob=1.5)
    with pytest.raises(ValueError, match="min_crop_area must lie in"):
        AugmentSpec(min_crop_area=0.0)
    with pytest.raises(ValueError, match="seed must lie in"):
        view_of_seed(SPEC, -1)


def test_the_window_is_where_the_pixels_are_cut() -> None:
    pixels = photo()
    for i in range(20):
        view = view_of_seed(SPEC, i)
        top, left, height, width = view.window((30, 45))
        cut = pixels[:, top : top + height, left : left + width]
        assert torch.equal(view.apply(pixels), cut.flip(-1) if view.is_flipped else cut)
