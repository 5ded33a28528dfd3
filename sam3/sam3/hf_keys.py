"""Key map between the released layout and Hugging Face's ``Sam3VideoModel`` layout, dict to dict.

Covers the parts that this version builds: trunk, both necks, prompt encoder, mask decoder. Most keys are renamed; these
change shape:

- fused queries, keys and values (``qkv``) are three tensors there;
- the trunk's position table has no row for the (never read) class token there;
- the four point embeddings are rows of one table there;
- the Fourier matrix of the prompt encoder is stored twice there; rotary tables are not stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

HF_PREFIXES = ("detector_model.", "tracker_model.", "tracker_neck.")
# Parts of the HF file that this version does not build.
HF_UNBUILT_PARTS = (
    "detector_model.text_encoder.",
    "detector_model.text_projection.",
    "detector_model.geometry_encoder.",
    "detector_model.detr_encoder.",
    "detector_model.detr_decoder.",
    "detector_model.mask_decoder.",
    "detector_model.dot_product_scoring.",
    "tracker_model.memory_temporal_positional_encoding",
    "tracker_model.no_memory_positional_encoding",
    "tracker_model.no_object_pointer",
    "tracker_model.occlusion_spatial_embedding_parameter",
    "tracker_model.mask_downsample.",
    "tracker_model.temporal_positional_encoding_projection_layer.",
    "tracker_model.object_pointer_proj.",
    "tracker_model.memory_attention.",
    "tracker_model.memory_encoder.",
)

_VISION = "detector.backbone.vision_backbone."
_TRUNK = _VISION + "trunk."
_HF_TRUNK = "detector_model.vision_encoder.backbone."
_PROMPT = "tracker.sam_prompt_encoder."
_HF_PROMPT = "tracker_model.prompt_encoder."
_DECODER = "tracker.sam_mask_decoder."
_HF_DECODER = "tracker_model.mask_decoder."

_POSITIONS = (_TRUNK + "pos_embed", _HF_TRUNK + "embeddings.position_embeddings")
_QKV = (r"(blocks)\.(\d+)\.attn\.qkv\.(\w+)", r"(layers)\.(\d+)\.attention\.q_proj\.(\w+)")
_POINTS = (_PROMPT + "point_embeddings.{}.weight", _HF_PROMPT + "point_embed.weight")
_FOURIER = (
    _PROMPT + "pe_layer.positional_encoding_gaussian_matrix",
    (_HF_PROMPT + "shared_embedding.positional_embedding", "tracker_model.shared_image_embedding.positional_embedding"),
)

# (released, HF): literal text but for "#", an index, and "*", the rest of the key, which both sides share.
_COPIES: tuple[tuple[str, str], ...] = (
    (_TRUNK + "patch_embed.proj.weight", _HF_TRUNK + "embeddings.patch_embeddings.projection.weight"),
    (_TRUNK + "ln_pre.*", _HF_TRUNK + "layer_norm.*"),
    (_TRUNK + "blocks.#.norm1.*", _HF_TRUNK + "layers.#.layer_norm1.*"),
    (_TRUNK + "blocks.#.norm2.*", _HF_TRUNK + "layers.#.layer_norm2.*"),
    (_TRUNK + "blocks.#.attn.proj.*", _HF_TRUNK + "layers.#.attention.o_proj.*"),
    (_TRUNK + "blocks.#.mlp.*", _HF_TRUNK + "layers.#.mlp.*"),
    *(
        (f"{_VISION}{neck}.#.{ours}.*", f"{hf_neck}.fpn_layers.#.{theirs}.*")
        for neck, hf_neck in (("convs", "detector_model.vision_encoder.neck"), ("sam2_convs", "tracker_neck"))
        for ours, theirs in (("conv_1x1", "proj1"), ("conv_3x3", "proj2"))
    ),
    *(
        (f"{_VISION}{neck}.{level}.{ours}.*", f"{hf_neck}.fpn_layers.{level}.scale_layers.{theirs}.*")
        for neck, hf_neck in (("convs", "detector_model.vision_encoder.neck"), ("sam2_convs", "tracker_neck"))
        for level, ours, theirs in ((0, "dconv_2x2_0", 0), (0, "dconv_2x2_1", 2), (1, "dconv_2x2", 0))
    ),
    ("tracker.no_mem_embed", "tracker_model.no_memory_embedding"),
    (_PROMPT + "not_a_point_embed.*", _HF_PROMPT + "not_a_point_embed.*"),
    (_PROMPT + "no_mask_embed.*", _HF_PROMPT + "no_mask_embed.*"),
    (_PROMPT + "mask_downscaling.0.*", _HF_PROMPT + "mask_embed.conv1.*"),
    (_PROMPT + "mask_downscaling.1.*", _HF_PROMPT + "mask_embed.layer_norm1.*"),
    (_PROMPT + "mask_downscaling.3.*", _HF_PROMPT + "mask_embed.conv2.*"),
    (_PROMPT + "mask_downscaling.4.*", _HF_PROMPT + "mask_embed.layer_norm2.*"),
    (_PROMPT + "mask_downscaling.6.*", _HF_PROMPT + "mask_embed.conv3.*"),
    *(
        (f"{_DECODER}transformer.{block}.out_proj.*", f"{_HF_DECODER}transformer.{block}.o_proj.*")
        for block in (
            "layers.#.self_attn",
            "layers.#.cross_attn_token_to_image",
            "layers.#.cross_attn_image_to_token",
            "final_attn_token_to_image",
        )
    ),
    *(
        (f"{_DECODER}transformer.layers.#.norm{i}.*", f"{_HF_DECODER}transformer.layers.#.layer_norm{i}.*")
        for i in (1, 2, 3, 4)
    ),
    (_DECODER + "transformer.layers.#.mlp.lin1.*", _HF_DECODER + "transformer.layers.#.mlp.proj_in.*"),
    (_DECODER + "transformer.layers.#.mlp.lin2.*", _HF_DECODER + "transformer.layers.#.mlp.proj_out.*"),
    (_DECODER + "transformer.norm_final_attn.*", _HF_DECODER + "transformer.layer_norm_final_attn.*"),
    (_DECODER + "output_upscaling.0.*", _HF_DECODER + "upscale_conv1.*"),
    (_DECODER + "output_upscaling.1.*", _HF_DECODER + "upscale_layer_norm.*"),
    (_DECODER + "output_upscaling.3.*", _HF_DECODER + "upscale_conv2.*"),
    *(
        (f"{_DECODER}{mlp}.layers.{ours}.*", f"{_HF_DECODER}{mlp}.{theirs}.*")
        for mlp in ("output_hypernetworks_mlps.#", "iou_prediction_head", "pred_obj_score_head")
        for ours, theirs in (("0", "proj_in"), ("1", "layers.0"), ("2", "proj_out"))
    ),
    # What is left of the decoder has the same names: q, k and v projections, tokens, skip convolutions.
    (_DECODER + "*", _HF_DECODER + "*"),
)


def is_hf_layout(keys: Mapping[str, object]) -> bool:
    """Whether these are the keys of a Hugging Face file."""
    return any(key.startswith(HF_PREFIXES) for key in keys)


def released_to_hf(released: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Released names -> HF names for the parts that this version builds.

    Raises:
        KeyError: If a key belongs to none of them.
    """
    renamed: dict[str, Tensor] = {}
    point_rows: dict[str, Tensor] = {}
    for key, value in released.items():
        qkv = re.fullmatch(re.escape(_TRUNK) + _QKV[0], key)
        if key.endswith(".freqs_cis"):
            continue
        if key == _POSITIONS[0]:
            renamed[_POSITIONS[1]] = value[:, 1:]
        elif qkv:
            for name, part in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{_HF_TRUNK}layers.{qkv[2]}.attention.{name}_proj.{qkv[3]}"] = part
        elif key.startswith(_POINTS[0].split("{}")[0]):
            point_rows[key] = value
        elif key == _FOURIER[0]:
            renamed.update(dict.fromkeys(_FOURIER[1], value))
        else:
            renamed[_rename(key, _COPIES)] = value
    if point_rows:
        renamed[_POINTS[1]] = torch.cat([point_rows[_POINTS[0].format(i)] for i in range(len(point_rows))])
    return renamed


def released_from_hf(hf: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """HF names -> released names; `HF_UNBUILT_PARTS` are left out.

    Raises:
        KeyError: If a key belongs to no known part; or if a tensor that is stored in pieces is incomplete.
    """
    inverse = tuple((theirs, ours) for ours, theirs in _COPIES)
    renamed: dict[str, Tensor] = {}
    for key, value in hf.items():
        q = re.fullmatch(re.escape(_HF_TRUNK) + _QKV[1], key)
        if key.startswith(HF_UNBUILT_PARTS) or key == _FOURIER[1][1]:
            continue
        if key == _POSITIONS[1]:
            renamed[_POSITIONS[0]] = torch.cat([torch.zeros_like(value[:, :1]), value], dim=1)
        elif q:
            parts = [hf[key.replace("q_proj", f"{name}_proj")] for name in "qkv"]
            renamed[f"{_TRUNK}blocks.{q[2]}.attn.qkv.{q[3]}"] = torch.cat(parts)
        elif key.startswith(_HF_TRUNK) and re.search(r"\.attention\.[kv]_proj\.", key):
            continue  # taken together with q_proj
        elif key == _POINTS[1]:
            renamed.update({_POINTS[0].format(i): row[None] for i, row in enumerate(value)})
        elif key == _FOURIER[1][0]:
            renamed[_FOURIER[0]] = value
        else:
            renamed[_rename(key, inverse)] = value
    return renamed


def _rename(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for old, new in rules:
        match = re.fullmatch(re.escape(old).replace(r"\#", r"(?P<index>\d+)").replace(r"\*", r"(?P<rest>.+)"), key)
        if match:
            groups = match.groupdict()
            return new.replace("#", groups.get("index", "")).replace("*", groups.get("rest", ""))
    raise KeyError(f"no rule for the key {key!r}")
