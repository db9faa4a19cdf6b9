"""A server of a test, on a free port, that leaves no connection open."""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from openagents_worker.testing.model_server.listening import Listening, Serve

__all__ = ["listening"]


@asynccontextmanager
async def listening(serve: Serve, *, tls: ssl.SSLContext | None = None) -> AsyncGenerator[int]:
    """Serves each connection with the function. Yields the port. At the end, all connections are closed."""
    server = Listening(serve, name="connection of a test")
    await server.start(tls=tls)
    try:
        yield server.port
    finally:
        await server.stop()
