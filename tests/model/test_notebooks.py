"""The notebooks run from top to bottom, in their own folder, and show what they promise."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from demo_clips import make_clip
from golden import fill
from nbclient import NotebookClient
from PIL import Image
from safetensors import safe_open
from video_clips import write_video

from sam3.image_input import open_image
from sam3.model.sam3_image_processor import Sam3Processor
from sam3.model_builder import build_sam3_image_model
from sam3.released_names import to_released

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "sam3/examples"
OTHER_TEXTS = ["orange star", "cyan heart", "blue circle"]
TEACHER = ROOT / "data/demo/tiny_teacher.safetensors"


def execute(name: str, folder: Path, **environment: str) -> list[nbformat.NotebookNode]:
    """Run a copy of a notebook in a copy of the repository's layout; gives its code cells with their outputs."""
    copy = folder / "sam3/examples"
    shutil.copytree(EXAMPLES, copy)
    (folder / "data").symlink_to(ROOT / "data")
    notebook = nbformat.read(copy / name, as_version=4)
    nbformat.validate(notebook)
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SAM3_")}
    settings = clean | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(folder / "ipython")}
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(copy)}})
    client.execute(env=settings | environment)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def num_pictures(cell: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def test_the_image_notebook_runs_on_any_checkpoint(tmp_path) -> None:
    """With golden weights, which find nonsense, in the place of the user's own checkpoint."""
    options = {"enable_detector": True, "enable_inst_interactivity": True}
    model = fill(build_sam3_image_model(load_from_HF=False, config="tiny", device="cpu", **options))
    torch.save({"model": to_released(model.state_dict(), model.config)}, tmp_path / "mine.pt")
    cells = execute("image_predictor.ipynb", tmp_path, SAM3_CHECKPOINT=str(tmp_path / "mine.pt"), SAM3_TEXT="a cat")
    assert "mine.pt: " in printed(cells[1])
    assert [num_pictures(cell) for cell in cells] == [0, 0, 1, 1, 1, 1, 1, 1, 0]
    processor = Sam3Processor(model)
    state = processor.set_text_prompt(OTHER_TEXTS, processor.set_image(open_image(EXAMPLES / "shapes.jpg")))
    expected = [f"{result['text']}: {len(result['scores'])}" for result in state["results"]]
    assert printed(cells[4]).splitlines() == expected
    assert not [output for cell in cells for output in cell.outputs if output.get("name") == "stderr"]


def test_the_image_notebook_on_the_demo_teacher(tmp_path) -> None:
    cells = execute("image_predictor.ipynb", tmp_path)
    ious = re.fullmatch(r"estimated IoU: (\S+) from the box, (\S+) with the click\n", printed(cells[-2]))
    assert ious is not None and float(ious[1]) > 0.8
    num_pixels = int(printed(cells[-1]).split()[0])
    assert 0.5 * 73 * 70 < num_pixels < 73 * 70, "the hexagon fills most of its box"
    assert [num_pictures(cell) for cell in cells[-3:]] == [1, 1, 0]
    with safe_open(TEACHER, framework="pt") as file:
        has_detector = any(".dot_prod_scoring." in key for key in file.keys())  # noqa: SIM118
    if not has_detector:
        assert "not in this checkpoint: text encoder, detector" in printed(cells[1])
        assert [num_pictures(cell) for cell in cells[:-3]] == [0] * 6
        return
    assert [num_pictures(cell) for cell in cells[:-3]] == [0, 0, 1, 1, 1, 1]
    assert len(printed(cells[2]).splitlines()) == 2, "there are two red hexagons"
    assert printed(cells[4]).splitlines() == ["orange star: 1", "cyan heart: 1", "blue circle: 0"]
    assert printed(cells[5]) == "2 like the box\n"


def test_the_video_notebook_runs_on_any_checkpoint(tmp_path) -> None:
    """With golden weights and a clip of its own."""
    options = {"enable_detector": True, "enable_inst_interactivity": True, "enable_tracker": True}
    model = fill(build_sam3_image_model(load_from_HF=False, config="tiny", device="cpu", **options))
    torch.save({"model": to_released(model.state_dict(), model.config)}, tmp_path / "mine.pt")
    clip = write_video(tmp_path / "mine.mp4", 6, (240, 320))
    cells = execute(
        "video_predictor.ipynb",
        tmp_path,
        SAM3_CHECKPOINT=str(tmp_path / "mine.pt"),
        SAM3_VIDEO=str(clip),
        SAM3_TEXT="a",
    )
    assert "mine.mp4: 6 frames, 320 x 240, 24 per second" in printed(cells[1])
    assert printed(cells[3]) == "6 frames, objects [1, 2]\n" and printed(cells[5]) == "objects [1, 2, 3]\n"
    assert re.fullmatch(r"a: \d+ found in 6 frames\n", printed(cells[6]))
    assert printed(cells[7]).startswith("6 frames pushed, ") and ", 6 masks\n" in printed(cells[8])
    assert [num_pictures(cell) for cell in cells] == [0, 0, 1, 1, 1, 1, 1, 0, 0]
    assert any("<video" in output.get("data", {}).get("text/html", "") for output in cells[8].outputs)
    assert not [output for cell in cells for output in cell.outputs if output.get("name") == "stderr"]


def test_the_video_notebook_on_the_demo_teacher(tmp_path) -> None:
    with safe_open(TEACHER, framework="pt") as file:
        if not any(".maskmem_backbone." in key for key in file.keys()):  # noqa: SIM118
            pytest.skip("the demo teacher has no tracker yet")
    (tmp_path / "results").mkdir()
    cells = execute("video_predictor.ipynb", tmp_path, TMPDIR=str(tmp_path / "results"))
    assert printed(cells[3]) == "48 frames, objects [1, 2]\n" and printed(cells[5]) == "objects [1, 2, 3]\n"
    assert [num_pictures(cell) for cell in cells] == [0, 0, 1, 1, 1, 1, num_pictures(cells[6]), 0, 0]
    clip = make_clip(0, "test", 212, 48)
    ious: dict[int, list[float]] = {1: [], 2: [], 3: []}
    for path in sorted((tmp_path / "results").glob("*/masks/*.png")):
        values, (_, truth) = np.array(Image.open(path)), clip.frame(int(path.stem))
        for obj_id, name in ((1, "yellow cross"), (2, "green rectangle"), (3, "white ellipse")):
            if obj_id == 3 and int(path.stem) < 34:
                continue  # it is marked there
            (index,) = [i for i, moving in enumerate(clip.objects) if moving.shape.category == name]
            found, true = values == obj_id, truth[index]
            ious[obj_id].append((found & true).sum() / (found | true).sum())
    assert [len(values) for values in ious.values()] == [48, 48, 14]
    assert {obj_id: np.mean(values) > 0.5 for obj_id, values in ious.items()} == {1: True, 2: True, 3: True}, ious


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_names_no_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert {cell.id for cell in notebook.cells} and notebook.metadata.kernelspec.name == "python3"
    text = path.read_text(encoding="utf-8")
    assert not [word for word in ("/work/", "/root/", "/home/", "/Users/") if word in text]
