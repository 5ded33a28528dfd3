"""The demo's report: what it measures, on tiny random models and a two-scene world."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from demo_compare import Prompt, compare, describe_model, iou, segment
from demo_eval import evaluate_promptable
from demo_finetune import compare_finetuned, loss_chart
from demo_report import LOAD_LINES, make_load_lines, photo_prompts, run_load_lines, training_charts
from demo_report import main as report_main
from demo_scores import box_ious, epoch_checkpoints, read_scenes, score_prompts, shown_prompts
from fixtures_data import make_sa1b_tree
from PIL import Image

from sam3 import Sam3Config, build_sam3_image_model
from sam3.config import StudentConfig
from sam3_train.errors import UserError


def build(config: Sam3Config, seed: int = 0):
    torch.manual_seed(seed)
    return build_sam3_image_model(
        load_from_HF=False, device="cpu", enable_inst_interactivity=True, enable_detector=False, config=config
    )


@pytest.fixture(scope="module")
def teacher():
    return build(Sam3Config.preset("tiny"))


@pytest.fixture(scope="module")
def student():
    return build(Sam3Config.preset("tiny").replace(student=StudentConfig("demo_cnn")))


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8))


def test_a_prompt_is_a_box_or_clicks():
    assert Prompt((1, 2, 3, 4)).words == "box"
    assert Prompt(points_xy_px=[(1, 2)]).words == "one click"
    assert Prompt(points_xy_px=[(1, 2), (3, 4)]).words == "2 clicks"
    assert Prompt(points_xy_px=[(1, 2)]).arguments()["multimask_output"] is True
    for bad in ({}, {"box_xyxy_px": (1, 2, 3, 4), "points_xy_px": [(1, 2)]}):
        with pytest.raises(ValueError, match="a prompt is a box or clicks"):
            Prompt(**bad)


def test_iou_of_masks():
    first, second = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    assert iou(first, second) == 1.0
    first[:2], second[1:3] = True, True
    assert iou(first, second) == pytest.approx(1 / 3)


def test_the_mask_that_the_model_scores_best_is_taken(photo):
    class Predictor:
        def set_image(self, image):
            self.size = image.size

        def predict(self, **_):
            masks = np.zeros((3, self.size[1], self.size[0]), np.float32)
            masks[1] = 1
            return masks, np.array([0.1, 0.9, 0.3]), None

    assert segment(Predictor(), photo, Prompt(points_xy_px=[(5, 5)])).all()


def test_comparison_of_two_real_models(teacher, student, photo):
    truth = np.zeros((60, 90), bool)
    truth[10:40, 20:70] = True
    box = Prompt((20, 10, 69, 39))
    one = compare(teacher, student, photo, box, "noise", truth)
    assert one.prompt == "box"
    assert one.teacher_iou == pytest.approx(iou(segment(teacher.inst_interactive_predictor, photo, box), truth))
    assert one.agreement == pytest.approx(
        iou(*(segment(model.inst_interactive_predictor, photo, box) for model in (teacher, student)))
    )
    assert len({bytes(view) for view in one.views_jpeg}) == 3
    assert compare(teacher, teacher, photo, box, "same").agreement == 1.0


def test_a_model_is_described_by_what_it_holds(teacher, photo, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"x" * 1234)
    row = describe_model("teacher", "ViT", teacher, tmp_path / "model.pt", photo, repeats=2)
    trunk = sum(p.numel() for p in teacher.backbone.vision_backbone.trunk.parameters())
    assert (row.encoder_params, row.file_bytes) == (trunk, 1234)
    assert row.total_params > row.encoder_params
    assert row.encode_ms > 0
    assert row.predict_ms > 0


def write_metrics(run: Path) -> None:
    records = []
    for step in range(10):
        loss = {"mse": 1 / (step + 1), "cosine": 0.5 / (step + 1)}
        records.append({"kind": "train", "epoch": step // 5, "step": step, **loss})
    records += [{"kind": "val", "epoch": epoch, "step": 5 * epoch, "mse": 0.4, "cosine": 0.2} for epoch in (1, 2)]
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(record) for record in records) + "\n")


def test_curves_come_from_the_runs_own_log(tmp_path):
    write_metrics(tmp_path / "run")
    loss, scores = training_charts(tmp_path / "run", [(1.0, 0.3), (2.0, 0.6)], 0.7)
    assert loss.count("<polyline") == 4
    assert "mse, validation" in loss
    assert scores.count("<polyline") == 3
    assert "90% of the teacher" in scores


def test_a_run_without_a_log_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"has no metrics\.jsonl with training and validation records"):
        training_charts(tmp_path, [], 0.5)


def test_photo_prompts_are_scaled_to_the_photo(tmp_path, photo):
    (tmp_path / "photos").mkdir()
    photo.save(tmp_path / "photos" / "cup.png")
    settings = [
        {"name": "cup", "title": "a cup", "box": [0.1, 0.5, 0.2, 1.0]},
        {"name": "cup", "title": "a point", "points": [[0.5, 0.5]]},
    ]
    (path, title, box), (_, _, click) = photo_prompts(tmp_path, settings)
    assert (path.name, title) == ("cup.png", "a cup")
    assert box.box_xyxy_px == pytest.approx([9, 30, 18, 60])
    assert click.points_xy_px == [(45.0, 30.0)]
    with pytest.raises(UserError, match=r"REPORT\.photos names saucer, but .*photos has no such file"):
        photo_prompts(tmp_path, [{"name": "saucer", "title": "x", "box": [0, 0, 1, 1]}])


def test_load_lines_that_fail_stop_the_report():
    assert run_load_lines("print(1 + 1)") == "2"
    with pytest.raises(UserError, match="the lines that load the merged file fail"):
        run_load_lines("import sam3\nsam3.load_modell")


def test_load_lines_run_on_a_real_file(student, photo, tmp_path):
    from sam3.checkpoint_io import write_merged
    from sam3.released_names import released_state_dict

    photo.save(tmp_path / "photo.png")
    config = student.config
    metadata = {
        "format_version": 1,
        "variant": "demo_cnn",
        "model": config.to_dict(),
        "preprocess": student.preprocess.to_dict(),
        "provenance": {},
    }
    write_merged(tmp_path / "merged.pt", released_state_dict(student), metadata)
    lines = make_load_lines(tmp_path / "merged.pt", tmp_path / "photo.png", Prompt((10, 10, 50, 40)))
    assert lines.count("\n") == LOAD_LINES.count("\n")
    assert "box=np.array([10, 10, 50, 40])" in lines
    assert run_load_lines(lines).startswith("masks (1, 60, 90) pixels inside")


def test_scenes_are_read_with_their_exact_masks_and_scored(teacher, tmp_path):
    world = make_sa1b_tree(tmp_path)
    scenes = read_scenes(world, "val")
    assert [scene.name for scene in scenes] == ["sa_100", "sa_101", "sa_102"]
    assert scenes[0].masks.shape == (2, 32, 48)
    assert scenes[0].masks[:, 4:12, 8:20].any()
    ious = box_ious(teacher, scenes)
    assert ious.shape == (6,)
    alone = segment(teacher.inst_interactive_predictor, scenes[0].image, Prompt(tuple(scenes[0].boxes_xyxy_px[0])))
    assert ious[0] == pytest.approx(iou(alone, scenes[0].masks[0])), "all boxes at once give what each gives alone"
    assert [prompt.words for _, prompt, _, _ in shown_prompts(scenes)] == ["box", "box", "one click"]
    with pytest.raises(UserError, match="holds no scene"):
        read_scenes(world, "test")


def test_checkpoints_on_the_curve_are_spread_evenly_and_end_with_the_last(tmp_path):
    for epoch in range(40):
        (tmp_path / f"ckpt_epoch_{epoch}.pth").touch()
    (tmp_path / "best.pth").touch()
    (tmp_path / "ckpt_epoch_last.pth").touch()
    kept = epoch_checkpoints(tmp_path)
    assert len(kept) == 12
    assert (kept[0][0], kept[-1][0]) == (1, 40)
    assert kept == sorted(kept)


def test_scores_are_those_of_the_shared_evaluation(teacher, student, tmp_path):
    scenes = read_scenes(make_sa1b_tree(tmp_path), "val", limit=2)
    scores, num_objects = score_prompts(teacher, student, scenes)
    assert [score.prompt for score in scores] == ["box", "one click", "three clicks"]
    assert num_objects == 4
    assert scores[0].student == pytest.approx(evaluate_promptable(student, scenes)["box"])


def test_the_fine_tuned_student_is_measured_as_the_other_two_were(teacher, student, tmp_path):
    """The same scenes, objects and prompts; each number is that of the model it stands for."""
    scenes = read_scenes(make_sa1b_tree(tmp_path), "val", limit=2)
    after = build(Sam3Config.preset("tiny").replace(student=StudentConfig("demo_cnn")), seed=1)
    scores, _ = score_prompts(teacher, student, scenes)
    run = tmp_path / "run"
    run.mkdir()
    records = [{"kind": "train", "step": step, "mse": 0.3, "sam_mask_bce": 0.1, "loss": 0.5} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    models = {"teacher": teacher, "before": student, "after": after}
    found = compare_finetuned(models, scenes, scores, [], {"num_scenes": 1}, run)
    expected = evaluate_promptable(after, scenes)
    assert [row.words for row in found.scores] == ["box mIoU", "one click mIoU", "three clicks mIoU"]
    assert [row.after for row in found.scores] == [expected[kind] for kind in ("box", "one_click", "three_clicks")]
    assert [row.before for row in found.scores] == [score.student for score in scores]
    (shown,) = found.scenes
    scene, prompt, _, truth = shown_prompts(scenes[:1])[0]
    ious = [iou(segment(m.inst_interactive_predictor, scene.image, prompt), truth) for m in models.values()]
    assert [shown.teacher_iou, shown.before_iou, shown.after_iou] == ious
    assert "features" in found.chart and "mask cross entropy, SAM heads" in found.chart


def test_the_loss_of_the_fine_tune_needs_its_log(tmp_path):
    with pytest.raises(UserError, match=r"has no metrics\.jsonl with training records"):
        loss_chart(tmp_path)


def test_a_fine_tuned_file_without_its_run_is_one_clear_line(tmp_path, capsys):
    words = [word for name in ("world", "teacher", "student", "run") for word in (f"--{name}", str(tmp_path))]
    finetuned = ["--finetuned", str(tmp_path), "--output", str(tmp_path / "page.html")]
    assert report_main([*words, *finetuned]) == 2
    assert "--finetuned and --finetune-run go together" in capsys.readouterr().err
