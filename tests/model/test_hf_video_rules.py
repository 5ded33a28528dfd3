"""The rules of the text-prompted video model beside those of Hugging Face's `Sam3VideoModel`, on random scripts."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sam3.model.video_association import Association, Hotstart, associate, suppress_recently_occluded
from sam3.model.video_config import VideoConfig

hf_video = pytest.importorskip("transformers.models.sam3_video.modeling_sam3_video")

SIDE = 12
CONFIG = VideoConfig()
SHORT_LIVED = dataclasses.replace(
    CONFIG, suppress_unmatched_only_within_hotstart=False, init_trk_keep_alive=2, max_trk_keep_alive=3
)
STORES = (
    "obj_first_frame_idx",
    "unmatched_frame_inds",
    "overlap_pair_to_frame_inds",
    "trk_keep_alive",
    "removed_obj_ids",
    "suppressed_obj_ids",
)


class Rules(SimpleNamespace):
    """Their model without its networks: settings, and the methods that need nothing else."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(hf_video.Sam3VideoModel, name):
            raise AttributeError(name)
        return getattr(hf_video.Sam3VideoModel, name).__get__(self)


def rules(config: VideoConfig) -> Any:
    return Rules(**vars(config), config=SimpleNamespace(**vars(config)))


def random_masks(rng: random.Random, count: int, p_empty: float) -> Tensor:
    """Logits of rectangles, some of them empty or like an earlier one."""
    logits = torch.full((count, SIDE, SIDE), -10.0)
    for i in range(count):
        if i and rng.random() < 0.4:
            logits[i] = logits[rng.randrange(i)].roll(rng.choice([0, 0, 1]), -1)
        elif rng.random() >= p_empty:
            (top, bottom), (left, right) = (sorted(rng.sample(range(SIDE + 1), 2)) for _ in range(2))
            logits[i, top:bottom, left:right] = 10
    return logits


def test_association_is_the_same() -> None:
    rng, theirs = random.Random(0), rules(CONFIG)
    seen = {"new": 0, "matched": 0, "unmatched": 0, "empty": 0, "sure": 0}
    for _ in range(200):
        num_dets, num_tracks = rng.randrange(5), rng.randrange(6)
        both = random_masks(rng, num_dets + num_tracks, 0.1)[_shuffled(rng, num_dets + num_tracks)]
        dets, tracks = both[:num_dets], both[num_dets:]
        scores = torch.tensor([0.5 + 0.5 * rng.random() for _ in range(num_dets)])
        ids = rng.sample(range(20), num_tracks)
        prompts = (torch.zeros(count, dtype=torch.long) for count in (num_dets, num_tracks))
        new, lost, matched, sure, empty = theirs._associate_det_trk(dets, scores, tracks, ids, *prompts)
        ours = associate(dets > 0, scores.tolist(), tracks > 0, ids, CONFIG)
        assert list(new) == ours.new_detections
        assert list(lost) == ours.unmatched_ids
        assert {d: list(obj_ids) for d, obj_ids in matched.items() if len(obj_ids)} == ours.matched
        assert sure == ours.sure_detections
        assert list(empty) == ours.empty_ids
        for kind, found in zip(seen, (new, ours.matched, lost, empty, sure), strict=True):
            seen[kind] += len(found)
    assert min(seen.values()) > 10, seen


def _shuffled(rng: random.Random, count: int) -> Tensor:
    return torch.tensor(rng.sample(range(count), count), dtype=torch.long)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "config",
    [CONFIG, SHORT_LIVED, dataclasses.replace(SHORT_LIVED, decrease_trk_keep_alive_for_empty_masklets=True)],
    ids=["released", "keep-alive", "keep-alive of empty masks"],
)
def test_probation_is_the_same(config: VideoConfig, reverse: bool) -> None:
    num_removed = num_hidden = 0
    for seed in range(8):
        rng, theirs, session = random.Random(seed), rules(config), hf_video.Sam3VideoInferenceSession()
        stores = {name: getattr(session, name) for name in STORES}
        ours, living, gone, next_id = Hotstart(config), [], set(), 0
        for t in range(40, 0, -1) if reverse else range(40):
            matched = {d: [i for i in living if rng.random() < 0.3] for d in range(4)}
            matched = {d: obj_ids for d, obj_ids in matched.items() if obj_ids}
            empty = [i for i in living if rng.random() < 0.1]
            lost = [i for i in living if i not in empty and rng.random() < 0.4]
            new = [next_id] * (rng.random() < 0.3)
            next_id += len(new)
            expected, stores = theirs._process_hotstart(session, t, reverse, matched, new, empty, lost, stores)
            removed, hidden = ours.update(Association([], matched, lost, empty, {}), t, reverse)
            assert removed == expected
            assert hidden - gone == stores["suppressed_obj_ids"][t] - removed - gone
            ours.add(new, t)
            ours.discard(removed)
            gone |= removed
            living = [i for i in living + new if i not in gone]
            num_removed, num_hidden = num_removed + len(removed), num_hidden + len(hidden)
    assert num_removed > 10
    assert (num_hidden > 10) == (config is not CONFIG)


@pytest.mark.parametrize("reverse", [False, True])
def test_suppression_by_occlusion_is_the_same(reverse: bool) -> None:
    rng, theirs, num_suppressed = random.Random(1), rules(CONFIG), 0
    for _ in range(150):
        count = rng.randrange(1, 6)
        masks = random_masks(rng, count, 0.15) > 0
        last = [rng.choice([-1, -1, 3, 5, 9, 100_000]) for _ in range(count)]
        expected = theirs._get_objects_to_suppress_based_on_most_recently_occluded(
            masks, torch.tensor(last), list(range(count)), reverse
        )
        ours, _ = suppress_recently_occluded(masks, list(range(count)), dict(enumerate(last)), 20, 0.7, reverse=reverse)
        assert expected.tolist() == ours
        num_suppressed += sum(ours)
    assert num_suppressed > 10
