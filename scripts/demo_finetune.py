"""The geometry fine-tune on the demo's page: the student before and after it, beside the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from demo_compare import Prompt, iou, segment
from demo_drawing import STUDENT_RGB, TEACHER_RGB, draw_mask, draw_prompt, to_jpeg
from demo_eval import evaluate_promptable
from demo_page import DetectorScore, FineTune, Score, TunedScene, TunedScore
from demo_phrases import SCORE_WORDS
from demo_scores import PROMPT_WORDS, SceneFile, shown_prompts
from detector_eval import evaluate_detector
from svg_chart import Series, line_chart

from sam3_train.errors import UserError
from sam3_train.log import read_metrics

MODELS = ("teacher", "before", "after")
CHART_TERMS = {"mse": "features", "mask_bce": "mask cross entropy", "mask_dice": "mask Dice"}
"""Terms of the loss that are drawn, and what the page calls them."""


def compare_finetuned(
    models: Mapping[str, Any],
    scenes: Sequence[SceneFile],
    scores: Sequence[Score],
    detector_scores: Sequence[DetectorScore],
    settings: Mapping[str, Any],
    run: Path,
) -> FineTune:
    """Measure the fine-tuned student as teacher and stage-1 student were measured, and draw all three.

    Args:
        models: ``teacher``, ``before`` and ``after``.
        scenes: The held-out scenes.
        scores: `demo_scores.score_prompts` of teacher and student before, on the same scenes.
        detector_scores: `demo_phrases.detector_scores` of both; empty where the teacher has no detector.
        settings: Section REPORT of the demo's settings.
        run: Folder of the fine-tuning.
    """
    found = evaluate_promptable(models["after"], scenes)
    kinds = {words: kind for kind, words in PROMPT_WORDS.items()}
    rows = [TunedScore(f"{s.prompt} mIoU", s.teacher, s.student, found[kinds[s.prompt]]) for s in scores]
    if detector_scores:
        scored = scenes[: settings["num_scored_phrase_scenes"]]
        after = evaluate_detector(models["after"], scored, progress=False)
        names = {words: name for name, words in SCORE_WORDS.items()}
        rows += [TunedScore(s.words, s.teacher, s.student, after[names[s.words]]) for s in detector_scores]
    shown = [draw_scene(models, *one) for one in shown_prompts(scenes[: settings["num_scenes"]])]
    return FineTune(rows, shown, loss_chart(run))


def draw_scene(models: Mapping[str, Any], scene: SceneFile, prompt: Prompt, title: str, truth: Any) -> TunedScene:
    """One object by all three models."""
    masks = [segment(models[who].inst_interactive_predictor, scene.image, prompt) for who in MODELS]
    points = prompt.points_xy_px
    colours = (TEACHER_RGB, STUDENT_RGB, STUDENT_RGB)
    views = [draw_prompt(scene.image, prompt.box_xyxy_px, points, [1] * len(points))]
    views += [draw_mask(scene.image, mask, colour) for mask, colour in zip(masks, colours, strict=True)]
    asked, teacher, before, after = (to_jpeg(view) for view in views)
    return TunedScene(title, prompt.words, (asked, teacher, before, after), *(iou(mask, truth) for mask in masks))


def loss_chart(run: Path) -> str:
    """The terms of the loss while it ran.

    Raises:
        UserError: If the run has logged nothing.
    """
    records = read_metrics(run, "train")
    if not records:
        raise UserError(f"{run} has no metrics.jsonl with training records: was the run finished?")
    series: list[Series] = []
    for term, words in CHART_TERMS.items():
        for name, route in ((term, ""), (f"detector_{term}", ", detector"), (f"sam_{term}", ", SAM heads")):
            kept = [record for record in records if record.get(name) is not None]
            if kept:
                steps, values = [record["step"] for record in kept], [record[name] for record in kept]
                series.append(Series(words + route, steps, values, color=len(series)))
    return line_chart("Loss of the fine-tune", "optimizer step", "term", series, y_low=0.0)
