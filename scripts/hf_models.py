"""Hugging Face's SAM 3 in the size of one of our models and with its weights, as an independent implementation.

What measurements and parity tests compare with. Needs the ``transformers`` package.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sam3.config import Sam3Config
from sam3.hf_keys import released_to_hf
from sam3.model.sam3_image import Sam3Image
from sam3.released_names import released_state_dict

_DETECTOR = "detector_model."
_TRACKER_VIEW = {
    "tracker_model.": "",
    "tracker_neck.": "vision_encoder.neck.",
    "detector_model.vision_encoder.backbone.": "vision_encoder.backbone.",
}
"""Beginnings of names in their whole video model -> in their tracker."""
# Their default is 1e-6; the original's is 1e-5.
_NORMS: dict[str, Any] = {"layer_norm_eps": 1e-5}


def hf_vision_config(config: Sam3Config) -> Any:
    """Configuration of their vision encoder (trunk and detector neck)."""
    import transformers

    trunk, grid = config.trunk, config.grid_size
    backbone = transformers.Sam3ViTConfig(
        hidden_size=trunk.embed_dim,
        intermediate_size=trunk.mlp_dim,
        num_hidden_layers=trunk.depth,
        num_attention_heads=trunk.num_heads,
        image_size=config.image_size_px,
        patch_size=trunk.patch_size_px,
        window_size=trunk.window_size,
        global_attn_indexes=list(trunk.global_blocks),
        pretrain_image_size=trunk.pretrain_img_size_px,
        **_NORMS,
    )
    return transformers.Sam3VisionConfig(
        backbone_config=backbone,
        fpn_hidden_size=config.hidden_dim,
        backbone_feature_sizes=[[grid * 4] * 2, [grid * 2] * 2, [grid] * 2],
        **_NORMS,
    )


def hf_image_config(config: Sam3Config) -> Any:
    """Configuration of their whole image model."""
    import transformers

    def transformer(part: Any, **more: Any) -> dict[str, Any]:
        sizes = {"num_layers": part.num_layers, "num_attention_heads": part.num_heads}
        return {"hidden_size": config.hidden_dim, "intermediate_size": part.mlp_dim, **sizes, **_NORMS, **more}

    text = config.text
    return transformers.Sam3Config(
        vision_config=hf_vision_config(config),
        text_config={
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "intermediate_size": int(text.width * text.mlp_ratio),
            "num_hidden_layers": text.depth,
            "num_attention_heads": text.num_heads,
            "max_position_embeddings": text.context_length,
            "projection_dim": text.projection_dim,
            "hidden_act": "gelu",
            **_NORMS,
        },
        geometry_encoder_config=transformer(config.geometry_encoder, roi_size=config.geometry_encoder.roi_size),
        detr_encoder_config=transformer(config.fusion_encoder),
        detr_decoder_config=transformer(config.decoder, num_queries=config.decoder.num_queries),
        mask_decoder_config={
            "hidden_size": config.hidden_dim,
            "num_attention_heads": config.segmentation_head.num_heads,
            **_NORMS,
        },
    )


def build_hf_image_model(model: Sam3Image) -> nn.Module:
    """Their image model in eval mode over the very tensors of ours, which may not be copied."""
    import transformers

    weights = released_to_hf(released_state_dict(model))
    with torch.device(model.device):
        hf = transformers.Sam3Model(hf_image_config(model.config))
    own = {key.removeprefix(_DETECTOR): value for key, value in weights.items() if key.startswith(_DETECTOR)}
    hf.load_state_dict(own, assign=True)
    return hf.eval()


def hf_tracker_video_config(config: Sam3Config) -> Any:
    """Configuration of their tracker with its memory.

    Raises:
        ValueError: If the mask channels are not 4, 16, 64, ...: theirs always grow by 4.
    """
    import transformers

    dim, heads, tracker = config.hidden_dim, config.sam_heads, config.tracker
    channels, attention = tracker.memory_encoder.mask_channels, tracker.memory_attention
    if channels != tuple(4 ** (i + 1) for i in range(len(channels))):
        raise ValueError(f"Hugging Face's memory encoder has no place for mask_channels {channels}")
    image_size: dict[str, Any] = {"image_size": config.image_size_px}  # not among their declared arguments
    return transformers.Sam3TrackerVideoConfig(
        **image_size,
        vision_config=hf_vision_config(config),
        prompt_encoder_config={
            "hidden_size": dim,
            "image_size": config.image_size_px,
            "patch_size": config.trunk.patch_size_px,
            "mask_input_channels": heads.mask_in_channels,
        },
        mask_decoder_config={
            "hidden_size": dim,
            "mlp_dim": heads.transformer_mlp_dim,
            "num_hidden_layers": heads.transformer_depth,
            "num_attention_heads": heads.transformer_num_heads,
            "attention_downsample_rate": heads.attention_downsample_rate,
            "iou_head_depth": heads.head_depth,
            "iou_head_hidden_dim": heads.head_hidden_dim,
        },
        num_maskmem=tracker.num_maskmem,
        max_cond_frame_num=tracker.max_cond_frames_in_attn,
        max_object_pointers_in_encoder=tracker.max_obj_ptrs_in_encoder,
        memory_attention_hidden_size=dim,
        memory_attention_num_layers=attention.num_layers,
        memory_attention_num_attention_heads=attention.num_heads,
        memory_attention_feed_forward_hidden_size=attention.mlp_dim,
        memory_attention_rope_feat_sizes=[config.grid_size] * 2,
        memory_encoder_hidden_size=dim,
        memory_encoder_output_channels=tracker.mem_dim,
        mask_downsampler_embed_dim=dim,
        mask_downsampler_total_stride=2 ** len(channels),
        memory_fuser_num_layers=tracker.memory_encoder.fuser_layers,
        memory_fuser_embed_dim=dim,
        memory_fuser_intermediate_dim=dim * tracker.memory_encoder.fuser_expansion,
    )


def build_hf_tracker_video_model(model: Sam3Image) -> nn.Module:
    """Their tracker in eval mode over the very tensors of ours, which may not be copied."""
    import transformers

    config = model.config
    with torch.device(model.device):
        hf: Any = transformers.Sam3TrackerVideoModel(hf_tracker_video_config(config))
        for layer in hf.memory_attention.layers:  # made for memories of 64 channels, whatever the configuration says
            layer.cross_attn_image.k_proj = nn.Linear(config.tracker.mem_dim, config.hidden_dim)
            layer.cross_attn_image.v_proj = nn.Linear(config.tracker.mem_dim, config.hidden_dim)
    own = {}
    for key, value in released_to_hf(released_state_dict(model)).items():
        for prefix, replacement in _TRACKER_VIEW.items():
            if key.startswith(prefix):
                own[replacement + key.removeprefix(prefix)] = value
    hf.load_state_dict(own, assign=True)
    return hf.eval()
