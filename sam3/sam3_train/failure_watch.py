"""When one rank fails or dies, end all the others at once, on whichever machine they are.

Each rank keeps a TCP connection to rank 0 for the length of the run. The kernel closes a dead process's connections, so
a kill -9 or an out-of-memory kill is seen at once, without time-outs that could misfire on a slow machine; a machine
that vanishes is seen through TCP keep-alive within half a minute. A rank that fails says its exit code first, so that
all ranks end with the same code, and gets a few seconds to print its message before the others end.

Messages are lines of text: ``hello TOKEN RANK``, ``fail CODE RANK``, ``stop SIGNAL RANK`` (a signal asked that rank to
stop: all save and stop) and ``bye``.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import sys
import threading
import time

import torch.distributed as dist

from sam3_train.errors import EXIT_BUG

_CONNECT_TIMEOUT_S = 20.0
_NEWS_TIME_S = 1.0
"""How long a failing rank waits to hear whether another one failed before it."""
_PRINT_TIME_S = 5.0
"""How long a rank that fails has for its message before the others end."""


class FailureWatch:
    """One rank's end of the watch; `start` on all ranks after the process group exists."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._is_single_node = os.environ.get("LOCAL_WORLD_SIZE") == str(world_size)
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._peers: dict[socket.socket, int] = {}
        self._listener: socket.socket | None = None
        self._failure: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None
        self._token = ""
        self.stop_heard: str | None = None
        """``SIGTERM on rank 1`` once a signal has asked another rank to stop."""

    @classmethod
    def start(cls, rank: int, world_size: int) -> FailureWatch:
        """Connect all ranks to rank 0. Collective."""
        watch = cls(rank, world_size)
        if world_size == 1:
            return watch
        address: list[object] = [None, None]
        if rank == 0:
            interface = "127.0.0.1" if watch._is_single_node else ""
            watch._listener = socket.create_server((interface, 0), backlog=world_size)
            watch._token = secrets.token_hex(16)
            address = [watch._listener.getsockname()[1], watch._token]
        dist.broadcast_object_list(address, src=0)
        if rank == 0:
            watch._accept_all()
        else:
            host = "127.0.0.1" if watch._is_single_node else os.environ.get("MASTER_ADDR", "127.0.0.1")
            watch._connect(host, int(str(address[0])), str(address[1]))
        watch._thread = threading.Thread(target=watch._watch, name="failure-watch", daemon=True)
        watch._thread.start()
        return watch

    def report(self, code: int) -> bool:
        """Tell the others that this rank fails with an exit code.

        Returns:
            True if this rank is the first to fail, so that it should print its message.
        """
        if code == EXIT_BUG and self._peers:
            # A broken connection to a rank that has just died raises here, too; its death is the message that counts.
            time.sleep(_NEWS_TIME_S)
        with self._lock:
            if self._failure is not None:
                return False
            self._failure = (code, self.rank)
        for peer in self._peers:
            _send(peer, f"fail {code} {self.rank}\n")
        # Should ending in the usual way get stuck (a library waiting for another rank), end anyway.
        threading.Thread(target=_end_after, args=(code, 4 * _PRINT_TIME_S), daemon=True).start()
        if self.rank != 0:
            # Another rank's message may be on its way; rank 0 echoes the first failure it has heard of.
            deadline = time.monotonic() + _NEWS_TIME_S
            while self._thread is not None and self._thread.is_alive() and time.monotonic() < deadline:
                with self._lock:
                    if self._failure is not None and self._failure[1] != self.rank:
                        return False
                time.sleep(0.02)
        return True

    @property
    def failure_code(self) -> int | None:
        """Exit code of the failure that ends the run, once there is one."""
        return self._failure[0] if self._failure is not None else None

    def announce_stop(self, signal_name: str) -> None:
        """Tell the others that a signal asked this rank to stop. Safe in a signal handler: it takes no lock."""
        for peer in self._peers:
            _send(peer, f"stop {signal_name} {self.rank}\n")

    def close(self) -> None:
        """Leave the watch in good order: what happens to this rank from now on is no failure."""
        self._closing.set()
        for peer in self._peers:
            _send(peer, "bye\n")
        if self._thread is not None:
            self._thread.join(timeout=_PRINT_TIME_S)
        for peer in self._peers:
            peer.close()
        if self._listener is not None:
            self._listener.close()

    def _accept_all(self) -> None:
        assert self._listener is not None
        self._listener.settimeout(_CONNECT_TIMEOUT_S)
        while len(self._peers) < self.world_size - 1:
            try:
                peer, _ = self._listener.accept()
                peer.settimeout(_CONNECT_TIMEOUT_S)
                word, token, number = _read_line(peer).split()
            except TimeoutError:
                print(
                    f"warning: {self.world_size - 1 - len(self._peers)} ranks could not connect to rank 0; if one of "
                    "them fails, the others may notice only when a collective operation times out",
                    file=sys.stderr,
                    flush=True,
                )
                return
            except (ValueError, OSError):
                continue
            if word == "hello" and secrets.compare_digest(token, self._token):
                _keep_alive(peer)
                self._peers[peer] = int(number)

    def _connect(self, host: str, port: int, token: str) -> None:
        try:
            peer = socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S)
        except OSError:
            return  # rank 0 warns about it
        _keep_alive(peer)
        _send(peer, f"hello {token} {self.rank}\n")
        self._peers[peer] = 0

    def _watch(self) -> None:
        """Read what peers say until this rank closes; end the process if one of them fails."""
        selector = selectors.DefaultSelector()
        buffers = dict.fromkeys(self._peers, "")
        for connection in buffers:
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_READ, data=connection)
        left: set[socket.socket] = set()
        while buffers and not self._closing.is_set():
            for key, _ in selector.select(timeout=0.2):
                peer: socket.socket = key.data
                text = _receive(peer)
                if text is None:
                    selector.unregister(peer)
                    del buffers[peer]
                    self._on_end(self._peers[peer], said_so=peer in left)
                    continue
                *lines, buffers[peer] = (buffers[peer] + text).split("\n")
                for word, *values in (line.split() for line in lines if line.strip()):
                    if word == "stop":
                        self._on_stop(values[0], int(values[1]))
                        continue
                    left.add(peer)
                    if word == "fail":
                        self._on_failure(int(values[0]), int(values[1]), peer)

    def _on_stop(self, signal_name: str, stopped_rank: int) -> None:
        self.stop_heard = self.stop_heard or f"{signal_name} on rank {stopped_rank}"
        for peer, number in self._peers.items() if self.rank == 0 else ():
            if number != stopped_rank:
                _send(peer, f"stop {signal_name} {stopped_rank}\n")

    def _on_failure(self, code: int, failed_rank: int, source: socket.socket) -> None:
        with self._lock:
            if self._failure is not None:
                # Ours came first (or we only echo): tell the sender whose message counts.
                if self.rank == 0 and self._failure[1] != failed_rank:
                    _send(source, f"fail {self._failure[0]} {self._failure[1]}\n")
                elif self.rank != 0 and self._failure[1] == self.rank:
                    self._failure = (code, failed_rank)
                return
            self._failure = (code, failed_rank)
        if self.rank == 0:
            for peer, number in self._peers.items():
                if number != failed_rank:
                    _send(peer, f"fail {code} {failed_rank}\n")
        threading.Thread(target=_end_after, args=(code, _PRINT_TIME_S), daemon=True).start()

    def _on_end(self, ended_rank: int, said_so: bool) -> None:
        failure = self._failure
        if failure is None:
            if not said_so:
                self._on_death(ended_rank)
        elif failure[1] != self.rank and ended_rank in (0, failure[1]):
            _end_after(failure[0], 0.0)  # its message is out, so there is nothing more to wait for

    def _on_death(self, dead_rank: int) -> None:
        with self._lock:
            if self._failure is not None or self._closing.is_set():
                return
            self._failure = (1, dead_rank)
        # On a single machine the launcher sees a process die, and says so.
        if not self._is_single_node and (self.rank == 0 or (dead_rank == 0 and self.rank == 1)):
            print(
                f"error: rank {dead_rank} of {self.world_size} died without a message (killed, or out of memory?); "
                "ending all ranks. Start the same command again to continue from the last checkpoint.",
                file=sys.stderr,
                flush=True,
            )
        if self.rank == 0:
            for peer in self._peers:
                _send(peer, f"fail 1 {dead_rank}\n")
        _end_after(1, 0.5)


def _end_after(code: int, delay_s: float) -> None:
    # Not sys.exit: the main thread may sit in a collective operation that will never return.
    time.sleep(delay_s)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _keep_alive(peer: socket.socket) -> None:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _send(peer: socket.socket, line: str) -> None:
    # A peer that is gone already is what the watch is for, so it is no error here.
    try:
        peer.sendall(line.encode())
    except OSError:
        return


def _receive(peer: socket.socket) -> str | None:
    """What a peer sent; None when its connection has ended."""
    try:
        data = peer.recv(4096)
    except (BlockingIOError, InterruptedError):
        return ""
    except OSError:
        return None
    return data.decode(errors="replace") if data else None


def _read_line(peer: socket.socket) -> str:
    data = b""
    while not data.endswith(b"\n"):
        byte = peer.recv(1)
        if not byte or len(data) > 200:
            raise ValueError("connection ended before a whole line")
        data += byte
    return data.decode(errors="replace")
