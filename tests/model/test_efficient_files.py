"""Files with a compressed memory: both memories in one, the published layout, and what does not fit."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from checkpoint_files import TINY, make_model, whole_model, whole_weights
from safetensors.torch import save_file
from torch import Tensor

from sam3.checkpoint_io import CheckpointError, read_checkpoint, write_merged
from sam3.checkpoint_keys import EFFICIENT_PREFIX
from sam3.checkpoint_parts import EFFICIENT_MEMORY, FULL_MEMORY_PREFIXES
from sam3.config import EfficientMemoryConfig, Sam3Config
from sam3.convert import main as convert
from sam3.efficient_keys import (
    OWN_PREFIXES,
    identify_efficient_memory,
    own_weights,
    stage2_to_released,
    tracker_from_released,
    tracker_to_released,
)
from sam3.inspection import inspect_checkpoint
from sam3.loading import load_model
from sam3.model.building import building_on
from sam3.model.efficient_sam3_tracker import EfficientSam3Tracker
from sam3.model.sam3_image import Sam3Image
from sam3.model_builder import build_sam3_image_model
from sam3.recognition import recognise
from sam3.released_names import from_released, released_state_dict, to_released

COMPRESSED = TINY.with_efficient_memory()


@pytest.fixture(scope="module")
def efficient() -> Sam3Image:
    return make_model(COMPRESSED, seed=1)


def both_memories(efficient: Sam3Image) -> dict[str, Tensor]:
    return whole_weights() | own_weights(efficient.tracker.state_dict())


def write(path: Path, weights: dict[str, Tensor], config: Sam3Config | None = COMPRESSED) -> Path:
    if config is None:
        torch.save(weights, path)
    else:
        write_merged(path, weights, {"model": config.to_dict()})
    return path


def assert_same_weights(ours: Sam3Image, theirs: Sam3Image) -> None:
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in ours.state_dict().items())


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_of_a_tracker() -> None:
    names = {"mem_proj.bias": 0, "memory_attention.norm.bias": 1, "maskmem_tpos_enc": 2, "obj_ptr_proj.x": 3}
    released = {
        "efficient_tracker.mem_proj.bias": 0,
        "efficient_tracker.memory_attention.norm.bias": 1,
        "efficient_tracker.maskmem_tpos_enc": 2,
        "tracker.obj_ptr_proj.x": 3,
    }
    assert tracker_to_released(names) == released
    assert {tracker_from_released(key): value for key, value in released.items()} == names
    assert own_weights(names).keys() == {key for key in released if key.startswith(EFFICIENT_PREFIX)}
    full = {"maskmem_tpos_enc": 0, "transformer.encoder.norm.bias": 1}
    assert tracker_to_released(full) == {"tracker." + key: value for key, value in full.items()}
    with pytest.raises(CheckpointError, match="no compressed memory: none of 2 names"):
        own_weights(full)
    stage2 = names | {"backbone.vision_backbone.convs.0.x": 4}
    assert stage2_to_released(stage2) == released | {"detector.backbone.vision_backbone.convs.0.x": 4}


def test_names_of_a_model_and_back(efficient: Sam3Image) -> None:
    own = efficient.state_dict()
    released = to_released(own, COMPRESSED)
    assert from_released(released, COMPRESSED).keys() == own.keys()
    added = {key for key in released if key.startswith(EFFICIENT_PREFIX)}
    assert added == {EFFICIENT_PREFIX + k for k in efficient.tracker.state_dict() if k.startswith(OWN_PREFIXES)}
    assert not any(key.startswith(FULL_MEMORY_PREFIXES) for key in released)
    assert released.keys() - added == {k for k in whole_weights() if not k.startswith(FULL_MEMORY_PREFIXES)}


def test_sizes_from_shapes() -> None:
    for name, memory in (
        ("sam3", EfficientMemoryConfig()),
        ("sam3", EfficientMemoryConfig(num_latents=16, num_latents_2d=9, perceiver_depth=1, perceiver_heads=8)),
        ("sam3", EfficientMemoryConfig(num_latents=0, num_layers=3, mlp_dim=512)),
        ("tiny", EfficientMemoryConfig(256, 4, 3, 2, 16, 2, num_heads=4, mlp_dim=32)),
    ):
        with building_on(torch.device("meta")):
            tracker = EfficientSam3Tracker(Sam3Config.preset(name).with_efficient_memory(memory))
        assert identify_efficient_memory(own_weights(tracker.state_dict()), name) == memory


# --- one file, both memories ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_both_memories_open_from_one_file(tmp_path: Path, efficient: Sam3Image, suffix: str) -> None:
    path = write(tmp_path / f"both{suffix}", both_memories(efficient))
    for memory in (None, "efficient"):
        opened = load_model(path, memory=memory)
        assert isinstance(opened.tracker, EfficientSam3Tracker) and opened.missing_parts == ()
        assert opened.config == COMPRESSED
        for key, value in opened.tracker.state_dict().items():
            source = efficient.tracker if key.startswith(OWN_PREFIXES) else whole_model().tracker
            assert torch.equal(value, source.state_dict()[key]), key
    full = load_model(path, memory="full")
    assert full.config == TINY and full.missing_parts == ()
    assert_same_weights(full, whole_model())


def test_a_file_without_the_full_memory(tmp_path: Path, efficient: Sam3Image) -> None:
    path = write(tmp_path / "light.pt", dict(released_state_dict(efficient)))
    opened = load_model(path)
    assert isinstance(opened.tracker, EfficientSam3Tracker) and opened.missing_parts == ()
    with pytest.raises(CheckpointError, match=r"light\.pt: holds no full memory \(it holds: efficient\)"):
        load_model(path, memory="full")


def test_files_without_a_compressed_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "full.pt", whole_weights(), TINY)
    with pytest.raises(CheckpointError, match=r"full\.pt: holds no efficient memory \(it holds: full\)"):
        load_model(path, memory="efficient")
    with pytest.raises(ValueError, match="memory 'light' is not one of efficient, full"):
        load_model(path, memory="light")
    described = write(tmp_path / "lost.pt", whole_weights(), COMPRESSED)
    assert load_model(described).missing_parts == (EFFICIENT_MEMORY.name,)


def test_a_saved_model_opens(tmp_path: Path, efficient: Sam3Image, caplog: pytest.LogCaptureFixture) -> None:
    """Under the names of modules, and without a record: sizes come from the shapes, and that is said."""
    path = tmp_path / "state_dict.pt"
    torch.save(efficient.state_dict(), path)
    with caplog.at_level(logging.WARNING):
        opened = load_model(path)
    assert "does not describe its compressed memory" in caplog.text and "64 tokens of a frame" in caplog.text
    assert_same_weights(opened, efficient)


def test_released_builders_take_the_released_memory(tmp_path: Path, efficient: Sam3Image) -> None:
    path = write(tmp_path / "both.pt", both_memories(efficient))
    model = build_sam3_image_model(path, enable_tracker=True, config=TINY)
    assert torch.equal(model.tracker.maskmem_tpos_enc, whole_model().tracker.maskmem_tpos_enc)
    heads = build_sam3_image_model(path, enable_inst_interactivity=True, config=TINY)
    assert not heads.has_tracker


# --- a published stage-2 checkpoint -----------------------------------------------------------------------------------


def published_stage2() -> tuple[Sam3Image, dict[str, Tensor]]:
    """A model as the published training builds it, and its checkpoint's weights: no detector, no text encoder."""
    model = make_model(TINY.with_efficient_memory(compat="published"), seed=2, enable_detector=False)
    return model, dict(model.tracker.state_dict()) | {
        "backbone." + k: v for k, v in model.backbone.state_dict().items()
    }


def test_published_checkpoint_opens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, weights = published_stage2()
    path = tmp_path / "stage2.pt"
    torch.save({"model": {"module." + k: v for k, v in weights.items()}, "epoch": 3, "loss": 0.5}, path)
    with caplog.at_level(logging.WARNING):
        opened = load_model(path)
    assert "the rules of the published code" in caplog.text and "320 tokens" in caplog.text
    assert opened.config == model.config and not opened.has_detector
    assert_same_weights(opened, model)
    assert inspect_checkpoint(path).layout == "stage 2, published, with DDP's module., under 'model'"


def test_published_memory_alone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "memory.pt"
    torch.save({"model": published_stage2()[0].tracker.state_dict()}, path)
    with pytest.raises(CheckpointError, match=r"memory\.pt: a compressed memory \(stage 2\) without the image"):
        load_model(path)


# --- what does not fit ------------------------------------------------------------------------------------------------

HALVES = {
    "efficient, opened": (EFFICIENT_PREFIX + "spatial_perceiver.layers.1.", None, "efficient memory: 20 of 135"),
    "full, not opened": ("tracker.transformer.encoder.layers.1.", None, "tracker memory: 26 of"),
    "efficient, not opened": (EFFICIENT_PREFIX + "mem_pos_proj.", "full", "efficient memory: 2 of"),
    "full, opened": ("tracker.maskmem_backbone.fuser.", "full", "tracker memory: 18 of"),
    "pointers": ("tracker.obj_ptr_proj.", None, "tracker memory: 6 of"),
}


@pytest.mark.parametrize(("prefix", "memory", "message"), HALVES.values(), ids=HALVES)
def test_half_a_memory_is_refused(
    tmp_path: Path, efficient: Sam3Image, prefix: str, memory: str | None, message: str
) -> None:
    weights = {k: v for k, v in both_memories(efficient).items() if not k.startswith(prefix)}
    path = write(tmp_path / "half.pt", weights)
    with pytest.raises(CheckpointError, match=message):
        load_model(path, memory=memory)
    found = inspect_checkpoint(path)
    assert memory == "full" or found.problem is not None
    assert "partial" in {part.state for part in found.parts}


def test_weights_of_another_memory(tmp_path: Path, efficient: Sam3Image) -> None:
    other = make_model(TINY.with_efficient_memory(EfficientMemoryConfig(num_latents=16, perceiver_head_dim=16)))
    weights = both_memories(efficient) | own_weights(other.tracker.state_dict())
    with pytest.raises(CheckpointError, match=r"of another shape: efficient_tracker\.\S+: file"):
        load_model(write(tmp_path / "other.pt", weights))


def test_a_memory_without_attention_cannot_be_identified(tmp_path: Path, efficient: Sam3Image) -> None:
    weights = {k: v for k, v in both_memories(efficient).items() if ".linear1." not in k or "tracker.tr" in k}
    missing = r"a compressed memory without efficient_tracker\.memory_attention\.layers\.0\.linear1\.weight"
    with pytest.raises(CheckpointError, match=missing):
        load_model(write(tmp_path / "unknown.pt", weights, None))


# --- tools ------------------------------------------------------------------------------------------------------------


def test_inspection_names_both(tmp_path: Path, efficient: Sam3Image) -> None:
    found = inspect_checkpoint(write(tmp_path / "both.safetensors", both_memories(efficient)))
    assert found.opens and found.memories == ["efficient", "full"] and found.tokens_per_frame == 64
    own = own_weights(efficient.tracker.state_dict())
    rows = {part.name: part for part in found.parts}
    assert {part.state for part in found.parts} == {"complete"}
    assert rows["efficient memory"].tensors == len(own)
    assert rows["efficient memory"].parameters == sum(v.numel() for v in own.values())
    assert "memory      efficient and full; the efficient one stores 64 tokens of a frame" in found.lines()
    plain = inspect_checkpoint(write(tmp_path / "plain.pt", whole_weights(), TINY))
    assert plain.memories == ["full"] and "efficient memory" not in {part.name for part in plain.parts}
    assert not any(line.startswith("memory") for line in plain.lines())


def test_conversion_keeps_both(tmp_path: Path, efficient: Sam3Image, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "both.safetensors", both_memories(efficient))
    assert convert([str(source), str(tmp_path / "both.pt")]) == 0
    before, after = (recognise(read_checkpoint(path)) for path in (source, tmp_path / "both.pt"))
    assert after.config == before.config == COMPRESSED
    assert all(torch.equal(after.weights[key], value) for key, value in before.weights.items())
    capsys.readouterr()
    hf = tmp_path / "hf.safetensors"
    assert convert([str(source), str(hf), "--layout", "hf"]) == 0
    assert "tensors of the compressed memory, for which there is no place there" in capsys.readouterr().out
    assert load_model(hf).config == TINY


def test_files_of_sam3_are_opened_as_before(tmp_path: Path) -> None:
    path = tmp_path / "sam3.safetensors"
    save_file({k: v for k, v in whole_weights().items() if not k.endswith("freqs_cis")}, path)
    assert load_model(path).config == TINY
