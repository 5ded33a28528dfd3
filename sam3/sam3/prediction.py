"""What ``python -m sam3.predict`` does with each image, and the files it leaves."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sam3.cli import CommandError
from sam3.coco_rle import encode_mask
from sam3.drawing import draw_overlay, index_image
from sam3.image_input import ImageInputError, open_image, to_rgb_uint8
from sam3.model.sam3_image import Sam3Image
from sam3.model.sam3_image_processor import Sam3Processor
from sam3.sam.prompts import PromptError

if TYPE_CHECKING:
    from sam3.predict import Marks

RESULTS_FILE = "predictions.json"


class Found(NamedTuple):
    """The objects of one prompt on one image, best first."""

    prompt: str
    scores: np.ndarray
    """(n,)."""
    boxes_xyxy_px: np.ndarray
    """(n, 4)."""
    masks: np.ndarray | None
    """Bool, (n, H, W); None if the model makes no masks."""


class ImageName(NamedTuple):
    """What an image is called in the results."""

    file_name: str
    output_name: str
    """The start of the names of its output files, with ``/`` between folders."""
    image_id: int


class Predictor(Protocol):
    """Objects of an image."""

    def __call__(self, pixels_chw: Tensor) -> list[Found]:
        """One entry for each prompt, for a uint8 image (3, H, W).

        Raises:
            PromptError: If a prompt does not fit the image.
        """


class Detector:
    """Everything that texts, boxes and points describe."""

    def __init__(
        self,
        model: Sam3Image,
        texts: Sequence[str],
        boxes: Marks,
        points: Marks,
        box_format: str = "xyxy",
        threshold: float = 0.5,
        top_k: int | None = None,
        nms_iou: float | None = None,
    ) -> None:
        self.processor = Sam3Processor(
            model,
            confidence_threshold=threshold,
            top_k=top_k,
            nms_iou=nms_iou,
            sort_by_score=True,
            return_probabilities=False,
            for_clicks=False,
        )
        self.prompts: dict[str, Any] = {"text": list(texts) or None}
        if boxes.values:
            self.prompts |= {"boxes": boxes.values, "box_labels": boxes.labels, "box_format": f"{box_format}_px"}
        if points.values:
            self.prompts |= {"points": points.values, "point_labels": points.labels, "point_format": "xy_px"}

    def __call__(self, pixels_chw: Tensor) -> list[Found]:
        """See `Predictor`."""
        state = self.processor.set_prompts(self.processor.set_image(pixels_chw), **self.prompts)
        return [
            Found(
                result["text"],
                result["scores"].cpu().numpy(),
                result["boxes"].cpu().numpy(),
                result["masks"][:, 0].cpu().numpy() if "masks" in result else None,
            )
            for result in state["results"]
        ]


class Clicker:
    """The objects that boxes and clicks mark."""

    def __init__(self, model: Sam3Image, boxes: Marks, points: Marks, box_format: str = "xyxy") -> None:
        if model.inst_interactive_predictor is None:
            raise ValueError("this model has no SAM heads: build it with enable_inst_interactivity=True")
        self.predictor = model.inst_interactive_predictor
        self.boxes = np.array(boxes.values, dtype=np.float32) if boxes.values else None
        if self.boxes is not None and box_format == "xywh":
            self.boxes[:, 2:] += self.boxes[:, :2]
        self.points = np.array(points.values, dtype=np.float32) if points.values else None
        self.labels = np.array(points.labels) if points.values else None

    def __call__(self, pixels_chw: Tensor) -> list[Found]:
        """See `Predictor`. Of a single click's three candidates the best by the model's own estimate is taken."""
        self.predictor.set_image(pixels_chw)
        is_ambiguous = self.boxes is None and self.labels is not None and len(self.labels) == 1
        box = self.boxes[0] if self.boxes is not None and len(self.boxes) == 1 else self.boxes
        masks, ious, _ = self.predictor.predict(self.points, self.labels, box, multimask_output=is_ambiguous)
        if masks.ndim == 4:
            masks, ious = masks[:, 0], ious[:, 0]
        elif is_ambiguous:
            best = int(ious.argmax())
            masks, ious = masks[best : best + 1], ious[best : best + 1]
        order = (-ious).argsort(kind="stable")
        inside = masks[order] > 0
        return [Found("interactive", ious[order], np.stack([mask_box(mask) for mask in inside]), inside)]


def mask_box(mask: np.ndarray) -> np.ndarray:
    """x0, y0, x1, y1 around a bool mask (H, W), in pixels; zeros if it is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return np.zeros(4, dtype=np.float32)
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float32)


class Folder:
    """The output folder: pictures as they are made, and one list of all objects."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.results: list[dict[str, Any]] = []

    def add(self, image: ImageName, pixels_hwc: np.ndarray, found: Sequence[Found]) -> int:
        """Write the pictures of one image (uint8) and remember its objects; returns how many there are."""
        files, records = [], []
        for category, prompt in enumerate(found, start=1):
            mask_name = None
            if prompt.masks is not None:
                mask_name = f"{image.output_name}_mask{f'_{category}' if len(found) > 1 else ''}.png"
                files.append((mask_name, index_image(list(prompt.masks), pixels_hwc.shape[:2])))
            for i, (score, box) in enumerate(zip(prompt.scores.tolist(), prompt.boxes_xyxy_px.tolist(), strict=True)):
                x0, y0, x1, y1 = box
                record = {
                    "image_id": image.image_id,
                    "category_id": category,
                    "bbox": [round(value, 2) for value in (x0, y0, x1 - x0, y1 - y0)],
                    "score": round(score, 6),
                    "file_name": image.file_name,
                    "prompt": prompt.prompt,
                }
                if prompt.masks is not None:
                    record |= {"segmentation": encode_mask(prompt.masks[i])}
                    record |= {"mask_file": mask_name, "mask_value": i + 1}
                records.append(record)
        files.append((f"{image.output_name}_overlay.png", _overlay(pixels_hwc, found)))
        for file_name, picture in files:
            write_whole(self.root / file_name, partial(picture.save, format="PNG"))
        self.results += records
        return len(records)

    def save(self) -> None:
        """Write the list of all objects so far, one a line."""
        text = "[" + ",\n".join(json.dumps(result) for result in self.results) + "]\n"
        write_whole(self.root / RESULTS_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def _overlay(pixels_hwc: np.ndarray, found: Sequence[Found]) -> Image.Image:
    return draw_overlay(
        pixels_hwc,
        [mask for prompt in found if prompt.masks is not None for mask in prompt.masks],
        [box for prompt in found for box in prompt.boxes_xyxy_px.tolist()],
        [f"{prompt.prompt[:40]} {score:.2f}" for prompt in found for score in prompt.scores],
    )


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Call ``write`` with a path beside ``path`` and rename the result, so that no half file is ever seen.

    Raises:
        CommandError: If it cannot be written, e.g. because the disk is full.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(aside)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise CommandError(
            f"{path}: cannot be written ({error.strerror or error}); free some space or choose another --output"
        ) from error


@dataclass
class Run:
    """How a run over images went."""

    num_images: int = 0
    """Images that were done."""
    num_objects: int = 0
    failures: list[str] = field(default_factory=list)
    """One message for each image that could not be used."""
    is_interrupted: bool = False


def predict_images(predictor: Predictor, images: Sequence[tuple[Path, str]], folder: Folder) -> Run:
    """Predict image after image; one that cannot be used does not end the run.

    Args:
        predictor: A `Detector` or a `Clicker`.
        images: Files and their names in the results.
        folder: Where the results go. Its list is written however the run ends.
    """
    run = Run()
    names = name_images([name for _, name in images])
    try:
        for (path, _), name in zip(tqdm(images, unit="image", disable=len(images) == 1), names, strict=True):
            try:
                pixels = to_rgb_uint8(open_image(path))
                found = predictor(pixels)
            except ImageInputError as error:
                run.failures.append(str(error))
                continue
            except PromptError as error:
                run.failures.append(f"{path}: {error}")
                continue
            run.num_objects += folder.add(name, pixels.permute(1, 2, 0).cpu().numpy(), found)
            run.num_images += 1
    except KeyboardInterrupt:
        run.is_interrupted = True
    finally:
        folder.save()
    return run


def name_images(names: Sequence[str]) -> list[ImageName]:
    """What each image is called in the results, given the names of the files.

    COCO numbers its images in their file names: where all names are different numbers, those are the ids. Else they
    are counted from 1. Output files are named without the suffix, unless two would then be called the same.
    """
    stems = [Path(name).stem for name in names]
    are_numbers = all(stem.isascii() and stem.isdigit() for stem in stems)
    image_ids = [int(stem) for stem in stems] if are_numbers else []
    if len(set(image_ids)) < len(names):
        image_ids = list(range(1, len(names) + 1))
    short = [Path(name).with_suffix("").as_posix() for name in names]
    output_names = [name if short.count(bare) > 1 else bare for name, bare in zip(names, short, strict=True)]
    seen: Counter[str] = Counter()
    for i, output_name in enumerate(output_names):
        seen[output_name] += 1
        if seen[output_name] > 1:  # the same name in two folders
            output_names[i] = f"{output_name}-{seen[output_name]}"
    return [ImageName(*each) for each in zip(names, output_names, image_ids, strict=True)]
