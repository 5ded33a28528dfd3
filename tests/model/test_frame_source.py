"""Frames from folders, lists, arrays and live sources, and decoding ahead in a thread."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from video_clips import frame_number, frame_pixels, write_video

from sam3.video.frame_source import (
    FrameRangeError,
    FrameSource,
    ListFrames,
    VideoDecodeError,
    VideoInputError,
    open_frames,
)
from sam3.video.prefetch import PrefetchedFrames


def write_pictures(folder: Path, names: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        Image.fromarray(frame_pixels(i)).save(folder / name)
    return folder


def all_numbers(frames: FrameSource) -> list[int]:
    return [frame_number(frames.frame(i)) for i in itertools.takewhile(frames.has_frame, itertools.count())]


def test_a_folder_by_number_or_by_name(tmp_path) -> None:
    folder = write_pictures(tmp_path / "numbers", ["0.png", "2.png", "10.png", "0011.png"])
    (folder / "sav_manual.json").write_text("{}")
    (folder / ".1.png").write_bytes(b"not looked at")
    with open_frames(folder) as frames:
        assert all_numbers(frames) == [0, 1, 2, 3] and frames.num_frames == 4
        assert frames.time_s(1) is None and frames.frames_per_second is None
    with open_frames(write_pictures(tmp_path / "names", ["a.png", "b10.png", "b9.png"])) as frames:
        assert all_numbers(frames) == [0, 1, 2]


def test_lists_arrays_and_tensors() -> None:
    pixels = [frame_pixels(i) for i in range(5)]
    array = np.stack(pixels)
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    for source in (pixels, [Image.fromarray(p) for p in pixels], tuple(tensor), array, tensor, tensor / 255):
        with open_frames(source) as frames:
            assert frames.size_hw == (48, 64) and frames.num_frames == 5
            for i in (4, 0, 2):
                assert np.abs(frames.frame(i).astype(int) - pixels[i]).max() <= 1
    frames = open_frames(array)
    assert open_frames(frames, prefetch=2) is frames, "a source is taken as it is"


def test_a_live_source_is_read_once_and_in_order() -> None:
    pulled = []

    def camera():
        for i in range(6):
            pulled.append(i)
            yield frame_pixels(i)

    frames = open_frames(camera())
    assert frames.is_sequential and frames.num_frames is None and pulled == [0], "one frame, for the size"
    assert [frame_number(frames.frame(i)) for i in (0, 0, 1, 2, 1)] == [0, 0, 1, 2, 1]
    with pytest.raises(FrameRangeError, match="frame 0 is gone; a live source keeps its last 2"):
        frames.frame(0)
    assert frames.has_frame(5) and not frames.has_frame(6) and frames.num_frames == 6
    with pytest.raises(FrameRangeError, match=r"has no frame 6; it has 6 frames \(0 to 5\)"):
        frames.frame(6)


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_live_source_that_fails_hands_out_what_came(prefetch) -> None:
    def camera():
        yield from (frame_pixels(i) for i in range(3))
        raise OSError("the cable was pulled")

    with open_frames(camera(), prefetch=prefetch) as frames:
        assert [frame_number(frames.frame(i)) for i in range(3)] == [0, 1, 2]
        with pytest.raises(VideoDecodeError, match=r"failed at frame 3 \(OSError: the cable was pulled\)") as caught:
            frames.frame(3)
        assert caught.value.frame_idx == 3


def test_sources_that_cannot_be_used(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    damaged = write_pictures(tmp_path / "damaged", ["0.png", "1.png"])
    (damaged / "0.png").write_bytes(b"no picture")
    for source, message in (
        (tmp_path / "empty", "empty: the folder holds no picture"),
        (write_pictures(tmp_path / "twice", ["1.png", "01.png"]), "twice: 01.png and 1.png are both frame 1"),
        (damaged, "0.png: not an image"),
        ([], "the list of frames: holds no frame"),
        (iter([]), "the live source: ended before its first frame"),
        (iter(["a.png"]), "the live source: frame 0: an image must be"),
        (np.zeros((48, 64, 3), np.uint8), r"an array of frames must be \(T, H, W, 3\)"),
        (7, "a video must be a video file, a folder of pictures, .* got int"),
        ("", "the video's name is empty"),
    ):
        with pytest.raises(VideoInputError, match=message):
            open_frames(source)


def test_a_picture_of_another_size_is_refused_when_it_comes(tmp_path) -> None:
    folder = write_pictures(tmp_path / "pictures", ["0.png", "1.png", "2.png"])
    Image.fromarray(frame_pixels(2, (40, 64))).save(folder / "2.png")
    for source in (folder, [frame_pixels(0), frame_pixels(1), frame_pixels(2, (40, 64))]):
        with open_frames(source) as frames:
            assert [frame_number(frames.frame(i)) for i in range(2)] == [0, 1]
            with pytest.raises(VideoDecodeError, match="frame 2 has 64 x 40 pixels, the first frame 64 x 48"):
                frames.frame(2)


class Recorded(ListFrames):
    """Remembers which frames were read, and by which thread."""

    def __init__(self, num_frames: int) -> None:
        super().__init__([frame_pixels(i) for i in range(num_frames)])
        self.reads: list[int] = []
        self.threads: set[str] = set()

    def _read(self, index: int) -> np.ndarray:
        self.reads.append(index)
        self.threads.add(threading.current_thread().name)
        return super()._read(index)


def wait_until(is_true) -> None:
    deadline = time.monotonic() + 10
    while not is_true():
        assert time.monotonic() < deadline, "waited for 10 seconds"
        time.sleep(0.005)


def test_reading_ahead_follows_the_direction_and_is_bounded() -> None:
    inside = Recorded(40)
    with PrefetchedFrames(inside, 3) as frames:
        frames.frame(10)
        wait_until(lambda: sorted(inside.reads) == [10, 11, 12, 13])
        assert frame_number(frames.frame(11)) == 11
        wait_until(lambda: 14 in inside.reads)
        frames.frame(10)
        wait_until(lambda: {9, 8, 7} <= set(inside.reads))
        assert [frame_number(frames.frame(i)) for i in range(9, -1, -1)] == list(range(9, -1, -1))
        assert frame_number(frames.frame(39)) == 39
        time.sleep(0.05)
        assert max(inside.reads) == 39 and min(inside.reads) == 0, "never beyond the ends"
        assert len(frames._shared.ready) <= 5, "the present frame, the one before it and three ahead"
        assert inside.threads == {"frames of the list of frames"}
    assert inside._is_closed and not frames._thread.is_alive()
    with pytest.raises(VideoInputError, match="is closed"):
        frames.frame(0)


def test_the_next_frame_is_read_while_the_model_works() -> None:
    inside = Recorded(20)
    with PrefetchedFrames(inside, 2) as frames:
        for i in range(19):
            frames.frame(i)
            wait_until(lambda ahead=i + 1: ahead in inside.reads)


def test_reading_ahead_of_a_live_source() -> None:
    with open_frames((frame_pixels(i) for i in range(12)), prefetch=3) as frames:
        assert frames.is_sequential and frames.num_frames is None
        assert all_numbers(frames) == list(range(12))
        assert frames.num_frames == 12 and not frames.has_frame(12)
        with pytest.raises(FrameRangeError, match="has no frame 12"):
            frames.frame(12)


def test_a_fault_ahead_is_raised_when_its_frame_is_asked_for(tmp_path) -> None:
    pixels = [frame_pixels(i) for i in range(8)]
    pixels[3] = frame_pixels(3, (24, 64))
    with open_frames(pixels, prefetch=4) as frames:
        assert [frame_number(frames.frame(i)) for i in (0, 1, 2)] == [0, 1, 2]
        with pytest.raises(VideoDecodeError, match="frame 3 has"):
            frames.frame(3)
        assert frame_number(frames.frame(4)) == 4


def test_a_source_that_is_forgotten_ends_its_thread(tmp_path) -> None:
    frames = open_frames(write_video(tmp_path / "clip.mp4", 12), prefetch=2)
    assert isinstance(frames, PrefetchedFrames) and frame_number(frames.frame(5)) == 5
    assert frames.time_s(6) == pytest.approx(0.25)
    thread = frames._thread
    del frames
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


def test_closing_does_not_wait_for_a_camera_that_hangs() -> None:
    is_over = threading.Event()

    def camera():
        yield frame_pixels(0)
        is_over.wait(30)

    frames = open_frames(camera(), prefetch=2)
    assert frame_number(frames.frame(0)) == 0
    start = time.monotonic()
    frames.close()
    assert time.monotonic() - start < 5
    is_over.set()
