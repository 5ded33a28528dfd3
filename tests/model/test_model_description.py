"""The model description: presets, plain-type round trip, and refusal of what it does not know."""

import dataclasses
import json

import pytest

from sam3.config import PRESETS, Sam3Config, StudentConfig, TrunkConfig


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_description_survives_json(name: str) -> None:
    config = Sam3Config.preset(name).replace(student=StudentConfig("repvit_m1_1", fuse_stride16=True))
    assert Sam3Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_record_of_a_version_without_the_detector_takes_its_sizes_from_the_preset() -> None:
    tiny = Sam3Config.preset("tiny").replace(student=StudentConfig("repvit_m1_1"))
    record = json.loads(json.dumps(tiny.to_dict()))
    for later in ("text", "geometry_encoder", "fusion_encoder", "decoder", "scoring", "segmentation_head"):
        del record[later]
    del record["sam_heads"]["head_depth"]
    assert Sam3Config.from_dict(record) == tiny
    record["hidden_dim"] = 32
    assert Sam3Config.from_dict(record) == tiny.replace(hidden_dim=32)
    other = Sam3Config.from_dict(record | {"name": "my own"})
    assert other.trunk == tiny.trunk and other.decoder == Sam3Config().decoder


def test_the_released_sizes() -> None:
    config = Sam3Config.preset("sam3")
    assert (config.grid_size, config.embedding_shape, config.low_res_mask_size) == (72, (1024, 72, 72), 288)
    assert config.trunk.mlp_dim == 4736


def test_tiny_keeps_the_topology_of_the_released_model() -> None:
    tiny, full = Sam3Config.preset("tiny"), Sam3Config.preset("sam3")
    assert 224 <= tiny.image_size_px <= 336
    assert tiny.grid_size % tiny.trunk.window_size == 0 and full.grid_size // full.trunk.window_size == 3
    assert tiny.neck == full.neck
    assert tiny.trunk.global_blocks[-1] == tiny.trunk.depth - 1
    assert tiny.trunk.window_size * tiny.trunk.patch_size_px == tiny.trunk.pretrain_img_size_px


def test_an_unknown_field_is_named() -> None:
    data = Sam3Config.preset("tiny").to_dict()
    data["trunk"]["num_layers"] = 3
    with pytest.raises(ValueError, match=r"model description\.trunk: unknown field 'num_layers'"):
        Sam3Config.from_dict(data)


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'sam4'.*'sam3', 'tiny'"):
        Sam3Config.preset("sam4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "embed_dim 1024 over num_heads 3"),
        ({"global_blocks": (7, 15)}, "must lie in 0..31 and hold the last block"),
        ({"pretrain_img_size_px": 337}, "337 is not a multiple of patch_size_px 14"),
    ],
)
def test_impossible_trunks_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TrunkConfig(), **changes)
