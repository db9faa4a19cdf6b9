"""Monitoring: the only place where a worker answers requests for metrics and probes.

The answers come from a thread of their own, which works while the event loop is blocked or Redis is away. The
number of connections and the time of each are bounded. A port that is in use does not stop the worker.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET6, SHUT_RDWR, SO_REUSEADDR, SOL_SOCKET, socket
from typing import Any
from urllib.parse import urlsplit

from openagents_worker.telemetry.logs import get_logger
from openagents_worker.worker.background import Health, Leave, background_thread

__all__ = ["MonitoringReply", "MonitoringServer", "Route", "checks_answer"]

log = get_logger(__name__)

MAX_CONNECTIONS = 8
REQUEST_S = 5.0  # between two bytes of a client that sends its request or takes the answer
CONNECTION_S = 15.0  # of one connection: a client that sends a byte from time to time must not keep it
BIND_AGAIN_S = 1.0
LOG_AGAIN_S = 300.0
STOP_S = 5.0


@dataclass(frozen=True, slots=True)
class MonitoringReply:
    """The answer to a request."""

    status: HTTPStatus
    body: bytes
    content_type: str = "text/plain; charset=utf-8"


Route = Callable[[str], MonitoringReply]
"""Answers a request for one path. The argument is its header `Accept`."""


class MonitoringServer:
    """Serves some paths at one port from `start` to `stop`.

    The port is opened by a thread, which tries again while another process has it: an old worker may still
    be handing over its runs.
    """

    def __init__(
        self, address: str, port: int, routes: Mapping[str, Route], *, health: Health, leave: Leave
    ) -> None:
        """`routes` maps paths, such as `/metrics`, to the functions that answer. `port` 0: any free one."""
        self.health = health
        self._address = address
        self._port = port
        self._routes = dict(routes)
        self._server: _Server | None = None
        self._opened = threading.Event()
        self._stopping = threading.Event()
        self._thread = background_thread(self._main, name="openagents-monitoring", leave=leave)

    @property
    def port(self) -> int | None:
        """The port at which it listens; None while it could not be opened."""
        return None if self._server is None else int(self._server.server_address[1])

    def start(self) -> None:
        self._thread.start()

    def wait_opened(self, timeout_s: float) -> bool:
        """Wait until the port is open; returns whether it is."""
        return self._opened.wait(timeout_s)

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(STOP_S)

    def _main(self) -> None:
        server = self._open()
        if server is None:
            return
        with server:
            self._server = server
            self._opened.set()
            log.info("monitoring.started", address=self._address, port=self.port, paths=sorted(self._routes))
            while not self._stopping.is_set():
                server.handle_request()  # returns after `server.timeout` without a request
                server.close_old_connections()

    def _open(self) -> _Server | None:
        """Open the port, again and again; None when the worker stops."""
        tries = 0
        while not self._stopping.is_set():
            try:
                server = _Server(self._address, self._port, self._routes)
            except (OSError, OverflowError) as error:
                self.health.failed(error, code="monitoring.port_in_use")
                if tries % round(LOG_AGAIN_S / BIND_AGAIN_S) == 0:
                    log.error(
                        "monitoring.port_in_use",
                        address=self._address,
                        port=self._port,
                        error=str(error),
                        hint="give each worker process of this machine its own METRICS_PORT and HEALTH_PORT",
                    )
                tries += 1
                self._stopping.wait(BIND_AGAIN_S)
            else:
                self.health.succeeded()
                return server
        return None


class _Server(ThreadingHTTPServer):
    """A thread for each connection, a few at a time. Further connections are closed at once."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 16
    timeout = 0.5  # how soon it sees that the worker has stopped

    def __init__(self, address: str, port: int, routes: Mapping[str, Route]) -> None:
        self.routes = routes
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._opened_at: dict[socket, float] = {}
        if ":" in address:
            self.address_family = AF_INET6
        super().__init__((address, port), _RequestHandler)

    def server_bind(self) -> None:
        """Bind without the look-up of the name of this machine, which may take long."""
        # Connections that the last owner of the port has closed must not keep it for a minute.
        self.socket.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        self._opened_at[request] = time.monotonic()
        try:
            super().process_request(request, client_address)
        except Exception:  # the process may not start a thread: the server closes the connection
            self._end(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._end(request)

    def _end(self, request: Any) -> None:
        self._opened_at.pop(request, None)
        self._free.release()

    def close_old_connections(self) -> None:
        """End the connections that are older than `CONNECTION_S`. Their threads see that and end."""
        for connection, opened_at in list(self._opened_at.items()):
            if time.monotonic() - opened_at > CONNECTION_S:
                with suppress(OSError):  # it has just ended
                    connection.shutdown(SHUT_RDWR)

    def handle_error(self, request: socket | tuple[bytes, socket], client_address: Any) -> None:
        """A client that has gone is not a problem of this process."""
        log.debug("monitoring.request_failed", exc_info=True)


class _RequestHandler(BaseHTTPRequestHandler):
    timeout = REQUEST_S
    server_version, sys_version = "openagents-worker", ""

    def do_GET(self) -> None:
        assert isinstance(self.server, _Server)
        route = self.server.routes.get(urlsplit(self.path).path)
        accept = self.headers.get("Accept", "")
        self._send(route(accept) if route else MonitoringReply(HTTPStatus.NOT_FOUND, b"not found\n"))

    do_HEAD = do_GET

    def _send(self, answer: MonitoringReply) -> None:
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Probes come every few seconds: they are not logged."""


def checks_answer(checks: Iterable[tuple[str, str]]) -> MonitoringReply:
    """The answer to a probe: 200 if no check has a problem, else 503. One line for each check.

    `checks` are names with the problem, '' if there is none.
    """
    lines, status = [], HTTPStatus.OK
    for name, problem in checks:
        lines.append(f"[{'-' if problem else '+'}] {name}: {problem or 'ok'}\n")
        status = HTTPStatus.SERVICE_UNAVAILABLE if problem else status
    return MonitoringReply(status, "".join(lines).encode())
