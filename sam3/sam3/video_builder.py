"""Builders of the text-prompted video model; `sam3.model_builder` exports them beside the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sam3.config import Sam3Config
from sam3.hub import download_ckpt_from_hf
from sam3.model.sam3_video_inference import Sam3VideoInference
from sam3.model.sam3_video_predictor import Sam3VideoPredictor
from sam3.model.video_config import VideoConfig
from sam3.preprocess import Preprocess


def build_sam3_video_model(
    checkpoint_path: str | Path | None = None,
    load_from_HF: bool = True,
    bpe_path: str | Path | None = None,
    has_presence_token: bool = True,
    geo_encoder_use_img_cross_attn: bool = True,
    strict_state_dict_loading: bool = True,
    apply_temporal_disambiguation: bool = True,
    device: torch.device | str | None = None,
    compile: bool = False,
    *,
    config: Sam3Config | str = "sam3",
    video_config: VideoConfig | None = None,
    preprocess: Preprocess | None = None,
    memory_dtype: torch.dtype = torch.bfloat16,
    memory: str | None = None,
) -> Sam3VideoInference:
    """Build detector and tracker, load their weights, and join them for text-prompted videos.

    A model that is loaded already needs no builder: ``Sam3VideoInference(model)``.

    Args:
        checkpoint_path: Any file that `sam3.load_model` opens and that holds detector and tracker.
        load_from_HF: Without ``checkpoint_path``, download the released file (gated; see `download_ckpt_from_hf`). If
            False and without ``checkpoint_path``, the weights are fresh.
        bpe_path: The tokenizer's vocabulary; accepted so that released calls work, as it comes with a package.
        has_presence_token: Multiply scores by the probability that the text is on the frame at all.
        geo_encoder_use_img_cross_attn: Accepted and of no effect, as in the released builder.
        strict_state_dict_loading: Accepted; loading is always strict.
        apply_temporal_disambiguation: Memory selection, the probation of new objects and their renewal. False is the
            released ablation without all three.
        device: Default: CUDA where there is one, else the CPU.
        compile: Compile the trunk with ``torch.compile`` (takes effect at its first call).
        config: Without a file, sizes: a preset's name or a description.
        video_config: Constants of the rules; default: the released ones, by ``apply_temporal_disambiguation``.
        preprocess: As for `sam3.load_model`.
        memory_dtype: Spatial memories are stored in it; bfloat16 as released.
        memory: As for `sam3.load_model`.

    Raises:
        CheckpointError: If the file cannot be read, downloaded, or does not fit.
        ValueError: If the file lacks detector or tracker, or ``bpe_path`` is another vocabulary than the released one.
    """
    # Both need this module themselves.
    from sam3.loading import load_model
    from sam3.model_builder import build_sam3_image_model, require_released_vocabulary

    require_released_vocabulary(bpe_path)
    if checkpoint_path is None and load_from_HF:
        checkpoint_path = download_ckpt_from_hf()
    if checkpoint_path is not None:
        model = load_model(checkpoint_path, device, preprocess=preprocess, memory=memory)
        if compile:
            model.backbone.vision_backbone.trunk.compile()
    else:
        model = build_sam3_image_model(
            load_from_HF=False,
            device=device,
            enable_tracker=True,
            compile=compile,
            config=config,
            preprocess=preprocess,
        )
    if video_config is None:
        released = VideoConfig if apply_temporal_disambiguation else VideoConfig.without_temporal_disambiguation
        video_config = released()
    if not has_presence_token:
        video_config = video_config.replace(use_presence=False)
    settings = model.tracker.settings.replace(use_memory_selection=apply_temporal_disambiguation)
    return Sam3VideoInference(model, video_config, tracker_settings=settings, memory_dtype=memory_dtype)


def build_sam3_video_predictor(
    *model_args: Any, gpus_to_use: Sequence[int] | None = None, **model_kwargs: Any
) -> Sam3VideoPredictor:
    """Sessions on a model of their own; see `Sam3VideoPredictor`.

    Args:
        *model_args: Those of `build_sam3_video_model`.
        gpus_to_use: None, or one CUDA device to build on. (The released predictor spreads a video over several; results
            are those of one.)
        **model_kwargs: Those of `build_sam3_video_model`.

    Raises:
        ValueError: If ``gpus_to_use`` names several.
        CheckpointError: As there.
    """
    if gpus_to_use is not None:
        if len(gpus_to_use) != 1:
            raise ValueError(f"gpus_to_use {list(gpus_to_use)}: a predictor runs on one device; build one for each GPU")
        model_kwargs.setdefault("device", f"cuda:{gpus_to_use[0]}")
    return Sam3VideoPredictor(build_sam3_video_model(*model_args, **model_kwargs))
