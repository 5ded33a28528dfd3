"""``stage2`` gives the model and its builders by name."""

from __future__ import annotations

import pytest

import stage2
from sam3.model import efficient_sam3_model_builder as builder
from sam3.model.efficient_sam3_train import EfficientSam3Train


def test_the_model_and_every_builder_are_exported() -> None:
    assert stage2.EfficientSam3Train is EfficientSam3Train
    public = [name for name in vars(builder) if name.startswith("build_efficient_sam3_")]
    public += ["load_efficient_sam3_checkpoint", "save_efficient_sam3_checkpoint"]
    assert sorted(["EfficientSam3Train", *public]) == stage2.__all__ == dir(stage2)
    assert all(getattr(stage2, name) is getattr(builder, name) for name in public)
    with pytest.raises(AttributeError, match="module 'stage2' has no attribute 'EfficientSam3'"):
        _ = stage2.EfficientSam3
