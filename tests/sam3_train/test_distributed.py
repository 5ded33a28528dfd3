"""Several gloo processes: the same result as one, the same weights on each, and one end for all."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from toy_training import Group, ToyTask, newest, run_group, toy_config, toy_loaders, train_toy

from sam3_train.checkpoint import CheckpointManager, load_checkpoint, state_dict_sha256
from sam3_train.distributed import (
    all_gather_object,
    barrier,
    broadcast_object,
    is_main,
    mean_over_ranks,
    patient_barrier,
    rank,
    training_run,
    world_size,
)
from sam3_train.errors import Interrupted, UserError
from sam3_train.learner import Learner, Member
from sam3_train.log import read_metrics
from sam3_train.metrics import RunningMean
from sam3_train.replicas import BatchNormStatistics, check_replicas
from sam3_train.rng import seed_everything
from sam3_train.stop_signal import StopSignal
from sam3_train.trainer import Trainer

END = "finished\n"


def plain_task() -> ToyTask:
    return ToyTask(norm=False)


def helpers_body() -> None:
    """What each rank checks about the helpers."""
    with training_run("cpu") as run:
        r = run.rank
        assert (rank(), world_size(), is_main()) == (r, 2, r == 0)
        assert mean_over_ranks({"b": r, "a": 2.0 * r}) == {"b": 0.5, "a": 1.0}
        assert mean_over_ranks(r) == 0.5
        tensor = torch.full((2,), float(r), requires_grad=True)
        assert torch.equal(mean_over_ranks(tensor), torch.full((2,), 0.5)) and tensor.eq(r).all()
        assert all_gather_object({"rank": r}) == [{"rank": 0}, {"rank": 1}]
        assert broadcast_object(["from", r]) == ["from", 0]
        means = RunningMean()
        means.add({"iou": torch.tensor([1.0, 0.0, 0.0]) if r == 0 else torch.tensor([1.0])})
        if r == 1:
            means.add({"only_here": 3.0})
        assert means.means_over_ranks() == {"iou": 0.5, "only_here": 3.0}
        barrier()
    print(END, end="")


def test_helpers_agree_on_two_ranks(tmp_path):
    """D-50, D-49: means weigh images, not ranks."""
    ended = run_group(helpers_body, 2, tmp_path)
    assert ended.codes == [0, 0] and ended.text.count(END) == 2, ended.text


def test_helpers_answer_on_a_single_process():
    assert (rank(), world_size(), is_main()) == (0, 1, True)
    assert mean_over_ranks({"a": 2}) == {"a": 2.0} and all_gather_object(3) == [3] and broadcast_object("x") == "x"
    barrier()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_equal_one_at_the_same_global_batch(tmp_path, accumulation):
    """D-57: gradients are averaged over ranks and micro-batches; two epochs, validation included."""
    opts = ["TRAIN.ACCUMULATION_STEPS", str(accumulation), "TRAIN.EMA_DECAY", "0.9"]
    train_toy(tmp_path / "one", opts, task=plain_task, batch_size=8)
    ended = run_group(train_toy, 2, tmp_path, tmp_path / "two", opts, task=plain_task, batch_size=4)
    assert ended.codes == [0, 0], ended.text
    one, two = (load_checkpoint(tmp_path / name / "ckpt_epoch_1.pth") for name in ("one", "two"))
    for part in ("model", "ema"):
        torch.testing.assert_close(one[part], two[part], rtol=1e-5, atol=1e-6)
    for kind, names in (("train", ("loss", "lr", "grad_norm", "global_batch")), ("val", ("loss", "index_mean"))):
        alone, together = (read_metrics(tmp_path / name, kind) for name in ("one", "two"))
        assert len(alone) == len(together) > 0
        for a, b in zip(alone, together, strict=True):
            assert [b[name] for name in names] == pytest.approx([a[name] for name in names], rel=1e-4)


def hashes_body(folder: Path) -> None:
    """Train with BatchNorm and dropout, then write this rank's hash."""
    with training_run("cpu") as run:
        torch.manual_seed(run.rank)  # the ranks start differently: rank 0's weights win
        cfg = toy_config(["TRAIN.ACCUMULATION_STEPS", "3", "TRAIN.REPLICA_CHECK_STEPS", "1", "TRAIN.EMA_DECAY", "0.9"])
        train, val = toy_loaders(run, num_images=44)
        trainer = Trainer([Member(ToyTask(), cfg, folder / "run")], train, val, run, None)
        trainer.prepare()
        trainer.train()
        learner = trainer.learners[0]
        live = state_dict_sha256(learner.task.state_dict())
        with learner.best_weights():
            average = state_dict_sha256(learner.task.state_dict())
        (folder / f"hash-{run.rank}").write_text(f"{live} {average}")


def test_two_processes_end_with_identical_weights_and_statistics(tmp_path):
    """D-51: statistics and average included, under accumulation with a partial last step, and with unequal starts."""
    ended = run_group(hashes_body, 2, tmp_path, tmp_path)
    assert ended.codes == [0, 0], ended.text
    assert (tmp_path / "hash-0").read_text() == (tmp_path / "hash-1").read_text()


def statistics_body() -> None:
    """BatchNorm statistics are the mean over ranks, and a skipped step restores them."""
    with training_run("cpu") as run:
        task = ToyTask()
        statistics = BatchNormStatistics(task)
        norm = task.student[1]
        norm.running_mean.fill_(float(run.rank))
        statistics.settle(torch.tensor(0.0))
        assert norm.running_mean.eq(0.5).all(), norm.running_mean
        norm.running_mean.fill_(float("nan"))
        statistics.settle(torch.tensor(1.0))
        assert norm.running_mean.eq(0.5).all(), norm.running_mean
    print(END, end="")


def test_statistics_of_all_ranks_count_not_only_those_of_rank_0(tmp_path):
    """D-51"""
    ended = run_group(statistics_body, 2, tmp_path)
    assert ended.text.count(END) == 2, ended.text


def no_sync_body() -> None:
    """Count what is sent per micro-batch."""
    with training_run("cpu") as run:
        train, _ = toy_loaders(run)
        learner = Learner(Member(plain_task(), toy_config(), Path()), run, 10, 16)
        learner.wrap()
        learner.train_mode()
        batches = iter(train)
        learner.backward(next(batches), 2, is_last=False)
        local = [p.grad.clone() for p in learner.task.student.parameters()]
        gathered = all_gather_object([g.tolist() for g in local])
        assert gathered[0] != gathered[1], "nothing may be synchronised before the last micro-batch"
        learner.backward(next(batches), 2, is_last=True)
        gathered = all_gather_object([p.grad.tolist() for p in learner.task.student.parameters()])
        assert gathered[0] == gathered[1]
    print(END, end="")


def test_gradients_are_synchronised_once_per_step(tmp_path):
    """D-57"""
    ended = run_group(no_sync_body, 2, tmp_path)
    assert ended.text.count(END) == 2, ended.text


class WatchedTask(ToyTask):
    """Logs what one of its parameters says, and does not train it."""

    def __init__(self) -> None:
        super().__init__(norm=False)
        self.probe = torch.nn.Conv2d(4, 1, 1)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**super().forward(batch), "probe": self.probe(self.student(batch["image"])).square().mean()}


def test_a_parameter_that_only_a_logged_term_reads_is_left_alone(tmp_path):
    """DDP's backward pass gives such a parameter no gradient, not one of zeros; the tiny tracker's hint ends so."""
    opts = ["TRAIN.FIND_UNUSED_PARAMETERS", "True", "TRAIN.WEIGHT_DECAY", "0.0"]
    ended = run_group(train_toy, 2, tmp_path, tmp_path / "run", opts, task=WatchedTask)
    assert ended.codes == [0, 0], ended.text
    seed_everything(0)
    start = WatchedTask().probe.state_dict()
    trained = newest(tmp_path / "run")["model"]
    assert torch.equal(trained["probe.weight"], start["weight"]) and torch.equal(trained["probe.bias"], start["bias"])


def diverging_body(what: str) -> None:
    """Ranks that differ in one tensor."""
    with training_run("cpu") as run:
        task = ToyTask()
        for tensor in task.state_dict().values():
            dist.broadcast(tensor, 0)
        check_replicas(task, 7)
        if run.rank == 1:
            (task.student[1].running_var if what == "buffer" else task.student[4].weight.data).view(-1)[0] += 1e-6
        check_replicas(task, 8)


@pytest.mark.parametrize("what, name", [("buffer", "student.1.running_var"), ("weight", "student.4.weight")])
def test_diverged_replicas_are_found_and_the_first_tensor_is_named(tmp_path, what, name):
    ended = run_group(diverging_body, 2, tmp_path, what)
    assert ended.codes == [2, 2]
    assert ended.text.count("error:") == 1 and "at step 8: 1 of" in ended.text and f"the first is {name}" in ended.text


def test_one_rank_with_a_bad_batch_makes_all_skip_the_step(tmp_path):
    """D-58: weights stay the same on both, and the run goes on."""
    poison = [36, 37]  # in one rank's part of some step
    ended = run_group(train_toy, 2, tmp_path, tmp_path / "run", ["TRAIN.REPLICA_CHECK_STEPS", "1"], poison=poison)
    assert ended.codes == [0, 0], ended.text
    counters = load_checkpoint(tmp_path / "run" / "ckpt_epoch_1.pth")["counters"]
    assert counters["skipped"] >= 2 and counters["updates"] + counters["skipped"] == 12


def failing_body(kind: str, where: str) -> None:
    """Rank 1 fails in one of several ways while rank 0 waits for it or works on."""
    with training_run("cpu") as run:
        if run.rank == 1:
            if kind == "kill":
                os.kill(os.getpid(), 9)
            text = f"{kind} error"  # the source line in a traceback must not look like the message
            raise UserError(text) if kind == "user" else ZeroDivisionError(text)
        if where == "collective":
            barrier()
        time.sleep(30)


@pytest.mark.parametrize("where", ["collective", "compute"])
@pytest.mark.parametrize("kind, code", [("user", 2), ("bug", 1)])
def test_one_rank_that_fails_ends_all_with_its_code_and_one_message(tmp_path, kind, code, where):
    ended = run_group(failing_body, 2, tmp_path, kind, where)
    assert ended.codes == [code, code] and ended.seconds < 50
    assert ended.text.count(f"{kind} error") == 1 and ended.text.count("Traceback") == (1 if kind == "bug" else 0), (
        ended.text
    )


@pytest.mark.parametrize("where", ["collective", "compute"])
def test_one_rank_that_is_killed_ends_the_others(tmp_path, where):
    ended = run_group(failing_body, 2, tmp_path, "kill", where)
    assert ended.codes == [1, -9] and ended.seconds < 50
    assert "Traceback" not in ended.text, ended.text


def test_a_rank_killed_while_training_ends_the_others_and_the_run_can_be_continued(tmp_path):
    """D-46: with real collectives in flight."""
    opts = ["TRAIN.SAVE_EVERY_STEPS", "2", "PRINT_FREQ", "1"]
    group = Group(train_toy, 2, tmp_path, (tmp_path / "run", opts), delay_s=0.01)
    deadline = time.monotonic() + 30
    # The pointer is there before the first checkpoint is whole.
    while not list((tmp_path / "run").glob("last.json")) or not CheckpointManager(tmp_path / "run").names():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    group.processes[0].kill()
    ended = group.wait(30)
    assert ended.codes == [-9, 1] and "Traceback" not in ended.text, ended.text
    again = run_group(train_toy, 2, tmp_path, tmp_path / "run", opts)
    assert again.codes == [0, 0] and "continuing from" in again.text, again.text


def absent_body() -> None:
    """Rank 1 fails before it joins; rank 0 must not wait for ever."""
    if os.environ["RANK"] == "1":
        raise UserError("no such folder on this machine")
    import sam3_train.distributed as distributed

    distributed.START_TIMEOUT_S = 1.0
    with training_run("cpu"):
        raise AssertionError("there is nobody to join")


def test_a_rank_that_never_comes_is_named(tmp_path):
    ended = run_group(absent_body, 2, tmp_path)
    assert ended.codes == [2, 2]
    assert "did not find the other processes at 127.0.0.1:" in ended.text and "1/2" in ended.text, ended.text


def test_an_unreachable_or_incomplete_rendezvous_is_a_user_error(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=r"rank 1 did not find .*MASTER_ADDR"), training_run("cpu"):
        raise AssertionError
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(UserError, match="RANK must be an integer, got 'one'"), training_run("cpu"):
        raise AssertionError


def interrupted_body() -> None:
    with training_run("cpu"):
        raise Interrupted("stopped, all saved")


def test_ranks_that_stop_in_agreement_say_so_once(tmp_path):
    ended = run_group(interrupted_body, 2, tmp_path)
    assert ended.codes == [130, 130] and ended.text == "stopped, all saved\n"


def signalled_body(victim: int, number: int, where: str) -> None:
    with training_run("cpu") as run:
        if run.rank == victim:
            time.sleep(0.3)  # the other one is in its collective operation
            os.kill(os.getpid(), number)
        if where == "collective":
            barrier()
        time.sleep(30)


@pytest.mark.parametrize("victim, number, where", [(0, signal.SIGTERM, "compute"), (1, signal.SIGINT, "collective")])
def test_a_signal_to_one_rank_ends_all_with_130_and_one_line(tmp_path, victim, number, where):
    """Where nothing is there to be saved."""
    ended = run_group(signalled_body, 2, tmp_path, victim, number, where)
    assert ended.codes == [130, 130] and ended.seconds < 50
    assert ended.text == f"interrupted by {signal.Signals(number).name}\n"


def waiting_body(port: int) -> None:
    """A rank that waits for one that is late; the store is the launcher's, as under torchrun."""
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    if os.environ["RANK"] == "1":
        time.sleep(60)
    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    with training_run("cpu"):
        raise AssertionError("there is nobody to join")


def test_a_signal_ends_a_rank_that_waits_for_the_others_at_once(tmp_path):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = Group(waiting_body, 2, tmp_path, (store.port,))
    group.processes[0].join(20)
    assert group.processes[0].exitcode == 130
    assert group.log.read_text() == "interrupted by SIGTERM\n"
    group.processes[1].kill()
    assert group.wait().codes == [130, -9]


def stopping_body(folder: Path, victim: int) -> None:
    """One rank gets a signal; the others learn of it, also while they wait."""
    with training_run("cpu") as run, StopSignal(run.watch) as stop:
        barrier()
        if run.rank == victim:
            os.kill(os.getpid(), signal.SIGTERM)
        while not stop.requested:
            time.sleep(0.01)
        (folder / f"requested-{run.rank}").write_text(stop.requested)
        patient_barrier()
        raise Interrupted("all saved")


@pytest.mark.parametrize("victim", [0, 2])
def test_a_stop_signal_is_passed_on_to_all_ranks(tmp_path, victim):
    ended = run_group(stopping_body, 3, tmp_path, tmp_path, victim)
    assert ended.codes == [130, 130, 130] and ended.text == "all saved\n"
    heard = [(tmp_path / f"requested-{r}").read_text() for r in range(3)]
    assert heard == ["SIGTERM" if r == victim else f"SIGTERM on rank {victim}" for r in range(3)]
