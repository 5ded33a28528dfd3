"""Scores of the demo's models on the scenes of its world, whose masks are exact."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from demo_compare import Prompt, iou
from demo_eval import evaluate_promptable
from demo_page import Score
from PIL import Image

from sam3_train.data.sa1b import load_sa1b_annotation
from sam3_train.errors import UserError
from sam3_train.student_checkpoint import build_trained_student, read_student

MAX_CHECKPOINTS = 12
PROMPT_WORDS = {"box": "box", "one_click": "one click", "three_clicks": "three clicks"}
"""What `demo_eval.evaluate_promptable` measures, and what the page calls it."""


@dataclass(frozen=True)
class SceneFile:
    """One image of the world and its exact masks."""

    name: str
    image: Image.Image
    boxes_xyxy_px: np.ndarray
    """float32, (N, 4)."""
    points_xy_px: np.ndarray
    """A click inside each object, float32, (N, 2)."""
    masks: np.ndarray
    """bool, (N, H, W)."""
    categories: tuple[str, ...] = ()
    """What each object is: "red circle"."""


def read_scenes(world: Path, split: str, limit: int | None = None) -> list[SceneFile]:
    """Scenes of a split, sorted by name.

    Raises:
        UserError: If there are none.
    """
    paths = sorted((world / "images" / split).glob("*.jpg"))
    if not paths:
        raise UserError(f"{world / 'images' / split} holds no scene: make the world again (data/demo/demo_world.py)")
    scenes = []
    for path in paths[:limit]:
        annotation = world / "annotations" / split / f"{path.stem}.json"
        objects = load_sa1b_annotation(annotation)
        names = tuple(one.get("category", "object") for one in json.loads(annotation.read_text())["annotations"])
        with Image.open(path) as image:
            rgb = image.convert("RGB")
        boxes = np.array([one.box_xyxy_px for one in objects], np.float32)
        points = np.array([one.points_xy_px[0] for one in objects], np.float32)
        scenes.append(SceneFile(path.stem, rgb, boxes, points, np.stack([one.mask() for one in objects]), names))
    return scenes


def box_ious(model: Any, scenes: Sequence[SceneFile]) -> np.ndarray:
    """IoU with the exact mask for each object's box, all objects of a scene in one call: (number of objects,)."""
    predictor = model.inst_interactive_predictor
    found: list[float] = []
    for scene in scenes:
        predictor.set_image(scene.image)
        masks, _, _ = predictor.predict(box=scene.boxes_xyxy_px, multimask_output=False)
        masks = np.asarray(masks).reshape(scene.masks.shape) > 0
        found += [iou(mask, truth) for mask, truth in zip(masks, scene.masks, strict=True)]
    return np.array(found)


def score_prompts(teacher: Any, student: Any, scenes: Sequence[SceneFile]) -> tuple[list[Score], int]:
    """Mean IoU of both models with the exact masks, by kind of prompt, box first; and the number of objects."""
    results = [evaluate_promptable(model, scenes) for model in (teacher, student)]
    scores = [Score(words, results[0][kind], results[1][kind]) for kind, words in PROMPT_WORDS.items()]
    return scores, int(results[0]["num_objects"])


def shown_prompts(scenes: Sequence[SceneFile]) -> list[tuple[SceneFile, Prompt, str, np.ndarray]]:
    """One object of each scene for the page, by box and by click in turn: the one of median size."""
    chosen = []
    for number, scene in enumerate(scenes):
        index = int(np.argsort(scene.masks.sum((1, 2)))[len(scene.masks) // 2])
        if number % 3 == 2:
            prompt = Prompt(points_xy_px=[tuple(scene.points_xy_px[index])])
        else:
            prompt = Prompt(tuple(scene.boxes_xyxy_px[index]))
        chosen.append((scene, prompt, f"scene {scene.name}", scene.masks[index]))
    return chosen


def epoch_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """At most `MAX_CHECKPOINTS` of a run's checkpoints, evenly spread, always with the last: (epochs done, file)."""
    found = []
    for path in run.glob("ckpt_epoch_*.pth"):
        number = re.fullmatch(r"ckpt_epoch_(\d+)", path.stem)
        if number:
            found.append((int(number.group(1)) + 1, path))
    found.sort()
    if len(found) <= MAX_CHECKPOINTS:
        return found
    kept = np.unique(np.linspace(0, len(found) - 1, MAX_CHECKPOINTS).round().astype(int))
    return [found[index] for index in kept]


def checkpoint_scores(student: Any, run: Path, scenes: Sequence[SceneFile]) -> list[tuple[float, float]]:
    """(epochs done, box mIoU) of a run's checkpoints in the merged model's place; the model is left as it was.

    Args:
        student: The merged model.
        run: Folder of the training run.
        scenes: Scenes that are scored.
    """
    trunk = student.backbone.vision_backbone.trunk
    deployed = trunk.model
    curve = []
    try:
        for epoch, path in epoch_checkpoints(run):
            trunk.model = build_trained_student(read_student(path)).eval()
            curve.append((float(epoch), float(box_ious(student, scenes).mean())))
    finally:
        trunk.model = deployed
    return curve
