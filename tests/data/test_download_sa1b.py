"""The downloader against a server on this machine: it resumes, checks, and says what it could not get."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import download_sa1b
import pytest
from fixtures_data import make_sa1b_tar


class Server:
    """Serves bytes by name; how a name behaves can be set."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.behaviour: dict[str, str] = {}
        self.requests: list[tuple[str, str]] = []
        self.release = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def link(self, name: str, query: str = "") -> str:
        return f"http://127.0.0.1:{self.http.server_port}/{name}{query}"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        name = handler.path.strip("/").partition("?")[0]
        wish = handler.headers.get("Range", "")
        self.requests.append((name, wish))
        behaviour = self.behaviour.get(name, "")
        body = self.files.get(name)
        if behaviour == "forbidden" or body is None:
            handler.send_error(403 if body is not None else 404)
            return
        if behaviour == "busy_once":
            self.behaviour[name] = ""
            handler.send_error(503)
            return
        if behaviour == "slow":
            self.release.wait(20)
        start = int(re.findall(r"\d+", wish)[0]) if wish and behaviour != "no_range" else 0
        if start >= len(body) > 0:
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(body)}")
            handler.end_headers()
            return
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        handler.send_header("Content-Type", "text/html" if behaviour == "page" else "application/x-tar")
        if behaviour != "no_length":
            handler.send_header("Content-Length", str(len(body) - start))
        handler.end_headers()
        rest = body[start:]
        handler.wfile.write(rest[: len(rest) // 2] if behaviour == "truncating" else rest)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.release.set()
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    original = download_sa1b.Fetcher.__init__
    monkeypatch.setattr(
        download_sa1b.Fetcher,
        "__init__",
        lambda self, output, timeout_s, retries: original(self, output, timeout_s, retries, backoff_s=0.001),
    )


@pytest.fixture
def tars(tmp_path: Path) -> dict[str, bytes]:
    names = {"sa_000020.tar": range(5), "sa_000021.tar": range(5, 9), "sa_000022.tar": range(9, 12)}
    return {name: make_sa1b_tar(tmp_path / "made" / name, ids).read_bytes() for name, ids in names.items()}


def download(server: Server, tmp_path: Path, names: list[str], *more: str, query: str = "") -> int:
    listed = tmp_path / "list.txt"
    rows = ["file_name\tcdn_link", *(f"{name}\t{server.link(name, query)}" for name in names)]
    listed.write_text("\n".join(rows) + "\n")
    return download_sa1b.main(["--list", str(listed), "--output", str(tmp_path / "tars"), "--retries", "3", *more])


def fetched(tmp_path: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (tmp_path / "tars").iterdir()}


def test_all_files_arrive_and_a_second_run_asks_for_nothing(
    server: Server, tmp_path: Path, tars: dict[str, bytes]
) -> None:
    server.files = tars
    assert download(server, tmp_path, list(tars)) == 0
    assert fetched(tmp_path) == tars
    num_requests = len(server.requests)
    assert download(server, tmp_path, list(tars), "--verify") == 0
    assert len(server.requests) == num_requests


def test_a_part_continues_where_it_ended(server: Server, tmp_path: Path, tars: dict[str, bytes]) -> None:
    server.files = tars
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "sa_000020.tar.part").write_bytes(tars["sa_000020.tar"][:5000])
    assert download(server, tmp_path, ["sa_000020.tar"]) == 0
    assert fetched(tmp_path) == {"sa_000020.tar": tars["sa_000020.tar"]}
    assert server.requests == [("sa_000020.tar", "bytes=5000-")]


@pytest.mark.parametrize("behaviour", ["no_range", "no_length", "busy_once"])
def test_odd_servers_are_coped_with(
    server: Server, tmp_path: Path, tars: dict[str, bytes], behaviour: str, no_waiting: None
) -> None:
    server.files, server.behaviour = tars, {"sa_000020.tar": behaviour}
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "sa_000020.tar.part").write_bytes(tars["sa_000020.tar"][:5000])
    assert download(server, tmp_path, ["sa_000020.tar"]) == 0
    assert fetched(tmp_path) == {"sa_000020.tar": tars["sa_000020.tar"]}


def test_a_part_that_is_already_whole_is_accepted(server: Server, tmp_path: Path, tars: dict[str, bytes]) -> None:
    server.files = tars
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "sa_000020.tar.part").write_bytes(tars["sa_000020.tar"])
    assert download(server, tmp_path, ["sa_000020.tar"]) == 0
    assert fetched(tmp_path) == {"sa_000020.tar": tars["sa_000020.tar"]}


def test_a_part_longer_than_the_file_is_fetched_afresh(
    server: Server, tmp_path: Path, tars: dict[str, bytes], no_waiting: None
) -> None:
    server.files = tars
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "sa_000020.tar.part").write_bytes(tars["sa_000020.tar"] + b"more")
    assert download(server, tmp_path, ["sa_000020.tar"]) == 0
    assert fetched(tmp_path) == {"sa_000020.tar": tars["sa_000020.tar"]}


def test_truncated_bodies_are_resumed_until_the_size_is_right(
    server: Server, tmp_path: Path, tars: dict[str, bytes], no_waiting: None
) -> None:
    """D-98: a file has its name only when it is whole."""
    server.files, server.behaviour = tars, {"sa_000021.tar": "truncating"}
    assert download(server, tmp_path, ["sa_000021.tar"]) == 2
    assert "sa_000021.tar" not in fetched(tmp_path)
    part = (tmp_path / "tars" / "sa_000021.tar.part").stat().st_size
    assert part > 0.9 * len(tars["sa_000021.tar"]), "each attempt must continue the last"
    server.behaviour = {}
    assert download(server, tmp_path, ["sa_000021.tar"]) == 0
    assert fetched(tmp_path) == {"sa_000021.tar": tars["sa_000021.tar"]}
    assert server.requests[-1] == ("sa_000021.tar", f"bytes={part}-")


def test_expired_links_are_listed_with_a_remedy_and_the_rest_arrives(
    server: Server, tmp_path: Path, tars: dict[str, bytes], capsys: pytest.CaptureFixture
) -> None:
    """D-98: exit code 2, the failed lines in a list of the same form, no empty tar."""
    server.files, server.behaviour = tars, {"sa_000021.tar": "forbidden"}
    assert download(server, tmp_path, list(tars), query="?oh=1&oe=65000000") == 2
    errors = capsys.readouterr().err
    assert "3 of 3 links have expired" in errors and "fresh links" in errors
    assert set(fetched(tmp_path)) == {"sa_000020.tar", "sa_000022.tar", "download_failed.txt"}
    failed = download_sa1b.read_list(tmp_path / "tars" / "download_failed.txt")
    assert failed == [download_sa1b.Entry("sa_000021.tar", server.link("sa_000021.tar", "?oh=1&oe=65000000"))]
    assert [name for name, _ in server.requests].count("sa_000021.tar") == 1, "403 is not retried"
    server.behaviour = {}
    assert download(server, tmp_path, list(tars)) == 0
    assert set(fetched(tmp_path)) == set(tars)


@pytest.mark.parametrize(
    ("damage", "said"), [("empty", "empty file"), ("cut", "no whole uncompressed tar"), ("page", "web page")]
)
def test_files_that_are_no_tars_never_get_the_name(
    server: Server, tmp_path: Path, tars: dict[str, bytes], damage: str, said: str, capsys: pytest.CaptureFixture
) -> None:
    """D-98: an empty tar, a cut one and an error page with status 200 are failures."""
    name = "sa_000020.tar"
    body = {"empty": b"", "cut": tars[name][:7000], "page": b"<html></html>"}[damage]
    server.files, server.behaviour = {name: body}, {name: damage}
    assert download(server, tmp_path, [name]) == 2
    assert said in capsys.readouterr().err
    assert set(fetched(tmp_path)) == {"download_failed.txt"}


def test_verify_finds_a_damaged_tar_and_fetches_it_again(
    server: Server, tmp_path: Path, tars: dict[str, bytes]
) -> None:
    """D-98: without --verify, what has its name is left alone."""
    server.files = tars
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "sa_000020.tar").write_bytes(tars["sa_000020.tar"][:-8000])
    assert download(server, tmp_path, ["sa_000020.tar"]) == 0
    assert not server.requests
    assert download(server, tmp_path, ["sa_000020.tar"], "--verify") == 0
    assert fetched(tmp_path)["sa_000020.tar"] == tars["sa_000020.tar"]


def test_a_server_that_is_gone_is_reported_after_the_retries(
    server: Server, tmp_path: Path, tars: dict[str, bytes], no_waiting: None, capsys: pytest.CaptureFixture
) -> None:
    server.files = tars
    server.http.server_close()
    assert download(server, tmp_path, ["sa_000020.tar"]) == 2
    assert "no connection" in capsys.readouterr().err


def test_one_slow_file_does_not_hold_up_the_others(server: Server, tmp_path: Path, tars: dict[str, bytes]) -> None:
    """D-98: workers take the next file as soon as they are free."""
    server.files = {**tars, **{f"sa_0001{i:02d}.tar": tars["sa_000022.tar"] for i in range(5)}}
    server.behaviour = {"sa_000020.tar": "slow"}
    names = list(server.files)
    result: list[int] = []
    run = threading.Thread(target=lambda: result.append(download(server, tmp_path, names, "--workers", "2")))
    run.start()
    for _ in range(500):
        if (tmp_path / "tars").is_dir() and len(list((tmp_path / "tars").glob("*.tar"))) == len(names) - 1:
            break
        threading.Event().wait(0.01)
    assert len(list((tmp_path / "tars").glob("*.tar"))) == len(names) - 1
    assert not result
    server.release.set()
    run.join(20)
    assert result == [0] and len(fetched(tmp_path)) == len(names)


def test_a_full_disk_is_noticed_before_the_file_is_written(
    server: Server,
    tmp_path: Path,
    tars: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    server.files = tars
    usage = download_sa1b.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(download_sa1b.shutil, "disk_usage", lambda path: usage._replace(free=100))
    assert download(server, tmp_path, ["sa_000020.tar"]) == 2
    assert "GB free" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no file"),
        ("sa_1.tar http://127.0.0.1/x\n", "line 1: expected a name, a tab and a link"),
        ("sa_1.tar\thttp://127.0.0.1/x\n../evil.tar\thttp://127.0.0.1/y\n", "line 2: '../evil.tar' is no plain"),
        ("sa_1.tar\tfile:///etc/passwd\n", "is no http link"),
        ("sa_1.tar\thttp://127.0.0.1/x\nsa_1.tar\thttp://127.0.0.1/y\n", "two different links"),
    ],
)
def test_a_malformed_list_is_refused_with_the_line(
    tmp_path: Path, text: str, said: str, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "list.txt").write_text(text)
    assert download_sa1b.main(["--list", str(tmp_path / "list.txt"), "--output", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_list_without_header_is_read(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("sa_1.tar\thttp://127.0.0.1/x\n\n# remark\nsa_2.tar\thttp://127.0.0.1/y\n")
    assert [entry.name for entry in download_sa1b.read_list(tmp_path / "list.txt")] == ["sa_1.tar", "sa_2.tar"]
