"""How a command ends: exit code and what it prints."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sam3.preprocess import Preprocess
from sam3_train.errors import Interrupted, UserError, run_cli


def body(error: BaseException | None):
    def main_body(argv):
        if error is not None:
            raise error

    return main_body


def test_success_is_0_and_a_returned_code_is_kept():
    assert run_cli(body(None)) == 0
    assert run_cli(lambda argv: 3) == 3


def test_arguments_are_passed_on():
    assert run_cli(lambda argv: len(argv), ["a", "b"]) == 2


def test_a_user_error_is_2_with_one_line_and_no_traceback(capsys):
    assert run_cli(body(UserError("config.yaml: no such key"))) == 2
    assert capsys.readouterr().err == "error: config.yaml: no such key\n"


def test_a_preprocessing_mismatch_is_a_user_error(capsys):
    """D-01"""
    with pytest.raises(ValueError) as caught:
        Preprocess().require_equal(Preprocess.letterbox_imagenet(), "the config", "the store")
    assert run_cli(body(caught.value)) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_error_of_a_checkpoint_is_a_user_error(tmp_path, capsys):
    from sam3.checkpoint_io import read_state_dict

    assert run_cli(lambda argv: read_state_dict(tmp_path / "none.pt")) == 2
    assert "none.pt" in capsys.readouterr().err


def test_a_bug_is_1_with_a_traceback(capsys):
    assert run_cli(body(ZeroDivisionError("x"))) == 1
    assert "Traceback" in capsys.readouterr().err


def test_interruptions_are_130(capsys, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *args: None)
    assert run_cli(body(Interrupted("stopped at step 3"))) == 130
    assert run_cli(body(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err.splitlines() == ["stopped at step 3", "interrupted by SIGINT"]


def test_argparse_keeps_its_own_exit():
    with pytest.raises(SystemExit):
        run_cli(lambda argv: sys.exit(2))


def test_an_error_that_all_ranks_make_is_printed_by_the_local_main_process_only(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run_cli(body(UserError("no such file"))) == 2
    assert capsys.readouterr().err == ""


def test_several_problems_are_reported_at_once():
    message = str(UserError.from_problems("preflight", ["no photos", "no disk"]))
    assert message == "preflight: 2 problems\n  - no photos\n  - no disk"
    assert str(UserError.from_problems("preflight", ["no photos"])) == "preflight: no photos"


def test_a_closed_output_is_one_line_and_no_traceback():
    """As when a plan is read with `head`; whether Python finds out at the first print or at its end."""
    code = "import sys; from sam3_train.errors import run_cli; sys.exit(run_cli(lambda _: print('x' * {size})))"
    for size in (10, 1_000_000):
        read, write = os.pipe()
        os.close(read)
        command = [sys.executable, "-c", code.format(size=size)]
        ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
        os.close(write)
        assert ended.returncode == 1
        assert ended.stderr == "stopped: whoever read the output has closed it, as `head` does\n"


def test_a_pipe_that_breaks_elsewhere_is_a_bug(capsys):
    def body(argv):
        raise BrokenPipeError("a worker is gone")

    assert run_cli(body, []) == 1
    assert "Traceback" in capsys.readouterr().err
