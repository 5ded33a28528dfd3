"""Downloads, against a stand-in for the Hub: what is asked for, and what a user is told when it fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from sam3.checkpoint_io import CheckpointError
from sam3.config import Sam3Config
from sam3.hub import download_ckpt_from_hf
from sam3.loading import load_model
from sam3.model_builder import assemble_image_model, build_sam3_image_model, build_sam3_trunk
from sam3.released_names import released_state_dict

TINY = Sam3Config.preset("tiny")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict]:
    """hf_hub_download gives a tiny model's file and notes what it was asked for."""
    torch.manual_seed(0)
    path = tmp_path / "sam3.pt"
    torch.save({"model": released_state_dict(assemble_image_model(TINY, enable_inst_interactivity=True))}, path)
    calls: list[dict] = []

    def download(**kwargs) -> str:
        calls.append(kwargs)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return calls


def test_success_opens_the_released_file(calls: list[dict]) -> None:
    model = load_model("facebook/sam3", device="cpu")
    assert calls == [{"repo_id": "facebook/sam3", "filename": "sam3.pt"}]
    assert model.config == TINY


def test_another_model_of_the_hub_is_named_with_its_file(calls: list[dict]) -> None:
    load_model("someone/es3-models/small/es_rv_m.safetensors", device="cpu")
    assert calls == [{"repo_id": "someone/es3-models", "filename": "small/es_rv_m.safetensors"}]


def test_the_builders_download_when_no_file_is_given(calls: list[dict]) -> None:
    for build in (build_sam3_image_model, build_sam3_trunk):
        with pytest.raises(CheckpointError, match="does not fit the model 'sam3'"):
            build(device="cpu")
    assert len(calls) == 2


class Response:
    """What the client's errors look at."""

    status_code = 403
    headers: dict[str, str] = {}  # noqa: RUF012
    request = None
    url = "https://huggingface.co/facebook/sam3"


def make_entry_error() -> EntryNotFoundError:
    """Its constructor differs between versions of the client."""
    error = EntryNotFoundError.__new__(EntryNotFoundError)
    error.args = ("404",)
    return error


FAILURES = {
    "gated": (
        lambda: GatedRepoError("403", response=Response()),
        r"access is not granted.*https://huggingface\.co/facebook/sam3, accept the licence.*hf auth login.*HF_TOKEN",
    ),
    "no such repository": (lambda: RepositoryNotFoundError("401", response=Response()), "no such model.*hf auth login"),
    "no such file": (lambda: make_entry_error(), "has no such file"),
    "not in the cache": (lambda: LocalEntryNotFoundError("outgoing traffic disabled"), "not in the local cache"),
    "offline mode": (lambda: OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
    "server error": (lambda: HfHubHTTPError("500", response=Response()), "cannot be downloaded"),
    "no connection": (lambda: ConnectionError("refused"), "Check the connection"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_say_what_to_do(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    make_error, message = FAILURES[name]

    def download(**kwargs) -> str:
        raise make_error()

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(CheckpointError, match=message) as error:
        download_ckpt_from_hf()
    assert "facebook/sam3" in str(error.value)
    assert "\n" not in str(error.value)


class GatedHandler(BaseHTTPRequestHandler):
    """Answers as the Hub does for a gated model."""

    def do_HEAD(self) -> None:
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("X-Error-Message", "Access to model facebook/sam3 is restricted.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, format: str, *args) -> None:
        """Keep the test's output clean."""


class BreakingHandler(GatedHandler):
    """Promises a file and hangs up in the middle of it."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("ETag", '"0123456789abcdef"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", "100000")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(b"only this much")
        self.close_connection = True


@pytest.fixture
def local_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[type | None], None]]:
    """Points the real client at a local server with that handler, or at a port where nobody listens."""
    servers: list[tuple[ThreadingHTTPServer, threading.Thread]] = []

    def connect(handler: type[BaseHTTPRequestHandler] | None) -> None:
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler or GatedHandler)
        if handler is None:
            server.server_close()
        else:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
            thread.start()
            servers.append((server, thread))
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits between its attempts
    yield connect
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_real_client_against_a_gated_server(local_client: Callable) -> None:
    """Not only our idea of the client's errors: the client itself, talking to a local server."""
    local_client(GatedHandler)
    with pytest.raises(CheckpointError, match="access is not granted"):
        download_ckpt_from_hf()


def test_the_real_client_without_a_server(local_client: Callable) -> None:
    local_client(None)
    with pytest.raises(CheckpointError, match="cannot be downloaded and is not in the local cache"):
        download_ckpt_from_hf()


def test_the_real_client_when_the_connection_breaks(local_client: Callable) -> None:
    local_client(BreakingHandler)
    with pytest.raises(CheckpointError, match="cannot be downloaded"):
        download_ckpt_from_hf()
