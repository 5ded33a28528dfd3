"""Files for the tests of merging a memory: whole tiny models, and checkpoints of a training in front of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from checkpoint_files import TINY
from torch import Tensor

from sam3.checkpoint_io import read_checkpoint, write_merged
from sam3.config import EfficientMemoryConfig
from sam3.model.efficient_sam3_model_builder import build_efficient_sam3_train, save_efficient_sam3_checkpoint
from sam3.model.efficient_sam3_train import EfficientSam3Train
from sam3.model.sam3_image import Sam3Image
from sam3.preprocess import Preprocess
from sam3.recognition import recognise
from sam3.released_names import released_state_dict
from stage2.base_file import frozen_sha256
from stage2.convert_memory_weights_stage2 import main

PREPROCESS = Preprocess(TINY.image_size_px)


def write_base(path: Path, model: Sam3Image, dtype: torch.dtype | None = None, **record: Any) -> Path:
    """A whole model's file."""
    provenance = {"teacher_file": "sam3.pt", "teacher_trunk_sha256": "a" * 64}
    metadata = {"model": model.config.to_dict(), "preprocess": PREPROCESS.to_dict(), "provenance": provenance}
    write_merged(path, dict(released_state_dict(model)), {**metadata, **record}, dtype)
    return path


def trained_module(base: Path, memory: EfficientMemoryConfig | None = None) -> EfficientSam3Train:
    """What a training in front of a file ends with: everything trainable has moved."""
    torch.manual_seed(7)
    module = build_efficient_sam3_train(base, memory=memory, device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return module


def identity_of(module: EfficientSam3Train, base: Path, **changes: Any) -> dict[str, Any]:
    """What the checkpoints of a run say about it."""
    return {
        "stage": "stage2",
        "model": module.config.to_dict(),
        "preprocess": module.preprocess.to_dict(),
        "frozen_sha256": frozen_sha256(recognise(read_checkpoint(base))),
        **changes,
    }


def write_trained(path: Path, base: Path, module: EfficientSam3Train | None = None, **changes: Any) -> Path:
    """A ``model_final.pth``; ``changes`` go into its identity."""
    module = module or trained_module(base)
    save_efficient_sam3_checkpoint(
        module,
        path,
        epoch=3,
        step=40,
        metrics={"j_and_f": 0.5},
        config={"SEED": 0},
        identity=identity_of(module, base, **changes),
        is_ema=False,
        start={"file": base.name, "sha256": "b" * 64},
    )
    return path


def rewrite(path: Path, source: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with other fields; None removes one."""
    state = torch.load(source, weights_only=True) | changes
    torch.save({key: value for key, value in state.items() if value is not None}, path)
    return path


def weights_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a training checkpoint."""
    return dict(torch.load(path, weights_only=True)["model"])


def convert(trained: Path, base: Path, output: Path, *more: str) -> int:
    """Run the command."""
    files = {"--trained_checkpoint": trained, "--sam3_checkpoint": base, "--output_path": output}
    return main([*(str(word) for pair in files.items() for word in pair), *more])
