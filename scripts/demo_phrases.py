"""The detector on the demo's page: what phrases and exemplar boxes find with the teacher's trunk and the student's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from demo_compare import iou
from demo_drawing import STUDENT_RGB, TEACHER_RGB, draw_mask, draw_prompt, to_jpeg
from demo_page import Comparison, DetectorScore
from demo_scores import SceneFile
from detector_eval import SHOWN_FROM, ask, evaluate_detector, normalised_box, scene_phrases

from sam3.model.sam3_image_processor import Sam3Processor

SCORE_WORDS = {
    "mask_ap": "mask AP, phrases",
    "mask_ap50": "mask AP50, phrases",
    "box_ap": "box AP, phrases",
    "phrase_miou": "mIoU, phrases",
    "exemplar_miou": "mIoU, exemplar boxes",
    "absent_rejected": "phrases that nothing answers: nothing found",
}


def detector_scores(teacher: Any, student: Any, scenes: Sequence[SceneFile]) -> tuple[list[DetectorScore], int]:
    """Both models on phrases and exemplars; and the number of phrases."""
    results = [evaluate_detector(model, scenes, progress=False) for model in (teacher, student)]
    scores = [DetectorScore(words, results[0][name], results[1][name]) for name, words in SCORE_WORDS.items()]
    return scores, int(results[0]["num_phrases"])


def compare_phrases(teacher: Any, student: Any, scenes: Sequence[SceneFile]) -> list[Comparison]:
    """One prompt for each scene, every third an exemplar box: the category with the most objects."""
    processors = [Sam3Processor(model, confidence_threshold=SHOWN_FROM) for model in (teacher, student)]
    compared = []
    for number, scene in enumerate(scenes):
        phrases = scene_phrases(scene.categories)
        phrase, members = max(phrases.items(), key=lambda item: (item[1].sum(), scene.masks[item[1]].sum()))
        meant = scene.masks[members]
        by_box = number % 3 == 2
        box_px = scene.boxes_xyxy_px[int(np.flatnonzero(members)[0])] if by_box else None
        shown = []
        for processor in processors:
            state = processor.set_image(scene.image)
            answer = ask(processor, state, box=normalised_box(meant[0])) if by_box else ask(processor, state, phrase)
            shown.append(np.asarray(answer["masks"].any(axis=0)))
        views = (
            draw_prompt(scene.image, box_px),
            draw_mask(scene.image, shown[0], TEACHER_RGB),
            draw_mask(scene.image, shown[1], STUDENT_RGB),
        )
        words = "everything like the box" if by_box else f'"{phrase}"'
        truth = np.asarray(meant.any(axis=0))
        jpegs = (to_jpeg(views[0]), to_jpeg(views[1]), to_jpeg(views[2]))
        title = f"scene {scene.name}"
        compared.append(Comparison(title, words, jpegs, iou(*shown), iou(shown[0], truth), iou(shown[1], truth)))
    return compared
