"""Photos that cannot be read: found once, written down, and skipped by export and training alike.

A list is a text file with one image per line: key, tab, reason. `python -m sam3_train.data.validate` makes one for a
whole data set; a loader appends to its run's list what it meets.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from sam3_train.errors import UserError

BAD_IMAGES_FILE = "bad_images.txt"
_log = logging.getLogger(__name__)


def read_bad_images(path: str | Path) -> dict[str, str]:
    """Read a list: reason by key. Empty if there is no such file."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the list of bad images cannot be read: {error}") from error
    pairs = (line.partition("\t") for line in lines if line)
    return {key: reason for key, _, reason in pairs}


def bad_image_limit(max_fraction: float, num_images: int) -> int:
    """How many bad images a run tolerates: a share of the data set, but one at least unless the share is zero."""
    return max(1, int(max_fraction * num_images)) if max_fraction > 0 else 0


class BadImageLog:
    """Writes down the unreadable images that a process meets and ends the run when there are too many.

    Args:
        path: The list to append to; made on the first bad image. None keeps the list in memory only.
        limit: Distinct bad images that are tolerated. What an earlier run listed counts only if it is met again.
    """

    def __init__(self, path: str | Path | None, limit: int) -> None:
        self.path = None if path is None else Path(path)
        self.limit = limit
        self.reasons: dict[str, str] = {}
        """What this process has met: reason by key."""
        self._listed = set() if self.path is None else set(read_bad_images(self.path))

    def record(self, bad: Iterable[tuple[str, str]]) -> None:
        """Note some (key, reason) pairs; keys that are already known are passed over.

        Raises:
            UserError: If more images are bad than the limit allows, or the list cannot be written.
        """
        fresh = {key: " ".join(reason.split()) for key, reason in bad if key not in self.reasons}
        if not fresh:
            return
        self.reasons.update(fresh)
        for reason in fresh.values():
            _log.warning("skipped: %s", reason)
        if self.path is not None:
            self._append("".join(f"{key}\t{reason}\n" for key, reason in fresh.items() if key not in self._listed))
        if len(self.reasons) > self.limit:
            listed = f"; they are listed in {self.path}" if self.path else ""
            raise UserError(
                f"{len(self.reasons)} unreadable images, more than the {self.limit} that DATA.MAX_BAD_FRACTION allows"
                f"{listed}. Repair them, leave them out (DATA.BAD_IMAGES) or raise the limit; the newest: {reason}"
            )

    def _append(self, text: str) -> None:
        assert self.path is not None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # One write call on an O_APPEND descriptor, so that the lines of several ranks do not mix.
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(descriptor, text.encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from error
