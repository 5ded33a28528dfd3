"""Compose the parts of a model, load weights, place it on a device. No layers are defined here."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from sam3.checkpoint_io import CheckpointError, read_state_dict
from sam3.config import Sam3Config
from sam3.hub import download_ckpt_from_hf
from sam3.model.necks import Sam3DualViTDetNeck
from sam3.model.sam3_image import Sam3Image
from sam3.model.student_encoder import StudentTrunk, build_student
from sam3.model.vitdet import ViT
from sam3.model.vl_backbone import SAM3VLBackbone
from sam3.preprocess import Preprocess
from sam3.released_names import load_released, load_trunk
from sam3.sam.heads import SamHeads

__all__ = [
    "assemble_image_model",
    "build_sam3_image_model",
    "build_sam3_trunk",
    "build_trunk",
    "download_ckpt_from_hf",
]


def build_trunk(config: Sam3Config) -> nn.Module:
    """The image trunk of a description with fresh weights: the ViT, or the student in its place.

    Returns:
        A module that maps (B, 3, S, S) to a list with one map (B, C, G, G).
    """
    if config.student is not None:
        return StudentTrunk(build_student(config))
    return ViT(config.trunk, config.image_size_px)


def assemble_image_model(
    config: Sam3Config,
    preprocess: Preprocess | None = None,
    enable_inst_interactivity: bool = False,
    device: torch.device | str | None = None,
) -> Sam3Image:
    """The image model with fresh weights, in training mode.

    Args:
        config: Sizes.
        preprocess: Default: stretch to the model's size, as SAM 3 does.
        enable_inst_interactivity: Build the second neck, the SAM heads and the interactive predictor.
        device: Where the weights are made; ``meta`` for weights that come from a file. A student is then made on the
            CPU, because its network holds tables that no file contains.
    """
    device = torch.device(device or "cpu")
    trunk_device = torch.device("cpu") if device.type == "meta" and config.student is not None else device
    with trunk_device:
        trunk = build_trunk(config)
    with device:
        neck = Sam3DualViTDetNeck(trunk, config, add_sam2_neck=enable_inst_interactivity)
        heads = SamHeads(config) if enable_inst_interactivity else None
        preprocess = preprocess or Preprocess(size_px=config.image_size_px)
        return Sam3Image(config, SAM3VLBackbone(neck), preprocess, heads)


def build_sam3_image_model(
    checkpoint_path: str | Path | None = None,
    load_from_HF: bool = True,
    device: torch.device | str | None = None,
    eval_mode: bool = True,
    enable_segmentation: bool = True,
    enable_inst_interactivity: bool = False,
    enable_text_encoder: bool = True,
    compile: bool = False,
    *,
    config: Sam3Config | str = "sam3",
    preprocess: Preprocess | None = None,
) -> Sam3Image:
    """Build the image model and load its weights.

    The model is the image path: trunk, neck and, with ``enable_inst_interactivity``, the SAM heads. Text encoder and
    segmentation head belong to the detector, which is not part of this version; the two switches for them are
    accepted so that calls keep their meaning when it is.

    Args:
        checkpoint_path: A file in the released layout (``.pt``, ``.pth`` or ``.safetensors``; see `load_released`).
        load_from_HF: Without ``checkpoint_path``, download the released file (gated; see `download_ckpt_from_hf`).
            If False and without ``checkpoint_path``, the weights are fresh.
        device: Default: CUDA where there is one, else the CPU.
        eval_mode: Return the model in eval mode.
        enable_segmentation: See above.
        enable_inst_interactivity: Masks from clicks and boxes: ``model.inst_interactive_predictor``.
        enable_text_encoder: See above.
        compile: Compile the trunk with ``torch.compile`` (takes effect at its first call).
        config: A preset's name or a description.
        preprocess: Default: stretch to the model's size.

    Raises:
        CheckpointError: If the file cannot be read, downloaded, or does not fit the description.
    """
    config = Sam3Config.preset(config) if isinstance(config, str) else config
    path = _weights_path(checkpoint_path, load_from_HF, config)
    model = assemble_image_model(config, preprocess, enable_inst_interactivity, "meta" if path else None)
    if path is not None:
        state_dict, _ = read_state_dict(path)
        load_released(model, state_dict, source=str(path))
    model.to(_default_device(device))
    if compile:
        model.backbone.vision_backbone.trunk.compile()
    return model.eval() if eval_mode else model.train()


def build_sam3_trunk(
    checkpoint_path: str | Path | None = None,
    config: Sam3Config | str = "sam3",
    device: torch.device | str | None = None,
    load_from_HF: bool = True,
) -> nn.Module:
    """The trunk alone, frozen and in eval mode: what exporting a teacher's embeddings needs.

    Neck, text encoder and heads are neither built nor read from the file.

    Args:
        checkpoint_path: A file in the released layout, or one that holds the trunk's keys alone.
        config: A preset's name or a description.
        device: Default: CUDA where there is one, else the CPU.
        load_from_HF: Without ``checkpoint_path``, download the released file; if False, the weights are fresh.

    Raises:
        CheckpointError: If the file cannot be read or downloaded, or its trunk does not fit the description.
    """
    config = Sam3Config.preset(config) if isinstance(config, str) else config
    path = _weights_path(checkpoint_path, load_from_HF, config)
    with torch.device("meta" if path is not None and config.student is None else "cpu"):
        trunk = build_trunk(config)
    if path is not None:
        state_dict, _ = read_state_dict(path)
        load_trunk(trunk, config, state_dict, source=str(path))
    return trunk.to(_default_device(device)).eval().requires_grad_(False)


def _weights_path(checkpoint_path: str | Path | None, load_from_HF: bool, config: Sam3Config) -> Path | None:
    if checkpoint_path is not None:
        return Path(checkpoint_path)
    if not load_from_HF:
        return None
    if config != Sam3Config.preset("sam3"):
        raise CheckpointError(
            f"no checkpoint_path for the model {config.name!r}: the weights on the Hub fit the preset 'sam3' alone. "
            "Pass checkpoint_path, or load_from_HF=False for fresh weights."
        )
    return download_ckpt_from_hf()


def _default_device(device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
