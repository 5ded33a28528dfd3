"""Photos that cannot be read: found once, written down, and skipped by export and training alike.

A list is a text file with one image per line: key, tab, reason. `python -m sam3_train.data.validate` makes one for a
whole data set; a loader appends to its run's list what it meets.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable
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

    The list is shared: what other ranks and what earlier starts of the run wrote there counts as well. A share of the
    limit for each rank would not do, because over the epochs each rank meets every bad image.

    Args:
        path: The list to append to; made on the first bad image. None keeps the list in memory only.
        limit: Distinct bad images that are tolerated in the whole run.
        left_out: Listed images that do not count, because the run leaves them out (``DATA.BAD_IMAGES``).
        noun: What messages call what cannot be read.
        how_to_leave_out: What messages recommend for what cannot be repaired.
    """

    def __init__(
        self,
        path: str | Path | None,
        limit: int,
        left_out: Collection[str] = (),
        *,
        noun: str = "unreadable images",
        how_to_leave_out: str = "leave them out (DATA.BAD_IMAGES)",
    ) -> None:
        self.path = None if path is None else Path(path)
        self.limit = limit
        self._noun, self._how_to_leave_out = noun, how_to_leave_out
        self.reasons: dict[str, str] = {}
        """What this process has met: reason by key."""
        self._left_out = frozenset(left_out)
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
        self.check()

    def check(self) -> None:
        """Count the images that all ranks and all starts of this run have found.

        Raises:
            UserError: If they are more than the limit allows.
        """
        bad = self.reasons if self.path is None else {**read_bad_images(self.path), **self.reasons}
        counted = [reason for key, reason in bad.items() if key not in self._left_out]
        if len(counted) > self.limit:
            listed = f"; they are listed in {self.path}" if self.path else ""
            remedy = "Repair them and take them off the list" if self.path else "Repair them"
            raise UserError(
                f"{len(counted)} {self._noun}, more than the {self.limit} that DATA.MAX_BAD_FRACTION allows"
                f"{listed}. {remedy}, {self._how_to_leave_out} or raise the limit; the newest: {counted[-1]}"
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
