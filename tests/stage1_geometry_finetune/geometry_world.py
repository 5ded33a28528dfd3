"""What the tests of the dual path share: the demo's tiny teacher, objects drawn as rectangles, prompts for them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam3.config import Sam3Config, StudentConfig
from sam3.model.box_ops import xyxy_to_cxcywh
from sam3.model.prompt_sampling import boxes_from_masks, centre_clicks
from sam3.model.sam3_image import Sam3Image
from sam3.model.student_encoder import build_student
from sam3.model_builder import build_sam3_image_model
from stage1_geometry_finetune.frozen_heads import FrozenHeads
from stage1_geometry_finetune.losses import GeometryLossWeights
from stage1_geometry_finetune.prompts import PromptBatch
from stage1_geometry_finetune.task import GeometryOptions, GeometryTask

TINY = Sam3Config.preset("tiny")
TEACHER_FILE = Path(__file__).resolve().parents[2] / "data/demo/tiny_teacher.safetensors"
CPU = torch.device("cpu")
SIDE = 4 * TINY.grid_size


@cache
def load_heads(detector: bool = True, sam: bool = True, checkpointing: bool = True) -> FrozenHeads:
    """The demo teacher's heads; no test changes them."""
    return FrozenHeads.from_checkpoint(TEACHER_FILE, TINY, CPU, detector=detector, sam=sam, checkpointing=checkpointing)


@cache
def deployed_model() -> Sam3Image:
    """The demo teacher as users have it."""
    return build_sam3_image_model(TEACHER_FILE, device="cpu", config=TINY, enable_inst_interactivity=True)


@cache
def scene() -> tuple[Tensor, Tensor, Tensor]:
    """Two images (2, 3, S, S) with shapes on them, the teacher's features of both, and the masks of five shapes."""
    masks = torch.zeros(5, SIDE, SIDE, dtype=torch.bool)
    for index, (top, left, height, width) in enumerate(
        [(6, 6, 20, 26), (38, 30, 24, 14), (10, 44, 16, 20), (20, 14, 34, 20), (46, 48, 16, 18)]
    ):
        masks[index, top : top + height, left : left + width] = True
    generator = torch.Generator().manual_seed(3)
    side_px = TINY.image_size_px
    small = torch.nn.functional.interpolate(masks[:, None].float(), size=(side_px, side_px))[:, 0]
    colours = torch.rand(5, 3, 1, 1, generator=generator) * 2 - 1
    images = torch.full((2, 3, side_px, side_px), -0.2)
    for index, image in enumerate(images_of_objects().tolist()):
        images[image] = torch.where(small[index] > 0, colours[index], images[image])
    images = images + 0.05 * torch.randn(images.shape, generator=generator)
    with torch.no_grad():
        features = deployed_model().backbone.vision_backbone.trunk(images)[-1]
    return images, features, masks


def images_of_objects() -> Tensor:
    """Three shapes lie on the first image, two on the second."""
    return torch.tensor([0, 0, 0, 1, 1])


def make_prompts(kinds: str = "bcxbc") -> PromptBatch:
    """Prompts of the scene's shapes: ``b`` box, ``c`` click, ``x`` both, for each shape."""
    masks = scene()[2]
    has_box = torch.tensor([kind in "bx" for kind in kinds])
    is_point = torch.tensor([kind in "cx" for kind in kinds])[:, None]
    boxes = xyxy_to_cxcywh((boxes_from_masks(masks) + torch.tensor([0, 0, 1, 1])) / SIDE)
    clicks = (centre_clicks(masks).points_xy_px + 0.5) / SIDE
    return PromptBatch(
        images_of_objects(),
        boxes * has_box[:, None],
        has_box,
        clicks * is_point[..., None],
        is_point.long(),
        is_point,
        masks,
        torch.arange(len(masks)) + 100 * sum(map(ord, kinds)),
    )


def make_batch(kinds: str = "bcxbc") -> dict[str, Any]:
    """What the loader and `prepare_batch` make."""
    images, features, _ = scene()
    valid = torch.ones(2, 1, TINY.grid_size, TINY.grid_size)
    return {"image": images, "teacher": features, "valid": valid, "prompts": make_prompts(kinds)}


def no_objects(batch: dict[str, Any]) -> dict[str, Any]:
    """The same images without any object."""
    return {**batch, "prompts": batch["prompts"].select(torch.arange(0))}


def make_task(
    weights: GeometryLossWeights | None = None,
    detector: bool = True,
    sam: bool = True,
    checkpointing: bool = True,
    **options: Any,
) -> GeometryTask:
    """A random student in front of the demo teacher's heads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = build_student(TINY.replace(student=StudentConfig("demo_cnn")))
    if weights is None:
        weights = GeometryLossWeights(detector=float(detector), sam=float(sam))
    heads = load_heads(detector, sam, checkpointing)
    variance_c = scene()[1].var((0, 2, 3)).clamp(min=1e-3)
    return GeometryTask(student, heads, variance_c, weights, GeometryOptions(**options))
