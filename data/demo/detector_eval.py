"""How well the tiny teacher's detector finds what phrases and exemplars ask for, on held-out scenes.

Everything goes through `Sam3Processor`, which users call, at the images' own size. Average precision is COCO's
(pycocotools), where each pair of a scene and a phrase counts as one image; as many phrases that nothing answers are
asked, and whatever is found for them counts against the precision.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from demo_shapes import COLOURS, SHAPES
from tqdm import tqdm

from sam3.model.sam3_image import Sam3Image
from sam3.model.sam3_image_processor import Sam3Processor

CANDIDATES_FROM = 0.05
"""Scores that count for average precision, whose curve needs more than what a user is shown."""
SHOWN_FROM = 0.5


def scene_phrases(categories: Sequence[str]) -> dict[str, np.ndarray]:
    """Each category in a scene ("red circle") and which of its N objects it means, bool (N,)."""
    names = np.array(list(categories))
    return {name: names == name for name in sorted(set(categories))}


FORMS = {"colour": "{colour} shape", "kind": "{kind}"}
"""Phrases that leave one of the two words open."""


def evaluate_forms(model: Sam3Image, scenes: Sequence[Any]) -> dict[str, dict[str, float]]:
    """Scores of phrases that name a colour alone ("red shape") or a kind alone ("circle").

    Args:
        model: With its detector.
        scenes: As for `evaluate_detector`.

    Returns:
        Per form ``mask_ap``, ``mask_ap50``, ``box_ap``, ``box_ap50`` and ``phrase_miou``.
    """
    processor = Sam3Processor(model, confidence_threshold=CANDIDATES_FROM)
    answers: dict[str, list[tuple[dict[str, np.ndarray], np.ndarray]]] = {form: [] for form in FORMS}
    for scene in scenes:
        state = processor.set_image(scene.image)
        words = [category.split() for category in scene.categories]
        for form, pattern in FORMS.items():
            phrases = scene_phrases([pattern.format(colour=colour, kind=kind) for colour, kind in words])
            for phrase, members in phrases.items():
                answers[form].append((ask(processor, state, text=phrase), scene.masks[members]))
    return {
        form: {**average_precision(found), "phrase_miou": float(np.mean([union_iou(*one) for one in found]))}
        for form, found in answers.items()
    }


def absent_phrases(categories: Sequence[str], count: int, seed: int) -> list[str]:
    """Phrases that nothing in a scene answers; each shares one word with an object of the scene."""
    rng = np.random.default_rng(seed)
    phrases: list[str] = []
    while len(phrases) < count:
        colour, kind = categories[int(rng.integers(len(categories)))].split()
        if rng.random() < 0.5:
            phrase = f"{colour} {list(SHAPES)[rng.integers(len(SHAPES))]}"
        else:
            phrase = f"{list(COLOURS)[rng.integers(len(COLOURS))]} {kind}"
        if phrase not in categories:
            phrases.append(phrase)
    return phrases


def evaluate_detector(model: Sam3Image, scenes: Sequence[Any], progress: bool = True) -> dict[str, float]:
    """Scores of text phrases and of box exemplars.

    Args:
        model: With its detector.
        scenes: Each has ``image`` (uint8 RGB array or PIL image), ``masks``, bool (N, H, W), and ``categories``, the
            names of the N objects.
        progress: Show a bar.

    Returns:
        ``mask_ap``, ``mask_ap50``, ``box_ap``, ``box_ap50`` (0..1) of phrases; ``phrase_miou`` and ``exemplar_miou``,
        the mean IoU of everything shown with everything meant; ``absent_rejected``, the share of unanswerable phrases
        for which nothing is shown; and ``num_phrases``.
    """
    processor = Sam3Processor(model, confidence_threshold=CANDIDATES_FROM)
    answers: list[tuple[dict[str, np.ndarray], np.ndarray]] = []
    phrase_ious, exemplar_ious, rejected = [], [], []
    for index, scene in enumerate(tqdm(scenes, desc="phrases and exemplars", unit="scene", disable=not progress)):
        state = processor.set_image(scene.image)
        phrases = scene_phrases(scene.categories)
        for phrase, members in phrases.items():
            answer, meant = ask(processor, state, text=phrase), scene.masks[members]
            answers.append((answer, meant))
            phrase_ious.append(union_iou(answer, meant))
            exemplar_ious.append(union_iou(ask(processor, state, box=normalised_box(meant[0])), meant))
        for phrase in absent_phrases(scene.categories, len(phrases), index):
            answer = ask(processor, state, text=phrase)
            answers.append((answer, scene.masks[:0]))
            rejected.append(not (answer["scores"] > SHOWN_FROM).any())
    return {
        **average_precision(answers),
        "phrase_miou": float(np.mean(phrase_ious)),
        "exemplar_miou": float(np.mean(exemplar_ious)),
        "absent_rejected": float(np.mean(rejected)),
        "num_phrases": len(phrase_ious),
    }


def average_precision(answers: Sequence[tuple[dict[str, np.ndarray], np.ndarray]]) -> dict[str, float]:
    """COCO's average precision of masks and boxes.

    Args:
        answers: Per prompt: what was found (``masks`` bool (n, H, W), ``boxes`` xyxy (n, 4), ``scores`` (n,)) and the
            masks that were meant, bool (m, H, W).
    """
    from pycocotools import mask as coco_mask
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def encode(mask: np.ndarray) -> dict[str, Any]:
        return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))

    truth: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for index, (answer, meant) in enumerate(answers):
        common = {"image_id": index + 1, "category_id": 1}
        for mask in meant:
            x0, y0, x1, y1 = _edges(mask)
            entry = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": int(mask.sum()), "iscrowd": 0}
            truth.append({**common, **entry, "id": len(truth) + 1, "segmentation": encode(mask)})
        for mask, (x0, y0, x1, y1), score in zip(answer["masks"], answer["boxes"], answer["scores"], strict=True):
            bbox = [float(x0), float(y0), float(x1 - x0), float(y1 - y0)]
            found.append({**common, "score": float(score), "bbox": bbox, "segmentation": encode(mask)})
    if not found:
        return dict.fromkeys(("mask_ap", "mask_ap50", "box_ap", "box_ap50"), 0.0)
    result = {}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco = COCO()
        coco.dataset = {
            "images": [
                {"id": i + 1, "height": meant.shape[1], "width": meant.shape[2]} for i, (_, meant) in enumerate(answers)
            ],
            "categories": [{"id": 1}],
            "annotations": truth,
        }
        coco.createIndex()
        for kind, name in (("segm", "mask"), ("bbox", "box")):
            # loadRes takes boxes for the answer's kind if it sees one: give it only what is judged.
            dropped = "bbox" if kind == "segm" else "segmentation"
            judged = [{k: v for k, v in one.items() if k != dropped} for one in found]
            evaluation = COCOeval(coco, coco.loadRes(judged), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            result[f"{name}_ap"], result[f"{name}_ap50"] = (float(value) for value in evaluation.stats[:2])
    return result


def ask(
    processor: Sam3Processor, state: dict[str, Any], text: str | None = None, box: Sequence[float] | None = None
) -> dict[str, np.ndarray]:
    """What a phrase, or a normalised (cx, cy, w, h) box as exemplar, finds in an image that was set: ``masks`` bool
    (n, H, W), ``boxes`` xyxy in pixels (n, 4), ``scores`` (n,)."""
    processor.reset_all_prompts(state)
    state = (
        processor.set_text_prompt(text, state) if text else processor.add_geometric_prompt(list(box or ()), True, state)
    )
    return {
        "masks": state["masks"][:, 0].cpu().numpy(),
        "boxes": state["boxes"].float().cpu().numpy(),
        "scores": state["scores"].float().cpu().numpy(),
    }


def union_iou(answer: dict[str, np.ndarray], meant: np.ndarray) -> float:
    """IoU of everything that is shown to a user with everything that was meant."""
    shown = np.asarray(answer["masks"][answer["scores"] > SHOWN_FROM].any(axis=0))
    wanted = np.asarray(meant.any(axis=0))
    union = int((shown | wanted).sum())
    return float((shown & wanted).sum() / union) if union else 1.0


def _edges(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Outer edges of a mask: x0, y0, x1, y1 with the last pixel included."""
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def normalised_box(mask: np.ndarray) -> list[float]:
    """Normalised (cx, cy, w, h) of a mask."""
    (x0, y0, x1, y1), (height, width) = _edges(mask), mask.shape
    return [(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height]
