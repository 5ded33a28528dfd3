"""Compose the parts of a model, load weights, place it on a device. No layers are defined here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sam3.checkpoint_io import CheckpointError, read_state_dict
from sam3.config import Sam3Config
from sam3.hub import download_ckpt_from_hf
from sam3.model.decoder import TransformerDecoder, TransformerWrapper
from sam3.model.fusion_encoder import TransformerEncoderFusion
from sam3.model.geometry import SequenceGeometryEncoder
from sam3.model.necks import Sam3DualViTDetNeck
from sam3.model.sam3_image import Sam3Image
from sam3.model.scoring import DotProductScoring
from sam3.model.segmentation_head import UniversalSegmentationHead
from sam3.model.student_encoder import StudentTrunk, build_student
from sam3.model.text_encoder import VETextEncoder
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
    *,
    enable_detector: bool = False,
    enable_text_encoder: bool = True,
    enable_segmentation: bool = True,
) -> Sam3Image:
    """The image model with fresh weights, in training mode. Trunk and detector neck are always built.

    Args:
        config: Sizes.
        preprocess: Default: stretch to the model's size, as SAM 3 does.
        enable_inst_interactivity: Build the second neck, the SAM heads and the interactive predictor.
        device: Where the weights are made; ``meta`` for weights that come from a file. A student is then made on the
            CPU, because its network holds tables that no file contains.
        enable_detector: Build geometry encoder, fusion encoder, decoder and scoring. Without them the next two
            parts, which only they read, are left out too.
        enable_text_encoder: Build the text encoder. Without it, text features come from the caller.
        enable_segmentation: Build the detector's mask head. Without it the detector gives boxes alone.
    """
    device = torch.device(device or "cpu")
    trunk_device = torch.device("cpu") if device.type == "meta" and config.student is not None else device
    with trunk_device:
        trunk = build_trunk(config)
    with device:
        neck = Sam3DualViTDetNeck(trunk, config, add_sam2_neck=enable_inst_interactivity)
        heads = SamHeads(config) if enable_inst_interactivity else None
        text = VETextEncoder(config.text, config.hidden_dim) if enable_detector and enable_text_encoder else None
        detector = _build_detector(config, enable_segmentation) if enable_detector else {}
        preprocess = preprocess or Preprocess(size_px=config.image_size_px)
        return Sam3Image(config, SAM3VLBackbone(neck, text), preprocess, heads, **detector)


def _build_detector(config: Sam3Config, enable_segmentation: bool) -> dict[str, Any]:
    """The detector's parts behind the backbone, by their names in `Sam3Image`."""
    dim = config.hidden_dim
    return {
        "geometry_encoder": SequenceGeometryEncoder(config),
        "transformer": TransformerWrapper(
            TransformerEncoderFusion(config.fusion_encoder, dim), TransformerDecoder(config.decoder, dim)
        ),
        "dot_prod_scoring": DotProductScoring(config.scoring, dim),
        "segmentation_head": UniversalSegmentationHead(config.segmentation_head, dim) if enable_segmentation else None,
    }


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
    enable_detector: bool = False,
    config: Sam3Config | str = "sam3",
    preprocess: Preprocess | None = None,
) -> Sam3Image:
    """Build the image model and load its weights.

    Args:
        checkpoint_path: A file in the released layout (``.pt``, ``.pth`` or ``.safetensors``; see `load_released`).
        load_from_HF: Without ``checkpoint_path``, download the released file (gated; see `download_ckpt_from_hf`).
            If False and without ``checkpoint_path``, the weights are fresh.
        device: Default: CUDA where there is one, else the CPU.
        eval_mode: Return the model in eval mode.
        enable_segmentation: Masks from the detector; without them it gives boxes alone.
        enable_inst_interactivity: Masks from clicks and boxes: ``model.inst_interactive_predictor``.
        enable_text_encoder: Prompts in words; without it, text features come from the caller.
        compile: Compile the trunk with ``torch.compile`` (takes effect at its first call).
        enable_detector: False leaves out all of the detector behind its neck: an image encoder, with the SAM heads if
            ``enable_inst_interactivity``.
        config: A preset's name or a description.
        preprocess: Default: stretch to the model's size.

    Raises:
        CheckpointError: If the file cannot be read, downloaded, or does not fit the description.
    """
    config = Sam3Config.preset(config) if isinstance(config, str) else config
    path = _weights_path(checkpoint_path, load_from_HF, config)
    model = assemble_image_model(
        config,
        preprocess,
        enable_inst_interactivity,
        "meta" if path else None,
        enable_detector=enable_detector,
        enable_text_encoder=enable_text_encoder,
        enable_segmentation=enable_segmentation,
    )
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
