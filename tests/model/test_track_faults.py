"""Frames that cannot be decoded, before and after the one with the prompt: everything else is tracked and kept."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import av
import pytest
from track_command import Ran, run_track, write_pictures, write_tiny_checkpoint
from video_clips import frame_number, write_video

from sam3.video.frame_source import VideoDecodeError, open_frames
from sam3.video.spool import open_spool

PROMPT = ("--point", "20,30", "--frame", "4")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny.pt")


@pytest.fixture
def run(checkpoint, tmp_path, capsys):
    return partial(run_track, checkpoint, tmp_path / "out", capsys)


def frames_of(ran: Ran) -> list[int]:
    return [frame["frame"] for frame in ran.tracks["frames"]]


def write_with_damage(path: Path, packet: int) -> Path:
    """30 frames with key frames 0, 10 and 20, and one that holds none."""
    options = {"bf": "0", "sc_threshold": "0"}
    write_video(path, 30, container_options={"movflags": "faststart"}, options=options)
    with av.open(str(path)) as container:
        position, size = [(p.pos, p.size) for p in container.demux(video=0) if p.size][packet]
    data = bytearray(path.read_bytes())
    data[position : position + size] = b"\xff" * size
    path.write_bytes(data)
    return path


def test_a_damaged_frame_behind_the_prompt_leaves_the_way_forward(run, tmp_path) -> None:
    whole = run(write_pictures(tmp_path / "whole", 9), *PROMPT, "--save", "tracks")
    damaged = run(write_pictures(tmp_path / "damaged", 9, damaged=1), *PROMPT, "--save", "tracks", "--overwrite")
    assert (whole.code, damaged.code) == (0, 2)
    assert damaged.tracks["frames"] == whole.tracks["frames"][2:], "what is not damaged is tracked as ever"
    assert "1.png: not an image" in damaged.err and "out holds 7 frames, 2 to 8" in damaged.err
    assert "1.png: not an image" in damaged.tracks["stopped_by"] and "frames: 7, " in damaged.out


def test_damage_on_both_sides_is_reported_at_once(run, tmp_path) -> None:
    folder = write_pictures(tmp_path / "frames", 9, damaged=1)
    (folder / "6.png").write_bytes(b"no picture")
    ran = run(folder, *PROMPT, "--save", "tracks")
    assert ran.code == 2 and frames_of(ran) == [2, 3, 4, 5]
    assert all(words in ran.err for words in ("1.png: not an image", "6.png: not an image", "4 frames, 2 to 5"))


@pytest.mark.parametrize(
    ("damaged", "direction", "expected", "kept"),
    [
        (4, "both", [], "nothing was tracked"),
        (3, "backward", [4], "out holds frame 4"),
        (5, "both", [0, 1, 2, 3, 4], "out holds 5 frames, 0 to 4"),
    ],
)
def test_what_is_kept_is_said(run, tmp_path, damaged, direction, expected, kept) -> None:
    folder = write_pictures(tmp_path / "frames", 9, damaged)
    ran = run(folder, *PROMPT, "--direction", direction, "--save", "tracks")
    assert ran.code == 2 and frames_of(ran) == expected and kept in ran.err
    assert ran.err.count(f"{damaged}.png: not an image") == 1


def test_frames_after_the_next_key_frame_outlive_a_damaged_one(tmp_path) -> None:
    with open_frames(write_with_damage(tmp_path / "a.mp4", 12), decoder="av") as frames:
        with pytest.raises(VideoDecodeError):
            frames.frame(12)
        assert [frame_number(frames.frame(i)) for i in (25, 26, 20, 9)] == [25, 26, 20, 9]
        with pytest.raises(VideoDecodeError):
            frames.frame(12)
        assert frame_number(frames.frame(29)) == 29


def test_a_damaged_video_is_tracked_from_there_on(run, tmp_path) -> None:
    path = write_with_damage(tmp_path / "a.mp4", 12)
    ran = run(path, "--point", "20,30", "--frame", "22", "--save", "tracks", "--decoder", "av")
    frames = frames_of(ran)
    assert ran.code == 2 and 12 < frames[0] <= 20 and frames == list(range(frames[0], 30))
    assert f"out holds {len(frames)} frames, {frames[0]} to 29" in ran.err


def test_results_that_wait_are_in_a_file_without_a_name(tmp_path) -> None:
    records = [[i, [1, 2], [0.1 * i, 1 / 3], ["ab" * i]] for i in range(100)]
    with open_spool(tmp_path) as spool:
        for record in records:
            spool.append(record)
        assert list(tmp_path.iterdir()) == [] and len(spool) == 100
        assert list(spool.last_first()) == json.loads(json.dumps(records))[::-1]
        assert list(spool.last_first(leave=98)) == records[:97:-1]
        assert list(spool.last_first(leave=101)) == []
