"""The track command on a tiny checkpoint, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from golden import fill
from PIL import Image
from video_clips import frame_pixels

from sam3.model_builder import build_sam3_image_model
from sam3.released_names import to_released
from sam3.track import main


class Ran(NamedTuple):
    """How the command ended, and the tracks that it left."""

    code: int
    out: str
    err: str
    tracks: Any


def write_tiny_checkpoint(path: Path) -> Path:
    """All parts of the tiny model, with the golden vectors' weights."""
    options = {"enable_detector": True, "enable_inst_interactivity": True, "enable_tracker": True}
    model = fill(build_sam3_image_model(load_from_HF=False, config="tiny", device="cpu", **options))
    torch.save({"model": to_released(model.state_dict(), model.config)}, path)
    return path


def write_pictures(folder: Path, num_frames: int, damaged: int | None = None) -> Path:
    """A folder of `frame_pixels`, of which one may be no picture."""
    folder.mkdir()
    for i in range(num_frames):
        Image.fromarray(frame_pixels(i)).save(folder / f"{i}.png")
    if damaged is not None:
        (folder / f"{damaged}.png").write_bytes(b"no picture")
    return folder


def run_track(checkpoint: Path, output: Path, capsys: pytest.CaptureFixture[str], *options: object) -> Ran:
    """Run the command on the CPU."""
    words = ["--checkpoint", checkpoint, "--output", output, "--device", "cpu", *options]
    code = main([str(word) for word in words])
    file, printed = output / "tracks.json", capsys.readouterr()
    return Ran(code, printed.out, printed.err, json.loads(file.read_text()) if file.exists() else None)
