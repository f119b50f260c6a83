"""A server of /v1/chat/completions on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

Reply = Callable[[str], Any]


@dataclass
class Endpoint:
    """A server of /v1/chat/completions. `reply` answers a question; an exception that it raises becomes an error 500."""

    reply: Reply
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    url: str = ""

    @property
    def questions(self) -> list[str]:
        return [str(request["messages"][-1]["content"]) for request in self.requests]


def handler(endpoint: Endpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            endpoint.requests.append(body)
            endpoint.keys.append(str(self.headers["Authorization"]))
            try:
                answer = endpoint.reply(body["messages"][-1]["content"])
            except RuntimeError as error:
                self._send(500, {"error": {"message": str(error)}})
                return
            if isinstance(answer, str):
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}
                usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
                answer = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice],
                          "usage": usage}  # fmt: skip
            self._send(200, answer)

        def _send(self, status: int, body: Any) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if isinstance(body, bytes) else "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                pass  # the client did not wait

        def log_message(self, *_args: Any) -> None: ...

    return Handler
