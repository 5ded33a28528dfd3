"""Names, shapes and parameter counts of the released model, embedded as counts and hashes."""

from __future__ import annotations

import hashlib

import pytest
import torch

from sam3.config import Sam3Config
from sam3.model.data_misc import FindStage
from sam3.model.sam3_image import Sam3Image
from sam3.model_builder import assemble_image_model, build_trunk
from sam3.released_counts import TOTAL, compare_built
from sam3.released_names import from_released, released_state_dict

VISION = "detector.backbone.vision_backbone."
# Of sorted lines "key (shape)" of the released file: number of keys, parameters, SHA-256.
GROUPS = {
    VISION + "trunk.": (420, 446_237_696, "360193c3965cd95c6332fefc73fd653935afa8a85944717cdff9d800932b68ab"),
    VISION + "convs.": (22, 7_802_112, "cc93869f19ef3018411ac5f54482e78b08eb410dd79505fe1455301ad5d4e19a"),
    VISION + "sam2_convs.": (22, 7_802_112, "522702801b04554b4142be8be28a1d2a239716bd112839499ab020e15a5b3ccf"),
    "detector.backbone.language_backbone.": (
        295,
        353_724_672,
        "b24e329fc3fff47ed28eb333c0871f35661bae6f0224848285065c40752bccc5",
    ),
    "detector.geometry_encoder.": (76, 8_215_808, "5874fa4439343246fbfdc773b933f1de42b1f24a9fd117005dc86c3daa38db6f"),
    "detector.transformer.encoder.": (
        108,
        9_472_512,
        "fab52b0d232258b3e4dcdc5fad7660dddef81854ec4d8045d4b735261f08f61b",
    ),
    "detector.transformer.decoder.": (
        175,
        11_575_093,
        "3986a5c82e87f275969939ae8d699a43a455990a6e5d1fd6a56c09d4b6338abd",
    ),
    "detector.segmentation_head.": (28, 2_298_881, "d0933bf552a1a37412da053e391728670eaf2c1c454233e63efbeec22d79d156"),
    "detector.dot_prod_scoring.": (10, 1_182_976, "0827f0ff3996c0baa1888b401923ce95f17e2fe7595649b6a512a800a6102313"),
    "tracker.": (309, 11_743_362, "7c451572439e76729dc1b36134693c9b78905735c39b00c72b18fecf8a89875a"),
}


@pytest.fixture(scope="module")
def released_model() -> Sam3Image:
    return assemble_image_model(Sam3Config(), device="meta", enable_tracker=True)


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
    assert len(keys) == 1465
    assert all(key.startswith(tuple(GROUPS)) for key in keys)


def test_parameter_counts(released_model: Sam3Image) -> None:
    vision = released_model.backbone.vision_backbone
    assert sum(p.numel() for p in vision.trunk.parameters()) == 446_237_696
    assert sum(p.numel() for p in vision.convs.parameters()) == 7_802_112
    assert sum(p.numel() for p in vision.sam2_convs.parameters()) == 7_802_112
    assert sum(p.numel() for p in vision.parameters()) == 461_841_920
    assert sum(p.numel() for p in released_model.backbone.language_backbone.parameters()) == 353_724_672
    heads = sum(p.numel() for p in released_model.heads.parameters())
    total = sum(p.numel() for p in released_model.parameters())
    assert total - heads == 848_311_862  # the published "848M": the detector
    assert heads == 11_743_362
    assert total == TOTAL == 860_055_224
    assert all(expected == built for expected, built in compare_built(released_model).values())


@pytest.mark.parametrize(
    ("switches", "num_parameters", "num_keys"),
    [
        ({}, 840_509_750, 1134),
        ({"enable_segmentation": False}, 838_210_869, 1106),
        ({"enable_text_encoder": False}, 486_785_078, 839),
        ({"enable_detector": False}, 454_039_808, 442),
    ],
    ids=["image", "no masks", "no text", "encoder"],
)
def test_parameter_counts_of_models_without_some_parts(switches: dict, num_parameters: int, num_keys: int) -> None:
    model = assemble_image_model(Sam3Config(), device="meta", **switches)
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    assert len(released_state_dict(model)) == num_keys


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


def test_shapes_of_results_at_1008_px(released_model: Sam3Image) -> None:
    with torch.no_grad(), torch.device("meta"):
        backbone_out = released_model.backbone.forward_image(torch.empty(1, 3, 1008, 1008))
        text = {"language_features": torch.empty(32, 2, 256), "language_mask": torch.zeros(2, 32, dtype=torch.bool)}
        out = released_model.eval().forward_grounding(backbone_out | text, FindStage.of([0, 0], [0, 1]))
    expected = {
        "pred_logits": (2, 200, 1),
        "pred_boxes": (2, 200, 4),
        "presence_logit_dec": (2, 1),
        "pred_masks": (2, 200, 288, 288),
        "semantic_seg": (2, 1, 288, 288),
        "encoder_hidden_states": (5184, 2, 256),
    }
    assert {key: tuple(out[key].shape) for key in expected} == expected


def test_released_names_and_back(released_model: Sam3Image) -> None:
    own = released_model.state_dict()
    assert from_released(released_state_dict(released_model), released_model.config).keys() == own.keys()


def test_without_interactivity_there_is_neither_twin_neck_nor_heads() -> None:
    model = assemble_image_model(Sam3Config.preset("tiny"), enable_inst_interactivity=False, device="meta")
    assert not any("sam2_convs" in key or "inst_interactive" in key for key in model.state_dict())
    with pytest.raises(ValueError, match="enable_inst_interactivity=True"):
        _ = model.heads


def test_tiny_preset_has_the_topology_of_the_released_model(released_model: Sam3Image) -> None:
    """Same names up to the depth of the transformers, so what runs on `tiny` is what `sam3` runs."""
    tiny = assemble_image_model(Sam3Config.preset("tiny"), device="meta", enable_tracker=True)
    config = tiny.config
    depths = {
        ".trunk.blocks.": config.trunk.depth,
        ".resblocks.": config.text.depth,
        "geometry_encoder.encode.": config.geometry_encoder.num_layers,
        "transformer.encoder.layers.": config.fusion_encoder.num_layers,
        "transformer.decoder.layers.": config.decoder.num_layers,
        "model.transformer.encoder.layers.": config.tracker.memory_attention.num_layers,
    }

    def is_deeper(key: str) -> bool:
        return any(mark in key and int(key.split(mark)[1].split(".")[0]) >= n for mark, n in depths.items())

    expected = {key for key in released_model.state_dict() if not is_deeper(key)}
    assert set(tiny.state_dict()) == expected
    assert build_trunk(config).state_dict().keys() == {
        k.removeprefix("backbone.vision_backbone.trunk.") for k in expected if ".trunk." in k
    }
