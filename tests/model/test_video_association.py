"""The rules of the text-prompted video model on scripted masks and scores, by the constants of the released model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from sam3.model.video_association import (
    NEVER,
    Association,
    Hotstart,
    associate,
    detections_to_recondition,
    limit_new_objects,
    mask_iou,
    suppress_recently_occluded,
)
from sam3.model.video_config import VideoConfig

CONFIG = VideoConfig()
SIDE = 20


def masks(*widths: tuple[int, int]) -> Tensor:
    """One mask per (first column, last column + 1), over all rows."""
    result = torch.zeros(len(widths), SIDE, SIDE, dtype=torch.bool)
    for mask, (first, end) in zip(result, widths, strict=True):
        mask[:, first:end] = True
    return result


def unmatched(*ids: int) -> Association:
    return Association([], {}, list(ids), [], {})


def matched(*ids: int, times: int = 1) -> Association:
    return Association([], {d: list(ids) for d in range(times)}, [], [], {})


# --- association ------------------------------------------------------------------------------------------------------


def test_iou_of_empty_masks_is_zero() -> None:
    iou = mask_iou(masks((0, 4), (0, 0)), masks((2, 6), (0, 0), (0, 4)))
    torch.testing.assert_close(iou, torch.tensor([[1 / 3, 0.0, 1.0], [0.0, 0.0, 0.0]]))


def test_every_detection_is_new_while_nothing_is_tracked() -> None:
    result = associate(masks((0, 4), (6, 9)), [0.55, 0.9], masks(), [], CONFIG)
    assert result.new_detections == [0, 1]


def test_without_detections_objects_with_a_mask_are_unmatched() -> None:
    result = associate(masks(), [], masks((0, 4), (0, 0)), [7, 9], CONFIG)
    assert (result.new_detections, result.unmatched_ids, result.empty_ids) == ([], [7], [9])


@pytest.mark.parametrize(("score", "is_new"), [(0.69, False), (0.7, True)])
def test_a_detection_beside_all_objects_is_new_from_a_score_on(score: float, is_new: bool) -> None:
    assert associate(masks((10, 14)), [score], masks((0, 4)), [3], CONFIG).new_detections == [0] * is_new


@pytest.mark.parametrize(("overlap", "is_new"), [(1, True), (2, False)])
def test_a_detection_that_overlaps_an_object_by_a_tenth_is_never_new(overlap: int, is_new: bool) -> None:
    # 10 columns each: IoU 1/19 and 2/18.
    result = associate(masks((10 - overlap, 20 - overlap)), [0.99], masks((0, 10)), [3], CONFIG)
    assert result.new_detections == [0] * is_new
    assert result.matched == ({} if is_new else {0: [3]})
    assert result.unmatched_ids == [3]  # confirmed from half on


def test_a_detection_belongs_to_all_objects_that_it_overlaps() -> None:
    result = associate(masks((0, 8)), [0.6], masks((0, 5), (5, 8), (12, 16)), [4, 2, 9], CONFIG)
    assert result.matched == {0: [4, 2]}
    assert result.unmatched_ids == [2, 9]  # 5/8 confirms, 3/8 does not


def test_sure_detections_renew_the_best_object_and_the_last_one_wins() -> None:
    tracks = masks((0, 10), (0, 9))
    result = associate(masks((0, 10), (0, 8), (1, 10)), [0.85, 0.79, 0.8], tracks, [5, 6], CONFIG)
    assert result.sure_detections == {5: 2}  # 0.9 of object 5 against 0.8 of object 6
    result = associate(masks((0, 7)), [0.99], masks((0, 10)), [5], CONFIG)
    assert result.sure_detections == {}


def test_a_limit_of_objects_takes_the_best() -> None:
    config = dataclasses.replace(CONFIG, max_num_objects=5)
    assert limit_new_objects([0, 2, 3], [0.7, 1.0, 0.8, 0.9], 2, config) == [0, 2, 3]
    assert limit_new_objects([0, 2, 3], [0.7, 1.0, 0.8, 0.9], 3, config) == [3, 2]
    assert limit_new_objects([0, 2, 3], [0.7, 1.0, 0.8, 0.9], 6, config) == []


def test_renewal_asks_the_frame_and_the_trackers_logit() -> None:
    association = Association([], {}, [], [], {1: 0, 2: 1})
    logits = {1: 0.8, 2: 0.81}
    assert detections_to_recondition(association, logits, 32, CONFIG) == {2: 1}
    assert detections_to_recondition(association, logits, 33, CONFIG) == {}
    never = dataclasses.replace(CONFIG, recondition_every_nth_frame=0)
    assert detections_to_recondition(association, logits, 32, never) == {}


# --- probation --------------------------------------------------------------------------------------------------------


def run(hotstart: Hotstart, script: dict[int, Association], frames: range) -> dict[int, set[int]]:
    """Removed ids by frame."""
    reverse = frames.step < 0
    found = {}
    for frame_idx in frames:
        removed, _ = hotstart.update(script.get(frame_idx, Association([], {}, [], [], {})), frame_idx, reverse)
        hotstart.discard(removed)
        if removed:
            found[frame_idx] = removed
    return found


def test_eight_frames_without_confirmation_in_all_end_a_new_object() -> None:
    hotstart = Hotstart(CONFIG)
    hotstart.add([4], 10)
    frames = [11, 12, 14, 15, 17, 19, 20, 24]  # with gaps
    assert run(hotstart, dict.fromkeys(frames, unmatched(4)), range(11, 40)) == {24: {4}}
    assert hotstart.objects == {}


def test_the_probation_ends_after_fifteen_frames() -> None:
    hotstart = Hotstart(CONFIG)
    hotstart.add([4], 10)
    frames = [11, 12, 14, 15, 17, 19, 20, *range(25, 60)]  # the eighth comes one frame late
    assert run(hotstart, dict.fromkeys(frames, unmatched(4)), range(11, 60)) == {}
    assert hotstart.objects[4].num_unmatched == 0


def test_the_probation_runs_backward_too() -> None:
    hotstart = Hotstart(CONFIG)
    hotstart.add([4], 30)
    assert run(hotstart, dict.fromkeys(range(16, 24), unmatched(4)), range(29, 0, -1)) == {16: {4}}
    hotstart.add([5], 30)
    assert run(hotstart, dict.fromkeys(range(15, 23), unmatched(5)), range(29, 0, -1)) == {}


def test_the_younger_of_two_objects_that_share_detections_ends() -> None:
    hotstart = Hotstart(CONFIG)
    hotstart.add([4], 10)
    hotstart.add([3], 12)
    assert run(hotstart, dict.fromkeys(range(13, 21), matched(3, 4)), range(13, 40)) == {20: {3}}
    assert set(hotstart.objects) == {4} and hotstart.pair_counts == {}


def test_two_shared_detections_of_one_frame_count_twice() -> None:
    hotstart = Hotstart(CONFIG)
    hotstart.add([4, 3], 10)
    assert run(hotstart, dict.fromkeys(range(11, 15), matched(3, 4, times=2)), range(11, 20)) == {14: {4}}


def test_backward_the_object_of_the_later_frame_is_the_older() -> None:
    hotstart = Hotstart(CONFIG)
    hotstart.add([4], 30)
    hotstart.add([3], 28)
    assert run(hotstart, dict.fromkeys(range(20, 28), matched(3, 4)), range(27, 0, -1)) == {20: {3}}


def test_what_the_user_clicked_has_no_probation() -> None:
    hotstart = Hotstart(CONFIG)
    hotstart.add([4], 10)
    hotstart.add([4, 5], 10, is_from_user=True)
    hotstart.add([1], 9)
    script = dict.fromkeys(range(11, 25), Association([], {0: [1, 4, 5]}, [4, 5], [], {}))
    assert run(hotstart, script, range(11, 30)) == {}


def test_counts_follow_the_living_objects_and_not_the_length_of_the_video() -> None:
    hotstart = Hotstart(CONFIG)
    for frame_idx in range(500):
        living = list(hotstart.objects)
        association = Association([], {0: living} if living else {}, living[::2], living[1::2], {})
        removed, _ = hotstart.update(association, frame_idx)
        hotstart.discard(removed)
        hotstart.discard([obj_id for obj_id in living if obj_id < frame_idx - 20])
        hotstart.add([frame_idx], frame_idx)
        assert len(hotstart.objects) <= 22
        assert len(hotstart.pair_counts) <= 22 * 15


def test_keep_alive_hides_and_shows_again_if_it_is_asked_for() -> None:
    config = dataclasses.replace(
        CONFIG, suppress_unmatched_only_within_hotstart=False, init_trk_keep_alive=2, max_trk_keep_alive=2
    )
    hotstart = Hotstart(config)
    hotstart.add([4], 0)
    hidden = [hotstart.update(unmatched(4), 20 + i)[1] for i in range(4)]
    assert hidden == [set(), {4}, {4}, {4}]
    assert hotstart.objects[4].keep_alive == -1
    shown = [hotstart.update(matched(4), 30 + i)[1] for i in range(3)]
    assert shown == [{4}, set(), set()]


@pytest.mark.parametrize("counted", [False, True])
def test_empty_masks_use_up_keep_alive_if_it_is_asked_for(counted: bool) -> None:
    config = dataclasses.replace(CONFIG, decrease_trk_keep_alive_for_empty_masklets=counted)
    hotstart = Hotstart(config)
    hotstart.add([4], 0)
    hotstart.update(Association([], {}, [], [4], {}), 1)
    assert hotstart.objects[4].keep_alive == 30 - counted


def test_the_released_settings_hide_nothing() -> None:
    hotstart = Hotstart(CONFIG)
    hotstart.add([4], 0)
    assert all(hotstart.update(unmatched(4), 15 + i) == (set(), set()) for i in range(100))


# --- occlusion --------------------------------------------------------------------------------------------------------


def occluded(last: dict[int, int], *widths: tuple[int, int], **more: object) -> tuple[list[bool], dict[int, int]]:
    return suppress_recently_occluded(masks(*widths), list(range(len(widths))), last, 50, 0.7, **more)


def test_the_object_that_came_back_later_is_hidden() -> None:
    suppressed, table = occluded({0: 10, 1: 30}, (0, 10), (0, 9))
    assert suppressed == [False, True]
    assert table == {0: 10, 1: 50}


def test_backward_it_is_the_one_that_came_back_earlier() -> None:
    assert occluded({0: 10, 1: 30}, (0, 10), (0, 9), reverse=True)[0] == [True, False]


def test_nothing_is_hidden_for_an_object_that_was_never_occluded() -> None:
    assert occluded({1: 30}, (0, 10), (0, 9)) == ([False, False], {0: NEVER, 1: 30})


def test_objects_that_overlap_less_stay() -> None:
    assert occluded({0: 10, 1: 30}, (0, 10), (0, 6))[0] == [False, False]


def test_empty_masks_are_occluded_now() -> None:
    assert occluded({0: 10, 1: 30}, (0, 0), (0, 6)) == ([False, False], {0: 50, 1: 30})


def test_an_object_that_goes_gives_way() -> None:
    suppressed, _ = occluded({0: 40}, (0, 10), (0, 10), newly_removed={1})
    assert suppressed == [False, True]


def test_the_table_holds_the_objects_of_the_frame_alone() -> None:
    assert occluded({0: 10, 7: 3}, (0, 5))[1] == {0: 10}
    assert occluded({0: 10, 7: 3})[1] == {}


def test_a_threshold_of_zero_hides_nothing() -> None:
    found, _ = suppress_recently_occluded(masks((0, 5), (0, 5)), [0, 1], {0: 1, 1: 2}, 9, 0.0)
    assert found == [False, False]


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("score_threshold_detection", 1.5),
        ("det_nms_thresh", -0.1),
        ("hotstart_delay", -1),
        ("hotstart_unmatch_thresh", 0),
        ("max_num_objects", 0),
        ("init_trk_keep_alive", 31),
        ("recondition_every_nth_frame", -16),
    ],
)
def test_impossible_settings_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(CONFIG, **{field: value})


def test_the_ablation_has_no_probation_and_no_renewal() -> None:
    config = VideoConfig.without_temporal_disambiguation()
    hotstart = Hotstart(config)
    hotstart.add([1, 2], 0)
    both = Association([], {0: [1, 2]}, [1, 2], [], {1: 0})
    assert all(hotstart.update(both, t) == (set(), set()) for t in range(1, 40))
    assert detections_to_recondition(both, {1: 5.0, 2: 5.0}, 16, config) == {}
