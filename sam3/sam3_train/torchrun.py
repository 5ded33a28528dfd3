"""torchrun whose exit code is the command's own.

torch's launcher turns every failure of a process into a traceback of its own and exit code 1. Here the code of the
process that failed first (2 user error, 130 interrupted after saving, ...) is passed on, and its own message is all
that is seen::

    python -m sam3_train.torchrun --nproc_per_node 2 stage1/train_stage1.py --cfg ...
    python -m sam3_train.torchrun --nnodes 2 --node_rank 0 --rdzv_backend c10d --rdzv_endpoint host:29500 ... script ...

All of torchrun's own flags work. SIGTERM and SIGINT are handed to the processes, which get 30 s to save.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

import torch.distributed.run as torch_run
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError

from sam3_train.errors import EXIT_BUG, EXIT_DONE, EXIT_INTERRUPTED, EXIT_USER_ERROR


def main(argv: list[str] | None = None) -> int:
    """Launch, and return the exit code of the process that failed first, or 0."""
    args = torch_run.parse_args(sys.argv[1:] if argv is None else argv)
    # Otherwise torch warns that it sets 1; an explicit value is kept.
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads_per_process(args.nproc_per_node)))
    if "LOGLEVEL" not in os.environ:
        _quieten_torch()
    try:
        torch_run.run(args)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return _exit_code(failure)
    except (SignalException, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except (DistError, RendezvousError) as error:
        return _report_lost_connection(args.rdzv_endpoint or f"{args.master_addr}:{args.master_port}", error)
    return EXIT_DONE


def _report_lost_connection(where: str, error: Exception) -> int:
    times = os.times()
    if times.children_user + times.children_system > 0:  # processes have run, so the nodes had found each other
        print(
            f"error: the connection to the other machines at {where} was lost: one of them ended, see its own message; "
            "all processes here were ended. Start the same command again to continue.",
            file=sys.stderr,
        )
        return EXIT_BUG
    print(
        f"error: the processes could not be brought together at {where}: {str(error).splitlines()[0]}. Is the address "
        "reachable and the port free (MASTER_PORT, RDZV_ENDPOINT), and do all nodes use the same?",
        file=sys.stderr,
    )
    return EXIT_USER_ERROR


def _quieten_torch() -> None:
    """What the launcher logs about an ending process repeats the process's own message; LOGLEVEL brings it back."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.run", "torch.distributed.elastic")):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _exit_code(failure: ProcessFailure) -> int:
    if failure.exitcode >= 0:
        return failure.exitcode or EXIT_BUG
    name = signal.Signals(-failure.exitcode).name
    if name in ("SIGTERM", "SIGINT"):
        return EXIT_INTERRUPTED
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    print(
        f"error: process {failure.local_rank} on this machine was ended by {name}{hint}; all processes were ended. "
        "Start the same command again to continue.",
        file=sys.stderr,
    )
    return EXIT_BUG


def _threads_per_process(nproc_per_node: str) -> int:
    if not str(nproc_per_node).isdigit():
        return 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // int(nproc_per_node))


if __name__ == "__main__":
    sys.exit(main())
