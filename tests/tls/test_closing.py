"""A TLS connection is closed at once, also if the other side does not answer the close message."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest

from openagents_worker.concurrency import end_task
from openagents_worker.producer.client import cell_of
from openagents_worker.settings import Settings, load_settings
from openagents_worker.store.client import AsyncStore
from openagents_worker.worker.control_channel import ControlChannel
from tests.support.waiting import await_for
from tests.tls.servers import Servers, TlsEnd
from tests.tls.variants import VARIANTS

pytestmark = pytest.mark.allow_blocking("the other side's loop, in a thread of its own, is held")


@pytest.fixture
def settings(servers: Servers) -> Settings:
    return load_settings({"OPENAGENTS_REDIS_URL": VARIANTS["TLS"].url(servers)})


@contextmanager
def silent(end: TlsEnd) -> Generator[None]:
    """The other side does not answer the close message of TLS."""
    may_go_on = threading.Event()
    end._loop.call_soon_threadsafe(may_go_on.wait)
    try:
        yield
    finally:
        may_go_on.set()


def opened(store: AsyncStore) -> list[Any]:
    """The sockets of a store on this loop."""
    return [transport.get_extra_info("socket") for transport in store._on_loops.here().transports()]


async def closed(sockets: list[Any]) -> None:
    assert sockets
    await asyncio.sleep(0)  # asyncio closes a socket one turn after its transport
    assert [one.fileno() for one in sockets] == [-1] * len(sockets)


async def test_closing_that_is_cancelled_leaves_no_socket(settings: Settings, servers: Servers) -> None:
    store = AsyncStore(cell_of(settings))
    await store.use(lambda r: r.ping())
    sockets, transports = opened(store), list(store._on_loops.here().transports())
    with silent(servers.tls):
        closing = asyncio.create_task(store.close(), name="close")
        await await_for(lambda: all(transport.is_closing() for transport in transports), "it says goodbye")
        assert not closing.done()
        await end_task(closing)
        await closed(sockets)


async def test_closing_that_takes_too_long_leaves_no_socket(settings: Settings, servers: Servers) -> None:
    store = AsyncStore(cell_of(settings))
    await store.use(lambda r: r.ping())
    sockets = opened(store)
    for connection in store._on_loops.here()._pool.connection_class.opened:
        connection.socket_connect_timeout = 0.01  # redis-py waits for so long
    with silent(servers.tls):
        await store.close()
        await closed(sockets)


async def test_a_listener_that_ends_leaves_no_socket(settings: Settings, servers: Servers) -> None:
    heard: list[str] = []
    notices = ControlChannel(cell_of(settings), on_notice=heard.append)
    notices.follow("w1")
    with servers.inside(servers.free, 0) as inside:
        await await_for(lambda: inside.publish("oa:notices:w1", "r1"), "somebody listens")
    sockets = opened(notices._store)
    with silent(servers.tls):
        await notices.aclose()
        await closed(sockets)
