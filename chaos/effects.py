"""The outside world: an HTTP server that counts each side effect. The audit believes it, and nobody else.

`POST /effects` takes `{"key", "run", "begun"}` and answers `{"serial"}`, a number that is unique for each
execution. A tool returns this number as its result, so the stored result of a call names the execution that
was recorded. `begun` and `arrived` are seconds of the monotonic clock, which all processes of a host share.
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

__all__ = ["Execution", "Effects"]


@dataclass(frozen=True, slots=True)
class Execution:
    """One execution of a step, as the outside world has seen it."""

    serial: int
    key: str
    """The idempotency key of the call."""
    run_id: str
    begun: float
    arrived: float


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

    def record(self, key: str, run_id: str, begun: float) -> int:
        """Record one execution; returns its serial number."""
        serial = next(self._serials)
        self.executions.append(Execution(serial, key, run_id, begun, time.monotonic()))
        return serial

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
                serial = effects.record(entry["key"], entry["run"], entry["begun"])
                reply = json.dumps({"serial": serial, **effects._answer(entry)}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler
