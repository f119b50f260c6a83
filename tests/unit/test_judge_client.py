"""A judge's address that a stranger's recipe names gets neither texts nor keys, and cannot hold or fill this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from compile_steer.common.errors import RecipeError
from compile_steer.scoring.judge_client import HOSTS, open_client, read_key, require_confirmed, within


@pytest.mark.parametrize(
    ("url", "confirmed", "own", "allowed"),
    [
        ("https://api.example.com/v1", "", True, False),
        ("https://api.example.com/v1", "api.example.com", True, True),
        ("https://API.example.com/v1", "other, api.example.com", False, True),
        ("https://api.example.com:8443/v1", "api.example.com:8443", True, True),
        ("https://api.example.com:8443/v1", "api.example.com:443", True, False),
        ("https://api.example.com.evil.net/v1", "api.example.com", True, False),
        ("https://evil.net/api.example.com", "api.example.com", True, False),
        ("https://api.example.com@evil.net/v1", "api.example.com", True, False),
        ("https://evil.net#api.example.com", "api.example.com", True, False),
        ("http://169.254.169.254/latest", "", True, False),
        ("http://localhost.evil.net/v1", "", True, False),
        ("http://127.0.0.1:8000/v1", "", True, True),
        ("http://[::1]:8000/v1", "", True, True),
        ("http://localhost/v1", "", False, False),
        ("http://localhost/v1", "localhost", False, True),
        ("http://[::1/v1", "", True, False),
        ("http://x:99999/v1", "x", True, False),
        ("https:///v1", "", True, False),
    ],
)
def test_an_address_needs_the_users_word(
    url: str, confirmed: str, own: bool, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HOSTS, confirmed)
    if allowed:
        require_confirmed(url, own)
    else:
        with pytest.raises(RecipeError, match=r"validate\.score\.base_url"):
            require_confirmed(url, own)


@pytest.mark.parametrize(
    ("variable", "url", "words"),
    [
        ("AWS_SECRET_ACCESS_KEY", "https://x/v1", "not the name of a judge's key"),
        ("HF_TOKEN", "https://x/v1", "not the name of a judge's key"),
        ("PATH", "https://x/v1", "not the name of a judge's key"),
        ("JUDGE_API_KEY", "http://x/v1", "not encrypted"),
        ("NO_SUCH_API_KEY", "https://x/v1", "not set"),
    ],
)
def test_other_secrets_are_no_keys(variable: str, url: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "JUDGE_API_KEY"):
        monkeypatch.setenv(name, "secret")
    with pytest.raises(RecipeError, match=words) as caught:
        read_key(variable, url)
    assert "secret" not in str(caught.value)
    assert read_key("JUDGE_API_KEY", "https://x/v1") == read_key("JUDGE_API_KEY", "http://localhost/v1") == "secret"


Seen = list[dict[str, str]]
Serve = Callable[[Callable[[BaseHTTPRequestHandler], None]], tuple[str, Seen]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[ThreadingHTTPServer] = []

    def start(answer: Callable[[BaseHTTPRequestHandler], None]) -> tuple[str, Seen]:
        seen: Seen = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                seen.append({name.lower(): value for name, value in self.headers.items()})
                self.rfile.read(int(self.headers["Content-Length"]))
                with suppress(OSError):  # the client has gone
                    answer(self)

            def log_message(self, *_arguments: object) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/v1", seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def _ask(url: str, limit: float = 5.0) -> Any:
    client = open_client(url, "key", 1.0, 0)
    return within(limit, lambda: client.chat.completions.create(model="m", messages=[{"role": "user", "content": "?"}]))


def _drip_headers(request: BaseHTTPRequestHandler) -> None:
    for _ in range(1000):
        request.wfile.write(b"H")
        time.sleep(0.05)


def _drip_body(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.send_header("Content-Length", "1000")
    request.end_headers()
    for _ in range(1000):
        request.wfile.write(b" ")
        time.sleep(0.05)


@pytest.mark.parametrize("answer", [_drip_headers, _drip_body])
def test_slow_drip_ends_in_time(answer: Callable[[BaseHTTPRequestHandler], None], serve: Serve) -> None:
    url, _seen = serve(answer)
    client = open_client(url, "key", 60.0, 0)  # before the clock: the library is slow to import
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        within(0.4, lambda: client.chat.completions.create(model="m", messages=[{"role": "user", "content": "?"}]))
    assert time.monotonic() - started < 10, "the server drips for 50 seconds"


@pytest.mark.parametrize("status", [200, 500])
def test_endless_answer_is_cut_off(status: int, serve: Serve) -> None:
    sent: list[int] = []

    def endless(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.end_headers()
        sent.extend(request.wfile.write(b" " * 65536) for _ in range(2000))

    url, _seen = serve(endless)
    with pytest.raises(Exception, match="error|longer"):
        _ask(url)
    assert sum(sent) < 40_000_000  # what the two ends buffer


def test_compressed_answer_is_refused(serve: Serve) -> None:
    def compressed(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Encoding", "gzip")
        request.end_headers()

    url, _seen = serve(compressed)
    with pytest.raises(Exception, match="compressed"):
        _ask(url)


def test_redirect_carries_nothing_to_another_host(serve: Serve) -> None:
    other, seen_there = serve(lambda request: request.send_error(500))

    def elsewhere(request: BaseHTTPRequestHandler) -> None:
        request.send_response(307)
        request.send_header("Location", other)
        request.send_header("Content-Length", "0")
        request.end_headers()

    url, seen = serve(elsewhere)
    with pytest.raises(Exception, match="307"):
        _ask(url)
    assert len(seen) == 1 and seen_there == []


def test_no_other_variable_of_the_library_is_sent(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "OPENAI_API_KEY",
        "OPENAI_ADMIN_KEY",
        "OPENAI_ORG_ID",
        "OPENAI_PROJECT_ID",
        "OPENAI_CUSTOM_HEADERS",
        "HF_TOKEN",
    ):
        monkeypatch.setenv(name, "X: secret")
    url, seen = serve(lambda request: request.send_error(400))
    with pytest.raises(Exception, match="400"):
        _ask(url)
    assert "secret" not in str(seen) and seen[0]["authorization"] == "Bearer key"
