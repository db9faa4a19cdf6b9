"""The outside world: an HTTP server that counts each side effect. The audit believes it, and nobody else.

`POST /effects` takes `{"key", "run", "n", "begun"}` and answers `{"serial"}`, a number that is unique for
each execution. A tool returns this number as its result, so the stored result of a call names the execution
that was recorded. `GET /effects?key=...` answers the last execution with this key, or 404: then the caller
may make it (again). `begun` and `arrived` are seconds of the monotonic clock, which all processes of a host
share.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

__all__ = ["Effects", "Execution", "NotFound"]


@dataclass(frozen=True, slots=True)
class Execution:
    """One execution of a step, as the outside world has seen it."""

    serial: int
    key: str
    """The idempotency key of the call."""
    run_id: str
    begun: float
    arrived: float
    n: str = ""
    """Which call of its run it is; empty for a call of the model."""
    cents: int | None = None
    """The amount of a payment."""

    @property
    def call_id(self) -> str:
        return self.key.split(":", 2)[2]


@dataclass(frozen=True, slots=True)
class NotFound:
    """Somebody has asked for executions with a key, and got the answer that there are none."""

    key: str
    at: float


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # connections that wait to be accepted

    def handle_error(self, *_: Any) -> None:
        """Do not report a client that has closed its connection: its worker was killed."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(*_)


class Effects:
    """The server, in threads. `answer(entry)` may add fields to the reply of an execution."""

    def __init__(self, answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.executions: list[Execution] = []
        self.not_found: list[NotFound] = []
        self._answer = answer
        self._serials = itertools.count(1)
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, name="effects")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/effects"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def record(self, key: str, run_id: str, begun: float, n: str = "", cents: int | None = None) -> int:
        """Record one execution; returns its serial number."""
        serial = next(self._serials)
        self.executions.append(Execution(serial, key, run_id, begun, time.monotonic(), n, cents))
        return serial

    def find(self, key: str) -> Execution | None:
        """The last execution with this key. None is noted: the caller will make it."""
        for each in reversed(self.executions):
            if each.key == key:
                return each
        self.not_found.append(NotFound(key, time.monotonic()))
        return None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        effects = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                body = self.rfile.read(length)
                if len(body) < length:
                    return  # the client was killed while it sent the request
                entry = json.loads(body)
                serial = effects.record(
                    entry["key"], entry["run"], entry["begun"], entry["n"], entry.get("cents")
                )
                self._reply(200, {"serial": serial, **effects._answer(entry)})

            def do_GET(self) -> None:
                (key,) = parse_qs(urlsplit(self.path).query)["key"]
                found = effects.find(key)
                if found is None:
                    self._reply(404, {})
                else:
                    self._reply(200, {"serial": found.serial, "cents": found.cents})

            def _reply(self, status: int, value: dict[str, Any]) -> None:
                reply = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler
