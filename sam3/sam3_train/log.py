"""A run's log: lines to console and ``log_rank0.txt``, numbers to ``metrics.jsonl`` and TensorBoard.

``metrics.jsonl`` has one JSON object a line: ``{"kind": "train" | "val", "epoch": e, "step": s, ...numbers}``. A
resumed run removes what was logged after the step that it continues from, so curves have no doubled parts.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from sam3_train.errors import UserError

METRICS_NAME = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class RunLog:
    """Log of one run; on other ranks than the main one everything is a no-op except `warn`.

    Args:
        folder: The run's folder; made if missing.
        is_main: Whether this process writes.
        tensorboard: Write TensorBoard scalars; without the package a line says how to get it, and training goes on.
        resume_step: Numbers logged after this step are removed; None keeps nothing (a new run).
        resume_epoch: Validations of this epoch and later ones are removed too: they will be done again.
    """

    def __init__(
        self,
        folder: str | Path,
        is_main: bool = True,
        tensorboard: bool = True,
        resume_step: int | None = None,
        resume_epoch: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.is_main = is_main
        self._file: IO[str] | None = None
        self._metrics: IO[str] | None = None
        self._board: Any = None
        if not is_main:
            return
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = _open_append(self.folder / "log_rank0.txt")
            kept = _drop_after(self.folder / METRICS_NAME, resume_step, resume_epoch)
            self._metrics = _open_append(self.folder / METRICS_NAME)
        if tensorboard:
            self._board = self._open_board(resume_step, kept)

    def info(self, message: str) -> None:
        """One line for the console and the log file, main process only."""
        if self.is_main:
            self._line(message, sys.stdout)

    def warn(self, message: str) -> None:
        """As `info`, to the error stream, with ``warning:`` in front."""
        if self.is_main:
            self._line(message if message.startswith("warning:") else f"warning: {message}", sys.stderr)

    def numbers(self, kind: str, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Record numbers of one moment.

        Args:
            kind: ``train`` or ``val``: the group they are shown under.
            epoch: Zero-based epoch.
            step: Optimizer steps done.
            values: Name to number; a non-finite number is stored as null.
        """
        if not self.is_main or self._metrics is None:
            return
        finite = {name: (value if math.isfinite(value) else None) for name, value in values.items()}
        with self._writing():
            self._metrics.write(json.dumps({"kind": kind, "epoch": epoch, "step": step, **finite}) + "\n")
            if self._board is not None:
                for name, value in values.items():
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush and close all files."""
        for handle in (self._board, self._metrics, self._file):
            if handle is not None:
                handle.close()
        self._file = self._metrics = self._board = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write the log in {self.folder}: {error.strerror}; free some space or choose another --output"
            ) from error

    def _line(self, message: str, stream: Any) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        if self._file is not None:
            with self._writing():
                self._file.write(f"{stamp} {message}\n")
        try:
            from tqdm import tqdm

            tqdm.write(message, file=stream)  # keeps a progress bar whole
        except ImportError:
            print(message, file=stream)
        stream.flush()

    def _open_board(self, resume_step: int | None, kept: list[dict[str, Any]]) -> Any:
        """A writer whose reader forgets what `_drop_after` has dropped."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.warn("no TensorBoard scalars: install tensorboard (pip install 'efficientsam3[stage1]')")
            return None
        board = SummaryWriter(str(self.folder / TENSORBOARD_FOLDER), purge_step=resume_step)
        # A purge takes all of a step: a validation that will be done again, and the training numbers that stay.
        for record in kept:
            for name, value in record.items() if record["step"] == resume_step else ():
                if name not in ("kind", "epoch", "step"):
                    board.add_scalar(f"{record['kind']}/{name}", math.nan if value is None else value, resume_step)
        return board


def read_metrics(folder: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run's ``metrics.jsonl``, oldest first; a last line cut off by a crash is left out.

    Raises:
        UserError: If another line is no record: the file was damaged later, and its numbers cannot be trusted.
    """
    records = []
    path = Path(folder) / METRICS_NAME
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        record = _parse_record(line)
        if record is None and number < len(lines):
            raise UserError(
                f"{path}: line {number} of {len(lines)} is damaged: {line[:40]!r}. Remove that line, or move the file "
                "away to go on without the numbers logged so far"
            )
        if record is not None and kind in (None, record.get("kind")):
            records.append(record)
    return records


def _parse_record(line: bytes) -> dict[str, Any] | None:
    """A line of ``metrics.jsonl``, or None if it is none."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _open_append(path: Path) -> IO[str]:
    return open(path, "a", encoding="utf-8", buffering=1)


def _drop_after(path: Path, resume_step: int | None, resume_epoch: int | None) -> list[dict[str, Any]]:
    """Remove the numbers that a resumed run makes again; returns those that stay."""
    if not path.exists():
        return []
    kept = [] if resume_step is None else [r for r in read_metrics(path.parent) if r["step"] <= resume_step]
    if resume_epoch is not None:
        kept = [record for record in kept if record["kind"] != "val" or record["epoch"] < resume_epoch]
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(aside, path)
    return kept
