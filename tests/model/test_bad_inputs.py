"""Bad images and prompts: one table of what a user may do wrong and what each mistake is told.

Checkpoints have a table of their own, ``test_bad_checkpoints.py``.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from golden import fill
from PIL import Image

import sam3
from sam3.checkpoint_parts import POINT_PROMPTS
from sam3.devices import DeviceError
from sam3.finite import NonFiniteError
from sam3.image_input import ImageInputError, open_image
from sam3.model.sam3_image import Sam3Image
from sam3.model.sam3_image_processor import Sam3Processor
from sam3.released_names import HEADS_PREFIX
from sam3.sam.prompts import PromptError

HEIGHT, WIDTH = 40, 60
RGB = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
BOX = [0.5, 0.5, 0.2, 0.2]
ABSENT_DEVICE = "cuda:77"


class World(NamedTuple):
    """What a case may use."""

    processor: Sam3Processor
    state: dict[str, Any]
    """With an image set."""
    build: Callable[..., Sam3Image]
    folder: Path

    def set_image(self, image: Any) -> Any:
        return self.processor.set_image(image)

    def text(self, prompt: Any) -> Any:
        return self.processor.set_text_prompt(prompt, self.state)

    def box(self, box: Any, label: Any = True, **options: Any) -> Any:
        return self.processor.add_geometric_prompt(box, label, self.state, **options)

    def point(self, point: Any, label: Any = 1, **options: Any) -> Any:
        return self.processor.add_point_prompt(point, label, self.state, **options)

    def file(self, name: str, content: bytes) -> Image.Image:
        (self.folder / name).write_bytes(content)
        return open_image(self.folder / name)


def build(**options: Any) -> Sam3Image:
    return fill(sam3.build_sam3_image_model(load_from_HF=False, config="tiny", device="cpu", **options))


@pytest.fixture(scope="module")
def model() -> Sam3Image:
    return build(enable_detector=True, enable_inst_interactivity=True)


@pytest.fixture
def world(model, tmp_path) -> World:
    processor = Sam3Processor(model, confidence_threshold=0.31)
    return World(processor, processor.set_image(RGB), build, tmp_path)


def png(width: int, height: int) -> bytes:
    """A PNG that promises so many pixels and holds none: a decompression bomb's size without its cost."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def with_value(value: float) -> np.ndarray:
    image = np.full((HEIGHT, WIDTH, 3), 0.5, np.float32)
    image[3, 4, 1] = value
    return image


# what is wrong -> (the call, the error, what its message says)
REFUSED: dict[str, tuple[Callable[[World], Any], type[Exception], str]] = {
    # images
    "zero height": (lambda w: w.set_image(RGB[:0]), ImageInputError, "the image is empty: shape (0, 60, 3)"),
    "zero width": (lambda w: w.set_image(torch.zeros(3, 5, 0)), ImageInputError, "the image is empty: shape (3, 5, 0)"),
    "zero-size PIL image": (lambda w: w.set_image(Image.new("L", (0, 7))), ImageInputError, "is empty: 0 x 7 pixels"),
    "a file of 20,000 x 20,000 pixels": (
        lambda w: w.file("bomb.png", png(20_000, 20_000)),
        ImageInputError,
        "bomb.png: too large for a file that nobody vouches for (Image size (400000000 pixels) exceeds limit of",
    ),
    "an empty file": (lambda w: w.file("empty.jpg", b""), ImageInputError, "empty.jpg: not an image that Pillow can"),
    "a truncated file": (lambda w: w.file("cut.png", png(30, 20)[:50]), ImageInputError, "cut.png: cannot be decoded"),
    "a missing file": (lambda w: open_image(w.folder / "no.png"), ImageInputError, "no.png: no such file"),
    "a folder": (lambda w: open_image(w.folder), ImageInputError, "is a folder"),
    "a path in place of an image": (lambda w: w.set_image("a.png"), TypeError, "got str: open the file first"),
    "nothing in place of an image": (lambda w: w.set_image(None), TypeError, "got NoneType"),
    "NaN": (lambda w: w.set_image(with_value(np.nan)), ImageInputError, "must lie in 0..1, got values from nan"),
    "infinity": (lambda w: w.set_image(with_value(np.inf)), ImageInputError, "got values from 0.5 to inf"),
    "floats up to 255": (
        lambda w: w.set_image(RGB.astype(np.float32)),
        ImageInputError,
        "to 255.0: divide it by 255, or convert it to uint8",
    ),
    "a normalised tensor": (lambda w: w.set_image(torch.full((3, 4, 4), -1.0)), ImageInputError, "values from -1.0"),
    "int64 in range": (
        lambda w: w.set_image(RGB.astype(np.int64)),
        TypeError,
        "got int64 with values from 0 to 255: convert it to uint8",
    ),
    "uint16 out of range": (
        lambda w: w.set_image(RGB.astype(np.uint16) * 257),
        TypeError,
        "got uint16 with values from 0 to 65535: scale it to 0..255 and convert it to uint8",
    ),
    "a bool mask": (lambda w: w.set_image(RGB > 9), TypeError, "got bool: multiply a mask by 255"),
    "text in an array": (lambda w: w.set_image(np.full((4, 4, 3), "x")), TypeError, "must be uint8 or floating point"),
    "32-bit PIL image": (lambda w: w.set_image(Image.new("I", (3, 3), 70_000)), ImageInputError, "from 70000 to 70000"),
    "channels first in an array": (
        lambda w: w.set_image(RGB.transpose(2, 0, 1)),
        ImageInputError,
        "got (3, 40, 60); channels come last in an array: transpose(1, 2, 0)",
    ),
    "channels last in a tensor": (
        lambda w: w.set_image(torch.from_numpy(RGB)),
        ImageInputError,
        "got (40, 60, 3); channels come first in a tensor: permute(2, 0, 1)",
    ),
    "two channels": (lambda w: w.set_image(RGB[..., :2]), ImageInputError, "got (40, 60, 2)"),
    "a batch as one image": (lambda w: w.set_image(RGB[None]), ImageInputError, "give one image at a time, or a list"),
    "an array as a batch": (
        lambda w: w.processor.set_image_batch(RGB[None]),
        ImageInputError,
        "several images come as a list, got ndarray",
    ),
    "an empty batch": (lambda w: w.processor.set_image_batch([]), ImageInputError, "at least one image"),
    "one bad image of a batch": (
        lambda w: w.processor.set_image_batch([RGB, RGB[:0]]),
        ImageInputError,
        "image 1: the image is empty",
    ),
    # texts
    "empty text": (lambda w: w.text(""), PromptError, "the text prompt is empty: name what to find"),
    "blank text": (lambda w: w.text(["a cat", " \n"]), PromptError, "the text prompt is empty"),
    "no text in a list": (lambda w: w.text([]), PromptError, "the list of text prompts is empty"),
    "a number as text": (lambda w: w.text(7), PromptError, "must be a string or a list of strings, got 7"),
    "text without a text encoder": (
        lambda w: _with(w.build(enable_detector=True, enable_text_encoder=False)).set_text_prompt("a cat", w.state),
        ValueError,
        "this model has no text encoder",
    ),
    "text without a detector": (
        lambda w: _with(w.build(enable_detector=False)).set_text_prompt("a cat", w.state),
        ValueError,
        "this model has no detector",
    ),
    # boxes
    "box beside the image": (lambda w: w.box([1.6, 0.5, 0.2, 0.2]), PromptError, "lies outside the image (60 x 40"),
    "box in pixels taken for fractions": (
        lambda w: w.box([30, 20, 10, 10]),
        PromptError,
        "fractions of the image; if these are pixels, pass box_format='xyxy_px'",
    ),
    "box in pixels beside the image": (
        lambda w: w.box([61, 0, 70, 9], box_format="xyxy_px"),
        PromptError,
        "box [61, 0, 70, 9] lies outside the image",
    ),
    "inverted box": (
        lambda w: w.box([50, 10, 20, 30], box_format="xyxy_px"),
        PromptError,
        "box [50, 10, 20, 30] is inverted: it must be x0, y0, x1, y1 in pixels with x0 < x1",
    ),
    "negative width": (lambda w: w.box([0.5, 0.5, -0.2, 0.2]), PromptError, "[0.5, 0.5, -0.2, 0.2] is inverted"),
    "box without area": (lambda w: w.box([[*BOX], [0.5, 0.5, 0, 0.1]]), PromptError, "has no area"),
    "box of NaN": (lambda w: w.box([0.5, np.nan, 0.2, 0.2]), PromptError, "box holds values that are not finite"),
    "box with three numbers": (lambda w: w.box([0.5, 0.5, 0.2]), PromptError, "box has shape (3,), expected (4,)"),
    "box far larger than the image": (lambda w: w.box([0.5, 0.5, 3, 1]), PromptError, "more than 2 times as large"),
    "no box": (lambda w: w.box(np.zeros((0, 4))), PromptError, "box has shape (0, 4)"),
    "box of words": (lambda w: w.box("a box"), PromptError, "box must be an array of numbers, got 'a box'"),
    "unknown box format": (lambda w: w.box(BOX, box_format="xyxy"), PromptError, "box_format 'xyxy' is not one of"),
    "label 2": (lambda w: w.box(BOX, 2), PromptError, "label 2 of a box: a label is 1 (find the like) or 0"),
    "labels that do not fit": (lambda w: w.box(BOX, [1, 0]), PromptError, "2 labels for 1 box prompts"),
    "which image of a batch": (
        lambda w: w.processor.add_geometric_prompt(BOX, True, w.processor.set_image_batch([RGB, RGB])),
        PromptError,
        "image_index must say which of the 2 images is meant, got None",
    ),
    "image number that is none": (
        lambda w: w.processor.add_geometric_prompt(BOX, 1, w.processor.set_image_batch([RGB, RGB]), image_index=1.0),
        PromptError,
        "image_index must say which of the 2 images is meant, got 1.0",
    ),
    # points
    "point outside": (lambda w: w.point([0.5, 1.01]), PromptError, "point [0.5, 1.01] lies outside the image"),
    "point in pixels taken for fractions": (lambda w: w.point([30, 20]), PromptError, "pass point_format='xy_px'"),
    "point in pixels outside": (
        lambda w: w.point([-1, 5], point_format="xy_px"),
        PromptError,
        "[-1, 5] lies out",
    ),
    "point of infinity": (lambda w: w.point([np.inf, 0.5]), PromptError, "point holds values that are not finite"),
    "point with a box's label": (lambda w: w.point([0.5, 0.5], 3), PromptError, "label 3 of a point"),
    "point on a model from Hugging Face's layout": (
        lambda w: _without_points(w).add_point_prompt([0.5, 0.5], 1, w.state),
        PromptError,
        "point prompts of the detector",
    ),
    # order, device, settings
    "text before an image": (
        lambda w: w.processor.set_text_prompt("x", {}),
        RuntimeError,
        "no image is set: call",
    ),
    "box before an image": (lambda w: w.processor.add_geometric_prompt(BOX, 1, {}), RuntimeError, "no image is set"),
    "no prompt at all": (
        lambda w: w.processor.set_prompts(w.state),
        PromptError,
        "no prompt: give text, boxes or points",
    ),
    "unknown device": (
        lambda w: Sam3Processor(w.processor.model, device="gpu"),
        ValueError,
        "device gpu: torch knows devices such as cpu",
    ),
    "unknown device for a checkpoint": (
        lambda w: sam3.load_model(w.folder / "never read.pt", device="gpu"),
        DeviceError,
        "device gpu: torch knows devices such as cpu, cuda, cuda:1 and mps",
    ),
    "device that is not there": (
        lambda w: sam3.load_model(w.folder / "never read.pt", device=ABSENT_DEVICE),
        DeviceError,
        "device cuda:77: is not available here (",
    ),
    "device of another machine for a builder": (
        lambda w: sam3.build_sam3_image_model(load_from_HF=False, config="tiny", device=ABSENT_DEVICE),
        DeviceError,
        "device cuda:77: is not available here (",
    ),
    "dtype in words": (
        lambda w: sam3.load_model(w.folder / "never read.pt", dtype="fp16"),
        ValueError,
        "dtype 'fp16': weights and computation can be in torch.float32, torch.bfloat16, torch.float16, torch.float64",
    ),
    "whole numbers as dtype": (
        lambda w: sam3.load_model(w.folder / "never read.pt", dtype=torch.int8),
        ValueError,
        "dtype torch.int8: weights and computation can be in",
    ),
    "another device": (
        lambda w: Sam3Processor(w.processor.model, device="meta"),
        ValueError,
        "device is meta, but the model is on cpu: move it first",
    ),
    "threshold above 1": (
        lambda w: w.processor.set_confidence_threshold(50, w.state),
        ValueError,
        "confidence_threshold must lie in 0..1, got 50",
    ),
    "threshold that is no number": (
        lambda w: w.processor.set_confidence_threshold("0.5", w.state),
        ValueError,
        "confidence_threshold must lie in 0..1, got '0.5'",
    ),
    "half a prompt at a time": (
        lambda w: Sam3Processor(w.processor.model, max_prompts_per_pass=0.5),
        ValueError,
        "max_prompts_per_pass must be a positive integer, got 0.5",
    ),
    "resolution in words": (
        lambda w: Sam3Processor(w.processor.model, resolution="1008"),
        ValueError,
        "resolution '1008' is not a positive multiple of the patch size, 14 px",
    ),
    "resolution beside the patches": (
        lambda w: Sam3Processor(w.processor.model, resolution=250),
        ValueError,
        "resolution 250 is not a positive multiple of the patch size, 14 px",
    ),
    "clicks without a prompt": (
        lambda w: w.processor.model.predict_inst(w.state),
        PromptError,
        "no prompt: give",
    ),
    "clicks without SAM heads": (
        lambda w: w.build(enable_detector=False).predict_inst(w.state, box=[1, 1, 9, 9]),
        ValueError,
        "this model has no SAM heads: build it with enable_inst_interactivity=True",
    ),
    # weights that are damaged
    "scores of NaN": (
        lambda w: _with(_spoilt(w, "dot_prod_scoring.hs_proj.bias")).set_text_prompt("a cat", w.state),
        NonFiniteError,
        "the model's scores are not finite (NaN) in torch.float32: its weights are damaged, or",
    ),
    "IoUs of NaN": (
        lambda w: _spoilt(w, HEADS_PREFIX + "sam_mask_decoder.iou_prediction_head.layers.2.bias").predict_inst(
            w.state, box=[1, 1, 9, 9]
        ),
        NonFiniteError,
        "the model's estimated IoUs are not finite (NaN) in torch.float32",
    ),
    "masks of NaN": (
        lambda w: _spoilt(w, HEADS_PREFIX + "sam_mask_decoder.output_upscaling.3.bias").predict_inst(
            w.state, box=[1, 1, 9, 9]
        ),
        NonFiniteError,
        "the model's masks are not finite (NaN)",
    ),
}


def _with(model: Sam3Image) -> Sam3Processor:
    """A processor of another model; the state of the first fits, because the images' features have the same shapes."""
    return Sam3Processor(model)


def _spoilt(world: World, key: str) -> Sam3Image:
    """A model in which one tensor is NaN, as after a bit flip in a file."""
    model = world.build(enable_inst_interactivity=True)
    with torch.no_grad():
        model.get_parameter(key).fill_(torch.nan)
    return model


def _without_points(world: World) -> Sam3Processor:
    """As after loading a file in Hugging Face's layout, which lacks the projections of points."""
    model = world.build()
    model.missing_parts = (POINT_PROMPTS,)
    return Sam3Processor(model)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_with_a_message_that_helps(case: str, world: World) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error) as raised:
        call(world)
    assert message in str(raised.value), str(raised.value)
    assert "\n" not in str(raised.value)


# what looks bad and works -> the call
ACCEPTED: dict[str, Callable[[World], Any]] = {
    "1 x 1 image": lambda w: w.processor.set_text_prompt("a cat", w.set_image(RGB[:1, :1])),
    "1 x 3000 image": lambda w: w.processor.set_text_prompt("a cat", w.set_image(np.zeros((1, 3000), np.uint8))),
    "10,000 characters": lambda w: w.text("a very long text " * 600),
    "Chinese": lambda w: w.text("一只黑色的猫"),
    "Arabic": lambda w: w.text("قطة سوداء"),
    "emoji": lambda w: w.text("🐈‍⬛"),
    "control characters": lambda w: w.text("a\x00cat\x07"),
    "box over the edge": lambda w: w.box([0.0, 0.0, 0.5, 0.5]),
    "box of one pixel": lambda w: w.box([3, 4, 4, 5], box_format="xyxy_px"),
    "points on the corners": lambda w: w.point([[0, 0], [1, 1]], [True, False]),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_looks_bad_but_works_gives_finite_results(case: str, world: World) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = ACCEPTED[case](world)
    assert all(torch.isfinite(value.float()).all() for value in state["raw_outputs"].values())
    assert state["masks"].shape == (len(state["scores"]), 1, state["original_height"], state["original_width"])
