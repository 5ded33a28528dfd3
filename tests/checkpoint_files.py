"""Models and files for the tests of loading, inspecting and converting: tiny, random, with every part."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sam3.config import Sam3Config, StudentConfig
from sam3.model.sam3_image import Sam3Image
from sam3.model_builder import assemble_image_model
from sam3.released_names import released_state_dict

TINY = Sam3Config.preset("tiny")
STUDENT = "efficientvit_b0"


def make_model(config: Sam3Config = TINY, seed: int = 0, **parts: bool) -> Sam3Image:
    """A model with fresh weights, in eval mode, with every part that is not switched off."""
    torch.manual_seed(seed)
    switches = {"enable_tracker": True, "enable_detector": True, **parts}
    return assemble_image_model(config, **switches).eval()


@cache
def whole_model() -> Sam3Image:
    """The tiny model with every part; shared, so nobody may change it."""
    return make_model()


@cache
def student_model() -> Sam3Image:
    """The same with a student in the trunk's place."""
    return make_model(TINY.replace(student=StudentConfig(STUDENT)))


def whole_weights() -> dict[str, Tensor]:
    """Weights of `whole_model` under the released names, in a dict of its own."""
    return dict(released_state_dict(whole_model()))


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return shutil.copyfile, (__file__, str(self.target))
