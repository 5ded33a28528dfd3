"""``python -m sam3.track``: a video and prompts in, overlay, masks and tracks out; what was done is kept."""

from __future__ import annotations

import json
import shutil
import signal
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from track_command import run_track, write_pictures, write_tiny_checkpoint
from video_clips import frame_pixels, write_video

import sam3
from sam3.checkpoint_io import write_merged
from sam3.coco_rle import decode_mask
from sam3.drawing import index_image
from sam3.efficient_keys import own_weights
from sam3.model.efficient_sam3_tracker import EfficientSam3Tracker
from sam3.model.sam3_tracking_predictor import Sam3TrackerPredictor
from sam3.model_builder import build_sam3_image_model
from sam3.predict import join_marks
from sam3.released_names import to_released
from sam3.track import main
from sam3.video.frame_source import open_frames
from sam3.video.tracking import passes
from sam3.video.writer import BackgroundWriter

HEIGHT, WIDTH = 48, 64
NUM_FRAMES = 9
MEMORY_FLAGS = {"default": (), "efficient": ("--memory", "efficient"), "full": ("--memory", "full")}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny.pt")


@pytest.fixture(scope="module")
def model(checkpoint):
    return sam3.load_model(checkpoint, device="cpu")


@pytest.fixture
def clip(tmp_path) -> Path:
    return write_video(tmp_path / "clip.mp4", NUM_FRAMES)


@pytest.fixture
def run(checkpoint, tmp_path, capsys):
    """Run the command on the CPU; gives exit code, stdout, stderr and the tracks."""
    return partial(run_track, checkpoint, tmp_path / "out", capsys)


def expected_masks(model, clip: Path, add, start: int, reverse: bool, **settings) -> dict[int, np.ndarray]:
    """By frame, what the predictor gives for prompts: bool, (n, H, W)."""
    predictor = Sam3TrackerPredictor(model, **settings)
    state = predictor.init_state(video_path=clip)
    add(predictor, state)
    results = predictor.propagate_in_video(state, start, reverse=reverse)
    return {frame_idx: (masks[:, 0] > 0).numpy() for frame_idx, _, _, masks, _ in results}


def masks_of(frame: dict, ids: list[int]) -> np.ndarray:
    found = {entry["id"]: decode_mask(entry["segmentation"]) for entry in frame["objects"]}
    return np.array([found.get(obj_id, np.zeros((HEIGHT, WIDTH), bool)) for obj_id in ids])


def test_clicks_are_followed_both_ways(run, clip, model, tmp_path) -> None:
    code, out, err, tracks = run(clip, "--point", "20,30", "--point", "50,10,0", "--frame", "4")
    assert code == 0 and "frames: 9, " in out and " frames/s" in err
    assert (tracks["num_frames"], tracks["height"], tracks["stopped_by"]) == (9, HEIGHT, None)

    def add(predictor, state) -> None:
        points = [[20 / WIDTH, 30 / HEIGHT], [50 / WIDTH, 10 / HEIGHT]]
        predictor.add_new_points_or_box(state, 4, 1, points=points, labels=[1, 0])

    expected = expected_masks(model, clip, add, 4, reverse=True) | expected_masks(model, clip, add, 4, reverse=False)
    assert [frame["frame"] for frame in tracks["frames"]] == list(range(9)), "in the order of time"
    folder = tmp_path / "out/Annotations/clip"
    assert len(list(folder.iterdir())) == 9
    for frame in tracks["frames"]:
        index = frame["frame"]
        assert frame["time_s"] == pytest.approx(index / 24, abs=1e-5)
        np.testing.assert_array_equal(masks_of(frame, [1]), expected[index])
        np.testing.assert_array_equal(np.array(Image.open(folder / f"{index:05d}.png")) == 1, expected[index][0])
        assert all(0.0 <= entry["score"] <= 1.0 for entry in frame["objects"])
    assert sum(mask.sum() for mask in expected.values()) > 0
    with open_frames(tmp_path / "out/overlay.mp4") as overlay, open_frames(clip) as frames:
        assert overlay.num_frames == 9 and overlay.size_hw == (HEIGHT, WIDTH)
        changed = np.abs(overlay.frame(8).astype(int) - frames.frame(8)).max(axis=-1) > 40
        assert changed[expected[8][0]].mean() > 0.5


def test_several_objects_on_several_frames_from_json(run, clip, model, tmp_path) -> None:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[10:30, 30:50] = True
    index_image([mask], (HEIGHT, WIDTH), [7]).save(tmp_path / "mask.png")
    prompts = [{"object": 9, "box": [4, 4, 30, 30]}, {"object": 2, "frame": 2, "mask": "mask.png", "value": 7}]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    code, _, _, tracks = run(clip, "--prompts", tmp_path / "prompts.json", "--max-frames", "5", "--save", "tracks")
    assert code == 0 and [frame["frame"] for frame in tracks["frames"]] == list(range(6))

    def add(predictor, state) -> None:
        box = [4 / WIDTH, 4 / HEIGHT, 30 / WIDTH, 30 / HEIGHT]
        predictor.add_new_points_or_box(state, 0, 9, box=box)
        predictor.add_new_mask(state, 2, 2, mask)

    expected = expected_masks(model, clip, add, 0, reverse=False, objects="independent")
    for frame in tracks["frames"]:
        np.testing.assert_array_equal(masks_of(frame, [9, 2]), expected[frame["frame"]])
    assert expected[2][0].any(), "an object is followed through a frame that another one is prompted on"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tracks.json"]


def test_a_folder_and_a_picture_of_masks(run, tmp_path) -> None:
    folder = write_pictures(tmp_path / "frames", 4)
    masks = np.zeros((2, HEIGHT, WIDTH), dtype=bool)
    masks[0, 4:20, 4:20], masks[1, 24:40, 30:50] = True, True
    index_image(list(masks), (HEIGHT, WIDTH), [3, 4]).save(tmp_path / "first.png")
    options = ("--mask", tmp_path / "first.png", "--frame", "3", "--direction", "backward", "--fps", "2")
    code, _, _, tracks = run(folder, *options)
    assert code == 0 and [frame["frame"] for frame in tracks["frames"]] == [0, 1, 2, 3]
    assert [entry["id"] for entry in tracks["objects"]] == [3, 4] and "time_s" not in tracks["frames"][0]
    values = np.array(Image.open(tmp_path / "out/Annotations/frames/00003.png"))
    assert ((values == 3) == masks[0]).mean() > 0.95 and ((values == 4) == masks[1]).mean() > 0.95
    with open_frames(tmp_path / "out/overlay.mp4") as overlay:
        assert overlay.time_s(3) == pytest.approx(1.5, abs=1e-3)


def test_a_text_is_followed(run, clip, model, tmp_path) -> None:
    from sam3.model.sam3_video_inference import Sam3VideoInference

    code, out, _, tracks = run(clip, "--text", "a cat", "--max-frames", "6")
    assert code == 0 and "frames: 7, " in out and tracks["text"] == "a cat"
    video_model = Sam3VideoInference(model)
    state = video_model.init_state(clip)
    video_model.add_prompt(state, 0, text_str="a cat")
    results = dict(video_model.propagate_in_video(state, 0, 6))
    assert [frame["frame"] for frame in tracks["frames"]] == sorted(results) == list(range(7))
    for frame in tracks["frames"]:
        expected = results[frame["frame"]]
        ids = expected["out_obj_ids"].tolist()
        assert [entry["id"] for entry in frame["objects"]] == ids
        np.testing.assert_array_equal(masks_of(frame, ids).reshape(-1, HEIGHT, WIDTH), expected["out_binary_masks"])
        values = np.array(Image.open(tmp_path / f"out/Annotations/clip/{frame['frame']:05d}.png"))
        assert set(np.unique(values)) <= {0, *(obj_id + 1 for obj_id in ids)}


def test_a_video_of_varying_rate_keeps_its_times(run, tmp_path) -> None:
    ticks = [0, 5, 10, 40, 41, 43, 100]
    code, _, _, tracks = run(write_video(tmp_path / "varying.mp4", 7, ticks=ticks), "--point", "20,30")
    assert code == 0
    assert [frame["time_s"] for frame in tracks["frames"]] == pytest.approx([t / 120 for t in ticks], abs=1e-5)
    with open_frames(tmp_path / "out/overlay.mp4") as overlay:
        assert [overlay.time_s(i) for i in range(7)] == pytest.approx([t / 120 for t in ticks], abs=1e-3)


@pytest.mark.parametrize(("option", "value"), [("--point", "20,30"), ("--text", "a cat")])
def test_a_decoder_that_dies_midway_keeps_what_was_tracked(run, tmp_path, option, value) -> None:
    path = write_video(tmp_path / "cut.mp4", 12, keyframe_every=3, container_options={"movflags": "faststart"})
    with av.open(str(path)) as container:
        end = [packet.pos for packet in container.demux(video=0)][6]
    path.write_bytes(path.read_bytes()[:end])
    code, out, err, tracks = run(path, option, value)
    assert code == 2 and "Traceback" not in err
    assert "cut.mp4: decoding ends before frame 6 of 12 frames" in err and "out holds 6 frames, 0 to 5" in err
    assert "frames: 6, " in out and [frame["frame"] for frame in tracks["frames"]] == list(range(6))
    assert "decoding ends before frame 6" in tracks["stopped_by"]
    assert len(list((tmp_path / "out/Annotations/cut").iterdir())) == 6
    with open_frames(tmp_path / "out/overlay.mp4") as overlay:
        assert overlay.num_frames == 6


def test_frames_of_changing_size_keep_what_was_tracked(run, tmp_path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for i in range(5):
        Image.fromarray(frame_pixels(i, (HEIGHT, WIDTH if i < 3 else 60))).save(folder / f"{i}.png")
    code, out, err, tracks = run(folder, "--box", "4,4,30,30")
    assert code == 2 and "frames: 3, " in out and len(tracks["frames"]) == 3
    assert "frame 3 has 60 x 48 pixels, the first frame 64 x 48 pixels" in err


@pytest.mark.parametrize(("frame", "expected"), [(0, [0, 1, 2, 3]), (8, [5, 6, 7, 8])])
def test_ctrl_c_keeps_what_is_done(run, clip, tmp_path, monkeypatch, frame, expected) -> None:
    """Also while going backward, when nothing is written yet."""
    original = Sam3TrackerPredictor.track_frame
    num_frames = 0

    def interrupted_at_the_fifth(self, *args, **kwargs):
        nonlocal num_frames
        num_frames += 1
        if num_frames == 5:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Sam3TrackerPredictor, "track_frame", interrupted_at_the_fifth)
    code, out, err, tracks = run(clip, "--point", "20,30", "--frame", frame)
    assert code == 130 and "interrupted" in err and "Traceback" not in err
    assert "frames: 4, " in out and [entry["frame"] for entry in tracks["frames"]] == expected
    assert tracks["stopped_by"] == "interrupted" and len(list((tmp_path / "out/Annotations/clip").iterdir())) == 4
    with open_frames(tmp_path / "out/overlay.mp4") as overlay:
        assert overlay.num_frames == 4
    assert not list(tmp_path.rglob("*.part"))


def test_ctrl_c_while_writing_keeps_what_waits(run, tmp_path, monkeypatch) -> None:
    """A text's results come 14 frames late; a Ctrl-C between two of them must not lose those."""
    original = BackgroundWriter.add

    def interrupted(self, frame):
        if frame.frame_idx == 1:
            signal.raise_signal(signal.SIGINT)
        original(self, frame)

    monkeypatch.setattr(BackgroundWriter, "add", interrupted)
    code, _, err, tracks = run(write_video(tmp_path / "long.mp4", 20), "--text", "a cat", "--save", "tracks")
    assert code == 130 and tracks["stopped_by"] == "interrupted" and "Traceback" not in err
    assert [entry["frame"] for entry in tracks["frames"]] == list(range(16))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_while_files_are_finished_breaks_none(run, clip, tmp_path, monkeypatch) -> None:
    original = BackgroundWriter.close

    def interrupted(self, stopped_by=None):
        signal.raise_signal(signal.SIGINT)
        original(self, stopped_by)

    monkeypatch.setattr(BackgroundWriter, "close", interrupted)
    code, _, _, tracks = run(clip, "--point", "20,30", "--max-frames", "2")
    assert code == 0 and len(tracks["frames"]) == 3 and tracks["stopped_by"] is None
    assert not list(tmp_path.rglob("*.part"))


def test_a_second_ctrl_c_ends_at_once(run, clip, tmp_path, monkeypatch) -> None:
    def interrupted(self, frame):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(BackgroundWriter, "add", interrupted)
    code, out, _, tracks = run(clip, "--point", "20,30")
    assert code == 130 and "frames: 0, " in out and tracks["frames"] == []


def test_results_of_an_earlier_run_do_not_mix_with_new_ones(run, clip, tmp_path, monkeypatch) -> None:
    assert run(clip, "--point", "20,30")[0] == 0
    notes, other = tmp_path / "out/Annotations/clip/notes.txt", tmp_path / "out/Annotations/other/00000.png"
    other.parent.mkdir()
    for path in (notes, other):
        path.write_text("mine")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert len(before) == NUM_FRAMES + 4
    with monkeypatch.context() as patch:
        patch.setattr("sam3.loading.load_model", lambda *args, **kwargs: pytest.fail("a model was loaded"))
        code, _, err, _ = run(clip, "--point", "20,30", "--save", "tracks")
    assert code == 2 and len(err.splitlines()) == 1
    assert "holds results of an earlier run (overlay.mp4, ...; files: 11)" in err and "--overwrite" in err
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    code, _, _, tracks = run(clip, "--point", "20,30", "--max-frames", "2", "--save", "tracks", "--overwrite")
    assert code == 0 and len(tracks["frames"]) == 3
    assert {path for path in (tmp_path / "out").rglob("*") if path.is_file()} == {
        tmp_path / "out/tracks.json",
        notes,
        other,
    }
    elsewhere = write_video(tmp_path / "second.mp4", 2)
    assert run(elsewhere, "--point", "20,30", "--save", "masks")[0] == 2, "tracks.json is of the other video"


def test_a_bug_is_no_mistake_of_the_user_and_keeps_what_is_done(run, clip, tmp_path, monkeypatch) -> None:
    original = sam3.video.writer.draw_overlay

    def broken(pixels, *args):
        return 1 / 0 if pixels.mean() > 25 else original(pixels, *args)

    monkeypatch.setattr(sam3.video.writer, "draw_overlay", broken)
    with pytest.raises(ZeroDivisionError):
        run(clip, "--point", "20,30")
    tracks = json.loads((tmp_path / "out/tracks.json").read_text())
    assert tracks["stopped_by"] == "error" and 0 < len(tracks["frames"]) < NUM_FRAMES


def test_a_full_disk_is_said_in_one_line(run, clip, monkeypatch) -> None:
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sam3.video.writer.write_whole", full)
    code, _, err, _ = run(clip, "--point", "20,30")
    assert code == 2 and "out: cannot be written (No space left on device)" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["CLIP"], ["no prompt: give --point, --box, --mask, --prompts or --text"]),
        (["nowhere.mp4", "--point", "1,1"], ["nowhere.mp4: no such file or folder"]),
        (["", "--point", "1,1"], ["error: VIDEO '': the path is empty\n"]),
        (["CLIP", "--point", "1,1", "--output", ""], ["error: --output '': the path is empty\n"]),
        (["CLIP", "--mask", " "], ["error: --mask ' ': the path is empty\n"]),
        (["PROMPTS", "--point", "1,1"], ["prompts.json: holds no video"]),
        (["EMPTY", "--point", "1,1"], ["the folder holds no picture"]),
        (["CLIP", "--point", "1"], ["--point 1: expected 2 numbers with commas"]),
        (["CLIP", "--point", "1,90"], ["--point: point 1,90 lies outside the video (64 x 48 pixels)"]),
        (["CLIP", "--box", "9,9,3,12"], ["--box 9,9,3,12: must be X0,Y0,X1,Y1 with X0 < X1"]),
        (["CLIP", "--box", "1,1,3,3,0"], ["--box with label 0"]),
        (["CLIP", "--box", "1,1,3,3", "--box", "4,4,9,9", "--point", "1,1"], ["all points belong to one object"]),
        (["CLIP", "--point", "1,1", "--frame", "9"], ["there is no frame 9: the video has 9 frames (0 to 8)"]),
        (["CLIP", "--point", "1,1", "--frame", "-1"], ["--frame -1: must be at least 0"]),
        (["CLIP", "--box", "-20,-5.5,30,30", "--frame", "9"], ["error: --box: there is no frame 9"]),
        (["CLIP", "--point", "-.5,3"], ["--point: point -0.5,3 lies outside the video"]),
        (["CLIP", "--point", "1,1", "--fps", "5"], ["--fps 5: ", "clip.mp4 has times of its own"]),
        (["CLIP", "--mask", "CLIP"], ["clip.mp4: not an image"]),
        (["CLIP", "--mask", "SMALL"], ["small.png: the mask has 10 x 20 pixels, the video 64 x 48 pixels"]),
        (["CLIP", "--prompts", "PROMPTS"], ["prompts.json: entry 1: unknown key 'id'"]),
        (["CLIP", "--prompts", "PROMPTS", "--point", "1,1"], ["holds all marks, so --point"]),
        (["CLIP", "--text", "x", "--box", "1,1,9,9"], ["--box does not go with --text"]),
        (["CLIP", "--text", "x", "--direction", "backward"], ["--direction backward does not go with --text"]),
        (["CLIP", "--text", " "], ["--text ' ': the text is empty"]),
        (["CLIP", "--point", "1,1", "--device", "gpu"], ["--device gpu: torch knows devices such as cpu"]),
        (
            ["CLIP", "--fps", "0", "--max-frames", "-1", "--output", "CLIP"],
            ["4 problems", "--fps 0", "--max-frames -1", "clip.mp4: is a file, not a folder", "no prompt"],
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) and x[0].isupper() else "",
)
def test_what_cannot_work_is_said_before_a_model_is_loaded(run, clip, tmp_path, monkeypatch, options, messages) -> None:
    monkeypatch.setattr("sam3.loading.load_model", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    (tmp_path / "EMPTY").mkdir()
    Image.new("L", (10, 20), 255).save(tmp_path / "small.png")
    (tmp_path / "prompts.json").write_text('[{"id": 1}]')
    names = {"CLIP": clip, "EMPTY": tmp_path / "EMPTY", "SMALL": tmp_path / "small.png"}
    names["PROMPTS"] = tmp_path / "prompts.json"
    code, _, err, tracks = run(*(names.get(word, word) for word in options))
    assert code == 2 and tracks is None and "Traceback" not in err
    for message in messages:
        assert message in err


def test_a_checkpoint_without_the_needed_part_is_refused(clip, tmp_path, capsys) -> None:
    path = tmp_path / "heads.pt"
    options = {"load_from_HF": False, "config": "tiny", "device": "cpu", "enable_detector": False}
    for has_tracker, prompt, message in (
        (False, ["--point", "3,4"], "heads.pt: holds no tracker"),
        (True, ["--text", "x"], "heads.pt: holds no detector and text encoder"),
    ):
        heads = build_sam3_image_model(enable_inst_interactivity=True, enable_tracker=has_tracker, **options)
        torch.save({"model": to_released(heads.state_dict(), heads.config)}, path)
        assert main([str(clip), "--checkpoint", str(path), "--output", str(tmp_path / "out"), *prompt]) == 2
        assert message in capsys.readouterr().err
    assert main([str(clip), "--checkpoint", "nothing.pt", "--output", str(tmp_path / "out"), "--text", "x"]) == 2
    assert "nothing.pt" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out")


def test_a_file_with_two_memories_is_tracked_with_either(run, clip, model, tmp_path) -> None:
    config = model.config.with_efficient_memory()
    torch.manual_seed(0)
    own = own_weights(EfficientSam3Tracker(config).state_dict())
    both, weights = tmp_path / "both.pt", to_released(model.state_dict(), model.config)
    write_merged(both, weights | own, {"model": config.to_dict()})
    options = (clip, "--checkpoint", both, "--box", "12,8,40,36", "--overwrite", "--save", "tracks")
    found = {memory: run(*options, *flag) for memory, flag in MEMORY_FLAGS.items()}
    assert all(code == 0 for code, *_ in found.values())
    assert found["default"][3] == found["efficient"][3] != found["full"][3]
    _, _, _, expected = run(clip, "--box", "12,8,40,36", "--overwrite", "--save", "tracks")
    assert found["full"][3] == expected
    code, _, err, _ = run(clip, "--box", "12,8,40,36", "--overwrite", "--memory", "efficient")
    assert code == 2 and "holds no efficient memory (it holds: full)" in err


def test_only_numbers_after_a_minus_are_values() -> None:
    words = ["a.mp4", "--box", "-20,-5,30,30", "--point", "-1,2", "--save", "masks", "-h", "--text", "-x, y"]
    joined = ["a.mp4", "--box=-20,-5,30,30", "--point=-1,2", "--save", "masks", "-h", "--text", "-x, y"]
    assert join_marks(words) == joined and join_marks(joined) == joined


def test_passes_over_a_video() -> None:
    assert passes(4, 9, "both", None) == [range(4, -1, -1), range(4, 9)]
    assert passes(0, 9, "both", None) == [range(9)] and passes(0, 9, "backward", None) == [range(0, -1, -1)]
    assert passes(4, 9, "both", 2) == [range(4, 1, -1), range(4, 7)]
    assert passes(8, 9, "forward", 3) == [range(8, 9)] and passes(2, 9, "backward", 7) == [range(2, -1, -1)]
