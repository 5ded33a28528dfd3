"""A text on a stream: the results of the whole video, held back no longer than hot start asks."""

from __future__ import annotations

import numpy as np
import pytest
from video_world import FAST, ScriptedVideo, assert_same_outputs, make_frames, run_all

from sam3.model.text_streaming import TextStream
from sam3.sam.prompts import PromptError
from sam3.video.frame_source import VideoInputError

NUM_FRAMES = 14
SCRIPT = {
    0: [(0.9, (1, 6))],
    1: [(0.9, (1, 6)), (0.8, (9, 14))],
    2: [(0.95, (1, 6))],
    4: [(0.95, (1, 6)), (0.9, (18, 23))],
    8: [(0.9, (18, 23))],
}


def test_a_stream_gives_what_the_whole_video_gives():
    frames, video = make_frames(NUM_FRAMES), ScriptedVideo(SCRIPT)
    state = video.init_state(frames)
    video.add_prompt(state, 0, text_str="thing")
    expected = run_all(video, state)
    stream, found = TextStream(video, "thing"), {}
    for t, frame in enumerate(frames):
        ready = stream.push(frame)
        assert [frame_idx for frame_idx, _ in ready] == (
            [t - FAST.hotstart_delay + 1] if t + 1 >= FAST.hotstart_delay else []
        )
        found |= dict(ready)
    found |= dict(stream.finish())
    assert_same_outputs(found, expected)
    assert any(len(out["out_obj_ids"]) for out in found.values())
    assert not stream.state.cache.frames
    with pytest.raises(VideoInputError, match="the stream ended after 14 frames"):
        stream.push(frames[0])


def test_an_endless_source_and_an_object_that_is_not_wanted():
    frames = make_frames(5)
    script = {t: [(0.9, (1, 6))] for t in range(24)}
    stream = TextStream(ScriptedVideo(script, tracks=lambda obj_id, frame_idx: (1, 6)), "thing")
    sizes = []
    for t in range(24):
        stream.push(frames[t % 5])
        sizes.append(sum(len(group.bank.cond) + len(group.bank.non_cond) for group in stream.state.groups))
    assert 0 < max(sizes) <= 21
    stream.remove_object(stream.state.obj_ids[0])
    assert all(len(out["out_obj_ids"]) == 0 for _, out in stream.finish())


def test_mistakes_are_refused():
    stream = TextStream(ScriptedVideo({}), "thing")
    with pytest.raises(PromptError, match="nothing was pushed yet"):
        stream.remove_object(0)
    with pytest.raises(VideoInputError, match="frame 0 of the stream"):
        stream.push(np.zeros((4, 4, 9), np.uint8))
    assert stream.push(make_frames(1)[0]) == []
    with pytest.raises(PromptError, match="there is no object 3 to remove"):
        stream.remove_object(3)
