"""An OpenAI-compatible endpoint on the loopback that does what a test tells it to, and counts."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Act:
    """What the server does with a request.

    Attributes:
        content: of the reply's message; a mapping is the message itself.
        status, headers, body: an error in place of it.
        after: seconds until it answers.
        cut: the reply ends after so many bytes; `announced` tells the client the whole length first.
        drop: the connection is closed without a word.
        kind: content type.
    """

    content: str | dict[str, Any] = "5"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] | None = None
    after: float = 0.0
    cut: int | None = None
    announced: bool = False
    drop: bool = False
    kind: str = "application/json"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        act = self.server.arrived(body, self.headers["Authorization"])
        time.sleep(act.after)
        with self.server.lock:
            self.server.active -= 1
        if act.drop:
            self.close_connection = True
            return
        message = act.content if isinstance(act.content, dict) else {"role": "assistant", "content": act.content}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        whole = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
        sent = json.dumps(whole if act.body is None else act.body).encode()
        length = len(sent)
        if act.cut is not None:
            sent = sent[: act.cut]
            length = length if act.announced else act.cut
        self.send_response(act.status)
        for name, value in {"Content-Type": act.kind, "Content-Length": str(length), **act.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *_: Any) -> None:
        pass


class Endpoint(ThreadingHTTPServer):
    """Answers `reply(text of the user's message, how often it was sent)`.

    Attributes:
        requests: the bodies, in the order of arrival, and `times`, `keys` with them.
        most: the largest number of requests under way at once.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, reply: Callable[[str, int], Act]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.lock = reply, threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.keys: list[str] = []
        self.active = self.most = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def texts(self) -> list[str]:
        """The user's messages, in the order of arrival."""
        return [request["messages"][-1]["content"] for request in self.requests]

    def arrived(self, body: dict[str, Any], key: str) -> Act:
        with self.lock:
            self.requests.append(body)
            self.times.append(time.monotonic())
            self.keys.append(key)
            self.active += 1
            self.most = max(self.most, self.active)
            return self.reply(self.texts[-1], self.texts.count(self.texts[-1]))

    def handle_error(self, *_: Any) -> None:
        pass  # a client that gave up is what some tests are about
