"""The state that `Sam3Processor`'s methods pass on: a plain dict, with these keys.

Of the images: ``original_height`` and ``original_width``, or for a batch the lists ``original_heights`` and
``original_widths``; ``backbone_out``, to which a text prompt adds its features. Of the prompts: ``texts`` and
``geometric_prompt``, a `Prompt` with one row per image. Of the results: ``raw_outputs``, ``results`` and the keys that
`Sam3Processor` describes.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch

from sam3.devices import parse_device
from sam3.sam.prompts import PromptError

State = dict[str, Any]

IMAGE_KEYS = ("original_height", "original_width", "original_heights", "original_widths", "backbone_out")
TEXT_KEYS = ("language_features", "language_mask", "language_embeds")
"""In ``backbone_out``."""
RESULT_KEYS = ("boxes", "masks", "masks_logits", "mask_logits", "scores", "results")
PROMPT_KEYS = ("texts", "geometric_prompt", "raw_outputs")


def forget(state: State, *key_groups: tuple[str, ...]) -> None:
    """Remove what the keys name, where it is there; whatever else the caller keeps in the state stays."""
    for group in key_groups:
        for key in group:
            state.pop(key, None)


def original_hws(state: State) -> list[tuple[int, int]]:
    """Height and width of each image.

    Raises:
        RuntimeError: If no image is set.
    """
    if not isinstance(state, dict) or "backbone_out" not in state:
        raise RuntimeError("no image is set: call set_image or set_image_batch first and pass on the state it returns")
    if "original_heights" in state:
        return list(zip(state["original_heights"], state["original_widths"], strict=True))
    return [(state["original_height"], state["original_width"])]


def require_image_index(image_index: int | None, num_images: int) -> int:
    """Which image of a state is meant; need not be said if there is one.

    Raises:
        PromptError: If it is not said and there are several, or there is no such image.
    """
    if image_index is None and num_images == 1:
        return 0
    if not isinstance(image_index, Integral) or not 0 <= image_index < num_images:
        raise PromptError(f"image_index must say which of the {num_images} images is meant, got {image_index}")
    return int(image_index)


def require_device(device: torch.device | str | None, model_device: torch.device) -> torch.device:
    """The model's device, if ``device`` is none or the same.

    Raises:
        ValueError: If it is another one, or none that torch knows.
    """
    if device is None:
        return model_device
    wanted = parse_device(device)
    if wanted.type != model_device.type or wanted.index not in (None, model_device.index or 0):
        raise ValueError(f"device is {wanted}, but the model is on {model_device}: move it first, model.to({device!r})")
    return model_device
