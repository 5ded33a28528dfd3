"""Schedule, parameter groups, EMA and precision."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from toy_training import ToyTask, toy_config

from sam3_train.ema import Ema
from sam3_train.errors import UserError
from sam3_train.optim import build_optimizer, load_optimizer_state, parameter_groups, set_lr
from sam3_train.precision import pick_dtype
from sam3_train.schedule import Schedule, build_schedule, lr_scale_factor, lr_warning
from sam3_train.task import Task, freeze, to_device

CPU = torch.device("cpu")


def schedule(name: str = "cosine", **changes) -> Schedule:
    return replace(Schedule(name, base_lr=1.0, warmup_lr=0.1, min_lr=0.2, warmup_steps=10, total_steps=110), **changes)


def test_cosine_warms_up_linearly_and_falls_to_the_minimum():
    lr = schedule().lr
    assert [lr(0), lr(5), lr(10)] == pytest.approx([0.1, 0.55, 1.0])
    assert lr(60) == pytest.approx(0.6)
    assert lr(35) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert [lr(110), lr(5000)] == pytest.approx([0.2, 0.2])


def test_linear_step_and_constant_schedules():
    assert schedule("linear").lr(60) == pytest.approx(0.6)
    step = schedule("step", warmup_steps=0, decay_steps=30, decay_rate=0.5)
    assert [step.lr(s) for s in (29, 30, 60, 109)] == pytest.approx([1.0, 0.5, 0.25, 0.2])
    assert schedule("constant").lr(100) == 1.0


@pytest.mark.parametrize(
    "scaling, expected", [("none", 1e-3), ("linear", 1e-3 * 4 / 512), ("sqrt", 1e-3 * math.sqrt(4 / 512))]
)
def test_scaling_by_batch_is_an_explicit_choice(scaling, expected):
    """D-48"""
    train = toy_config(["TRAIN.LR_SCALING", scaling]).TRAIN
    built = build_schedule(train, steps_per_epoch=10, global_batch_size=4)
    assert built.base_lr == pytest.approx(expected)
    assert built.min_lr / built.base_lr == pytest.approx(train.MIN_LR / train.BASE_LR)


def test_a_learning_rate_far_outside_the_usual_is_pointed_out():
    """D-48: one GPU with 4 images under linear scaling to 512 barely learns."""
    train = toy_config(["TRAIN.LR_SCALING", "linear"]).TRAIN
    warning = lr_warning(build_schedule(train, 10, 4), "adamw", "linear")
    assert "7.81e-06" in warning and "TRAIN.LR_SCALING" in warning
    assert lr_warning(build_schedule(train, 10, 512), "adamw", "linear") is None


@pytest.mark.parametrize(
    "opts, named",
    [
        (["TRAIN.LR_SCALING", "cubic"], "LR_SCALING 'cubic'"),
        (["TRAIN.LR_SCHEDULER.NAME", "cosin"], "LR_SCHEDULER.NAME 'cosin'"),
        (["TRAIN.BASE_LR", "-1"], "BASE_LR"),
        (["TRAIN.MIN_LR", "nan"], "MIN_LR"),
        (["TRAIN.EPOCHS", "0"], "EPOCHS"),
        (["TRAIN.LR_REFERENCE_BATCH", "0"], "LR_REFERENCE_BATCH"),
    ],
)
def test_impossible_settings_are_named(opts, named):
    with pytest.raises(UserError, match=named.replace(".", r"\.")):
        build_schedule(toy_config(opts).TRAIN, 10, 4)


def test_a_warm_up_longer_than_the_run_still_reaches_the_base_rate():
    built = build_schedule(toy_config(["TRAIN.EPOCHS", "2", "TRAIN.WARMUP_EPOCHS", "5"]).TRAIN, 10, 4)
    assert max(built.lr(step) for step in range(20)) == pytest.approx(built.base_lr)


def test_scale_factor_of_the_reference_batch_is_1():
    assert [lr_scale_factor(name, 512, 512) for name in ("none", "linear", "sqrt")] == [1.0, 1.0, 1.0]


def test_every_trainable_parameter_is_in_exactly_one_group_and_no_frozen_one_is():
    task = ToyTask()
    task.student[0].bias.requires_grad_(False)
    task.tied = task.student[0]  # shared modules must not give a parameter twice
    groups = parameter_groups(task, 0.05, lambda name: 0.1 if name.startswith("student.4") else 1.0)
    named = [pair for group in groups for pair in group["params"]]
    trainable = {id(p) for p in task.parameters() if p.requires_grad}
    assert sorted(id(p) for _, p in named) == sorted(trainable)
    assert not any(name.startswith("teacher") for name, _ in named)
    by_name = {name: group for group in groups for name, _ in group["params"]}
    assert by_name["student.0.weight"]["weight_decay"] == 0.05
    assert by_name["student.1.weight"]["weight_decay"] == 0.0, "norms are not decayed"
    assert by_name["student.4.bias"]["weight_decay"] == 0.0
    assert by_name["student.4.weight"]["lr_scale"] == 0.1
    optimizer = build_optimizer(groups, toy_config().TRAIN, CPU)
    set_lr(optimizer, 2.0)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [0.2, 2.0]


def test_nothing_to_train_is_an_error():
    with pytest.raises(UserError, match="no trainable parameter"):
        parameter_groups(freeze(nn.Linear(1, 1)), 0.1)


def test_an_optimizer_state_of_other_parameters_is_refused():
    """D-43: torch alone would match moments by position."""
    cfg = toy_config().TRAIN
    state = build_optimizer(parameter_groups(nn.Sequential(nn.Linear(2, 2)), 0.1), cfg, CPU).state_dict()
    other = build_optimizer(parameter_groups(nn.ModuleDict({"a": nn.Linear(2, 2)}), 0.1), cfg, CPU)
    with pytest.raises(UserError, match=r"a\.weight here, 0\.weight there"):
        load_optimizer_state(other, state, "ckpt.pth")


def test_restored_moments_keep_the_settings_of_now():
    """D-47"""
    net = nn.Linear(2, 2)
    cfg = toy_config(["TRAIN.WEIGHT_DECAY", "0.5"]).TRAIN
    old = build_optimizer(parameter_groups(net, cfg.WEIGHT_DECAY), cfg, CPU)
    net(torch.ones(1, 2)).sum().backward()
    old.step()
    cfg.WEIGHT_DECAY = 0.25
    new = build_optimizer(parameter_groups(net, cfg.WEIGHT_DECAY), cfg, CPU)
    load_optimizer_state(new, old.state_dict(), "ckpt.pth")
    assert {group["weight_decay"] for group in new.param_groups} == {0.25, 0.0}
    torch.testing.assert_close(new.state[net.weight]["exp_avg"], old.state[net.weight]["exp_avg"])


def test_frozen_modules_stay_in_eval_mode_and_their_statistics_do_not_move():
    task = ToyTask(teacher_norm=True)
    before = task.teacher[1].running_mean.clone()
    for _ in range(2):
        task.train()
        assert task.training and task.student[1].training and not task.teacher.training and not task.teacher[1].training
        task({"image": torch.randn(4, 3, 6, 6)})
    assert torch.equal(task.teacher[1].running_mean, before)
    task.eval()
    assert not task.student[1].training


def test_what_is_saved_leaves_frozen_modules_out_and_loads_back():
    task = ToyTask(teacher_norm=True)
    saved = task.saved_state()
    assert saved and all(name.startswith("student.") for name in saved)
    other = ToyTask(teacher_norm=True)
    other.load_saved_state(saved, "file")
    torch.testing.assert_close(other.state_dict(), task.state_dict())
    saved.pop("student.0.bias")
    with pytest.raises(UserError, match=r"student\.0\.bias"):
        other.load_saved_state(saved, "file")


def test_the_average_starts_quickly_and_can_be_swapped_in():
    """D-52"""
    net = nn.Sequential(nn.Linear(1, 1, bias=False), freeze(nn.Linear(1, 1)))
    net[0].weight.data.fill_(0.0)
    ema = Ema(net, decay=0.99)
    expected = 0.0
    for n in range(1, 6):
        net[0].weight.data.fill_(float(n))
        ema.update(n)
        decay = min(0.99, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    with ema.applied():
        assert net[0].weight.item() == pytest.approx(expected)
    assert net[0].weight.item() == 5.0
    with pytest.raises(ZeroDivisionError), ema.applied():
        raise ZeroDivisionError
    assert net[0].weight.item() == 5.0


def test_the_average_covers_batchnorm_statistics():
    task = ToyTask()
    ema = Ema(task, 0.5)
    task.student[1].running_mean.fill_(8.0)
    ema.update(1000, is_bad=torch.tensor(1.0))
    with ema.applied():
        assert task.student[1].running_mean[0].item() == 0.0
    ema.update(1000, is_bad=torch.tensor(0.0))
    with ema.applied():
        assert task.student[1].running_mean[0].item() == 4.0


def test_precision_is_chosen_by_device():
    """D-58: never fp16 unless it is asked for or the GPU has nothing better."""
    assert pick_dtype(toy_config(), CPU) == torch.float32
    assert pick_dtype(toy_config(["AMP_DTYPE", "bf16"]), CPU) == torch.bfloat16
    assert pick_dtype(toy_config(["AMP_DTYPE", "bf16", "AMP_ENABLE", "False"]), CPU) == torch.float32
    with pytest.raises(UserError, match="needs CUDA"):
        pick_dtype(toy_config(["AMP_DTYPE", "fp16"]), CPU)
    with pytest.raises(UserError, match="AMP_DTYPE 'half'"):
        pick_dtype(toy_config(["AMP_DTYPE", "half"]), CPU)


def test_a_batch_moves_whatever_its_structure():
    batch = {"a": [torch.ones(2), "key"], "b": (torch.zeros(1), 3)}
    moved = to_device(batch, torch.device("meta"))
    assert moved["a"][0].is_meta and moved["b"][0].is_meta and moved["a"][1] == "key" and moved["b"][1] == 3
    assert Task().batch_size(batch) == 2
    with pytest.raises(TypeError, match="batch_size must be overridden"):
        Task().batch_size(["no tensor"])
