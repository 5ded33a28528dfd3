"""The map to Hugging Face's names: every released key, both directions, without a model, file or GPU of ours."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from sam3.checkpoint_keys import UnknownLayoutError
from sam3.hf_keys import (
    POINT_PROJECTIONS,
    hf_class,
    is_hf_layout,
    is_in_hf,
    released_from_hf,
    released_to_hf,
    to_video_names,
)

# Of sorted lines: number and SHA-256. The facts come from listings of the released file and of transformers 5.23.
RELEASED = (1427, "481a4030c4cc5521cd05e7cb9d6cae399110d71421e2c2210700004edaa53bd2")
"""``key (shape)`` of all released keys but for 32 rotary tables and 6 point projections."""
PAIRS = (1800, "cb1e90291fdb9c167a924f83a3ff654463e2094aec9fc5d5b48e84656b47118a")
"""``released key -> Hugging Face key``, a line for each pair."""
KEYS_OF_CLASS = {"Sam3VideoModel": 1797, "Sam3Model": 1468, "Sam3TrackerVideoModel": 845, "Sam3TrackerModel": 685}
RELEASED_KEYS_OF_CLASS = {
    "Sam3VideoModel": 1427,
    "Sam3Model": 1096,
    "Sam3TrackerVideoModel": 719,
    "Sam3TrackerModel": 559,
}
TRUNK, HF_TRUNK = "detector.backbone.vision_backbone.trunk.", "detector_model.vision_encoder.backbone."


def digest(lines: list[str]) -> tuple[int, str]:
    return len(lines), hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


@pytest.fixture(scope="module")
def hf_states() -> dict[str, dict[str, Tensor]]:
    """The state dicts of all four classes at full size, on the meta device."""
    transformers = pytest.importorskip("transformers")
    states = {}
    with torch.device("meta"):
        for name in KEYS_OF_CLASS:
            model_class = getattr(transformers, name)
            states[name] = dict(model_class(model_class.config_class()).state_dict())
    return states


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def test_all_keys_of_the_video_model_give_the_released_ones(hf_states) -> None:
    released = released_from_hf(hf_states["Sam3VideoModel"])
    assert digest([f"{key} {shape}" for key, shape in shapes(released).items()]) == RELEASED
    assert shapes(released_to_hf(released)) == shapes(hf_states["Sam3VideoModel"])


def test_each_key_gets_its_partner(hf_states) -> None:
    """One key at a time, so that no two keys of the same shape can be swapped."""
    video = hf_states["Sam3VideoModel"]
    released = released_from_hf(video)
    pairs = []
    for key, value in released.items():
        if "point_embeddings" in key:
            pairs.append(f"{key} -> tracker_model.prompt_encoder.point_embed.weight")
        else:
            pairs += [f"{key} -> {name}" for name in released_to_hf({key: value})]
    assert digest(pairs) == PAIRS


@pytest.mark.parametrize("name", KEYS_OF_CLASS)
def test_the_other_classes_are_views_of_the_video_model(hf_states, name: str) -> None:
    state = hf_states[name]
    assert len(state) == KEYS_OF_CLASS[name]
    assert hf_class(state) == name.replace("TrackerVideo", "Tracker")
    assert set(to_video_names(state)) <= set(hf_states["Sam3VideoModel"])
    released = shapes(released_from_hf(state))
    assert len(released) == RELEASED_KEYS_OF_CLASS[name]
    assert released.items() <= shapes(released_from_hf(hf_states["Sam3VideoModel"])).items()


def numbered(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


def test_what_each_kind_of_rule_does_to_the_numbers() -> None:
    released = {
        TRUNK + "blocks.3.attn.qkv.weight": numbered(6, 4),
        TRUNK + "blocks.3.attn.qkv.bias": numbered(6),
        TRUNK + "pos_embed": numbered(1, 5, 2),
        "detector.backbone.language_backbone.encoder.text_projection": numbered(4, 3),
        "detector.transformer.decoder.layers.2.ca_text.in_proj_bias": numbered(9),
        "detector.transformer.decoder.layers.2.ca_text.out_proj.weight": numbered(3, 3),
        **{f"tracker.sam_prompt_encoder.point_embeddings.{i}.weight": numbered(1, 2) + 10 * i for i in (0, 1, 2, 3)},
        "tracker.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": numbered(2, 3),
        "tracker.maskmem_backbone.fuser.layers.1.gamma": numbered(5),
    }
    hf = released_to_hf(released)
    attention = HF_TRUNK + "layers.3.attention."
    for index, letter in enumerate("qkv"):
        assert torch.equal(hf[f"{attention}{letter}_proj.weight"], numbered(6, 4)[2 * index : 2 * index + 2])
        assert torch.equal(
            hf[f"detector_model.detr_decoder.layers.2.text_cross_attn.{letter}_proj.bias"],
            numbered(9)[3 * index : 3 * index + 3],
        )
    assert torch.equal(hf[HF_TRUNK + "embeddings.position_embeddings"], numbered(1, 5, 2)[:, 1:])
    assert torch.equal(hf["detector_model.text_encoder.text_projection.weight"], numbered(4, 3).T)
    assert hf["tracker_model.prompt_encoder.point_embed.weight"].tolist() == [[0, 1], [10, 11], [20, 21], [30, 31]]
    twins = [key for key in hf if key.endswith("positional_embedding")]
    assert len(twins) == 2
    assert torch.equal(hf["tracker_model.memory_encoder.memory_fuser.layers.1.scale"], numbered(5))
    assert len(hf) == 6 + 1 + 1 + 3 + 1 + 1 + 2 + 1

    back = released_from_hf(hf)
    assert back.keys() == released.keys()
    expected = dict(released)
    expected[TRUNK + "pos_embed"] = torch.cat([torch.zeros(1, 1, 2), numbered(1, 5, 2)[:, 1:]], dim=1)
    for key, value in expected.items():
        assert torch.equal(back[key], value), key
    for twin in twins:  # either of them is enough
        alone = released_from_hf({twin: hf[twin]})
        assert list(alone) == ["tracker.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"]


def test_what_is_lost_is_listed() -> None:
    assert len(POINT_PROJECTIONS) == 6
    lost = {key: torch.zeros(2, 2) for key in (*POINT_PROJECTIONS, TRUNK + "blocks.0.attn.freqs_cis")}
    assert not any(is_in_hf(key) for key in lost)
    assert released_to_hf(lost) == {}
    assert is_in_hf(TRUNK + "pos_embed")


BAD = {
    "a key of nobody": ({"detector_model.novelty": numbered(1)}, r"no rule for the key 'detector_model\.novelty'"),
    "a leaf of nobody": ({HF_TRUNK + "layer_norm.scale": numbered(1)}, "no rule for the key"),
    "keys missing": ({HF_TRUNK + "layers.0.attention.q_proj.bias": numbered(2)}, r"k_proj\.bias' is missing beside"),
    "values missing": (
        {HF_TRUNK + f"layers.0.attention.{x}_proj.bias": numbered(2) for x in "qk"},
        r"v_proj\.bias' is missing beside",
    ),
    "another shape": (
        {HF_TRUNK + f"layers.0.attention.{x}_proj.bias": numbered(i + 1) for i, x in enumerate("qkv")},
        "differ in shape",
    ),
    "a flat position table": ({HF_TRUNK + "embeddings.position_embeddings": numbered(4)}, r"has shape \(4,\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_their_layout(name: str) -> None:
    state, message = BAD[name]
    assert is_hf_layout(state)
    with pytest.raises(UnknownLayoutError, match=message):
        released_from_hf(state)


def test_what_does_not_fit_the_released_layout() -> None:
    student = TRUNK + "model.backbone.model.stem.weight"
    for state, message in (
        ({student: numbered(2)}, "no rule for the key"),
        ({TRUNK + "blocks.0.attn.qkv.bias": numbered(4)}, r"of shape \(4,\) is not queries, keys and values"),
        ({"tracker.sam_prompt_encoder.point_embeddings.2.weight": numbered(1, 2)}, r"consecutive rows from 0.*\[2\]"),
    ):
        with pytest.raises(UnknownLayoutError, match=message):
            released_to_hf(state)
    assert not is_hf_layout({student: 0, "tracker.no_mem_embed": 0})
