"""The launcher: exit codes and messages of the processes it starts, on one node and on two."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from toy_training import free_port

SCRIPT = """
import os, signal, sys, time
from sam3_train.errors import Interrupted, UserError, run_cli

def body(argv):
    rank = os.environ["RANK"]
    if argv[0] == "user":
        raise UserError("config.yaml: no such key")
    if argv[0] == "kill" and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if argv[0] == "code" and rank == "1":
        return 7
    if argv[0] in ("kill", "code", "wait"):
        signal.signal(signal.SIGTERM, lambda *args: os._exit(130))
        print("ready", flush=True)
        time.sleep(30)
    print("threads", os.environ["OMP_NUM_THREADS"], flush=True)

sys.exit(run_cli(body, sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "mode, code, text",
    [
        ("fine", 0, ""),
        ("user", 2, "error: config.yaml: no such key\n"),
        ("code", 7, ""),
        ("kill", 1, "error: process 1 on this machine was ended by SIGKILL (out of memory?)"),
    ],
)
def test_torchrun_passes_the_exit_code_on_without_a_traceback_of_its_own(tmp_path, mode, code, text):
    (tmp_path / "script.py").write_text(SCRIPT)
    words = [sys.executable, "-m", "sam3_train.torchrun", "--standalone", "--nproc_per_node", "2"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [*words, str(tmp_path / "script.py"), mode], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(text) if mode == "kill" else done.stderr == text
    assert done.stdout.count("threads") == (2 if mode == "fine" else 0)


def test_torchrun_hands_a_signal_on_and_ends_with_130(tmp_path):
    """D-46"""
    (tmp_path / "script.py").write_text(SCRIPT)
    words = [sys.executable, "-m", "sam3_train.torchrun", "--standalone", "--nproc_per_node", "2"]
    words += [str(tmp_path / "script.py"), "wait"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert len(process.stdout.readline() + process.stdout.readline()) == 2 * len("ready\n")
    process.terminate()
    _, errors = process.communicate(timeout=40)
    assert (process.returncode, errors) == (130, b"")


NODE_SCRIPT = """
import os, sys, time
from sam3_train.distributed import barrier, training_run
from sam3_train.errors import run_cli

def body(argv):
    with training_run("cpu") as run:
        assert os.environ["LOCAL_WORLD_SIZE"] == "1" and run.world_size == 2
        barrier()
        print("ready", flush=True)
        if run.rank == int(argv[0]):
            os.kill(os.getpid(), 9)
        time.sleep(120)  # no collective: nothing but the watch can notice

sys.exit(run_cli(body, sys.argv[1:]))
"""


@pytest.mark.parametrize("victim", [0])  # rank 0 is the harder case: the watch and the store are its own
@pytest.mark.parametrize("backend", ["c10d", "static"])  # without and with NODE_RANK
def test_a_process_killed_on_one_node_ends_the_other_node(tmp_path, victim, backend):
    """Two agents on loopback, as with NNODES=2; the survivor says what happened and ends within 60 s."""
    (tmp_path / "script.py").write_text(NODE_SCRIPT)
    words = [sys.executable, "-m", "sam3_train.torchrun", "--nnodes", "2", "--nproc_per_node", "1"]
    words += ["--rdzv_backend", backend, "--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--rdzv_id", "test"]
    words += ["--local_addr", "127.0.0.1"]
    nodes = [
        subprocess.Popen(
            [
                *words,
                *(["--node_rank", str(rank)] if backend == "static" else []),
                str(tmp_path / "script.py"),
                str(victim),
            ],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [node.stdout.readline() for node in nodes if node.stdout] == ["ready\n", "ready\n"]
    start = time.monotonic()
    texts = [node.communicate(timeout=100)[1] for node in nodes]
    assert time.monotonic() - start < 60
    assert [node.returncode for node in nodes] == [1, 1]
    told = "".join(texts)
    assert "was ended by SIGKILL" in told, texts
    # The survivor hears of it through the watch or, if that is faster, through torch's rendezvous.
    assert f"rank {victim} of 2 died without a message" in told or "connection to the other machines" in told, texts
    assert "Traceback" not in told


def test_an_address_that_nobody_answers_is_a_user_error(tmp_path, monkeypatch, capsys):
    """Nothing has run yet, so it is the settings that are wrong: exit 2, with what to look at."""
    from torch.distributed import DistNetworkError

    from sam3_train import torchrun

    def refuse(args):
        raise DistNetworkError("connection refused\nstack")

    monkeypatch.setattr("torch.distributed.run.run", refuse)
    monkeypatch.setattr(os, "times", lambda: os.times_result((0.0, 0.0, 0.0, 0.0, 0.0)))
    monkeypatch.setenv("LOGLEVEL", "WARNING")
    words = ["--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "nowhere:1", "x.py"]
    assert torchrun.main(words) == 2
    assert "at nowhere:1: connection refused. Is the address reachable" in capsys.readouterr().err
    monkeypatch.setattr(os, "times", lambda: os.times_result((0.0, 0.0, 1.0, 0.0, 0.0)))
    assert torchrun.main(words) == 1
    assert "connection to the other machines at nowhere:1 was lost" in capsys.readouterr().err
