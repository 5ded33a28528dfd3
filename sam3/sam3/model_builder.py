"""Compose the parts of a model, load weights, place it on a device. No layers are defined here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sam3.checkpoint_io import CheckpointError, read_checkpoint, read_state_dict, sha256_file
from sam3.config import Sam3Config, StudentConfig
from sam3.devices import find_device
from sam3.hub import download_ckpt_from_hf
from sam3.model.building import building_on
from sam3.model.decoder import TransformerDecoder, TransformerWrapper
from sam3.model.efficient_sam3_tracker import EfficientSam3Tracker
from sam3.model.fusion_encoder import TransformerEncoderFusion
from sam3.model.geometry import SequenceGeometryEncoder
from sam3.model.matcher import BinaryHungarianMatcherV2
from sam3.model.necks import Sam3DualViTDetNeck
from sam3.model.sam3_image import Sam3Image
from sam3.model.sam3_tracker import Sam3Tracker
from sam3.model.scoring import DotProductScoring
from sam3.model.segmentation_head import UniversalSegmentationHead
from sam3.model.student_encoder import StudentTrunk, build_student
from sam3.model.text_encoder import VETextEncoder
from sam3.model.vitdet import ViT
from sam3.model.vl_backbone import SAM3VLBackbone
from sam3.preprocess import Preprocess
from sam3.released_names import load_released, load_trunk
from sam3.sam.heads import SamHeads
from sam3.video_builder import build_sam3_video_model, build_sam3_video_predictor

__all__ = [
    "STUDENT_SIZES",
    "assemble_image_model",
    "build_efficientsam3_image_model",
    "build_heads",
    "build_sam3_image_model",
    "build_sam3_trunk",
    "build_sam3_video_model",
    "build_sam3_video_predictor",
    "build_trunk",
    "download_ckpt_from_hf",
    "student_backbone",
]

STUDENT_SIZES = {
    "repvit": {"m0.9": "repvit_m0_9", "m1.1": "repvit_m1_1", "m2.3": "repvit_m2_3"},
    "tinyvit": {"5m": "tiny_vit_5m", "11m": "tiny_vit_11m", "21m": "tiny_vit_21m"},
    "efficientvit": {"b0": "efficientvit_b0", "b1": "efficientvit_b1", "b2": "efficientvit_b2"},
}
"""``backbone_type`` -> ``model_name`` -> registered backbone, for the released students."""
_BPE_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


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
    enable_detector: bool = True,
    enable_text_encoder: bool = True,
    enable_segmentation: bool = True,
    enable_tracker: bool = False,
) -> Sam3Image:
    """The model with fresh weights, in training mode. Trunk and detector neck are always built.

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
        enable_tracker: Build the tracker, which is the SAM heads with a memory, and what they need. Its memory is the
            compressed one where ``config.efficient_memory`` describes one, else the released one.
    """
    enable_inst_interactivity = enable_inst_interactivity or enable_tracker
    device = torch.device(device or "cpu")
    trunk_device = torch.device("cpu") if device.type == "meta" and config.student is not None else device
    with building_on(trunk_device):
        trunk = build_trunk(config)
    with building_on(device):
        neck = Sam3DualViTDetNeck(trunk, config, add_sam2_neck=enable_inst_interactivity)
        heads = build_heads(config, enable_tracker) if enable_inst_interactivity else None
        text = VETextEncoder(config.text, config.hidden_dim) if enable_detector and enable_text_encoder else None
        detector = _build_detector(config, enable_segmentation) if enable_detector else {}
        preprocess = preprocess or Preprocess(size_px=config.image_size_px)
        return Sam3Image(config, SAM3VLBackbone(neck, text), preprocess, heads, **detector)


def build_heads(config: Sam3Config, enable_tracker: bool) -> SamHeads:
    """The SAM heads with fresh weights, alone or with the memory of the description."""
    if not enable_tracker:
        return SamHeads(config)
    return Sam3Tracker(config) if config.efficient_memory is None else EfficientSam3Tracker(config)


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
    enable_detector: bool = True,
    enable_tracker: bool = False,
    bpe_path: str | Path | None = None,
    config: Sam3Config | str = "sam3",
    preprocess: Preprocess | None = None,
) -> Sam3Image:
    """Build the image model and load its weights. To open any file without saying what it is, see `sam3.load_model`.

    Args:
        checkpoint_path: A file in the released layout (``.pt``, ``.pth`` or ``.safetensors``; see `load_released`).
        load_from_HF: Without ``checkpoint_path``, download the released file (gated; see `download_ckpt_from_hf`).
            If False and without ``checkpoint_path``, the weights are fresh.
        device: Default: CUDA where there is one, else the CPU.
        eval_mode: Return the model in eval mode. In training mode it also has a ``matcher``.
        enable_segmentation: Masks from the detector; without them it gives boxes alone.
        enable_inst_interactivity: Masks from clicks and boxes: ``model.inst_interactive_predictor``.
        enable_text_encoder: Prompts in words; without it, text features come from the caller.
        compile: Compile the trunk with ``torch.compile`` (takes effect at its first call).
        enable_detector: False leaves out all of the detector behind its neck: an image encoder, with the SAM heads if
            ``enable_inst_interactivity``.
        enable_tracker: Masks through videos: ``model.tracker``, which is the SAM heads with a memory.
        bpe_path: The tokenizer's vocabulary; accepted so that released calls work, as it comes with a package.
        config: A preset's name or a description.
        preprocess: Default: stretch to the model's size.

    Raises:
        CheckpointError: If the file cannot be read, downloaded, or does not fit the description.
        ValueError: If ``bpe_path`` is another vocabulary than the released one.
    """
    require_released_vocabulary(bpe_path)
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
        enable_tracker=enable_tracker,
    )
    if path is not None:
        state_dict, _ = read_state_dict(path)
        load_released(model, state_dict, source=str(path))
    return _finish(model, device, eval_mode, compile)


def build_efficientsam3_image_model(
    checkpoint_path: str | Path | None = None,
    backbone_type: str | None = None,
    model_name: str | None = None,
    device: torch.device | str | None = None,
    eval_mode: bool = True,
    enable_segmentation: bool = True,
    enable_inst_interactivity: bool = False,
    enable_text_encoder: bool = True,
    compile: bool = False,
    *,
    enable_detector: bool = True,
    enable_tracker: bool = False,
    bpe_path: str | Path | None = None,
    config: Sam3Config | str = "sam3",
    preprocess: Preprocess | None = None,
) -> Sam3Image:
    """Build the image model with a student in the trunk's place.

    Example::

        model = build_efficientsam3_image_model("efficient_sam3_repvit_m.pt", "repvit", "m1.1")

    Args:
        checkpoint_path: A merged checkpoint, published or ours. None: fresh weights.
        backbone_type: ``repvit``, ``tinyvit`` or ``efficientvit``. With a file, it and ``model_name`` may be left out:
            the file says what it holds.
        model_name: The size: ``m0.9``, ``m1.1``, ``m2.3``; ``5m``, ``11m``, ``21m``; ``b0``, ``b1``, ``b2``.
        device: As for `build_sam3_image_model`, and so are the other arguments.
        eval_mode: As there.
        enable_segmentation: As there.
        enable_inst_interactivity: As there.
        enable_text_encoder: As there.
        compile: As there.
        enable_detector: As there.
        enable_tracker: As there.
        bpe_path: As there.
        config: Without a file, sizes of everything but the student. With one, the file says them.
        preprocess: As there; the record of the file, if it has one, must agree.

    Raises:
        CheckpointError: If the file cannot be read, does not fit, or holds another student or none.
        ValueError: If there is no such student, or ``bpe_path`` is another vocabulary than the released one.
        PreprocessMismatchError: If ``preprocess`` contradicts the file's record.
    """
    require_released_vocabulary(bpe_path)
    backbone = None if backbone_type is None and model_name is None else student_backbone(backbone_type, model_name)
    parts: dict[str, Any] = {
        "enable_inst_interactivity": enable_inst_interactivity,
        "enable_detector": enable_detector,
        "enable_text_encoder": enable_text_encoder,
        "enable_segmentation": enable_segmentation,
        "enable_tracker": enable_tracker,
    }
    if checkpoint_path is not None:
        model = _open_student(Path(checkpoint_path), backbone, preprocess, parts)
    elif backbone is None:
        raise ValueError("without a checkpoint, backbone_type and model_name must say which student to build")
    else:
        config = Sam3Config.preset(config) if isinstance(config, str) else config
        model = assemble_image_model(config.replace(student=StudentConfig(backbone)), preprocess, **parts)
    return _finish(model, device, eval_mode, compile)


def student_backbone(backbone_type: str | None, model_name: str | None) -> str:
    """The registered backbone for a family and a size, in any of their spellings: ``repvit`` and ``m1.1`` or ``M1_1``.

    Raises:
        ValueError: If there is none; the message lists all.
    """
    sizes = STUDENT_SIZES.get(_plain(backbone_type), {})
    wanted = _plain(model_name).removeprefix(_plain(backbone_type))
    name = next((backbone for size, backbone in sizes.items() if _plain(size) == wanted), None)
    if name is None:
        known = "; ".join(f"{kind} with {', '.join(names)}" for kind, names in STUDENT_SIZES.items())
        raise ValueError(
            f"there is no student with backbone_type={backbone_type!r} and model_name={model_name!r}; there are {known}"
        )
    return name


def _plain(name: str | None) -> str:
    return "".join(c for c in (name or "").lower() if c.isalnum())


def _open_student(path: Path, backbone: str | None, preprocess: Preprocess | None, parts: dict[str, Any]) -> Sam3Image:
    # Both need this module themselves.
    from sam3.loading import choose_preprocess
    from sam3.recognition import recognise

    checkpoint = recognise(read_checkpoint(path))
    preprocess = choose_preprocess(checkpoint, preprocess)
    student = checkpoint.config.student
    if student is None:
        raise CheckpointError(f"{path}: holds SAM 3 itself, no student: use build_sam3_image_model or sam3.load_model")
    if backbone not in (None, student.backbone):
        raise CheckpointError(f"{path}: holds the student {student.backbone!r}, not {backbone!r}")
    model = assemble_image_model(checkpoint.config, preprocess, device="meta", **parts)
    load_released(model, checkpoint.weights_for(model), checkpoint.source)
    return model


def _finish(model: Sam3Image, device: torch.device | str | None, eval_mode: bool, compile: bool) -> Sam3Image:
    """Place a model, compile its trunk if asked, and put it into the right mode."""
    model.to(find_device(device))
    if compile:
        model.backbone.vision_backbone.trunk.compile()
    if eval_mode:
        return model.eval()
    if model.has_detector:
        model.matcher = BinaryHungarianMatcherV2()
    return model.train()


def require_released_vocabulary(bpe_path: str | Path | None) -> None:
    """Check a vocabulary that a caller brings along.

    Raises:
        ValueError: If it is another than the released one.
    """
    if bpe_path is None:
        return
    if not Path(bpe_path).is_file():
        raise ValueError(f"bpe_path {bpe_path}: no such file; leave it out, the vocabulary comes with a package")
    if sha256_file(bpe_path) != _BPE_SHA256:
        raise ValueError(
            f"bpe_path {bpe_path}: not the vocabulary that SAM 3 was trained with (bpe_simple_vocab_16e6.txt.gz); "
            "leave it out, that one comes with a package"
        )


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
    with building_on(torch.device("meta" if path is not None and config.student is None else "cpu")):
        trunk = build_trunk(config)
    if path is not None:
        state_dict, _ = read_state_dict(path)
        load_trunk(trunk, config, state_dict, source=str(path))
    return trunk.to(find_device(device)).eval().requires_grad_(False)


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
