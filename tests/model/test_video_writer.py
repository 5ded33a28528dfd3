"""Overlay videos, masks in DAVIS's layout and lists of tracks, written in a thread beside the model."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from video_clips import frame_pixels

from sam3.coco_rle import decode_mask
from sam3.drawing import object_color
from sam3.video.frame_source import open_frames
from sam3.video.writer import BackgroundWriter, MaskFolder, OverlayVideo, TrackedFrame, TrackList

SIZE = (48, 64)


def square(x: int, size_hw: tuple[int, int] = SIZE) -> np.ndarray:
    mask = np.zeros(size_hw, dtype=bool)
    mask[20:36, x : x + 16] = True
    return mask


def tracked(index: int, masks: list[np.ndarray], ids: list[int], time_s: float | None = None) -> TrackedFrame:
    height, width = masks[0].shape
    scores = [0.5 + 0.01 * obj_id for obj_id in ids]
    return TrackedFrame(index, time_s, frame_pixels(index, (height, width)), ids, scores, np.array(masks))


def test_an_overlay_shows_each_object_in_its_colour_at_its_time(tmp_path) -> None:
    times = [2.0, 2.1, 2.5, 2.51]
    video = OverlayVideo(tmp_path / "made" / "overlay.mp4", SIZE, 24.0)
    for i, time_s in enumerate(times):
        ids = [7, 2] if i < 2 else [2, 7]
        masks = [square(4 if obj_id == 7 else 40) for obj_id in ids]
        video.add(tracked(i, masks, ids, time_s))
    assert not (tmp_path / "made" / "overlay.mp4").exists(), "it appears when it is whole"
    video.close()
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["overlay.mp4"]
    with open_frames(tmp_path / "made" / "overlay.mp4") as frames:
        assert frames.num_frames == 4 and frames.size_hw == SIZE
        assert [frames.time_s(i) for i in range(4)] == pytest.approx([0, 0.1, 0.5, 0.51], abs=1e-4)
        for i in range(4):
            pixels = frames.frame(i).astype(int)
            for x, obj_id in ((12, 7), (48, 2)):
                expected = np.array(object_color(obj_id - 1)) / 2 + 2 * i
                assert np.abs(pixels[30, x] - expected).max() < 30, "tinted in the colour of its id"


def test_odd_sides_frames_without_times_and_objects_that_are_away(tmp_path) -> None:
    size = (47, 63)
    video = OverlayVideo(tmp_path / "overlay.mp4", size, None)
    for i in (3, 4, 6):
        video.add(tracked(i, [square(4, size), np.zeros(size, bool)], [1, 2]))
    video.close()
    with open_frames(tmp_path / "overlay.mp4") as frames:
        assert frames.size_hw == (48, 64)
        assert [frames.time_s(i) for i in range(3)] == pytest.approx([0, 1 / 24, 3 / 24], abs=1e-4)
        assert frames.frame(0)[40, 55].max() < 40, "no box for an empty mask"


def test_without_a_frame_there_is_no_overlay(tmp_path) -> None:
    OverlayVideo(tmp_path / "overlay.mp4", SIZE, 24.0).close("interrupted")
    assert not list(tmp_path.iterdir())


def test_masks_have_the_ids_of_their_objects_as_values(tmp_path) -> None:
    folder = MaskFolder(tmp_path / "Annotations" / "clip")
    folder.add(tracked(0, [square(4), square(10)], [9, 255]))
    folder.add(tracked(12, [square(4), square(30)], [3, 256]))
    names = sorted(path.name for path in (tmp_path / "Annotations" / "clip").iterdir())
    assert names == ["00000.png", "00012.png"]
    picture = Image.open(tmp_path / "Annotations" / "clip" / "00000.png")
    values = np.array(picture)
    assert picture.mode == "P" and set(np.unique(values)) == {0, 9, 255}
    np.testing.assert_array_equal(values == 9, square(4))
    np.testing.assert_array_equal(values == 255, square(10) & ~square(4))
    assert picture.convert("RGB").getpixel((5, 22)) == object_color(8)
    assert folder.dropped_ids == {256}, "more than a palette can hold"
    from_zero = MaskFolder(tmp_path, first_id=0)
    from_zero.add(tracked(0, [square(4), square(40)], [0, 254]))
    assert set(np.unique(np.array(Image.open(tmp_path / "00000.png")))) == {0, 1, 255}


@pytest.mark.parametrize("stopped_by", [None, "interrupted"])
def test_a_list_of_tracks_is_whole_however_it_ends(tmp_path, stopped_by) -> None:
    tracks = TrackList(tmp_path / "tracks.json", {"video": "clip.mp4", "height": 48})
    tracks.add(tracked(5, [square(4), square(40)], [1, 2], 0.25))
    tracks.add(tracked(6, [np.zeros(SIZE, bool), square(41)], [1, 2], 0.3))
    assert not (tmp_path / "tracks.json").exists()
    tracks.close(stopped_by)
    assert len(list(tmp_path.iterdir())) == 1
    content = json.loads((tmp_path / "tracks.json").read_text())
    assert (content["video"], content["stopped_by"], content["num_tracked"]) == ("clip.mp4", stopped_by, 2)
    assert content["objects"] == [
        {"id": 1, "mask_value": 1, "num_frames": 1},
        {"id": 2, "mask_value": 2, "num_frames": 2},
    ]
    first, second = content["frames"]
    assert (first["frame"], first["time_s"]) == (5, 0.25)
    assert [entry["id"] for entry in first["objects"]] == [1, 2] and [e["id"] for e in second["objects"]] == [2]
    assert second["objects"][0]["bbox"] == [41, 20, 16, 16] and second["objects"][0]["score"] == 0.52
    np.testing.assert_array_equal(decode_mask(second["objects"][0]["segmentation"]), square(41))
    empty = TrackList(tmp_path / "empty.json", {"video": "clip.mp4"})
    empty.close("error")
    assert json.loads((tmp_path / "empty.json").read_text())["frames"] == []


class Recorder:
    """Remembers what it got; may wait for, or fail at, some frame."""

    def __init__(self, fails_at: int | None = None, go_on: threading.Event | None = None) -> None:
        self.indices: list[int] = []
        self.threads: set[str] = set()
        self.closed: list[str | None] = []
        self.fails_at, self.go_on = fails_at, go_on
        self.has_started = threading.Event()

    def add(self, frame: TrackedFrame) -> None:
        self.has_started.set()
        if self.go_on is not None:
            assert self.go_on.wait(10)
        if frame.frame_idx == self.fails_at:
            raise OSError(28, "No space left on device")
        self.indices.append(frame.frame_idx)
        self.threads.add(threading.current_thread().name)

    def close(self, stopped_by: str | None = None) -> None:
        self.closed.append(stopped_by)


def test_writing_goes_on_beside_the_model_with_a_bounded_queue() -> None:
    go_on = threading.Event()
    recorder = Recorder(go_on=go_on)
    writer = BackgroundWriter([recorder], num_waiting=3)
    for i in range(4):  # none of these waits, although nothing is written
        writer.add(tracked(i, [square(4)], [1]))
        assert recorder.has_started.wait(10)
    is_added = threading.Event()
    late = threading.Thread(target=lambda: (writer.add(tracked(4, [square(4)], [1])), is_added.set()))
    late.start()
    assert not is_added.wait(0.1), "the queue is full"
    go_on.set()
    late.join(10)
    writer.close("interrupted")
    assert recorder.indices == [0, 1, 2, 3, 4] and recorder.threads == {"writer"}
    assert recorder.closed == ["interrupted"]


def test_a_writer_that_fails_is_heard_and_the_others_are_finished(tmp_path) -> None:
    failing, other = Recorder(fails_at=1), TrackList(tmp_path / "tracks.json", {"video": "clip.mp4"})
    writer = BackgroundWriter([other, failing])
    with pytest.raises(OSError, match="No space left"):
        for i in range(50):
            writer.add(tracked(i, [square(4)], [1]))
    with pytest.raises(OSError, match="No space left"):
        writer.close("error")
    assert failing.indices == [0] and failing.closed == ["error"]
    assert [f["frame"] for f in json.loads((tmp_path / "tracks.json").read_text())["frames"]] == [0, 1]
    assert not writer._thread.is_alive()


def test_an_overlay_plays_in_a_browser(tmp_path: Path) -> None:
    video = OverlayVideo(tmp_path / "overlay.mp4", SIZE, 30.0)
    for i in range(3):
        video.add(tracked(i, [square(4)], [1], i / 30))
    video.close()
    with av.open(str(tmp_path / "overlay.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name in ("h264", "mpeg4") and stream.codec_context.pix_fmt == "yuv420p"
