"""How the model library's own commands end: 0 done, 2 a mistake of the user (no traceback), 130 interrupted.

Anything else is a bug: it leaves ``main`` as an exception, and Python prints its traceback and ends with 1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

EXIT_DONE = 0
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

_USER_ERRORS = {
    "sam3.checkpoint_io": "CheckpointError",
    "sam3.image_input": "ImageInputError",
    "sam3.preprocess": "PreprocessMismatchError",
    "sam3.sam.prompts": "PromptError",
    "sam3.video.frame_source": "VideoInputError",
}

MainBody = Callable[["list[str] | None"], "int | None"]


class CommandError(Exception):
    """Something the user can repair: the message names the file or option, the bad value and the remedy."""

    @classmethod
    def from_problems(cls, problems: Sequence[str]) -> CommandError:
        """One error for everything that is wrong, so that it is repaired in one go."""
        if len(problems) == 1:
            return cls(problems[0])
        return cls(f"{len(problems)} problems\n" + "\n".join(f"  - {problem}" for problem in problems))


def run_command(main_body: MainBody, argv: list[str] | None = None) -> int:
    """Run a command and map the way it ends to an exit code.

    Args:
        main_body: The command; gets ``argv`` (None means ``sys.argv[1:]``) and returns an exit code or None for 0.
        argv: Passed through.
    """
    try:
        code = main_body(argv) or EXIT_DONE
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python flushes at its end
        return EXIT_DONE
    except Exception as error:
        if not isinstance(error, _user_error_types()):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED


def _user_error_types() -> tuple[type[BaseException], ...]:
    """Looked up, not imported: an error of a module that nothing has loaded cannot occur, and torch takes seconds."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in _USER_ERRORS.items())
    return (CommandError, *(error for error in found if error is not None))
