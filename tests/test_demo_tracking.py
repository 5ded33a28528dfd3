"""Videos on the demo's page: film strip, animation and scores, from a tracker that knows the answer."""

from __future__ import annotations

import io

import demo_tracking
import numpy as np
import pytest
from demo_tracking import STRIP_FRAMES, compare_tracking, strip_frames
from PIL import Image
from tracker_eval import EvalClip


def make_clip() -> EvalClip:
    """A square that drifts from the start and one that appears on frame 5."""
    masks = np.zeros((24, 2, 60, 80), bool)
    for t in range(24):
        masks[t, 0, 10:30, 5 + t : 25 + t] = True
        if t >= 5:
            masks[t, 1, 35:55, 50 - t : 70 - t] = True
    frames = [np.full((60, 80, 3), 40 + 5 * t, np.uint8) for t in range(24)]
    return EvalClip("drift", frames, masks, np.ones(24, bool), ("red square", "blue square"))


def test_the_strip_shows_every_frame_with_a_prompt():
    frames = strip_frames(make_clip())
    assert len(frames) == STRIP_FRAMES and frames[0] == 0 and frames[-1] == 23 and 5 in frames


def test_scores_and_pictures_of_two_models(monkeypatch: pytest.MonkeyPatch):
    def track(model, clip, kind, features):
        prompted = clip.first_frames()
        found = clip.masks.copy()
        if model == "student":
            found[12:] = False
        return prompted, found

    monkeypatch.setattr(demo_tracking, "clip_features", lambda model, clip: {})
    monkeypatch.setattr(demo_tracking, "track_clip", track)
    tracking = compare_tracking("teacher", "student", [make_clip(), make_clip()], num_shown=1)
    assert [score.prompt for score in tracking.scores] == ["mask", "box", "one click"]
    assert all(score.teacher == 1.0 for score in tracking.scores)
    assert tracking.scores[1].student == pytest.approx((11 / 23 + 6 / 18) / 2)
    assert 0.0 < tracking.stand_still < 0.7
    assert (tracking.num_objects, tracking.num_clips, len(tracking.clips)) == (4, 2, 1)
    strip = Image.open(io.BytesIO(tracking.clips[0].strip_jpeg))
    tiles = np.asarray(strip.convert("RGB")).astype(int)
    row = strip.height // 3
    last = tiles[:, -40:]
    assert np.abs(last[row : 2 * row] - last[2 * row : 3 * row]).max() > 60, "the student has lost both squares"
    film = Image.open(io.BytesIO(tracking.clips[0].animation_webp))
    assert film.n_frames == 24 and film.width == 2 * 80 + 6, "small frames are not enlarged"
