"""The table between the released layout and Hugging Face's ``Sam3VideoModel`` layout; `sam3.hf_keys` applies it.

Checked against transformers 5.23: the 1,465 released keys give exactly the 1,797 keys of ``Sam3VideoModel``. Both
columns are literal text but for ``#``, an index, ``*``, which is ``weight`` or ``bias``, and ``%``: ``q``, ``k`` and
``v`` in turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

_MARKS = {"#": r"(?P<index>\d+)", "*": r"(?P<leaf>weight|bias)", "%": "(?P<qkv>[qkv])"}


class Op(Enum):
    """How a tensor changes on its way to Hugging Face."""

    COPY = "same tensor, new name"
    SPLIT = "queries, keys and values, fused here along the first dimension, are three tensors there"
    TRANSPOSE = "a matrix applied from the right here is a Linear's weight there"
    NO_CLASS_TOKEN = "the position table loses the first row, which belongs to a class token that is never read"
    ROWS = "tables of one row each are the rows of one table, in index order"
    TWICE = "stored under two names"


@dataclass(frozen=True)
class Rule:
    """One line of the table, with the section's prefixes."""

    released: str
    hf: str
    op: Op = Op.COPY
    hf_again: str = ""
    """The second name of `Op.TWICE`."""
    released_regex: re.Pattern[str] = field(init=False, repr=False, compare=False)
    hf_regex: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "released_regex", _regex(self.released))
        object.__setattr__(self, "hf_regex", _regex(self.hf))


@dataclass(frozen=True)
class Section:
    """Rules whose keys share a prefix on either side."""

    released: str
    hf: str
    rules: tuple[Rule, ...]


def fill(pattern: str, match: re.Match[str], **marks: str) -> str:
    """A pattern with the values that another pattern matched; ``marks`` (index, leaf, qkv) wins over them."""
    values = match.groupdict() | marks
    return (
        pattern.replace("#", values.get("index") or "")
        .replace("*", values.get("leaf") or "")
        .replace("%", values.get("qkv") or "")
    )


def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile("".join(_MARKS.get(part, re.escape(part)) for part in re.split(r"([#*%])", pattern)))


Pairs = Sequence[tuple[str, str]]


def _section(released: str, hf: str, copies: Pairs, attention: Pairs = (), rules: Sequence[Rule] = ()) -> Section:
    """A section; ``attention`` names attentions with fused weights (``in_proj_*``), whose output is renamed too."""
    made = [Rule(released + ours, hf + theirs) for ours, theirs in copies]
    for ours, theirs in attention:
        out = "out_proj" if theirs.startswith("text_model.") else "o_proj"  # CLIP's text attention keeps its name
        made.append(Rule(f"{released}{ours}.in_proj_*", f"{hf}{theirs}.%_proj.*", Op.SPLIT))
        made.append(Rule(f"{released}{ours}.out_proj.*", f"{hf}{theirs}.{out}.*"))
    return Section(released, hf, (*made, *rules))


def _same(*names: str) -> Pairs:
    return [(name, name) for name in names]


def _mlp(ours: str, theirs: str, depth: int) -> Pairs:
    """An MLP whose layers are counted from 0 here and from 1 there."""
    return [(f"{ours}.layers.{i}.*", f"{theirs}.layer{i + 1}.*") for i in range(depth)]


def _sam_mlp(ours: str, theirs: str | None = None) -> Pairs:
    """A three-layer MLP of the SAM heads or of the tracker."""
    names = ("proj_in", "layers.0", "proj_out")
    return [(f"{ours}.layers.{i}.*", f"{theirs or ours}.{name}.*") for i, name in enumerate(names)]


_VISION = "detector.backbone.vision_backbone."
_TRUNK, _HF_TRUNK = _VISION + "trunk.", "detector_model.vision_encoder.backbone."
_TEXT, _HF_TEXT = "detector.backbone.language_backbone.", "detector_model.text_"
_CLIP, _HF_CLIP = _TEXT + "encoder.", "detector_model.text_encoder."
_PROMPT, _HF_PROMPT = "tracker.sam_prompt_encoder.", "tracker_model.prompt_encoder."
_TRANSFORMER_LAYER = (("linear1.*", "mlp.fc1.*"), ("linear2.*", "mlp.fc2.*")) + tuple(
    (f"norm{i}.*", f"layer_norm{i}.*") for i in (1, 2, 3)
)
_NECK = (
    ("0.dconv_2x2_0.*", "0.scale_layers.0.*"),
    ("0.dconv_2x2_1.*", "0.scale_layers.2.*"),  # scale_layers.1 is the activation
    ("1.dconv_2x2.*", "1.scale_layers.0.*"),
    ("#.conv_1x1.*", "#.proj1.*"),
    ("#.conv_3x3.*", "#.proj2.*"),
)
_SAM_ATTENTIONS = (
    "layers.#.self_attn",
    "layers.#.cross_attn_token_to_image",
    "layers.#.cross_attn_image_to_token",
    "final_attn_token_to_image",
)


def _projections(attention: str) -> Pairs:
    """An attention with four matrices of its own on both sides."""
    same = [f"{attention}.{name}_proj.*" for name in "qkv"]
    return [*_same(*same), (f"{attention}.out_proj.*", f"{attention}.o_proj.*")]


DETECTOR_SECTIONS: tuple[Section, ...] = (
    _section(
        _TRUNK,
        _HF_TRUNK,
        [
            ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight"),
            ("ln_pre.*", "layer_norm.*"),
            ("blocks.#.norm1.*", "layers.#.layer_norm1.*"),
            ("blocks.#.norm2.*", "layers.#.layer_norm2.*"),
            ("blocks.#.attn.proj.*", "layers.#.attention.o_proj.*"),
            ("blocks.#.mlp.fc1.*", "layers.#.mlp.fc1.*"),
            ("blocks.#.mlp.fc2.*", "layers.#.mlp.fc2.*"),
        ],
        rules=[
            Rule(_TRUNK + "blocks.#.attn.qkv.*", _HF_TRUNK + "layers.#.attention.%_proj.*", Op.SPLIT),
            Rule(_TRUNK + "pos_embed", _HF_TRUNK + "embeddings.position_embeddings", Op.NO_CLASS_TOKEN),
        ],
    ),
    _section(_VISION + "convs.", "detector_model.vision_encoder.neck.fpn_layers.", _NECK),
    _section(_VISION + "sam2_convs.", "tracker_neck.fpn_layers.", _NECK),
    _section(
        _CLIP,
        _HF_CLIP,
        [
            ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
            ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
            ("ln_final.*", "text_model.final_layer_norm.*"),
            ("transformer.resblocks.#.ln_1.*", "text_model.encoder.layers.#.layer_norm1.*"),
            ("transformer.resblocks.#.ln_2.*", "text_model.encoder.layers.#.layer_norm2.*"),
            ("transformer.resblocks.#.mlp.c_fc.*", "text_model.encoder.layers.#.mlp.fc1.*"),
            ("transformer.resblocks.#.mlp.c_proj.*", "text_model.encoder.layers.#.mlp.fc2.*"),
        ],
        attention=[("transformer.resblocks.#.attn", "text_model.encoder.layers.#.self_attn")],
        rules=[Rule(_CLIP + "text_projection", _HF_CLIP + "text_projection.weight", Op.TRANSPOSE)],
    ),
    _section(_TEXT + "resizer.", "detector_model.text_projection.", _same("*")),
    _section(
        "detector.geometry_encoder.",
        "detector_model.geometry_encoder.",
        [
            *_same("label_embed.weight", "cls_embed.weight", "final_proj.*"),
            *_same("boxes_direct_project.*", "boxes_pool_project.*", "boxes_pos_enc_project.*"),
            ("norm.*", "prompt_layer_norm.*"),
            ("img_pre_norm.*", "vision_layer_norm.*"),
            ("encode_norm.*", "output_layer_norm.*"),
            *((f"encode.#.{ours}", f"layers.#.{theirs}") for ours, theirs in _TRANSFORMER_LAYER),
        ],
        attention=[
            ("encode.#.self_attn", "layers.#.self_attn"),
            ("encode.#.cross_attn_image", "layers.#.cross_attn"),
        ],
    ),
    _section(
        "detector.transformer.encoder.layers.",
        "detector_model.detr_encoder.layers.",
        [(f"#.{ours}", f"#.{theirs}") for ours, theirs in _TRANSFORMER_LAYER],
        attention=[("#.self_attn", "#.self_attn"), ("#.cross_attn_image", "#.cross_attn")],
    ),
    _section(
        "detector.transformer.decoder.",
        "detector_model.detr_decoder.",
        [
            ("layers.#.norm1.*", "layers.#.vision_cross_attn_layer_norm.*"),
            ("layers.#.norm2.*", "layers.#.self_attn_layer_norm.*"),
            ("layers.#.catext_norm.*", "layers.#.text_cross_attn_layer_norm.*"),
            ("layers.#.norm3.*", "layers.#.mlp_layer_norm.*"),
            ("layers.#.linear1.*", "layers.#.mlp.fc1.*"),
            ("layers.#.linear2.*", "layers.#.mlp.fc2.*"),
            ("norm.*", "output_layer_norm.*"),
            *_same("query_embed.weight", "reference_points.weight", "presence_token.weight"),
            ("presence_token_out_norm.*", "presence_layer_norm.*"),
            *_mlp("presence_token_head", "presence_head", 3),
            *_mlp("bbox_embed", "box_head", 3),
            *_mlp("ref_point_head", "ref_point_head", 2),
            *_mlp("boxRPB_embed_x", "box_rpb_embed_x", 2),
            *_mlp("boxRPB_embed_y", "box_rpb_embed_y", 2),
        ],
        attention=[
            ("layers.#.self_attn", "layers.#.self_attn"),
            ("layers.#.ca_text", "layers.#.text_cross_attn"),
            ("layers.#.cross_attn", "layers.#.vision_cross_attn"),
        ],
    ),
    _section(
        "detector.segmentation_head.",
        "detector_model.mask_decoder.",
        [
            *_same("pixel_decoder.conv_layers.#.*", "pixel_decoder.norms.#.*"),
            ("mask_predictor.mask_embed.layers.#.*", "mask_embedder.layers.#.*"),
            ("instance_seg_head.*", "instance_projection.*"),
            ("semantic_seg_head.*", "semantic_projection.*"),
            ("cross_attn_norm.*", "prompt_cross_attn_norm.*"),
        ],
        attention=[("cross_attend_prompt", "prompt_cross_attn")],
    ),
    _section(
        "detector.dot_prod_scoring.",
        "detector_model.dot_product_scoring.",
        [
            *_mlp("prompt_mlp", "text_mlp", 2),
            ("prompt_mlp.out_norm.*", "text_mlp_out_norm.*"),
            ("prompt_proj.*", "text_proj.*"),
            ("hs_proj.*", "query_proj.*"),
        ],
    ),
)

TRACKER_SECTIONS: tuple[Section, ...] = (
    _section(
        _PROMPT,
        _HF_PROMPT,
        [
            *_same("not_a_point_embed.weight", "no_mask_embed.weight"),
            *(
                (f"mask_downscaling.{i}.*", f"mask_embed.{name}.*")
                for i, name in ((0, "conv1"), (1, "layer_norm1"), (3, "conv2"), (4, "layer_norm2"), (6, "conv3"))
            ),
        ],
        rules=[
            Rule(_PROMPT + "point_embeddings.#.weight", _HF_PROMPT + "point_embed.weight", Op.ROWS),
            Rule(
                _PROMPT + "pe_layer.positional_encoding_gaussian_matrix",
                _HF_PROMPT + "shared_embedding.positional_embedding",
                Op.TWICE,
                "tracker_model.shared_image_embedding.positional_embedding",
            ),
        ],
    ),
    _section(
        "tracker.sam_mask_decoder.transformer.",
        "tracker_model.mask_decoder.transformer.",
        [
            *(pair for attention in _SAM_ATTENTIONS for pair in _projections(attention)),
            *((f"layers.#.norm{i}.*", f"layers.#.layer_norm{i}.*") for i in (1, 2, 3, 4)),
            ("layers.#.mlp.lin1.*", "layers.#.mlp.proj_in.*"),
            ("layers.#.mlp.lin2.*", "layers.#.mlp.proj_out.*"),
            ("norm_final_attn.*", "layer_norm_final_attn.*"),
        ],
    ),
    _section(
        "tracker.sam_mask_decoder.",
        "tracker_model.mask_decoder.",
        [
            *_same("iou_token.weight", "mask_tokens.weight", "obj_score_token.weight", "conv_s0.*", "conv_s1.*"),
            ("output_upscaling.0.*", "upscale_conv1.*"),
            ("output_upscaling.1.*", "upscale_layer_norm.*"),
            ("output_upscaling.3.*", "upscale_conv2.*"),
            *_sam_mlp("output_hypernetworks_mlps.#"),
            *_sam_mlp("iou_prediction_head"),
            *_sam_mlp("pred_obj_score_head"),
        ],
    ),
    _section(
        "tracker.transformer.encoder.",
        "tracker_model.memory_attention.",
        [
            *_projections("layers.#.self_attn"),
            *_projections("layers.#.cross_attn_image"),
            *_same("layers.#.linear1.*", "layers.#.linear2.*"),
            *((f"layers.#.norm{i}.*", f"layers.#.layer_norm{i}.*") for i in (1, 2, 3)),
            ("norm.*", "layer_norm.*"),
        ],
    ),
    _section(
        "tracker.maskmem_backbone.",
        "tracker_model.memory_encoder.",
        [
            *(
                (f"mask_downsampler.encoder.{3 * i + j}.*", f"mask_downsampler.layers.{i}.{name}.*")
                for i in range(4)
                for j, name in enumerate(("conv", "layer_norm"))
            ),
            ("mask_downsampler.encoder.12.*", "mask_downsampler.final_conv.*"),
            ("pix_feat_proj.*", "feature_projection.*"),
            ("out_proj.*", "projection.*"),
            ("fuser.layers.#.gamma", "memory_fuser.layers.#.scale"),
            ("fuser.layers.#.dwconv.*", "memory_fuser.layers.#.depthwise_conv.*"),
            ("fuser.layers.#.norm.*", "memory_fuser.layers.#.layer_norm.*"),
            ("fuser.layers.#.pwconv1.*", "memory_fuser.layers.#.pointwise_conv1.*"),
            ("fuser.layers.#.pwconv2.*", "memory_fuser.layers.#.pointwise_conv2.*"),
        ],
    ),
    _section(
        "tracker.",
        "tracker_model.",
        [
            ("maskmem_tpos_enc", "memory_temporal_positional_encoding"),
            ("no_mem_embed", "no_memory_embedding"),
            ("no_mem_pos_enc", "no_memory_positional_encoding"),
            ("no_obj_ptr", "no_object_pointer"),
            ("no_obj_embed_spatial", "occlusion_spatial_embedding_parameter"),
            ("mask_downsample.*", "mask_downsample.*"),
            ("obj_ptr_tpos_proj.*", "temporal_positional_encoding_projection_layer.*"),
            *_sam_mlp("obj_ptr_proj", "object_pointer_proj"),
        ],
    ),
)
SECTIONS = DETECTOR_SECTIONS + TRACKER_SECTIONS
"""A key belongs to the first section whose prefix it has."""
