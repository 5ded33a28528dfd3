"""The task of the geometry fine-tune: what it trains, what it costs, what it remembers and what it saves."""

from __future__ import annotations

import math

import pytest
import torch
from geometry_world import make_batch, make_task, no_objects

from sam3_train.errors import UserError
from sam3_train.optim import parameter_groups
from stage1_geometry_finetune.losses import GeometryLossWeights
from stage1_geometry_finetune.routes import DetectorRoute, SamRoute
from stage1_geometry_finetune.task import GeometryTask, TeacherMaps


def as_teacher(task: GeometryTask, monkeypatch) -> GeometryTask:
    """A student that has learnt all there is to learn."""
    monkeypatch.setattr(task, "student_features", lambda batch: batch["teacher"])
    return task


def teacher_masks(task: GeometryTask, batch: dict) -> list[torch.Tensor]:
    prompts = batch["prompts"]
    return [task.teacher_targets(TeacherMaps(r, batch["teacher"]), prompts, None).masks for _, r in task.routes]


@pytest.mark.parametrize(("detector", "sam"), [(True, False), (False, True)])
def test_gradients_reach_every_student_parameter_and_no_frozen_one(detector, sam):
    """Through either route alone: without the embedding's term, every parameter still learns."""
    weights = GeometryLossWeights(embedding=0.0, detector=float(detector), sam=float(sam))
    task = make_task(weights, detector, sam).train()
    out = task(make_batch())
    out["loss"].backward()
    for name, parameter in task.student.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
    for _, route in task.routes:
        for heads in (route.teacher, route.student):
            assert not [n for n, p in heads.model.named_parameters() if p.requires_grad or p.grad is not None]
            assert not [n for n, module in heads.model.named_modules() if module.training], "eval mode under train()"
    prefixes = {name.split("_")[0] for name in out if name not in ("loss", "mse", "objects")}
    assert prefixes == {name for name, runs in (("detector", detector), ("sam", sam)) if runs}


def test_the_loss_is_the_weighted_sum_of_its_terms():
    """Every weight does what it says (D-04), and terms are logged without them."""
    names = ("mask_bce", "mask_dice", "score", "presence", "box")
    weights = {name: 0.5 + 0.3 * i for i, name in enumerate(names)}
    task = make_task(GeometryLossWeights(embedding=0.7, detector=1.3, sam=0.4, **weights)).eval()
    with torch.no_grad():
        out = {name: float(value) for name, value in task(make_batch()).items()}
    expected = 0.7 * out["mse"]
    for route, factor in (("detector", 1.3), ("sam", 0.4)):
        expected += factor * sum(w * out[f"{route}_{n}"] for n, w in weights.items() if f"{route}_{n}" in out)
    assert out["loss"] == pytest.approx(expected, rel=1e-5)
    assert "sam_box" not in out, "the SAM heads predict no box"
    assert all(value > 0 for name, value in out.items() if "iou" not in name)


def test_a_student_that_has_learnt_everything_makes_the_teachers_masks(monkeypatch):
    task = as_teacher(make_task(), monkeypatch).eval()
    with torch.no_grad():
        out = task(make_batch())
        values = task.validate(make_batch("xxxxx"))
    assert out["mse"] == 0
    assert out["detector_mask_iou"] == pytest.approx(1.0, abs=1e-3)
    assert out["sam_mask_iou"] == pytest.approx(1.0, abs=1e-3)
    assert out["sam_score"] < 1e-9
    assert out["detector_box"] < 1e-3
    torch.testing.assert_close(values["teacher_iou"], torch.ones(2))
    torch.testing.assert_close(values["truth_iou"], values["teacher_truth_iou"])


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_a_student_that_overflows_makes_a_loss_that_the_loop_skips(value, monkeypatch):
    """Not an exception, which would end the run on all ranks: a step that is not finite is skipped and counted."""
    task, batch = make_task(refine_rounds=1).train(), make_batch()
    features = torch.full_like(batch["teacher"], value)
    features[0] = batch["teacher"][0]
    monkeypatch.setattr(task, "student_features", lambda batch: features)
    assert not task(batch)["loss"].isfinite()
    with torch.no_grad():
        assert task.eval().validate(make_batch("xxxxx"))["truth_iou"].shape == (2,)


def test_so_does_a_teacher_in_the_loop_that_overflows():
    batch = make_batch()
    batch["teacher"] = batch["teacher"].clone()
    batch["teacher"][1] = math.nan
    with torch.no_grad():
        assert not make_task(sam=False)(batch)["detector_box"].isfinite()


def test_validation_scores_boxes_and_clicks_against_truth_and_teacher():
    """D-94: per image, with the masks of the annotations, and it picks the best checkpoint."""
    task = make_task().eval()
    with torch.no_grad():
        values = task.validate(make_batch("xxxxx"))
    kinds = [f"{route}_{kind}" for route in ("detector", "sam") for kind in ("box", "click")]
    for reference in ("truth", "teacher"):
        parts = torch.stack([values[f"{kind}_{reference}_iou"] for kind in kinds])
        assert parts.shape == (4, 2)
        assert ((parts >= 0) & (parts <= 1)).all()
        torch.testing.assert_close(values[f"{reference}_iou"], parts.mean(0))
    assert values["teacher_truth_iou"].shape == values["mse"].shape == (2,)
    assert (task.best_metric, task.best_mode) == ("truth_iou", "max")
    assert task.best_metric in values


def test_an_image_without_objects_is_neither_an_error_nor_a_score():
    """A batch may hold no object at all; every rank must still have a gradient of every parameter."""
    for weights in (None, GeometryLossWeights(embedding=0.0, sam=1.0)):
        task = make_task(weights, train_neck=True, train_mask_decoder=True).train()
        out = task(no_objects(make_batch()))
        out["loss"].backward()
        assert all(p.grad is not None for p in task.parameters())
        assert set(out) == {"loss", "mse", "objects"} and out["objects"] == 0
    task.eval()
    with torch.no_grad():
        values = task.validate(no_objects(make_batch("xxxxx")))
        mixed = make_batch("xxxxx")
        mixed["prompts"] = mixed["prompts"].select(torch.arange(3))  # the second image has none
        half = task.validate(mixed)
    assert values["truth_iou"].isnan().all()
    assert values["mse"].isfinite().all()
    assert half["truth_iou"].isnan().tolist() == [False, True]


@pytest.mark.parametrize("refine_rounds", [0, 1])
def test_the_cache_gives_the_same_loss_and_spares_the_teacher(refine_rounds, monkeypatch):
    """D-96: the second time, what the teacher said is known. Rounds of refinement depend on the student: not kept."""
    passes = []
    for kind in (DetectorRoute, SamRoute):
        compute = kind.targets
        monkeypatch.setattr(kind, "targets", lambda *args, f=compute: passes.append(1) or f(*args))
    batch, losses = make_batch(), {}
    for cache_bytes in (0, 10**8):
        task = make_task(detector=not refine_rounds, cache_bytes=cache_bytes, refine_rounds=refine_rounds).eval()
        results = []
        for _ in range(2):
            passes.clear()
            torch.manual_seed(5)
            with torch.no_grad():
                results.append((task(batch), len(passes)))
        losses[cache_bytes] = results
    images_times_routes = 2 * len(task.routes)
    for (out, count), (first, _) in zip(losses[0], losses[10**8], strict=True):
        assert torch.equal(out["loss"], first["loss"])
        assert count == images_times_routes * (1 + refine_rounds)
        assert "cache_hits" not in out
    counts = [count for _, count in losses[10**8]]
    assert counts == [images_times_routes * (1 + refine_rounds), images_times_routes * refine_rounds]
    assert [out["cache_hits"].item() for out, _ in losses[10**8]] == [0.0, 1.0]
    again = make_batch("xxxxx")
    with torch.no_grad():
        assert task(again)["cache_hits"] == 0, "other prompts of the same objects are another question"


def test_what_the_teacher_says_does_not_depend_on_the_batch_an_image_is_in():
    """A resumed run begins with an empty cache and must go on bit for bit."""
    task, batch = make_task(), make_batch()
    for _, route in task.routes:
        both = task.teacher_targets(TeacherMaps(route, batch["teacher"]), batch["prompts"], None)
        own = batch["prompts"].select(batch["prompts"].image_of_object == 1)
        own = own._replace(image_of_object=own.image_of_object * 0)
        alone = task.teacher_targets(TeacherMaps(route, batch["teacher"][1:]), own, None)
        slots = alone.kept.shape[1]
        assert torch.equal(both.masks[3:, :slots], alone.masks)
        assert torch.equal(both.presence[3:], alone.presence)
        assert not both.kept[3:, slots:].any()


def test_refinement_adds_rounds_and_is_reproducible():
    task, batch = make_task(detector=False, refine_rounds=2, refine_clicks=2).eval(), make_batch()
    plain = make_task(detector=False).eval()
    losses = []
    with torch.no_grad():
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            losses.append(task(batch)["loss"].item())
        first = plain(batch)
    assert losses[0] == losses[1] != losses[2]
    assert losses[0] != first["loss"].item()


def test_letterboxed_images_are_judged_inside_alone():
    """D-85: what lies in the padding, of masks and of features, is left out of the loss."""
    batch = make_batch()
    batch["valid"][:, :, 12:] = 0
    torch.manual_seed(0)
    with torch.no_grad():
        padded = make_task(has_padding=True).eval()(batch)
        whole = make_task().eval()(batch)
    assert padded["mse"] == whole["mse"]
    assert padded["sam_mask_bce"] != whole["sam_mask_bce"]
    task = make_task(has_padding=True)
    inside = task._inside(batch, batch["prompts"])
    side = batch["prompts"].masks.shape[-1]
    assert inside.shape == (5, side, side)
    assert inside[:, : 12 * 4].all() and not inside[:, 12 * 4 :].any()
    for _, route in task.routes:
        targets = task.teacher_targets(TeacherMaps(route, batch["teacher"]), batch["prompts"], inside)
        assert not targets.masks[..., 12 * 4 :, :].any()


def test_a_checkpoint_holds_trained_weights_alone():
    """D-90: the student's published names, and nothing of SAM 3."""
    task = make_task()
    saved = task.saved_state()
    assert all(name.startswith(("backbone.model.", "head.")) for name in saved)
    assert sum(v.numel() for v in saved.values()) == sum(v.numel() for v in task.student.state_dict().values())
    other = make_task()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    other.load_saved_state(saved, "run.pth")
    assert all(torch.equal(a, b) for a, b in zip(task.parameters(), other.parameters(), strict=True))
    groups = parameter_groups(task, 0.01, task.lr_scale, task.has_weight_decay)
    assert sum(len(g["params"]) for g in groups) == len(list(task.student.parameters()))


@pytest.mark.parametrize(
    ("options", "prefixes"),
    [
        ({"train_neck": True}, ("detector.backbone.vision_backbone.convs.", "detector.backbone.vision_backbone.sam2_")),
        ({"train_mask_decoder": True}, ("detector.segmentation_head.", "tracker.sam_mask_decoder.")),
    ],
)
def test_trained_parts_learn_are_saved_and_leave_the_teacher_alone(options, prefixes):
    task, batch = make_task(**options).train(), make_batch()
    teacher = {name: p.clone() for name, p in task.routes[0][1].teacher.model.named_parameters()}
    before = teacher_masks(task, batch)
    groups = parameter_groups(task, 0.01, task.lr_scale, task.has_weight_decay)
    trained = list(task.trained_parts.parameters())
    assert sum(len(g["params"]) for g in groups) == len(trained) + len(list(task.student.parameters()))
    start = {name: value.clone() for name, value in task.saved_state().items()}
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    task(batch)["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in trained)
    optimizer.step()
    saved = task.saved_state()
    parts = {name for name in saved if name.startswith(("detector.", "tracker."))}
    assert {next(p for p in prefixes if name.startswith(p)) for name in parts} == set(prefixes)
    assert any(not torch.equal(saved[name], start[name]) for name in parts)
    for name, parameter in task.routes[0][1].teacher.model.named_parameters():
        assert torch.equal(parameter, teacher[name]), name
    assert all(torch.equal(a, b) for a, b in zip(before, teacher_masks(task, batch), strict=True))
    other = make_task(**options)
    other.load_saved_state(saved, "run.pth")
    assert all(torch.equal(value, saved[name]) for name, value in other.saved_state().items())
    with torch.no_grad():
        assert torch.equal(task.eval()(batch)["loss"], other.eval()(batch)["loss"]), "the loaded parts are used"
    with pytest.raises(UserError, match="trained parts are not those of this run"):
        make_task().load_saved_state(saved, "run.pth")


def test_what_predicts_scores_is_trained_only_if_a_term_reads_it():
    def trained(score: float) -> set[str]:
        task = make_task(GeometryLossWeights(sam=1.0, score=score), train_mask_decoder=True)
        return {name for name in task.trained_parts.names if "iou_prediction_head" in name or "obj_score_head" in name}

    assert trained(0.5)
    assert not trained(0.0)


def test_a_few_steps_bring_the_answers_closer_to_the_teachers():
    torch.manual_seed(0)
    task, batch = (
        make_task(GeometryLossWeights(embedding=0.2, sam=1.0), channels_last=False).train(),
        make_batch("xxxxx"),
    )
    optimizer = torch.optim.AdamW(task.parameters(), lr=2e-3)
    losses = []
    for _ in range(4):
        out = task(batch)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        losses.append(out["loss"].item())
    assert math.isfinite(losses[-1])
    assert losses[-1] < 0.95 * losses[0]


def test_a_step_in_bf16_is_the_same_step():
    """What runs on CUDA by default: the terms are computed in float32 from answers in bf16."""
    batch, task = make_batch(), make_task().train()
    task.student.eval()  # statistics of the batch would differ
    with torch.no_grad():
        exact = task(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = task(batch)
    out["loss"].backward()
    assert all(value.dtype == torch.float32 for value in out.values())
    for name in ("loss", "mse", "detector_mask_bce", "detector_mask_dice", "sam_mask_bce", "sam_mask_dice"):
        assert out[name].item() == pytest.approx(exact[name].item(), rel=0.1), name
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.parameters())
