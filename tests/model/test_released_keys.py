"""Names, shapes and parameter counts of the released model, embedded as counts and hashes."""

from __future__ import annotations

import hashlib

import pytest
import torch

from sam3.config import Sam3Config
from sam3.model.sam3_image import Sam3Image
from sam3.model_builder import assemble_image_model, build_trunk
from sam3.released_names import UNBUILT_PARTS, from_released, released_state_dict

VISION = "detector.backbone.vision_backbone."
# Of sorted lines "key (shape)" of the released file: number of keys, parameters, SHA-256.
GROUPS = {
    VISION + "trunk.": (420, 446_237_696, "360193c3965cd95c6332fefc73fd653935afa8a85944717cdff9d800932b68ab"),
    VISION + "convs.": (22, 7_802_112, "cc93869f19ef3018411ac5f54482e78b08eb410dd79505fe1455301ad5d4e19a"),
    VISION + "sam2_convs.": (22, 7_802_112, "522702801b04554b4142be8be28a1d2a239716bd112839499ab020e15a5b3ccf"),
    "tracker.sam_prompt_encoder.": (17, 6_220, "3c0f6f88a5843acd25d51b7c1df9c53265e3cef710b5da9b5a46617940dcc40f"),
    "tracker.sam_mask_decoder.": (131, 4_215_109, "fa788ab4e4b0819cf402db3ed69b1c70f480b9eef6cbfb0c72270acef84b907c"),
    "tracker.no_mem_embed": (1, 256, "dd78fcfbfd9374948b4cc9dfc18224bd58c398560c95f5203ca7a19a5c9f3e85"),
}


@pytest.fixture(scope="module")
def released_model() -> Sam3Image:
    return assemble_image_model(Sam3Config(), enable_inst_interactivity=True, device="meta")


def _hash(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


@pytest.mark.parametrize("prefix", GROUPS)
def test_keys_and_shapes_are_those_of_the_released_file(released_model: Sam3Image, prefix: str) -> None:
    group = {k: v for k, v in released_state_dict(released_model).items() if k.startswith(prefix)}
    num_keys, num_parameters, digest = GROUPS[prefix]
    assert len(group) == num_keys
    parameters = {k: v for k, v in group.items() if not k.endswith(("freqs_cis", "gaussian_matrix"))}
    assert sum(v.numel() for v in parameters.values()) == num_parameters
    assert _hash([f"{key} {tuple(value.shape)}" for key, value in group.items()]) == digest


def test_nothing_else_is_built(released_model: Sam3Image) -> None:
    keys = released_state_dict(released_model)
    assert all(key.startswith(tuple(GROUPS)) for key in keys)
    assert not any(key.startswith(UNBUILT_PARTS) for key in keys)


def test_parameter_counts(released_model: Sam3Image) -> None:
    vision = released_model.backbone.vision_backbone
    assert sum(p.numel() for p in vision.trunk.parameters()) == 446_237_696
    assert sum(p.numel() for p in vision.convs.parameters()) == 7_802_112
    assert sum(p.numel() for p in vision.sam2_convs.parameters()) == 7_802_112
    assert sum(p.numel() for p in vision.parameters()) == 461_841_920


def test_rotary_tables_are_complex_and_not_buffers(released_model: Sam3Image) -> None:
    tables = {k: v for k, v in released_state_dict(released_model).items() if k.endswith("freqs_cis")}
    assert len(tables) == 32
    assert {str(v.dtype) for v in tables.values()} == {"torch.complex64"}
    whole_grid = {int(k.split(".")[5]) for k, v in tables.items() if tuple(v.shape) == (5184, 32)}
    assert whole_grid == {7, 15, 23, 31}
    assert not list(released_model.backbone.vision_backbone.trunk.buffers())


def test_shapes_of_features_at_1008_px(released_model: Sam3Image) -> None:
    images = torch.empty(2, 3, 1008, 1008, device="meta")
    assert released_model.backbone.vision_backbone.trunk(images)[0].shape == (2, 1024, 72, 72)
    out = released_model.backbone.forward_image(images)
    sides = [(2, 256, 288, 288), (2, 256, 144, 144), (2, 256, 72, 72)]
    for result in (out, out["sam2_backbone_out"]):
        assert [tuple(m.shape) for m in result["backbone_fpn"]] == sides
        assert tuple(result["vision_features"].shape) == sides[-1]
        assert tuple(result["vision_pos_enc"][2].shape) == sides[-1]


def test_released_names_and_back(released_model: Sam3Image) -> None:
    own = released_model.state_dict()
    assert from_released(released_state_dict(released_model), released_model.config).keys() == own.keys()


def test_without_interactivity_there_is_neither_twin_neck_nor_heads() -> None:
    model = assemble_image_model(Sam3Config.preset("tiny"), enable_inst_interactivity=False, device="meta")
    assert not any("sam2_convs" in key or "inst_interactive" in key for key in model.state_dict())
    with pytest.raises(ValueError, match="enable_inst_interactivity=True"):
        _ = model.heads


def test_tiny_preset_has_the_topology_of_the_released_model(released_model: Sam3Image) -> None:
    """Same names up to the depth of the trunk, so what runs on `tiny` is what `sam3` runs."""
    tiny = assemble_image_model(Sam3Config.preset("tiny"), enable_inst_interactivity=True, device="meta")
    depth = tiny.config.trunk.depth
    expected = {
        key
        for key in released_model.state_dict()
        if ".trunk.blocks." not in key or int(key.split(".trunk.blocks.")[1].split(".")[0]) < depth
    }
    assert set(tiny.state_dict()) == expected
    assert build_trunk(tiny.config).state_dict().keys() == {
        k.removeprefix("backbone.vision_backbone.trunk.") for k in expected if ".trunk." in k
    }
