"""What stage 2 trains: which parameters move, which modules stay calm, where a new memory starts, and its files."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import STUDENT, TINY, make_model, student_model, whole_model, whole_weights
from torch import Tensor, nn

from sam3.checkpoint_io import CheckpointError, write_merged
from sam3.config import EfficientMemoryConfig, Sam3Config
from sam3.efficient_keys import own_weights
from sam3.model.building import building_on
from sam3.model.clip_forward import ClipPlan
from sam3.model.efficient_sam3_model_builder import (
    build_efficient_sam3_predictor,
    build_efficient_sam3_tracker,
    build_efficient_sam3_train,
    load_efficient_sam3_checkpoint,
    save_efficient_sam3_checkpoint,
)
from sam3.model.efficient_sam3_tracker import EfficientSam3Tracker
from sam3.model.efficient_sam3_train import NOT_TRAINED, EfficientSam3Train, features_of_objects
from sam3.model.sam3_tracker import TrackerFeatures
from sam3.model_builder import assemble_image_model
from sam3.released_names import released_state_dict

COMPRESSED = TINY.with_efficient_memory()
SIDE = TINY.image_size_px


@pytest.fixture(scope="module")
def sam3_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sam3") / "sam3.pt"
    write_merged(path, whole_weights(), {"model": TINY.to_dict()})
    return path


@pytest.fixture
def module(sam3_file: Path) -> EfficientSam3Train:
    torch.manual_seed(3)
    return build_efficient_sam3_train(sam3_file, device="cpu")


def published_model() -> EfficientSam3Train:
    """At full size, without data."""
    config = Sam3Config().with_efficient_memory(compat="published")
    model = assemble_image_model(config, device="meta", enable_detector=False, enable_tracker=True)
    with building_on(torch.device("meta")):
        return EfficientSam3Train(config, model.backbone)


def sha256(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


def clip(num_clips: int = 2, num_frames: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Images, the coverage of three objects, and the clips that they are in."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(num_clips, num_frames, 3, SIDE, SIDE, generator=generator) * 2 - 1
    coverage = torch.zeros(num_frames, 3, 18, 18)
    coverage[:, 0, 2:8, 2:8] = coverage[:, 1, 9:15, 5:12] = coverage[:, 2, 3:9, 10:16] = 1.0
    return images, coverage, torch.tensor([0, 0, num_clips - 1])


# --- names and numbers of the published model -------------------------------------------------------------------------


def test_names_and_parameters_are_the_published_ones() -> None:
    model = published_model()
    state = model.state_dict()
    assert len(state) == 761
    assert sha256(state) == "3b2f10e2cf691cdc4d31c48526c065e9866bbe9d4af81f83ee058a782cae511f"
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(sizes.values()) == 470_022_146
    assert sum(size for name, size in sizes.items() if name.startswith("backbone.")) == 461_841_920
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not trained & NOT_TRAINED.keys()
    optimised = trained | NOT_TRAINED.keys()
    assert len(optimised) == 138 and sum(sizes[name] for name in optimised) == 3_744_800
    assert sha256(optimised) == "19ae516a47059b419a48b2c5ff5aecb682d0b1e70f2caaba7fa7ef0d7baeb815"
    assert model.trained_state().keys() == trained


def test_parameters_of_the_default() -> None:
    """Those of the published one but for the 256 window latents."""
    with building_on(torch.device("meta")):
        tracker = EfficientSam3Tracker(Sam3Config().with_efficient_memory())
    sizes = {name: value.numel() for name, value in own_weights(tracker.state_dict()).items()}
    assert sum(sizes.values()) == 3_744_800 - 512 - 256 * 64 == 3_727_904
    assert len(sizes) == 138 - 3


# --- frozen -----------------------------------------------------------------------------------------------------------


def training_modules(model: nn.Module) -> set[str]:
    return {name.split(".")[0] for name, child in model.named_modules() if name and child.training}


def test_frozen_parts_stay_in_eval_mode(module: EfficientSam3Train) -> None:
    """D-112, 7.6 (10): the published script's train() turns the frozen backbone's stochastic depth on."""
    memory = {"spatial_perceiver", "memory_attention", "mem_proj", "mem_pos_proj", "maskmem_backbone"}
    assert module.training and training_modules(module) == memory
    assert training_modules(module.eval()) == set() and not module.training
    assert training_modules(module.train()) == memory and module.training
    assert {name.split(".")[0] for name, p in module.named_parameters() if p.requires_grad} == memory | {
        "maskmem_tpos_enc",
        "no_obj_embed_spatial",
    }


@pytest.mark.parametrize("config", [COMPRESSED, TINY.with_efficient_memory(compat="published")], ids=["ours", "theirs"])
def test_a_step_moves_all_that_is_trained_and_nothing_else(config: Sam3Config) -> None:
    """Defect D-127, 7.6 (13, 14) of the published training."""
    torch.manual_seed(0)
    module = build_efficient_sam3_train(config=config, device="cpu")
    images, coverage, clips = clip()
    coverage[1, 1] = 0.0  # an object that is away for a frame: its embedding is trained too
    result = module(images, coverage, clips, ClipPlan("mask", (0,)), video_frames=16, force_presence=True)
    loss: Tensor = sum((answer.sam.mask_logits.square().mean() for answer in result.answers), torch.zeros(()))
    loss.backward()
    with_gradient = {name for name, p in module.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert with_gradient == {name for name, p in module.named_parameters() if p.requires_grad}


def test_frozen_answers_do_not_depend_on_the_mode(module: EfficientSam3Train) -> None:
    images, *_ = clip(1, 1)
    calm = module.eval().clip_features(images)
    for ours, theirs in zip(module.train().clip_features(images)[0], calm[0], strict=True):
        assert torch.equal(ours, theirs) and not ours.requires_grad


# --- clips ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_clips_together_are_the_clips_alone(module: EfficientSam3Train) -> None:
    module.eval()
    images, coverage, clips = clip()
    plan = ClipPlan("mask", (0,))
    together = module(images, coverage, clips, plan)
    first = module(images[:1], coverage[:, :2], clips[:2], plan)
    last = module(images[1:], coverage[:, 2:], torch.tensor([0]), plan)
    for t in range(3):
        alone = torch.cat([first.outputs[t].pred_masks, last.outputs[t].pred_masks])
        torch.testing.assert_close(together.outputs[t].pred_masks, alone, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_features_in_chunks_and_from_a_cache(module: EfficientSam3Train, monkeypatch: pytest.MonkeyPatch) -> None:
    module.eval()
    images, coverage, clips = clip()
    whole = module.clip_features(images, frames_at_once=6)
    assert [len(frame.coarse) for frame in whole] == [2, 2, 2]
    batches: list[int] = []
    forward_image = module.backbone.forward_image
    monkeypatch.setattr(
        module.backbone, "forward_image", lambda x, **kwargs: batches.append(len(x)) or forward_image(x, **kwargs)
    )
    chunked = module.clip_features(images, frames_at_once=4)
    assert batches == [4, 2]
    for ours, theirs in zip(chunked, whole, strict=True):
        torch.testing.assert_close(ours.coarse, theirs.coarse)
    plan = ClipPlan("mask", (0,))
    cached = module(whole, coverage, clips, plan).outputs[2].pred_masks
    assert batches == [4, 2]
    torch.testing.assert_close(
        cached, module(images, coverage, clips, plan).outputs[2].pred_masks, atol=1e-3, rtol=1e-3
    )
    assert module.clip_features(images[:1, :1], dtype=torch.bfloat16)[0].coarse.dtype == torch.float32


def test_rows_of_objects() -> None:
    frame = TrackerFeatures(*(torch.arange(2.0).view(2, 1, 1, 1) for _ in range(3)))
    (rows,) = features_of_objects([frame], torch.tensor([1, 1, 0]))
    assert rows.coarse.flatten().tolist() == [1, 1, 0]
    single = TrackerFeatures(*(m[:1] for m in frame))
    assert features_of_objects([single], torch.tensor([0, 0]))[0].coarse is single.coarse
    with pytest.raises(ValueError, match=r"objects are in clips \[0, 2\], and there are 2"):
        features_of_objects([frame], torch.tensor([0, 2]))


def test_clips_that_do_not_fit(module: EfficientSam3Train) -> None:
    images, coverage, clips = clip()
    with pytest.raises(ValueError, match="2 objects have a clip, 3 have masks"):
        module(images, coverage, clips[:2], ClipPlan("mask", (0,)))
    with pytest.raises(ValueError, match=r"images must be \(clips, frames, 3, S, S\)"):
        module.clip_features(images[0])


# --- builders ---------------------------------------------------------------------------------------------------------


def test_a_new_memory_starts_from_the_released_one(module: EfficientSam3Train) -> None:
    """D-118, 7.6 (9): the published memory encoder starts from random numbers."""
    released = whole_model().tracker.state_dict()
    ours = module.state_dict()
    same = {key for key, value in ours.items() if key in released and torch.equal(value, released[key])}
    assert same == {key for key in ours if key in released}
    for name in ("weight", "bias"):
        assert torch.equal(ours[f"memory_attention.norm.{name}"], released[f"transformer.encoder.norm.{name}"])
    backbone = whole_model().backbone.state_dict()
    assert all(torch.equal(v, backbone[k.removeprefix("backbone.")]) for k, v in ours.items() if k[:9] == "backbone.")


def test_any_student_can_be_the_backbone(tmp_path: Path) -> None:
    """D-119, 7.6 (21): the published builders know the teacher alone."""
    path = tmp_path / "student.pt"
    student = student_model()
    write_merged(path, released_state_dict(student), {"model": student.config.to_dict()})
    module = build_efficient_sam3_train(path, device="cpu", compat="published")
    assert module.config.student is not None and module.config.student.backbone == STUDENT
    assert module.memory == COMPRESSED.with_efficient_memory(compat="published").efficient_memory
    batch_norms = [m for m in module.train().modules() if isinstance(m, nn.BatchNorm2d)]
    assert batch_norms and not any(m.training for m in batch_norms)
    assert module.clip_features(clip(1, 1)[0])[0].coarse.shape == (1, TINY.hidden_dim, 18, 18)


def test_a_memory_in_the_file_is_trained_further(tmp_path: Path) -> None:
    trained = make_model(COMPRESSED, seed=5)
    path = tmp_path / "both.safetensors"
    own = own_weights(trained.tracker.state_dict())
    write_merged(path, whole_weights() | own, {"model": COMPRESSED.to_dict()})
    module = build_efficient_sam3_train(path, device="cpu")
    assert torch.equal(module.mem_proj.weight, trained.tracker.mem_proj.weight)
    with torch.no_grad():
        module.mem_proj.weight.zero_()
    again = build_efficient_sam3_tracker(path, device="cpu")
    assert torch.equal(again.mem_proj.weight, trained.tracker.mem_proj.weight), "the file must stay as it is"
    other = build_efficient_sam3_tracker(path, memory=EfficientMemoryConfig(16, perceiver_head_dim=16), device="cpu")
    assert other.memory.num_latents == 16
    assert torch.equal(other.maskmem_tpos_enc, whole_model().tracker.maskmem_tpos_enc)
    predictor = build_efficient_sam3_predictor(path, "cpu", objects="independent")
    assert isinstance(predictor.model.tracker, EfficientSam3Tracker) and predictor.objects == "independent"
    with pytest.raises(TypeError, match="latents"):
        build_efficient_sam3_predictor(path, "cpu", latents=3)


def test_files_that_a_memory_cannot_start_from(tmp_path: Path, sam3_file: Path) -> None:
    trained = make_model(COMPRESSED)
    light = tmp_path / "light.pt"
    write_merged(light, released_state_dict(trained), {"model": COMPRESSED.to_dict()})
    with pytest.raises(CheckpointError, match=r"light\.pt: a new compressed memory starts from the released memory"):
        build_efficient_sam3_train(light, compat="published")
    with pytest.raises(CheckpointError, match=r"sam3\.pt: holds no efficient memory"):
        build_efficient_sam3_predictor(sam3_file)
    with pytest.raises(ValueError, match="both describe the compressed memory"):
        build_efficient_sam3_train(sam3_file, memory=EfficientMemoryConfig(), compat="published")
    with pytest.raises(ValueError, match="the backbone has no neck for the SAM heads"):
        EfficientSam3Train(COMPRESSED, assemble_image_model(TINY, enable_detector=False).backbone)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def changed(module: EfficientSam3Tracker) -> EfficientSam3Tracker:
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    return module


def test_checkpoint_and_back(tmp_path: Path, module: EfficientSam3Train) -> None:
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)
    path = tmp_path / "memory.pt"
    save_efficient_sam3_checkpoint(module, path, optimizer, epoch=4, loss=0.25)
    expected = {key: value.clone() for key, value in module.state_dict().items()}
    assert not any(key.startswith("backbone.") for key in torch.load(path, weights_only=True)["model"])
    rest = load_efficient_sam3_checkpoint(changed(module), path)
    assert all(torch.equal(value, expected[key]) for key, value in module.state_dict().items())
    assert rest["epoch"] == 4 and rest["loss"] == 0.25
    optimizer.load_state_dict(rest["optimizer"])
    alone = EfficientSam3Tracker(COMPRESSED)
    load_efficient_sam3_checkpoint(alone, path)
    assert torch.equal(alone.mem_proj.weight, module.mem_proj.weight)


def test_checkpoint_with_a_backbone(tmp_path: Path, module: EfficientSam3Train) -> None:
    """As the published training writes it: everything, DDP's prefix included."""
    path = tmp_path / "efficient_sam3_stage2_final.pt"
    torch.save({"model": {"module." + k: v for k, v in module.state_dict().items()}, "epoch": 9}, path)
    with torch.no_grad():
        expected = module.backbone.vision_backbone.trunk.patch_embed.proj.weight.clone()
        module.backbone.vision_backbone.trunk.patch_embed.proj.weight.add_(1.0)
    assert load_efficient_sam3_checkpoint(module, path)["epoch"] == 9
    assert torch.equal(module.backbone.vision_backbone.trunk.patch_embed.proj.weight, expected)


def test_merged_file_as_checkpoint(tmp_path: Path, module: EfficientSam3Train) -> None:
    path = tmp_path / "both.safetensors"
    other = make_model(COMPRESSED, seed=6)
    own = own_weights(other.tracker.state_dict())
    write_merged(path, whole_weights() | own, {"model": COMPRESSED.to_dict(), "note": "merged"})
    assert load_efficient_sam3_checkpoint(module, path)["note"] == "merged"
    assert torch.equal(module.mem_proj.weight, other.tracker.mem_proj.weight)


BAD_FILES: dict[str, tuple[dict[str, Any], str]] = {
    "a key less": ({"drop": "mem_proj.bias"}, r"efficient memory: 1 of 135 missing: efficient_tracker\.mem_proj\.bias"),
    "a key more": ({"add": {"mem_proj.scale": torch.ones(1)}}, "1 unexpected"),
    "a shape": ({"add": {"mem_proj.bias": torch.ones(3)}}, r"1 of another shape: efficient_tracker\.mem_proj\.bias"),
    "other rules": (
        {"memory": {"position_on_keys": False}},
        "holds another compressed memory: position_on_keys is False, here True",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_checkpoints_that_do_not_fit(
    tmp_path: Path, module: EfficientSam3Train, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "memory.pt"
    save_efficient_sam3_checkpoint(module, path)
    content = torch.load(path, weights_only=True)
    content["model"].pop(change.get("drop"), None)
    content["model"] |= change.get("add", {})
    content["metadata"]["model"]["efficient_memory"] |= change.get("memory", {})
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        load_efficient_sam3_checkpoint(module, path)


def test_lenient_loading_is_said(
    tmp_path: Path, module: EfficientSam3Train, caplog: pytest.LogCaptureFixture, sam3_file: Path
) -> None:
    path = tmp_path / "memory.pt"
    save_efficient_sam3_checkpoint(module, path)
    content = torch.load(path, weights_only=True)
    del content["model"]["mem_proj.bias"]
    torch.save(content, path)
    with caplog.at_level(logging.WARNING):
        load_efficient_sam3_checkpoint(changed(module), path, strict=False)
    assert "efficient memory: 1 of 135 missing" in caplog.text
    with pytest.raises(CheckpointError, match="holds no compressed memory"):
        load_efficient_sam3_checkpoint(module, sam3_file, strict=False)


def test_names_that_a_checkpoint_needs_itself(tmp_path: Path, module: EfficientSam3Train) -> None:
    with pytest.raises(ValueError, match=r"memory\.safetensors: a checkpoint with an optimizer is stored as"):
        save_efficient_sam3_checkpoint(module, tmp_path / "memory.safetensors")
    with pytest.raises(ValueError, match="extra_state 'metadata' is the name of something else"):
        save_efficient_sam3_checkpoint(module, tmp_path / "memory.pt", metadata=1)
