"""What a user can do wrong, and how a command line says so.

A command's ``main(argv)`` is a thin call of `run_cli`, which turns each way to end into an exit code:
0 done, 2 a user's mistake (one or a few lines, no traceback), 1 a bug (traceback) or an output that nobody reads any
more (one line), 130 interrupted after saving.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

_MODEL_ERRORS = (
    ("sam3.checkpoint_io", "CheckpointError"),
    ("sam3.image_input", "ImageInputError"),
    ("sam3.preprocess", "PreprocessMismatchError"),
    ("sam3.sam.prompts", "PromptError"),
)

MainBody = Callable[["list[str] | None"], "int | None"]
T = TypeVar("T")


class UserError(Exception):
    """Something the user can repair: the message names the file or setting, the bad value and the remedy."""

    @classmethod
    def from_problems(cls, what: str, problems: Sequence[str]) -> UserError:
        """One error for several problems found at once, as a preflight reports them."""
        if len(problems) == 1:
            return cls(f"{what}: {problems[0]}")
        return cls(f"{what}: {len(problems)} problems\n" + "\n".join(f"  - {problem}" for problem in problems))


class Interrupted(Exception):
    """The run was asked to stop (SIGTERM or SIGINT) and has saved its state."""


def user_error_types() -> tuple[type[BaseException], ...]:
    """The exceptions that mean a mistake of the user and not of the program.

    Those of `sam3` are looked up and not imported: an error of a module that nothing has loaded cannot occur.
    """
    found = (getattr(sys.modules.get(module), name, None) for module, name in _MODEL_ERRORS)
    return (UserError, *(error for error in found if error is not None))


def attempt(problems: list[str], check: Callable[[], T]) -> T | None:
    """The check's result; what a user can repair goes to the problems (once) instead of ending the preflight."""
    try:
        return check()
    except user_error_types() as error:
        if str(error) not in problems:
            problems.append(str(error))
        return None


def require_no_problems(problems: Sequence[str]) -> None:
    """Raise one error for all problems that a preflight found.

    Raises:
        UserError: If there is any.
    """
    if problems:
        raise UserError.from_problems("nothing was computed, the run cannot start", problems)


def exit_code_of(error: BaseException) -> int:
    """The exit code that a command ends with when ``error`` reaches `run_cli`."""
    agreed = getattr(error, "exit_code", None)  # set by training_run: what all ranks end with
    if isinstance(agreed, int):
        return agreed
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else EXIT_BUG if error.code else EXIT_DONE
    if isinstance(error, (Interrupted, KeyboardInterrupt)):
        return EXIT_INTERRUPTED
    return EXIT_USER_ERROR if isinstance(error, user_error_types()) else EXIT_BUG


def run_cli(main_body: MainBody, argv: list[str] | None = None) -> int:
    """Run a command and map the way it ends to an exit code.

    Under torchrun a mistake that every rank makes is printed once (by the node's local rank 0), and an error that
    another rank has already reported (`sam3_train.distributed.training_run` knows) is not repeated.

    Args:
        main_body: The command; gets ``argv`` (None means ``sys.argv[1:]``) and returns an exit code or None for 0.
        argv: Passed through.

    Returns:
        0, 1, 2 or 130 as described in the module's docstring, or what ``main_body`` returned.
    """
    try:
        code = main_body(argv) or EXIT_DONE
        sys.stdout.flush()
        return code
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _give_up_closed_stdout():
            print("stopped: whoever read the output has closed it, as `head` does", file=sys.stderr, flush=True)
            return EXIT_BUG
        code = exit_code_of(error)
        if _should_report(error):
            _report(error, code)
        return code
    except KeyboardInterrupt as error:
        if _should_report(error):
            print(f"interrupted by {str(error) or 'SIGINT'}", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED


def _give_up_closed_stdout() -> bool:
    """Whether nobody reads the standard output any more; then it goes nowhere, also what Python writes at its end."""
    try:
        print(flush=True)  # any pipe may have broken; only trying tells which
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _report(error: Exception, code: int) -> None:
    if code == EXIT_BUG and not isinstance(error, user_error_types()):
        traceback.print_exception(error)
    elif code == EXIT_USER_ERROR:
        print(f"error: {error}", file=sys.stderr)
    else:
        print(str(error) or "interrupted", file=sys.stderr)
        if "LOCAL_RANK" in os.environ and threading.current_thread() is threading.main_thread():
            # torchrun sends SIGTERM to the ranks that end a moment later; they must still end with 130.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.stderr.flush()


def _should_report(error: BaseException) -> bool:
    reported = getattr(error, "report_on_this_rank", None)
    if reported is not None:
        return bool(reported)
    return os.environ.get("LOCAL_RANK", "0") == "0"
