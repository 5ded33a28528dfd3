"""What the loop does at a step, at a log line and at the end of an epoch, in one process."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.data import DataLoader
from toy_training import ToyData, ToyTask, newest, toy_config, toy_loaders, train_toy, train_toys

from sam3_train.checkpoint import load_checkpoint
from sam3_train.data.samplers import ResumableDistributedSampler
from sam3_train.distributed import RunContext
from sam3_train.errors import UserError
from sam3_train.learner import Learner, Member
from sam3_train.log import read_metrics
from sam3_train.loop import fit
from sam3_train.rng import seed_everything
from sam3_train.train_state import Best
from sam3_train.trainer import Trainer
from sam3_train.validation import run_validation

CPU = RunContext(torch.device("cpu"))
ONE_EPOCH = ["TRAIN.EPOCHS", "1"]


def plain_task() -> ToyTask:
    return ToyTask(norm=False)


def weights(folder, name="ckpt_epoch_0.pth") -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / name)["model"]


def reference_run(accumulation: int, steps: int, num_images: int = 44, epochs: int = 1) -> dict[str, torch.Tensor]:
    """The same training written out by hand: no loop of ours, the sampler's order only."""
    seed_everything(0)
    task, cfg, batch = plain_task(), toy_config().TRAIN, 4
    data, sampler = ToyData(num_images), ResumableDistributedSampler(num_images)
    groups: list[list[list[int]]] = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        order = list(sampler)
        batches = [order[i : i + batch] for i in range(0, len(order) - batch + 1, batch)]
        groups += [batches[i : i + accumulation] for i in range(0, len(batches), accumulation)]
    decayed = [p for n, p in task.student.named_parameters() if p.ndim > 1]
    others = [p for n, p in task.student.named_parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}])
    warmup = min(len(groups) // epochs, len(groups) // 2)
    for step, group in enumerate(groups[:steps]):
        progress = (step - warmup) / (len(groups) - warmup)
        rate = 1e-5 + (1e-3 - 1e-5) * 0.5 * (1 + math.cos(math.pi * progress))
        rate = 1e-6 + (1e-3 - 1e-6) * step / warmup if step < warmup else rate
        for settings in optimizer.param_groups:
            settings["lr"] = rate
        optimizer.zero_grad()
        for indices in group:
            images = torch.stack([data[index]["image"] for index in indices])
            (task({"image": images})["loss"] / len(group)).backward()
        torch.nn.utils.clip_grad_norm_(task.student.parameters(), cfg.CLIP_GRAD)
        optimizer.step()
    return task.state_dict()


@pytest.mark.parametrize("accumulation", [1, 3, 4])
def test_an_epoch_equals_the_same_training_written_out_by_hand(tmp_path, accumulation):
    """Zeroing, averaging over micro-batches, the last partial step (11 batches), clipping, schedule and decay."""
    train_toy(tmp_path, [*ONE_EPOCH, "TRAIN.ACCUMULATION_STEPS", str(accumulation)], task=plain_task, num_images=44)
    expected = reference_run(accumulation, steps=99)
    for name, tensor in weights(tmp_path).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)


def test_no_gradient_leaks_into_the_next_epoch(tmp_path):
    """D-91: an epoch's 11 batches are steps of 4, 4 and 3, and the next epoch begins with a step of its own 4."""
    opts = ["TRAIN.EPOCHS", "2", "TRAIN.ACCUMULATION_STEPS", "4"]
    train_toy(tmp_path, opts, task=plain_task, num_images=44)
    expected = reference_run(4, steps=99, epochs=2)
    for name, tensor in weights(tmp_path, "ckpt_epoch_1.pth").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
    assert newest(tmp_path)["counters"]["updates"] == 6


def test_a_step_that_is_not_finite_changes_nothing_and_does_not_advance_the_schedule(tmp_path):
    """D-58: weights, moments, BatchNorm statistics and the schedule are as if the poisoned batch had not come."""
    poisoned = ResumableDistributedSampler(48).order()[8:12]
    opts = [*ONE_EPOCH, "TRAIN.MAX_STEPS", "3", "TRAIN.EMA_DECAY", "0.9"]
    train_toy(tmp_path / "bad", opts, poison=poisoned)
    train_toy(tmp_path / "good", [*opts[:3], "2", *opts[4:]])
    bad, good = (newest(tmp_path / name) for name in ("bad", "good"))
    assert bad["counters"] == {"updates": 2, "skipped": 1, "skipped_in_row": 1}
    for part in ("model", "ema"):
        for name in good[part]:
            if not name.endswith("num_batches_tracked"):
                assert torch.equal(bad[part][name], good[part][name]), f"{part} {name}"
    assert bad["optimizer"]["state"][0]["step"].item() == 2.0
    log = read_metrics(tmp_path / "bad", "train")[-1]
    assert log["skipped_steps"] == 1 and math.isfinite(log["loss"]) and math.isfinite(log["grad_norm"])


def test_many_such_steps_in_a_row_end_the_run_with_the_reason(tmp_path):
    """D-58"""
    with pytest.raises(UserError, match=r"3 steps in a row .*not finite.*BASE_LR"):
        train_toy(tmp_path, [*ONE_EPOCH, "TRAIN.MAX_NONFINITE_STEPS", "3"], poison=range(48))


def test_an_infinite_loss_with_finite_gradients_is_skipped_too(tmp_path):
    class Infinite(ToyTask):
        def forward(self, batch):
            terms = super().forward(batch)
            return {**terms, "loss": terms["loss"] + (torch.inf if self.training else 0.0)}

    train_toy(tmp_path, ["TRAIN.MAX_STEPS", "2"], task=Infinite)
    assert newest(tmp_path)["counters"]["updates"] == 0


def test_the_log_says_what_a_run_needs(tmp_path):
    """D-05, D-48, D-50: clipped share, effective rate, global batch, each term undivided by accumulation."""
    train_toy(tmp_path, ["TRAIN.ACCUMULATION_STEPS", "2", "TRAIN.CLIP_GRAD", "1e-3"], num_images=32)
    record = read_metrics(tmp_path, "train")[-1]
    assert record["clip_fraction"] == 1.0 and record["global_batch"] == 8 and record["lr"] > 0
    assert record["images_per_s"] > 0 and 0 <= record["data_wait_share"] <= 1 and record["peak_memory_mb"] > 50
    assert record["loss"] == pytest.approx(record["mse"]) and 0.2 < record["loss"] < 1.0
    free = ["TRAIN.CLIP_GRAD", "0", "TRAIN.MAX_STEPS", "4"]
    train_toy(tmp_path / "free", free)
    assert read_metrics(tmp_path / "free", "train")[-1]["clip_fraction"] == 0.0


def test_the_output_tree_is_as_documented(tmp_path):
    """D-61: no colons in any name; scalars of all terms."""
    train_toy(tmp_path)
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert {"ckpt_epoch_0.pth", "ckpt_epoch_1.pth", "best.pth", "last.json", "log_rank0.txt", "metrics.jsonl"} <= names
    assert any(name.startswith("tensorboard/events.") for name in names)
    assert not any(":" in name for name in names)
    assert "epoch 1 val: loss" in (tmp_path / "log_rank0.txt").read_text()


def test_tensorboard_holds_every_term_of_train_and_val(tmp_path):
    """D-61"""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_toy(tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"train/loss", "train/mse", "train/lr", "train/images_per_s", "val/loss"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("val/loss")] == [12, 24]


def test_validation_picks_the_best_and_counts_each_image_once(tmp_path):
    """D-49: 11 images in batches of 4, the last one smaller."""
    result = train_toy(tmp_path, ["TRAIN.EPOCHS", "3"])
    records = read_metrics(tmp_path, "val")
    assert [record["epoch"] for record in records] == [0, 1, 2]
    assert all(record["index_mean"] == pytest.approx(5.0) for record in records)
    assert result.best.value == min(record["loss"] for record in records)
    best = load_checkpoint(tmp_path / "best.pth")
    assert best["epoch"] == result.best.epoch and best["metrics"]["loss"] == result.best.value


def test_validation_uses_the_average_and_leaves_the_live_weights(tmp_path):
    """D-52"""
    seen = []

    class Watching(ToyTask):
        def validate(self, batch):
            assert not self.training and not torch.is_grad_enabled()
            seen.append(self.student[0].weight.clone())
            return super().validate(batch)

    train_toy(tmp_path, [*ONE_EPOCH, "TRAIN.EMA_DECAY", "0.99"], task=Watching)
    state = load_checkpoint(tmp_path / "ckpt_epoch_0.pth")
    assert torch.equal(seen[-1], state["ema"]["student.0.weight"])
    assert not torch.equal(seen[-1], state["model"]["student.0.weight"])


def test_random_prompts_in_validation_are_the_same_each_epoch_and_do_not_touch_training(tmp_path):
    drawn = []

    class Drawing(ToyTask):
        def validate(self, batch):
            drawn.append(torch.rand(1).item())
            return super().validate(batch)

    train_toy(tmp_path / "a", task=Drawing)
    assert drawn[:3] == drawn[3:] and len(set(drawn)) == 3
    train_toy(tmp_path / "b")
    torch.testing.assert_close(weights(tmp_path / "a", "ckpt_epoch_1.pth"), weights(tmp_path / "b", "ckpt_epoch_1.pth"))


def test_a_metric_that_is_not_finite_is_never_the_best():
    best = Best("iou", "max")
    assert not best.improves({"iou": math.nan}) and not best.improves({})
    assert best.improves({"iou": 0.1})
    best.value = 0.5
    assert best.improves({"iou": 0.6}) and not best.improves({"iou": 0.5})
    assert Best("loss", "min", 1.0).improves({"loss": 0.9})


def test_a_task_whose_metric_is_missing_says_which_there_are(tmp_path):
    class Wrong(ToyTask):
        best_metric = "accuracy"

    with pytest.raises(TypeError, match=r"\['index_mean', 'loss'\], not the task's best_metric 'accuracy'"):
        train_toy(tmp_path, task=Wrong)


def test_save_freq_thins_epochs_but_keeps_the_last(tmp_path):
    """D-56"""

    class Worsening(ToyTask):
        calls = 0

        def validate(self, batch):
            Worsening.calls += 1
            return {"loss": torch.tensor(float(Worsening.calls))}

    opts = ["TRAIN.EPOCHS", "6", "SAVE_FREQ", "4", "TRAIN.KEEP_LAST", "9", "PRINT_FREQ", "0"]
    train_toy(tmp_path, opts, task=Worsening, num_images=8)
    assert sorted(path.name for path in tmp_path.glob("ckpt*")) == [f"ckpt_epoch_{e}.pth" for e in (0, 4, 5)]


def test_a_frozen_batchnorm_setting_keeps_statistics(tmp_path):
    """D-51: EVAL_BN_WHEN_TRAINING"""
    train_toy(tmp_path, [*ONE_EPOCH, "TRAIN.EVAL_BN_WHEN_TRAINING", "True"])
    assert weights(tmp_path)["student.1.running_mean"].eq(0).all()


def test_a_frozen_part_gets_no_gradient_and_keeps_its_bits(tmp_path):
    made = []

    def task():
        made.append(ToyTask(teacher_norm=True))
        made[0].before = {name: t.clone() for name, t in made[0].teacher.state_dict().items()}
        return made[0]

    train_toy(tmp_path, ONE_EPOCH, task=task)
    assert all(torch.equal(made[0].before[name], t) for name, t in made[0].teacher.state_dict().items())
    assert all(p.grad is None for p in made[0].teacher.parameters())


def test_an_online_teacher_runs_once_per_batch_for_all_students(tmp_path):
    """D-63: prepare_batch makes the targets without a gradient, in training and in validation."""
    calls = []

    def prepare(batch):
        assert not torch.is_grad_enabled()
        calls.append(len(batch["image"]))
        return batch

    train, val = toy_loaders(CPU)
    fit(ToyTask(), train, val, toy_config(ONE_EPOCH), CPU, tmp_path, prepare_batch=prepare)
    assert calls == [4] * 12 + [4, 4, 3]


def test_students_that_share_a_pass_must_agree(tmp_path):
    with pytest.raises(UserError, match="output folder of its own"):
        train_toys([tmp_path / "a", tmp_path / "a"])
    members = [Member(ToyTask(), toy_config(["TRAIN.EPOCHS", n]), tmp_path / n) for n in ("1", "2")]
    from sam3_train.loop import fit_many

    with pytest.raises(UserError, match=r"agree on TRAIN\.EPOCHS: 1 in .*, 2 in"):
        fit_many(members, *toy_loaders(CPU), CPU)


def test_too_few_images_for_one_batch_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"3 images, too few for one batch of 4.*DATA\.BATCH_SIZE"):
        train_toy(tmp_path, num_images=3)


def test_a_loader_that_cannot_be_resumed_is_a_bug_that_is_named(tmp_path):
    loader = DataLoader(ToyData(8), 4, shuffle=True)
    with pytest.raises(TypeError, match="ResumableDistributedSampler, got RandomSampler"):
        fit(ToyTask(), loader, None, toy_config(), CPU, tmp_path)


def test_without_a_val_split_training_runs_and_there_is_no_best(tmp_path):
    train, _ = toy_loaders(CPU)
    result = fit(ToyTask(), train, None, toy_config(ONE_EPOCH), CPU, tmp_path)
    assert result.metrics == {} and result.best.value is None and not (tmp_path / "best.pth").exists()


def test_between_log_lines_a_step_reads_nothing_but_its_flags(tmp_path, monkeypatch):
    """D-54: no value of the device is fetched per step, except one small tensor that decides on stop, save and skip."""
    reads = []
    for name in ("item", "tolist", "__float__", "__bool__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *args, _f=original, _n=name: reads.append(_n) or _f(self, *args)
        )
    counts = []
    for steps in (4, 12):
        reads.clear()
        train, _ = toy_loaders(CPU)
        opts = [*ONE_EPOCH, "PRINT_FREQ", "0", "TRAIN.MAX_STEPS", str(steps), "TRAIN.CLIP_GRAD", "0"]
        fit(plain_task(), train, None, toy_config(opts), CPU, tmp_path / str(steps))
        counts.append(len(reads))
    # The loader's order is one list per epoch; its dataset's own tensors cost nothing here.
    assert counts[1] - counts[0] <= 8 * 1


@pytest.mark.parametrize("opts", [[], ["TRAIN.SAVE_EVERY_STEPS", "5", "TRAIN.EMA_DECAY", "0.9"]])
def test_reading_the_flags_one_step_late_changes_no_result(tmp_path, monkeypatch, opts):
    """D-54, D-58: what CUDA does, done on the CPU: skipped steps, EMA, checkpoints and resume end the same."""
    poison = ResumableDistributedSampler(48).order()[16:20]
    train_toy(tmp_path / "now", opts, poison=poison)
    original = Trainer.__init__

    def late(self, *args):
        original(self, *args)
        self.reads_flags_late = True

    monkeypatch.setattr(Trainer, "__init__", late)
    train_toy(tmp_path / "late", [*opts, "TRAIN.MAX_STEPS", "7"], poison=poison)
    train_toy(tmp_path / "late", opts, poison=poison)
    now, late_state = (load_checkpoint(tmp_path / name / "ckpt_epoch_1.pth") for name in ("now", "late"))
    assert now["counters"] == late_state["counters"] and now["counters"]["skipped"] >= 2
    for part in ("model", "ema"):
        assert all(torch.equal(tensor, late_state[part][name]) for name, tensor in now.get(part, {}).items())


def test_workers_that_live_on_see_each_epochs_order(tmp_path):
    """D-55: persistent workers, and a resume inside the second epoch, give the weights of a plain loader."""

    def run(folder, opts, **options):
        seed_everything(0)
        sampler = ResumableDistributedSampler(24)
        loader = DataLoader(ToyData(24), 4, sampler=sampler, drop_last=True, **options)
        return fit(ToyTask(), loader, None, toy_config(opts), CPU, tmp_path / folder)

    run("plain", [])
    run("workers", ["TRAIN.MAX_STEPS", "8"], num_workers=1, persistent_workers=True)
    run("workers", [], num_workers=1, persistent_workers=True)
    plain, workers = (weights(tmp_path / name, "ckpt_epoch_1.pth") for name in ("plain", "workers"))
    assert all(torch.equal(plain[name], workers[name]) for name in plain)


def test_bf16_on_the_cpu_trains_and_keeps_float32_weights(tmp_path):
    result = train_toy(tmp_path, ["AMP_DTYPE", "bf16"])
    assert math.isfinite(result.metrics["loss"])
    assert weights(tmp_path)["student.0.weight"].dtype == torch.float32


def test_sgd_and_linear_schedule_train(tmp_path):
    opts = ["TRAIN.OPTIMIZER.NAME", "sgd", "TRAIN.LR_SCHEDULER.NAME", "linear", "TRAIN.BASE_LR", "0.05"]
    train_toy(tmp_path, [*opts, "TRAIN.EPOCHS", "6"])
    losses = [record["loss"] for record in read_metrics(tmp_path, "val")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "opts, named",
    [
        (["TRAIN.OPTIMIZER.NAME", "adam"], "OPTIMIZER.NAME 'adam'"),
        (["TRAIN.ACCUMULATION_STEPS", "0"], "ACCUMULATION_STEPS"),
        (["TRAIN.EMA_DECAY", "1.5"], "EMA_DECAY"),
    ],
)
def test_impossible_training_settings_are_named(tmp_path, opts, named):
    with pytest.raises(UserError, match=named):
        train_toy(tmp_path, opts)


def test_validation_can_be_stopped_between_batches():
    _, val = toy_loaders(CPU)
    task = ToyTask()
    assert run_validation([task], val, CPU, [torch.float32], should_stop=lambda: True) is None
    assert run_validation([task], val, CPU, [torch.float32])[0]["index_mean"] == pytest.approx(5.0)


def test_a_dropped_learner_setting_is_found_before_any_step(tmp_path):
    """Learning rates are checked when the learner is built, so that a dry run reports them."""
    cfg = toy_config(["TRAIN.LR_SCALING", "sqroot"])
    with pytest.raises(UserError, match="LR_SCALING 'sqroot'"):
        Learner(Member(ToyTask(), cfg, tmp_path), CPU, 10, 4)
