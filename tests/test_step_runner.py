"""The demo's steps: run once, reused while nothing changed, repeated from the first change on."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from step_runner import Step, StepFailedError, run_command, run_steps


class Job:
    """Two steps that append to a log and copy a number on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.txt"
        self.config.write_text("1")
        self.log = folder / "log.txt"
        self.first, self.second = folder / "first.txt", folder / "second.txt"

    def steps(self, word: str = "hello") -> list[Step]:
        first = f"echo first >>{self.log}; cat {self.config} >{self.first}"
        second = f"echo second >>{self.log}; (echo {word}; cat {self.first}) >{self.second}"
        return [
            Step("first", "Make the first", ["bash", "-c", first], [self.config], [self.first]),
            Step("second", "Make the second", ["bash", "-c", second], [], [self.second]),
        ]

    def run(self, **kwargs: str) -> list[str]:
        """Names of the steps that really ran."""
        self.log.write_text("")
        run_steps(self.steps(**kwargs), self.folder / "stamps", self.folder)
        return self.log.read_text().split()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_a_second_run_reuses_every_step(job, capfd):
    assert job.run() == ["first", "second"]
    assert "$ bash -c" in capfd.readouterr().out
    assert job.run() == []
    assert capfd.readouterr().out.count("done before") == 2


def test_a_changed_input_repeats_its_step_and_all_later_ones(job):
    job.run()
    job.config.write_text("2")
    assert job.run() == ["first", "second"]
    assert job.second.read_text() == "hello\n2"


def test_a_changed_command_repeats_only_what_depends_on_it(job):
    job.run()
    assert job.run(word="goodbye") == ["second"]


def test_a_deleted_result_and_a_damaged_stamp_are_made_again(job):
    job.run()
    job.second.unlink()
    assert job.run() == ["second"]
    (job.folder / "stamps" / "01-first.json").write_text("{half a rec")
    assert job.run() == ["first"]


class Training:
    """A command that goes on from what it finds, as export and training do: it counts up to 2 in its own folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "rate.txt"
        self.done = folder / "run" / "epochs.txt"

    def run(self, rate: str, fail_after: int = 9) -> str:
        """The rates of the two epochs that the run folder holds afterwards."""
        self.config.write_text(rate)
        (self.folder / "fail_after.txt").write_text(str(fail_after))
        loop = (
            "mkdir -p run; touch run/epochs.txt\n"
            "while [ $(wc -l <run/epochs.txt) -lt 2 ]; do\n"
            "  [ $(wc -l <run/epochs.txt) -lt $(cat fail_after.txt) ] || exit 130\n"
            "  (cat rate.txt; echo) >>run/epochs.txt\ndone"
        )
        step = Step("train", "Train", ["bash", "-c", loop], [self.config], [self.done], owned=[self.folder / "run"])
        try:
            run_steps([step], self.folder / "stamps", self.folder)
        except StepFailedError as error:
            assert error.exit_code == 130
        return self.done.read_text()


def test_a_changed_input_of_a_resumable_step_starts_it_from_nothing(tmp_path):
    training = Training(tmp_path)
    assert training.run("a") == "a\na\n"
    assert training.run("b") == "b\nb\n", "the finished run would have done nothing"


def test_an_interrupted_step_goes_on_unless_its_inputs_changed_meanwhile(tmp_path):
    training = Training(tmp_path)
    assert training.run("a", fail_after=1) == "a\n"
    training.done.write_text("A\n")  # marks what the first part made
    assert training.run("a") == "A\na\n"
    (tmp_path / "stamps" / "01-train.json").unlink()
    training.done.write_text("A\n")
    assert training.run("b") == "b\nb\n"


def test_output_that_no_step_has_made_is_not_deleted(tmp_path):
    training = Training(tmp_path)
    training.done.parent.mkdir()
    training.done.write_text("mine\n")
    assert training.run("a") == "mine\na\n"


def test_a_failed_step_names_itself_keeps_its_exit_code_and_stops_the_job(job):
    steps = job.steps()
    steps.insert(1, Step("broken", "Break", ["bash", "-c", "echo no such photo >&2; exit 2"]))
    with pytest.raises(StepFailedError, match=r"\[2/3\] Break: failed with exit code 2") as failure:
        run_steps(steps, job.folder / "stamps", job.folder)
    assert failure.value.exit_code == 2
    assert job.first.exists()
    assert not job.second.exists()


def test_a_step_that_leaves_a_result_out_has_failed(job):
    step = Step("empty", "Make nothing", ["true"], results=[job.folder / "never.txt"])
    with pytest.raises(StepFailedError, match=r"ended well but left out .*never\.txt"):
        run_steps([step], job.folder / "stamps", job.folder)
    assert list((job.folder / "stamps").glob("*.json")) == []


def test_missing_inputs_and_commands_are_clear(job):
    with pytest.raises(StepFailedError, match=r"its input .*nothing\.yaml is missing"):
        run_steps([Step("s", "S", ["true"], [job.folder / "nothing.yaml"])], job.folder / "stamps", job.folder)
    with pytest.raises(StepFailedError, match="no-such-command is not a command"):
        run_steps([Step("s", "S", ["no-such-command"])], job.folder / "stamps", job.folder)


def test_environment_settings_are_part_of_the_command(job):
    step = Step("s", "S", ["bash", "-c", 'echo "$WORD" >word.txt'], env={"WORD": "two words"})
    assert step.command_line.startswith("WORD='two words' bash -c")
    run_steps([step], job.folder / "stamps", job.folder)
    assert (job.folder / "word.txt").read_text() == "two words\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_reaches_the_commands_children_and_their_exit_is_waited_for(tmp_path, number):
    before = signal.getsignal(number)  # a background job of a shell ignores SIGINT
    inner = "import signal, sys, time\n"
    inner += f"signal.signal({int(number)}, lambda *_: (open('saved.txt', 'w').write('x'), sys.exit(130)))\n"
    inner += "open('ready.txt', 'w').write('x')\ntime.sleep(30)\n"
    (tmp_path / "inner.py").write_text(inner)

    def interrupt() -> None:
        deadline = time.monotonic() + 20
        while not (tmp_path / "ready.txt").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    # A shell around the real program, as a launcher is.
    run_command(["bash", "-c", f"{sys.executable} inner.py; exit $?"], tmp_path, {})
    thread.join()
    deadline = time.monotonic() + 5
    while not (tmp_path / "saved.txt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (tmp_path / "saved.txt").exists()
    assert signal.getsignal(number) == before


def test_a_command_killed_by_a_signal_has_a_shells_exit_code(tmp_path):
    assert run_command(["bash", "-c", "kill -9 $$"], tmp_path, {}) == 137
