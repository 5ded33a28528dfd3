"""The memory's training task: what its loss is made of, what it trains and saves, and what it does when a batch fails.

The defects that are named are those of the published stage-2 training.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from tracking_clips import TEACHER_FILE, make_batch, make_clip, make_model

from sam3.checkpoint_io import CheckpointError
from sam3.config import EfficientMemoryConfig
from sam3.model.clip_forward import ClipPlan, ClipPrompting
from sam3.model.efficient_sam3_train import EfficientSam3Train, is_trained
from sam3.model.sam3_tracker import Sam3Tracker
from sam3_train.errors import UserError
from sam3_train.optim import parameter_groups
from stage2.batch_errors import BatchError
from stage2.data.clip_batch import collate_clips
from stage2.distill import DistillWeights, full_memory_teacher
from stage2.losses import Stage2LossWeights
from stage2.task import Stage2Options, Stage2Task, measure_feature_scale

MEMORY = EfficientMemoryConfig(perceiver_head_dim=16, num_heads=4, mlp_dim=128, num_latents=8)
FEW_CLICKS = ClipPrompting(num_corrected=(0, 1), clicks_per_frame=1)
ALL_LOSSES = Stage2LossWeights(absent=0.5, temporal=0.5, reconstruction=0.5, others=0.2)
ALL_TEACHING = DistillWeights(mask=1.0, features=1.0, pointers=1.0)


@pytest.fixture(scope="module")
def teacher() -> Sam3Tracker:
    return full_memory_teacher(TEACHER_FILE, "cpu")


@pytest.fixture
def model() -> EfficientSam3Train:
    return make_model(MEMORY)


def run(task: Stage2Task, batch: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return task.train()(batch)


def test_all_terms_add_up_to_the_loss(model: EfficientSam3Train, teacher: Sam3Tracker) -> None:
    one_box = ClipPrompting(mask_share=0.0, box_share=1.0, num_prompted=(1, 1), num_corrected=(0, 0))
    options = Stage2Options(one_box, ALL_LOSSES, ALL_TEACHING)
    terms = {name: float(v.detach()) for name, v in run(Stage2Task(model, options, teacher), make_batch(3)).items()}
    expected = 20.0 * terms["focal"] + terms["dice"] + terms["iou"] + terms["object_score"]
    expected += 0.5 * (terms["absent"] + terms["temporal"] + terms["reconstruction"])
    expected += terms["teacher_mask"] + terms["teacher_features"] + terms["teacher_pointers"]
    assert terms["loss"] == pytest.approx(expected, rel=1e-5)
    assert all(math.isfinite(value) for name, value in terms.items() if name != "iou_tracked")
    assert all(terms[name] > 0 for name in ("temporal", "reconstruction", "teacher_mask", "teacher_features"))


def test_a_plain_run_has_the_losses_of_sam2_alone(model: EfficientSam3Train) -> None:
    """D-123: 20 : 1 : 1 : 1 and not 1 : 1."""
    terms = run(Stage2Task(model, Stage2Options(FEW_CLICKS)), make_batch(3))
    assert set(terms) == {"loss", "focal", "dice", "iou", "object_score", "iou_tracked"}


def test_every_trained_parameter_has_a_gradient_and_one_group(model: EfficientSam3Train, teacher: Sam3Tracker) -> None:
    """D-127, 7.6 (13, 14); and for several ranks: images and clips without absent objects too."""
    task = Stage2Task(model, Stage2Options(FEW_CLICKS, ALL_LOSSES, ALL_TEACHING), teacher)
    run(task, make_batch(1))["loss"].backward()
    with_gradient = {name for name, p in task.named_parameters() if p.grad is not None}
    grouped = [name for group in parameter_groups(task, 0.1, task.lr_scale) for name, _ in group["params"]]
    wanted = {f"model.{name}" for name in model.trained_state()}
    wanted |= {f"memory_decoder.{name}" for name, _ in task.memory_decoder.named_parameters()}
    assert with_gradient == wanted == set(grouped) and len(grouped) == len(wanted)


def test_a_mask_prompt_is_answered_in_full_and_from_raw_features(model: EfficientSam3Train) -> None:
    """7.6 (19): of the released tracker's size, and with a pointer that no memory attention has touched."""
    task = Stage2Task(model)
    features, coverage = task.tracked_rows(make_batch(2)["clips"])
    first = task._play(model, features, coverage, ClipPlan("mask", (0,)), 0, False).outputs
    for parameter in model.memory_attention.parameters():
        parameter.data.add_(1.0)
    second = task._play(model, features, coverage, ClipPlan("mask", (0,)), 0, False).outputs
    assert first[0].pred_masks.shape[-1] == model.mask_prompt_size // 14 * 4, "as the released tracker's"
    assert first[1].pred_masks.shape[-2:] == coverage.shape[-2:]
    assert torch.equal(first[0].obj_ptr, second[0].obj_ptr)
    answers = [outputs[1].sam for outputs in (first, second)]
    assert not torch.equal(answers[0].mask_logits, answers[1].mask_logits)


def test_frozen_modules_are_never_in_training_mode(model: EfficientSam3Train) -> None:
    """D-112."""
    task = Stage2Task(model).train()
    training = {name.removeprefix("model.") for name, module in task.named_modules() if module.training and name}
    assert training and all(is_trained(name + ".") for name in training if name != "model")


def test_what_is_saved_is_what_is_trained(model: EfficientSam3Train) -> None:
    task = Stage2Task(model, Stage2Options(FEW_CLICKS, Stage2LossWeights(reconstruction=1.0)))
    run(task, make_batch(2))
    saved = task.saved_state()
    extra = {name for name in saved if not is_trained(name)}
    assert {name for name in saved if is_trained(name)} == set(model.trained_state())
    assert extra == {"batches_done", *(f"memory_decoder.{name}" for name in task.memory_decoder.state_dict())}
    other = Stage2Task(make_model(MEMORY, seed=9), task.options)
    other.load_saved_state({name: value.clone() for name, value in saved.items()}, "here")
    assert int(other.batches_done) == 1
    assert all(torch.equal(value, saved[name]) for name, value in other.saved_state().items())
    with pytest.raises(UserError, match=r"1 missing, first model\.mem_proj\.bias"):
        other.load_saved_state({name: value for name, value in saved.items() if name != "mem_proj.bias"}, "here")


def test_same_seed_same_loss(model: EfficientSam3Train) -> None:
    task, batch = Stage2Task(model, Stage2Options(FEW_CLICKS)), make_batch(3)
    first, again, other = (float(run(task, batch, seed)["loss"]) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("still_frames", [1, 3])
def test_an_image_teaches_through_the_memory_of_a_still_clip(model: EfficientSam3Train, still_frames: int) -> None:
    task = Stage2Task(model, Stage2Options(FEW_CLICKS, still_frames=still_frames))
    terms = run(task, make_batch(1))
    terms["loss"].backward()
    learned = [name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())]
    assert bool(learned) == (still_frames > 1)
    assert ("spatial_perceiver.latents" in learned) == (still_frames > 1)
    assert math.isnan(float(terms["iou_tracked"])) == (still_frames == 1)


def test_presence_is_forced_at_first_only(model: EfficientSam3Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen score that finds everything absent must not stop all gradients."""
    task = Stage2Task(model, Stage2Options(FEW_CLICKS, presence_batches=2))
    forced: list[bool] = []
    play = task._play
    monkeypatch.setattr(task, "_play", lambda *inputs: (forced.append(inputs[-1]), play(*inputs))[1])
    for _ in range(3):
        run(task, make_batch(2))
    assert forced == [True, True, False]


def test_gradients_flow_while_everything_is_found_absent(model: EfficientSam3Train) -> None:
    """7.6 (8): masks are judged before absence replaces them by a constant."""
    head: Any = model.sam_mask_decoder.pred_obj_score_head
    head.layers[-1].bias.data.fill_(-50.0)
    task = Stage2Task(model, Stage2Options(ClipPrompting(mask_share=1.0, box_share=0.0)))
    run(task, make_batch(2))["loss"].backward()
    assert all(bool(p.grad.any()) for name, p in model.named_parameters() if name.startswith("memory_attention.layers"))


def test_a_failing_batch_names_its_videos(model: EfficientSam3Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """D-116, 7.6 (15): nothing is skipped."""
    task, batch = Stage2Task(model), make_batch(2)
    broken = batch | {"clips": batch["clips"]._replace(clip_of_object=torch.tensor([0, 0, 1, 7]))}
    for call in (task, task.validate):
        with (
            pytest.raises(BatchError, match=r"videos clip_0, clip_1 failed: ValueError: objects are in clips"),
            task.watching(broken),
        ):
            call(broken)

    def run_out(*inputs: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(task, "_play", run_out)
    out = pytest.raises(UserError, match=r"out of memory on 2 clips of 2 frames with 4 objects.*clip_0.*MAX_OBJECTS")
    with out, task.watching(batch):
        task(batch)


def test_many_videos_are_not_all_named(model: EfficientSam3Train) -> None:
    batch = {"key": [f"v{i}" for i in range(6)], "clips": None}
    task = Stage2Task(model)
    with pytest.raises(BatchError, match=r"videos v0, v1, v2, v3 and 2 more failed"), task.watching(batch):
        task(batch)


def test_validation_scores_each_clip(model: EfficientSam3Train) -> None:
    task = Stage2Task(model, Stage2Options(val_kinds=("mask", "click"))).eval()
    batch = make_batch(3, absent=(2,))
    with torch.no_grad():
        before = torch.get_rng_state()
        found = task.validate(batch)
        alone = [
            task.validate(collate_clips([{"clip": make_clip(f"clip_{i}", 3, 20 + 12 * i, absent=(2,)), "bad": []}]))
            for i in range(2)
        ]
    assert torch.equal(before, torch.get_rng_state())
    assert set(found) == {"j_and_f", "iou", "j_and_f_mask", "j_and_f_click"}
    assert torch.allclose(found["j_and_f"], (found["j_and_f_mask"] + found["j_and_f_click"]) / 2)
    for name, values in found.items():
        assert values.tolist() == pytest.approx([float(each[name][0]) for each in alone], abs=1e-4)


def test_validation_of_images_is_undefined_and_not_an_error(model: EfficientSam3Train) -> None:
    found = Stage2Task(model, Stage2Options(still_frames=1)).eval().validate(make_batch(1))
    assert bool(found["j_and_f"].isnan().all())


def test_cached_features_are_the_frames(model: EfficientSam3Train) -> None:
    task, batch = Stage2Task(model, Stage2Options(FEW_CLICKS)), make_batch(3)
    maps = task._features(batch["clips"])
    stacked = type(maps[0])(*(torch.stack(level, 1) for level in zip(*maps, strict=True)))
    clips = batch["clips"]._replace(pixels=batch["clips"].pixels[..., :0, :0], features=stacked)
    assert float(run(task, batch)["loss"]) == float(run(task, {"key": [], "clips": clips})["loss"])
    assert measure_feature_scale(model, [batch]) == pytest.approx(measure_feature_scale(model, [{"clips": clips}]))
    with pytest.raises(ValueError, match="no images"):
        clips.images(model.preprocess)


def test_learning_rates_follow_the_size_of_the_features(model: EfficientSam3Train) -> None:
    scale = measure_feature_scale(model, [make_batch(2)])
    assert 5.0 < scale < 100.0
    task = Stage2Task(model, Stage2Options(feature_scale=scale))
    added = "model.memory_attention.layers.0.cross_attn.out_proj.weight"
    assert task.lr_scale(added) == pytest.approx(min(scale, 30.0) ** 0.5)
    assert task.lr_scale("model.maskmem_backbone.pix_feat_proj.weight") == pytest.approx(1 / min(scale, 30.0))
    assert task.lr_scale("model.spatial_perceiver.latents") == 1.0
    for batches in ([], [{"clips": make_batch(2)["clips"]._replace(pixels=torch.zeros(2, 2, 3, 252, 252).byte())}]):
        with pytest.raises(UserError, match="do not vary"):
            measure_feature_scale(constant_backbone(model), batches)


def constant_backbone(model: EfficientSam3Train) -> EfficientSam3Train:
    for parameter in model.backbone.vision_backbone.sam2_convs.parameters():
        parameter.data.zero_()
    return model


def test_latents_tables_norms_and_biases_are_not_decayed(model: EfficientSam3Train) -> None:
    """Defect D-122, 7.6 (24) of the published training."""
    task = Stage2Task(model)
    decayed = {name.removeprefix("model.") for name, p in task.named_parameters() if task.has_weight_decay(name, p)}
    assert {"mem_proj.weight", "spatial_perceiver.layers.0.attn.to_q.weight"} <= decayed
    tables = {"spatial_perceiver.latents", "maskmem_tpos_enc", "no_obj_embed_spatial"}
    assert not decayed & (tables | {"mem_proj.bias", "memory_attention.norm.weight"})


def test_impossible_options(model: EfficientSam3Train, teacher: Sam3Tracker) -> None:
    for changes, said in (
        ({"still_frames": 0}, "still_frames"),
        ({"presence_batches": -1}, "presence_batches"),
        ({"feature_scale": 0.0}, "feature_scale"),
        ({"val_kinds": ("poke",)}, "val_kinds"),
        ({"val_kinds": ()}, "val_kinds"),
    ):
        with pytest.raises(ValueError, match=said):
            dataclasses.replace(Stage2Options(), **changes)
    with pytest.raises(ValueError, match="needs a teacher"):
        Stage2Task(model, Stage2Options(distill=DistillWeights(mask=1.0)))
    assert Stage2Task(model, Stage2Options(), teacher).teacher is None
    dense = make_model(dataclasses.replace(MEMORY, num_latents=0))
    with pytest.raises(ValueError, match="not compressed"):
        Stage2Task(dense, Stage2Options(losses=Stage2LossWeights(reconstruction=1.0)))


def test_a_file_without_a_full_memory_cannot_teach(tmp_path: Any) -> None:
    with pytest.raises(CheckpointError):
        full_memory_teacher(tmp_path / "none.pt", "cpu")


def test_the_teacher_is_no_part_of_the_task(model: EfficientSam3Train, teacher: Sam3Tracker) -> None:
    task = Stage2Task(model, Stage2Options(distill=ALL_TEACHING), teacher).train()
    assert task.teacher is teacher and not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    ids = {id(p) for p in teacher.parameters()}
    assert not any(id(p) in ids for p in task.parameters())


def test_frames_without_memory_are_the_same_for_teacher_and_student(
    model: EfficientSam3Train, teacher: Sam3Tracker
) -> None:
    """What differs between them is the memory and nothing else."""
    task = Stage2Task(model.eval())
    features, coverage = task.tracked_rows(make_batch(2)["clips"])
    for kind in ("box", "click"):
        plan = ClipPlan(kind, (0, 1))
        own, theirs = (task._play(each, features, coverage, plan, 0, False) for each in (model, teacher))
        for t in (0, 1):
            assert torch.allclose(own.outputs[t].pred_masks, theirs.outputs[t].pred_masks, atol=1e-3)
