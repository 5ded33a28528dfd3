"""``python -m sam3.predict``: files in, pictures and COCO results out; what is wrong is said, what is done is kept."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import fill
from PIL import Image

import sam3.prediction
from sam3.checkpoint_parts import POINT_PROMPTS
from sam3.coco_rle import decode_mask
from sam3.drawing import draw_overlay, index_image, object_color
from sam3.image_input import open_image
from sam3.model.sam3_image_processor import Sam3Processor
from sam3.model_builder import build_sam3_image_model
from sam3.predict import main
from sam3.prediction import name_images
from sam3.released_names import to_released

HEIGHT, WIDTH = 60, 90


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """All parts of the tiny model, with the golden vectors' weights."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pt"
    model = build_sam3_image_model(
        load_from_HF=False, config="tiny", device="cpu", enable_detector=True, enable_inst_interactivity=True
    )
    torch.save({"model": to_released(fill(model).state_dict(), model.config)}, path)
    return path


@pytest.fixture(scope="module")
def model(checkpoint):
    return sam3.load_model(checkpoint, device="cpu")


def photo(seed: int, height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def photos(tmp_path) -> Path:
    root = tmp_path / "photos"
    (root / "more").mkdir(parents=True)
    photo(0).save(root / "a.png")
    photo(1, 50, 40).save(root / "more" / "b.PNG")
    (root / ".hidden.png").write_bytes(b"not looked at")
    (root / "notes.txt").write_text("not looked at")
    return root


@pytest.fixture
def run(checkpoint, tmp_path, capsys):
    """Run the command on the CPU; gives exit code, stdout, stderr and the results."""

    def call(*options: object):
        words = ["--checkpoint", checkpoint, "--output", tmp_path / "out", "--device", "cpu", *options]
        code = main([str(word) for word in words])
        file = tmp_path / "out/predictions.json"
        printed = capsys.readouterr()
        return code, printed.out, printed.err, json.loads(file.read_text()) if file.exists() else None

    return call


def test_a_folder_becomes_pictures_and_results(run, photos, model, tmp_path) -> None:
    code, out, _, results = run("--image", photos, "--text", "a cat", "--text", "a dog", "--threshold", "0.31")
    assert code == 0
    assert f"objects: {len(results)}, images: 2 of 2" in out
    made = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    names = ("a_overlay", "a_mask_1", "a_mask_2", "more/b_overlay", "more/b_mask_1", "more/b_mask_2")
    assert made == {"predictions.json", *(f"{name}.png" for name in names)}
    processor = Sam3Processor(model, confidence_threshold=0.31, sort_by_score=True)
    for image_id, name in ((1, "a.png"), (2, "more/b.PNG")):
        state = processor.set_text_prompt(["a cat", "a dog"], processor.set_image(open_image(photos / name)))
        for category, expected in enumerate(state["results"], start=1):
            mine = [r for r in results if (r["image_id"], r["category_id"]) == (image_id, category)]
            assert len(mine) == len(expected["scores"]) > 0
            indices = np.array(Image.open(tmp_path / "out" / mine[0]["mask_file"]))
            for i, result in enumerate(mine):
                assert (result["file_name"], result["prompt"]) == (name, expected["text"])
                assert result["score"] == pytest.approx(expected["scores"][i].item(), abs=1e-4)
                x0, y0, x1, y1 = expected["boxes"][i].tolist()
                assert result["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=0.1)
                mask = decode_mask(result["segmentation"])
                assert (mask == expected["masks"][i, 0].numpy()).mean() > 0.999
                assert mask[indices == result["mask_value"]].all()
            assert (indices > 0).sum() == np.any([decode_mask(r["segmentation"]) for r in mine], axis=0).sum()


def test_boxes_and_points_in_pixels_with_labels(run, photos, model) -> None:
    options = ("--box", "10,20,40,50", "--box", "60,5,20,30,0", "--box-format", "xywh", "--point", "5,6,0")
    code, _, _, results = run(
        "--image", photos / "a.png", *options, "--threshold", "0.2", "--top-k", "3", "--nms", "0.9"
    )
    assert code == 0
    processor = Sam3Processor(model, confidence_threshold=0.2, top_k=3, nms_iou=0.9, sort_by_score=True)
    state = processor.set_prompts(
        processor.set_image(open_image(photos / "a.png")),
        boxes=[[10, 20, 50, 70], [60, 5, 80, 35]],
        box_labels=[1, 0],
        box_format="xyxy_px",
        points=[[5 / WIDTH, 6 / HEIGHT]],
        point_labels=0,
    )
    assert [r["score"] for r in results] == pytest.approx(state["scores"].tolist(), abs=1e-4)
    assert {r["prompt"] for r in results} == {"visual"} and {r["mask_file"] for r in results} == {"a_mask.png"}


def test_marked_objects_are_cut_out_interactively(run, photos, model, tmp_path) -> None:
    code, _, _, results = run(
        "--image", photos / "a.png", "--interactive", "--box", "10,10,50,40", "--box", "0,0,30,30"
    )
    assert code == 0 and len(results) == 2
    model.inst_interactive_predictor.set_image(open_image(photos / "a.png"))
    masks, ious, _ = model.inst_interactive_predictor.predict(
        box=np.array([[10, 10, 50, 40], [0, 0, 30, 30]]), multimask_output=False
    )
    order = (-ious[:, 0]).argsort()
    assert [r["score"] for r in results] == pytest.approx(ious[order, 0].tolist(), abs=1e-4)
    for result, i in zip(results, order, strict=True):
        mask = decode_mask(result["segmentation"])
        assert (mask == masks[i, 0].astype(bool)).mean() > 0.999
        rows, columns = mask.nonzero()
        if rows.size:
            x, y, w, h = result["bbox"]
            assert (x, y) == (columns.min(), rows.min()) and (x + w, y + h) == (columns.max() + 1, rows.max() + 1)
    code, _, _, results = run("--image", photos / "a.png", "--interactive", "--point", "20,20", "--point", "70,40,0")
    assert code == 0 and len(results) == 1
    code, _, _, results = run("--image", photos / "a.png", "--interactive", "--point", "20,20")
    _, ious, _ = model.inst_interactive_predictor.predict(np.array([[20, 20]]), np.array([1]))
    assert results[0]["score"] == pytest.approx(float(ious.max()), abs=1e-4)


def test_bad_images_are_listed_and_the_others_done(run, photos, tmp_path) -> None:
    (photos / "broken.jpg").write_bytes(b"no image")
    (photos / "cut.png").write_bytes((photos / "a.png").read_bytes()[:3000])
    code, out, err, results = run("--image", photos, "--text", "a cat", "--threshold", "0.2")
    assert code == 2
    assert "images: 2 of 4" in out and {r["file_name"] for r in results} == {"a.png", "more/b.PNG"}
    assert "2 of 4 images could not be used" in err and "Traceback" not in err
    assert "broken.jpg: not an image" in err and "cut.png: cannot be decoded" in err
    code, _, err, results = run("--image", photos, "--box", "60,10,80,40", "--threshold", "0.2")
    assert code == 2 and {r["file_name"] for r in results} == {"a.png"}
    assert "b.PNG: box [60, 10, 80, 40] lies outside the image (40 x 50 pixels)" in err


def test_ctrl_c_keeps_what_is_done(run, photos, monkeypatch) -> None:
    original = sam3.prediction.Detector.__call__

    def interrupted_at_the_second(self, pixels):
        if pixels.shape[-1] == 40:
            raise KeyboardInterrupt
        return original(self, pixels)

    monkeypatch.setattr(sam3.prediction.Detector, "__call__", interrupted_at_the_second)
    code, out, err, results = run("--image", photos, "--text", "a cat", "--threshold", "0.2")
    assert code == 130 and "interrupted" in err and "images: 1 of 2" in out
    assert {r["file_name"] for r in results} == {"a.png"}
    assert not list(photos.parent.rglob("*.part"))


def test_a_bug_is_no_mistake_of_the_user_and_keeps_what_is_done(run, photos, monkeypatch, tmp_path) -> None:
    original = sam3.prediction.draw_overlay
    monkeypatch.setattr(sam3.prediction, "draw_overlay", lambda i, *a: 1 / 0 if i.shape[1] == 40 else original(i, *a))
    with pytest.raises(ZeroDivisionError):
        run("--image", photos, "--text", "a cat", "--threshold", "0.2")
    results = json.loads((tmp_path / "out/predictions.json").read_text())
    assert {r["file_name"] for r in results} == {"a.png"}


def test_a_full_disk_is_said_in_one_line(run, photos, monkeypatch, tmp_path) -> None:
    original = sam3.prediction.os.replace

    def full_at_the_second(aside: Path, path: Path) -> None:
        if path.name.startswith("b_"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(aside, path)

    monkeypatch.setattr(sam3.prediction.os, "replace", full_at_the_second)
    code, _, err, results = run("--image", photos, "--text", "a cat", "--threshold", "0.2")
    assert code == 2 and "Traceback" not in err
    assert "b_mask.png: cannot be written (No space left on device); free some space" in err
    assert {r["file_name"] for r in results} == {"a.png"}
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("options", "key", "what"),
    [
        (["--text", "a cat"], "detector.dot_prod_scoring.hs_proj.bias", "scores"),
        (["--point", "9,9", "--interactive"], "detector.backbone.vision_backbone.sam2_convs.2.conv_1x1.bias", "IoUs"),
    ],
    ids=["detector", "interactive"],
)
def test_a_damaged_checkpoint_is_said_and_writes_no_object(run, photos, checkpoint, tmp_path, options, key, what):
    weights = torch.load(checkpoint)["model"]
    weights[key] = weights[key] * torch.nan
    torch.save({"model": weights}, tmp_path / "nan.pt")
    code, _, err, results = run("--image", photos / "a.png", "--checkpoint", tmp_path / "nan.pt", *options)
    assert (code, results) == (2, []) and "Traceback" not in err
    assert "nan.pt: the model's " in err and f"{what} are not finite" in err


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["--image", "PHOTO"], ["no prompt: give --text, --box or --point"]),
        (["--image", "nowhere.jpg", "--text", "x"], ["--image nowhere.jpg: no such file or folder"]),
        (["--image", "EMPTY", "--text", "x"], ["the folder holds no image"]),
        (["--image", "PHOTO", "--text", "x", "--output", "PHOTO"], ["a.png: is a file, not a folder"]),
        (["--image", "PHOTO", "--text", "x", "--output", "PHOTO/out"], ["a.png/out: cannot be made (Not a directory)"]),
        (["--image", "PHOTO", "--text", " "], ["--text ' ': the text is empty"]),
        (["--image", "PHOTO", "--box", "1,2,3"], ["--box 1,2,3: expected 4 numbers"]),
        (["--image", "PHOTO", "--box=-1,2,x,4"], ["--box -1,2,x,4: expected 4 numbers"]),
        (["--image", "PHOTO", "--box", "-1,2,x,4"], ["--box -1,2,x,4: expected 4 numbers"]),
        (["--image", "PHOTO", "--point", "1,2,3"], ["--point 1,2,3: expected 2 numbers with commas, and optionally"]),
        (["--image", "PHOTO", "--text", "x", "--device", "gpu"], ["--device gpu: torch knows devices such as cpu"]),
        (["--image", "PHOTO", "--text", "x", "--interactive"], ["--text does not go with --interactive"]),
        (["--image", "PHOTO", "--box", "1,1,9,9,0", "--interactive"], ["--box with label 0"]),
        (
            ["--image", "nowhere.jpg", "--threshold", "2", "--top-k", "0", "--nms", "nan"],
            ["5 problems", "--threshold 2: must lie in 0..1", "--top-k 0", "--nms nan", "no prompt"],
        ),
    ],
    ids=lambda x: " ".join(x[2:4]) if isinstance(x, list) and x[0] == "--image" else "",
)
def test_what_cannot_work_is_said_before_a_model_is_loaded(
    run, photos, tmp_path, monkeypatch, options, messages
) -> None:
    monkeypatch.setattr("sam3.loading.load_model", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    (tmp_path / "EMPTY").mkdir()
    names = {"PHOTO": str(photos / "a.png"), "EMPTY": str(tmp_path / "EMPTY")}
    names["PHOTO/out"] = names["PHOTO"] + "/out"
    code, _, err, results = run(*(names.get(word, word) for word in options))
    assert code == 2 and results is None and "Traceback" not in err
    for message in messages:
        assert message in err


def test_a_checkpoint_without_the_needed_part_is_refused(photos, tmp_path, capsys, monkeypatch) -> None:
    path = tmp_path / "heads.pt"
    options = {"load_from_HF": False, "config": "tiny", "device": "cpu"}
    heads = build_sam3_image_model(enable_detector=False, enable_inst_interactivity=True, **options)
    torch.save({"model": to_released(heads.state_dict(), heads.config)}, path)
    hf_model = build_sam3_image_model(**options)
    hf_model.missing_parts = (POINT_PROMPTS,)
    command = ["--checkpoint", str(path), "--image", str(photos / "a.png"), "--output", str(tmp_path / "out")]
    assert main([*command, "--text", "x"]) == 2
    assert "heads.pt: holds no detector" in capsys.readouterr().err
    assert main([*command, "--point", "3,4", "--interactive"]) == 0
    monkeypatch.setattr("sam3.loading.load_model", lambda *args, **kwargs: hf_model)
    assert main([*command, "--point", "3,4"]) == 2
    assert "heads.pt: holds no weights for --point without --interactive" in capsys.readouterr().err
    monkeypatch.undo()
    assert main([*command[:1], str(tmp_path / "nothing.pt"), *command[2:], "--text", "x"]) == 2
    assert "nothing.pt" in capsys.readouterr().err


def test_images_of_coco_keep_their_numbers_and_names_never_collide() -> None:
    coco = name_images(["000000397133.jpg", "val/000000000139.jpg"])
    assert [name.image_id for name in coco] == [397133, 139]
    assert [n.image_id for n in name_images(["a/1.jpg", "b/1.jpg"])] == [1, 2]
    names = name_images(["a.jpg", "a.png", "b.jpg", "c/a.jpg", "b.jpg"])
    assert [n.image_id for n in names] == [1, 2, 3, 4, 5]
    assert [n.output_name for n in names] == ["a.jpg", "a.png", "b.jpg", "c/a", "b.jpg-2"]


def test_an_overlay_shows_masks_boxes_and_labels() -> None:
    image = np.full((120, 160, 3), 100, np.uint8)
    mask = np.zeros((120, 160), bool)
    mask[40:80, 50:110] = True
    picture = np.array(draw_overlay(image, [mask], [[20, 30, 140, 100]], ["a ☕ 0.9"]))
    color = object_color(0)
    assert picture.shape == image.shape and (image == 100).all()
    np.testing.assert_allclose(picture[60, 80], np.array(color) / 2 + 50, atol=1)
    assert tuple(picture[40, 80]) == tuple(picture[100, 90]) == color
    assert tuple(picture[110, 150]) == (100, 100, 100)
    assert len(np.unique(picture[15:30, 20:60].reshape(-1, 3), axis=0)) > 5, "no label above the box"
    without_boxes = np.array(draw_overlay(image, [mask, mask], [], []))
    assert (without_boxes != image).any()
    outside = draw_overlay(image[:8, :8], [mask[:8, :8]], [[-5, -5, 900, 900]], ["label wider than the image"])
    assert outside.size == (8, 8)


def test_an_index_image_holds_each_mask_and_the_first_on_top() -> None:
    masks = [np.zeros((4, 6), bool) for _ in range(3)]
    masks[0][:2], masks[1][1:3], masks[2][:, 0] = True, True, True
    picture = index_image(masks, (4, 6))
    assert np.array(picture)[:, 1].tolist() == [1, 1, 2, 0] and np.array(picture)[3, 0] == 3
    assert picture.convert("RGB").getpixel((1, 2)) == object_color(1)
    with pytest.raises(ValueError, match="256 masks"):
        index_image([masks[0]] * 256, (4, 6))
