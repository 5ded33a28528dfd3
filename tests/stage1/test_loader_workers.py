"""Loader workers outlive a stop signal to the whole group, and never keep a process from ending."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import Dataset

from sam3_train.data.distillation_loader import build_loader


class WhoLoads(Dataset):
    """Items that tell which process made them."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {"key": str(os.getpid()), "bad": "", "seed": position}


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_ignore_stop_signals_until_their_loader_is_gone() -> None:
    """D-46: a signal to the process group must not take the batches from a run that still has to save."""
    loader = build_loader(WhoLoads(), None, 2, num_workers=1, prefetch_factor=1)
    batches = iter(loader)
    pid = int(next(batches)["key"][0])
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(pid, number)
    assert {key for batch in batches for key in batch["key"]} == {str(pid)}
    assert is_running(pid), "workers stay for the next epoch"
    del batches, loader
    gc.collect()
    assert not is_running(pid)


def test_a_process_with_a_loader_in_use_can_exit() -> None:
    """D-30: the interpreter waits for workers that ignore its signal for ever."""
    code = (
        "from test_loader_workers import WhoLoads, build_loader\n"
        "loader = build_loader(WhoLoads(), None, 2, num_workers=2, prefetch_factor=1)\n"
        "batches = iter(loader)\n"
        "print(next(batches)['key'][0], flush=True)\n"
        "loader.myself = loader\n"
        "raise SystemExit(7)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 7, ended.stderr
    assert not is_running(int(ended.stdout))
