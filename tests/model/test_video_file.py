"""Video files: the same frames from both decoders, in any order; what is wrong with a file is said."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from video_clips import FPS, frame_number, frame_pixels, rotate_in_header, write_audio, write_video

from sam3.video.frame_source import FrameRangeError, VideoDecodeError, VideoInputError, open_frames
from sam3.video.video_file import VideoFileFrames
from sam3.video.video_index import index_video, read_header

try:
    import decord
except ImportError:
    decord = None
DECODERS = [
    "av",
    pytest.param("decord", marks=pytest.mark.skipif(decord is None, reason="decord has no wheel for this machine")),
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", 50)


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_frame_in_any_order(clip, decoder) -> None:
    with VideoFileFrames(clip, decoder) as frames:
        assert (frames.num_frames, frames.size_hw, frames.decoder) == (50, (48, 64), decoder)
        assert frames.frames_per_second == pytest.approx(FPS)
        for order in (range(50), range(49, -1, -1), [0, 49, 7, 8, 8, 6, 31, 2, 48, 33]):
            assert [frame_number(frames.frame(i)) for i in order] == list(order)
        pixels = frames.frame(20)
        assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
        assert np.abs(pixels.astype(int) - frame_pixels(20)).max() < 12, "lossy, but the same picture"
        assert [frames.time_s(i) for i in (0, 12)] == pytest.approx([0.0, 0.5])


def test_the_index_holds_eight_bytes_for_each_frame(clip) -> None:
    times = index_video(clip).times
    assert memoryview(times).nbytes == 8 * len(times) > 0  # type: ignore[arg-type]  # any buffer


@pytest.mark.skipif(decord is None, reason="decord has no wheel for this machine")
def test_both_decoders_give_the_same_pixels(clip) -> None:
    with VideoFileFrames(clip, "av") as one, VideoFileFrames(clip) as other:
        assert other.decoder == "decord", "it is taken where it can be"
        for i in (*range(20), 40, 3):
            np.testing.assert_array_equal(one.frame(i), other.frame(i))


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_video_of_varying_rate_keeps_its_times(tmp_path, decoder) -> None:
    ticks = [0, 5, 10, 40, 41, 43, 100, 105, 110, 111, 200, 240]
    path = write_video(tmp_path / "varying.mp4", len(ticks), ticks=ticks)
    with VideoFileFrames(path, decoder) as frames:
        assert [frame_number(frames.frame(i)) for i in range(12)] == list(range(12))
        assert [frames.time_s(i) for i in range(12)] == pytest.approx([tick / 120 for tick in ticks])
        assert frames.frames_per_second == pytest.approx(11 / 2)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_video_that_is_shown_turned_is_turned(tmp_path, decoder) -> None:
    path = rotate_in_header(write_video(tmp_path / "phone.mp4", 4))
    with VideoFileFrames(path, decoder) as frames:
        assert (frames.size_hw, frames.decoder) == ((64, 48), "av"), "decord makes four channels of these"
        expected = np.rot90(frame_pixels(2), -1)
        assert np.abs(frames.frame(2).astype(int) - expected).max() < 12


@pytest.mark.parametrize(
    ("name", "codec"), [("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4"), ("a.mkv", "libx264"), ("a.h264", "libx264")]
)
def test_other_containers_and_codecs(tmp_path, name, codec) -> None:
    path = write_video(tmp_path / name, 24, codec=codec)
    with open_frames(path) as frames:
        assert frames.num_frames == 24
        order = [0, 1, 2, 23, 5, 4, 3, 17]
        assert [frame_number(frames.frame(i)) for i in order] == order


def test_bytes_of_a_file(clip) -> None:
    with open_frames(clip.read_bytes()) as frames:
        assert [frame_number(frames.frame(i)) for i in (3, 44, 1)] == [3, 44, 1]
    with pytest.raises(VideoInputError, match="the video's bytes: not a video"):
        open_frames(b"no video")


def test_a_file_that_is_closed_or_asked_for_too_much(clip) -> None:
    frames = open_frames(clip)
    for index in (-1, 50):
        with pytest.raises(FrameRangeError, match=rf"clip.mp4: has no frame {index}; it has 50 frames \(0 to 49\)"):
            frames.frame(index)
    frames.close()
    frames.close()
    with pytest.raises(VideoInputError, match=r"clip\.mp4: is closed"):
        frames.frame(0)
    with pytest.raises(ValueError, match="decoder 'cv2' is not one of"):
        open_frames(clip, decoder="cv2")


def test_files_that_are_no_videos(tmp_path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video " * 50)
    whole = write_video(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "no_header.mp4").write_bytes(whole[: len(whole) // 2])  # the table of frames is at the end
    write_video(tmp_path / "no_frames.mp4", 0, container_options={"movflags": "empty_moov+frag_keyframe"})
    write_video(tmp_path / "no_track.mp4", 0)
    write_audio(tmp_path / "audio.mp4")
    (tmp_path / "photo.png").write_bytes(b"")
    for name, message in {
        "missing.mp4": "no such file or folder",
        "empty.mp4": "not a video that can be read, or cut off",
        "text.mp4": "not a video that can be read, or cut off",
        "no_header.mp4": "not a video that can be read, or cut off",
        "no_frames.mp4": "the video has no frames",
        "no_track.mp4": "holds no video and nothing else",
        "audio.mp4": "holds no video, only audio",
        "photo.png": "is a picture; give a video file, or a folder of pictures",
    }.items():
        with pytest.raises(VideoInputError, match=rf"{name}: .*{message}"):
            open_frames(tmp_path / name)


@pytest.fixture
def damaged(tmp_path):
    """Make a 50-frame file whose table of frames comes first, with something else in the place of frame 30 onwards."""

    def make(name: str, second_half) -> Path:
        path = write_video(tmp_path / name, 50, container_options={"movflags": "faststart"})
        data = path.read_bytes()
        with av.open(str(path)) as container:
            middle = [packet.pos for packet in container.demux(video=0)][30]
        path.write_bytes(data[:middle] + second_half(data[middle:]))
        return path

    return make


@pytest.mark.parametrize(
    ("name", "second_half"),
    [
        ("cut.mp4", lambda rest: b""),
        ("zeros.mp4", lambda rest: bytes(len(rest))),
        ("noise.mp4", lambda rest: np.random.default_rng(0).bytes(len(rest))),
    ],
)
def test_what_comes_before_the_damage_is_handed_out(damaged, name, second_half) -> None:
    with open_frames(damaged(name, second_half)) as frames:
        assert frames.num_frames == 50
        numbers = []
        with pytest.raises(VideoDecodeError) as caught:
            for i in range(50):
                numbers.append(frame_number(frames.frame(i)))
        assert numbers == list(range(caught.value.frame_idx)) and len(numbers) >= 27
        assert f"{name}: decoding ends before frame {len(numbers)} of 50 frames" in str(caught.value)
        assert frame_number(frames.frame(5)) == 5, "what is good stays"
        with pytest.raises(VideoDecodeError, match=f"before frame {len(numbers)}"):
            frames.frame(49)


def test_an_mp4_whose_frames_change_their_size_on_the_way(tmp_path) -> None:
    """As copying streams of two videos into one makes them; decord would stretch the later frames."""
    parts = [write_video(tmp_path / f"{h}.h264", 10, (h, w), options={"bf": "0"}) for h, w in ((48, 64), (32, 48))]
    (tmp_path / "both.h264").write_bytes(b"".join(part.read_bytes() for part in parts))
    with av.open(str(tmp_path / "both.h264")) as raw, av.open(str(tmp_path / "both.mp4"), "w") as container:
        stream = container.add_stream_from_template(raw.streams.video[0])
        for i, packet in enumerate(packet for packet in raw.demux(video=0) if packet.size):
            packet.stream, packet.time_base = stream, Fraction(1, FPS)
            packet.pts = packet.dts = i
            container.mux(packet)
    with open_frames(tmp_path / "both.mp4") as frames:
        assert isinstance(frames, VideoFileFrames) and frames.decoder == "av" and frames.num_frames == 20
        assert [frame_number(frames.frame(i)) for i in range(10)] == list(range(10))
        with pytest.raises(VideoDecodeError, match="frame 10 has 48 x 32 pixels, the first frame 64 x 48"):
            frames.frame(10)


def test_decord_that_is_asked_for_and_not_there(clip, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(VideoInputError, match='decoder "decord" has no wheel for every machine and is not installed'):
        open_frames(clip, decoder="decord")
    with open_frames(clip) as frames:
        assert isinstance(frames, VideoFileFrames) and frames.decoder == "av"


def test_frames_of_changing_size_are_refused_where_they_change(tmp_path) -> None:
    small = write_video(tmp_path / "small.ts", 10, (32, 48)).read_bytes()
    path = write_video(tmp_path / "both.ts", 10)
    path.write_bytes(path.read_bytes() + small)
    with open_frames(path) as frames:
        assert [frame_number(frames.frame(i)) for i in range(10)] == list(range(10))
        with pytest.raises(VideoDecodeError, match="frame 10 has 48 x 32 pixels, the first frame 64 x 48"):
            frames.frame(10)


def test_the_header_is_read_alone(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 20)
    assert read_header(path) == ((48, 64), 20)
    with pytest.raises(VideoInputError, match="no such file"):
        read_header(tmp_path / "b.mp4")
    path.write_bytes(b"no video")
    with pytest.raises(VideoInputError, match="not a video that can be read"):
        read_header(path)


def test_damage_further_on_never_shows_as_an_error_of_the_decoder(tmp_path: Path) -> None:
    """decord decodes ahead: sometimes the damage already shows at the first frame, which is good."""
    data = bytearray(write_video(tmp_path / "a.mp4", 60).read_bytes())
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    third = start + (end - start) // 3
    data[third:end] = bytes(end - third)
    (tmp_path / "a.mp4").write_bytes(data)
    for _ in range(20):
        with VideoFileFrames(tmp_path / "a.mp4") as video:
            assert frame_number(video.frame(0)) == 0
            with pytest.raises(VideoDecodeError, match=r"a\.mp4"):
                video.frame(59)
