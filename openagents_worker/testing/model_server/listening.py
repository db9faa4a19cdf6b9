"""Listening: the only place of the model server that accepts connections, and closes them at the end.

`asyncio.Server` closes its port only (https://github.com/python/cpython/issues/113538). Two kinds of
connections are easily left open: one that asyncio accepts while the server stops, and one whose task is
cancelled before its first step.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Coroutine
from typing import Any

__all__ = ["Listening", "Serve"]

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]
"""Serves one connection. It may close the connection; the server does so in any case."""

STEPS_OF_ACCEPTING = 3
"""Steps of the loop after which asyncio has announced every connection that it was accepting: one makes the
transport, the next one calls `_connected`. The port must stay open so long: the transport of a closed server
cannot be made, and nobody closes its socket."""


class Listening:
    """Serves each connection in a task of its own, from `start` to `stop`."""

    def __init__(self, serve: Serve, *, name: str) -> None:
        """`name` is the name of the tasks."""
        self._serve = serve
        self._name = name
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self.accepted = 0
        """How many connections were opened so far."""

    @property
    def open(self) -> int:
        """How many connections are open."""
        return len(self._open)

    @property
    def is_started(self) -> bool:
        return self._server is not None

    @property
    def port(self) -> int:
        """The port of a started server."""
        assert self._server is not None, "the server is not started"
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def start(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        tls: ssl.SSLContext | None = None,
        backlog: int = 100,
        max_line_bytes: int = 2**16,
    ) -> None:
        """Listen. Port 0 is any free port. Raises `OSError` if the port is in use."""
        self._server = await asyncio.start_server(
            self._connected, host, port, ssl=tls, backlog=backlog, limit=max_line_bytes
        )

    async def stop(self) -> None:
        """Close the port and cancel the tasks of all connections; they are closed afterwards."""
        if self._server is None:
            return
        server, self._server = self._server, None
        for listening in server.sockets:  # not `server.close()`: it would leak what is being accepted
            asyncio.get_running_loop().remove_reader(listening.fileno())
        for _ in range(STEPS_OF_ACCEPTING):
            await asyncio.sleep(0)
        server.close()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)
        await server.wait_closed()

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.create_task(self._serve(reader, writer), name=self._name)
        self._open[task] = writer
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._open.pop(task).close()  # a task that is cancelled at once never starts, and has closed nothing
