"""An MCP server whose tools have effects that it counts. Real: the protocol, its HTTP server and its sockets.

A test sees each call before its effect and after it, and may then let the connection break.
"""

from __future__ import annotations

import json
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

__all__ = ["EffectServer", "effect_server"]

Moment = Literal["called", "done"]
ARGUMENTS = {"type": "object", "properties": {"n": {"type": "string"}}, "required": ["n"]}
TOOLS = [
    {
        "name": "put",
        "description": "Puts something in its place.",
        "inputSchema": ARGUMENTS,
        "annotations": {"idempotentHint": True, "destructiveHint": False},
    },
    {
        "name": "wipe",
        "description": "Destroys something.",
        "inputSchema": ARGUMENTS,
        "annotations": {"destructiveHint": True},
    },
]
"""`put` may be repeated. `wipe` needs an approval, and nobody may repeat it unasked."""


@dataclass
class EffectServer:
    """What the tools have done, by their argument `n`: the idempotency keys of the calls with an effect."""

    url: str = ""
    effects: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    breaks: Callable[[Moment, str], bool] = lambda moment, key: False
    """Called with the idempotency key before and after an effect. True: the connection breaks then."""

    def result(self, tool: str, n: str) -> str:
        """What a call returns."""
        return f"{tool} {n}: done"

    def answer(self, message: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to a request. None: the connection breaks."""
        params = message.get("params") or {}
        match message.get("method"):
            case "initialize":
                about = {"capabilities": {"tools": {}}, "serverInfo": {"name": "effects", "version": "1"}}
                return {"result": {"protocolVersion": params["protocolVersion"], **about}}
            case "tools/list":
                return {"result": {"tools": TOOLS}}
            case "tools/call":
                return self._call(params)
            case "ping":
                return {"result": {}}
            case method:
                return {"error": {"code": -32601, "message": f"no method {method}"}}

    def _call(self, params: dict[str, Any]) -> dict[str, Any] | None:
        key, n = params["_meta"]["openagents-worker/idempotencyKey"], params["arguments"]["n"]
        if self.breaks("called", key):
            return None
        self.effects[n].append(key)
        if self.breaks("done", key):
            return None
        return {"result": {"content": [{"type": "text", "text": self.result(params["name"], n)}]}}


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # a pooled connection of a killed worker may be open
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing about the connection of a killed worker."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def effect_server() -> Generator[EffectServer]:
    """A server on a free port."""
    service = EffectServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            message = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if "id" not in message:
                self.send(202)
            elif (reply := service.answer(message)) is None:
                self.close_connection = True
            else:
                self.send(200, {"jsonrpc": "2.0", "id": message["id"], **reply})

        def do_GET(self) -> None:
            self.send(405)

        def do_DELETE(self) -> None:
            self.send(200)

        def send(self, status: int, value: Any = None) -> None:
            body = b"" if value is None else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = _Server(("127.0.0.1", 0), Handler)
    service.url = f"http://127.0.0.1:{server.server_address[1]}/mcp"
    thread = threading.Thread(target=server.serve_forever, name="effect server")
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
