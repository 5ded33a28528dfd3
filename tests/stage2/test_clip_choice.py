"""Clips are made of annotated frames, start with what is visible, and take objects that are known throughout."""

from __future__ import annotations

import numpy as np
import pytest

from stage2.data.clip_choice import ClipChoice, ClipSpec, choose_clip
from stage2.data.video_entry import BadVideoError, VideoEntry, encode_areas

HW = (100, 100)


def entry(areas: list[list[int]]) -> VideoEntry:
    table = np.array(areas)
    rows, columns = table.shape
    numbers = np.arange(rows, dtype=np.int32) * 4
    return VideoEntry("film", HW, 4 * rows, numbers, np.arange(columns, dtype=np.int32), encode_areas(table, HW))


ONE_LATE = entry([[500, 0, 300]] * 6 + [[500, 400, 300]] * 6)
LAST_FRAME_ONLY = entry([[0]] * 9 + [[800]])


def draws(video: VideoEntry, length: int, spec: ClipSpec, count: int = 200) -> list[ClipChoice]:
    rng = np.random.default_rng(0)
    return [choose_clip(video, length, spec, rng) for _ in range(count)]


def test_every_object_is_visible_on_the_first_frame() -> None:
    """Defect D-115, 7.6 (16) of the published training."""
    for choice in draws(ONE_LATE, 4, ClipSpec(max_objects=3)):
        assert (ONE_LATE.area_codes[choice.rows[0], choice.columns] > 0).all()
        assert len(set(choice.columns.tolist())) == len(choice.columns) > 0


def test_several_objects_are_taken_and_not_always_the_same() -> None:
    """Defect D-115, 7.6 (16) of the published training."""
    pairs = {tuple(sorted(choice.columns.tolist())) for choice in draws(ONE_LATE, 4, ClipSpec(max_objects=2))}
    assert pairs == {(0, 1), (0, 2), (1, 2)}
    assert max(len(choice.columns) for choice in draws(ONE_LATE, 4, ClipSpec(max_objects=9))) == 3


def test_objects_smaller_than_asked_for_are_not_taken() -> None:
    spec = ClipSpec(max_objects=3, min_area=0.04)
    assert {column for choice in draws(ONE_LATE, 4, spec) for column in choice.columns} == {0, 1}


@pytest.mark.parametrize("strides", [(1,), (2,), (1, 3)])
def test_frames_stand_a_stride_apart_in_both_directions(strides: tuple[int, ...]) -> None:
    steps = {tuple(np.diff(choice.rows)) for choice in draws(ONE_LATE, 4, ClipSpec(strides=strides))}
    assert steps == {(sign * stride,) * 3 for stride in strides for sign in (1, -1)}


def test_time_runs_backwards_as_often_as_asked_for() -> None:
    for share in (0.0, 0.3, 1.0):
        chosen = draws(ONE_LATE, 4, ClipSpec(reverse_share=share), 400)
        assert np.mean([choice.rows[1] < choice.rows[0] for choice in chosen]) == pytest.approx(share, abs=0.06)


def test_every_start_that_shows_something_occurs() -> None:
    starts = {int(choice.rows[0]) for choice in draws(ONE_LATE, 4, ClipSpec(reverse_share=0.0))}
    assert starts == set(range(9))


def test_a_gap_leaves_one_run_of_frames_out_but_never_the_first() -> None:
    spec = ClipSpec(gap_share=1.0, max_gap=3, reverse_share=0.0)
    gaps = set()
    for choice in draws(ONE_LATE, 4, spec):
        steps = np.diff(choice.rows)
        assert sorted(steps)[:-1] == [1, 1] and 2 <= max(steps) <= 4
        gaps.add((int(steps.argmax()), int(max(steps)) - 1))
    assert gaps == {(place, length) for place in range(3) for length in (1, 2, 3)}


def test_a_stride_that_does_not_fit_is_not_used() -> None:
    assert all((np.diff(c.rows) == 1).all() for c in draws(ONE_LATE, 8, ClipSpec(strides=(1, 2, 5), reverse_share=0)))


def test_a_short_video_is_played_to_its_end_and_back() -> None:
    short = entry([[500], [500], [500]])
    seen = {tuple(choice.rows.tolist()) for choice in draws(short, 6, ClipSpec(reverse_share=0.0))}
    assert seen == {(0, 1, 2, 1, 0, 1), (1, 2, 1, 0, 1, 2), (2, 1, 0, 1, 2, 1)}


def test_an_object_on_the_last_frame_alone_still_starts_a_clip() -> None:
    for choice in draws(LAST_FRAME_ONLY, 4, ClipSpec(reverse_share=0.0, strides=(1, 2))):
        assert choice.rows.tolist() == [9, 8, 7, 6]


def test_an_object_of_which_a_frame_says_nothing_is_not_taken() -> None:
    areas = [[500, 500] for _ in range(6)]
    areas[3][0] = -1
    for choice in draws(entry(areas), 4, ClipSpec(max_objects=2)):
        assert choice.columns.tolist() == [1]
    with pytest.raises(BadVideoError, match="film: no clip of 4 frames starts with an object that is visible"):
        draws(entry([[500], [-1], [500], [-1], [500]]), 4, ClipSpec())


def test_validation_takes_the_earliest_clip_every_time() -> None:
    spec = ClipSpec(strides=(2,), gap_share=1.0, max_objects=2).for_validation(4)
    assert {(tuple(c.rows.tolist()), tuple(c.columns.tolist())) for c in draws(ONE_LATE, 4, spec)} == {
        ((0, 1, 2, 3), (0, 2))
    }
    late = entry([[0], [0], [500], [500], [500], [500], [500]])
    assert draws(late, 4, spec, 1)[0].rows.tolist() == [2, 3, 4, 5]


def test_clips_grow_with_the_epochs() -> None:
    spec = ClipSpec(lengths=((0, 4), (2, 8), (5, 16)))
    assert [spec.length_at(epoch) for epoch in range(7)] == [4, 4, 8, 8, 8, 16, 16]
    assert spec.for_validation(12).length_at(3) == 12


def test_impossible_settings_are_said_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        ClipSpec(lengths=((1, 0),), strides=(0,), reverse_share=2.0, max_objects=0, min_area=1.0)
    for part in ("ascend from 0", "lengths [0]", "strides", "reverse_share", "max_objects", "min_area"):
        assert part in str(caught.value)
