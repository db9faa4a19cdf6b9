"""Every form of URL with every client: each reaches the same Redis and the same database."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable
from contextlib import closing
from typing import Any

import pytest
import redis
from click.testing import CliRunner
from flower.utils.broker import Broker

from openagents_worker.celery.kombu_redis import TRANSPORTS
from openagents_worker.cli.commands import commands
from openagents_worker.dashboard.sockets import read_sockets_as_celery_does
from openagents_worker.errors import RunNotFound
from openagents_worker.producer.client import AsyncClient, Client, cell_of
from openagents_worker.producer.publisher import (
    close_producers,
    make_app,
    publishing_connection,
    send_first,
)
from openagents_worker.settings import Settings, load_settings
from openagents_worker.store import scripts
from openagents_worker.store.client import AsyncStore, Store
from openagents_worker.store.pubsub import subscribed_inbox
from openagents_worker.store.scripts import Wake
from openagents_worker.store.subscribed import SubscribedStore
from openagents_worker.worker.backlog import Backlog
from openagents_worker.worker.control_channel import ControlChannel
from tests.support.waiting import await_for
from tests.tls.servers import Servers
from tests.tls.variants import VARIANTS, Variant

REQUEST = {"agent_id": "assistant", "session_id": "s1", "input_text": "hi", "run_id": "r1"}
WAKE = Wake("r1", "agents", 300, "assistant", "s1", 1, 3, "")

Inside = redis.Redis
Door = Callable[[Settings, Inside], Awaitable[None] | None]


async def producer(settings: Settings, inside: Inside) -> None:
    """Record and message are both there when `submit` returns."""
    with Client(settings=settings) as client:
        await asyncio.to_thread(client.submit, REQUEST)
        record = await asyncio.to_thread(client.record, "r1")
    assert record.agent_id == "assistant"
    assert inside.exists("oa:run:r1")
    assert inside.llen("agents") == 1


async def async_producer(settings: Settings, inside: Inside) -> None:
    async with AsyncClient(settings=settings) as client:
        await client.submit(REQUEST)
        assert (await client.record("r1")).agent_id == "assistant"
        with pytest.raises(RunNotFound):
            await client.record("r2")
    assert inside.exists("oa:run:r1")
    assert inside.llen("agents") == 1


async def watcher(settings: Settings, inside: Inside) -> None:
    """Events come by pub/sub, which all watchers of a loop share."""
    async with subscribed_inbox(cell_of(settings), "oa:channel") as inbox:
        inside.publish("oa:channel", "heard")
        assert (message := await inbox.next(60)) is not None
        assert message.text == "heard"


async def cancel_listener(settings: Settings, inside: Inside) -> None:
    """A worker gets the cancellation of a run at once."""
    heard: list[str] = []
    notices = ControlChannel(cell_of(settings), on_notice=heard.append)
    notices.follow("w1")
    try:
        await await_for(lambda: inside.publish("oa:notices:w1", "r1"), "somebody listens")
        await await_for(lambda: "r1" in heard, "it hears")
    finally:
        await notices.aclose()


async def heartbeat(settings: Settings, inside: Inside) -> None:
    """Its connection is seen to live, which takes RESP3 and INFO."""
    with closing(SubscribedStore(cell_of(settings), answer_timeout_s=5, connect_timeout_s=5)) as store:
        store.subscribe("oa:alive:w1")
        await asyncio.to_thread(store.run, scripts.register(incarnation="w1", lease_ms=60_000, agents=[]))
        assert store.server == inside.info("server")["run_id"]
        assert inside.pubsub_numsub("oa:alive:w1") == [("oa:alive:w1", 1)]
        assert not await asyncio.to_thread(store.wait, 0)  # a message of TLS is not taken for the end
        assert store.is_connected
        store.run(scripts.retire(incarnation="w1"))


async def scripts_in_batches(settings: Settings, inside: Inside) -> None:
    """A worker's own store sends many commands at once."""
    store = AsyncStore(cell_of(settings))
    try:
        answers = await asyncio.gather(*(store.ask(lambda r: r.incr("oa:n")) for _ in range(50)))
    finally:
        await store.close()
    assert sorted(answers) == list(range(1, 51))
    assert inside.get("oa:n") == "50"


def broker(settings: Settings, inside: Inside) -> None:
    """kombu's connection, as in `celery inspect` and Flower, and our transport, as in a worker."""
    app = make_app(settings)
    for transports in ({}, TRANSPORTS):
        with app.connection_for_read() as connection:
            connection.transport_cls = transports.get(connection.transport_cls, connection.transport_cls)
            assert send_first(app, WAKE)
            channel = connection.default_channel
            message = channel.basic_get("agents", no_ack=True)
            assert message is not None
            assert channel.client.set("oa:seen", "yes")
            assert inside.getdel("oa:seen") == "yes"
    close_producers(app)
    app.close()


async def backlog(settings: Settings, inside: Inside) -> None:
    """A worker's rescue loop reads the oldest message of a queue."""
    inside.lpush("agents", json.dumps({"headers": {"wake_us": "300"}}))
    reader = Backlog(settings.broker_url)
    assert await reader.oldest_us("agents") == 300
    await reader.aclose()


def result_backend(settings: Settings, inside: Inside) -> None:
    app = make_app(settings)
    app.backend.client.set("celery-task-meta-1", "done")
    assert app.backend.get("celery-task-meta-1") == b"done"
    app.backend.client.connection_pool.disconnect()
    app.close()
    assert inside.get("celery-task-meta-1") == "done"


async def flower(settings: Settings, inside: Inside) -> None:
    """Flower counts the messages of queues over a connection that it makes itself."""
    read_sockets_as_celery_does()
    app = make_app(settings)
    inside.lpush("agents", "a message")
    with app.connection() as connection:
        url = connection.as_uri(include_password=True)
    page = Broker(
        url, broker_options=app.conf.broker_transport_options, broker_use_ssl=app.conf.broker_use_ssl
    )
    assert await page.queues(["agents"]) == [{"name": "agents", "messages": 1}]
    app.close()


async def command_line(settings: Settings, inside: Inside) -> None:
    inside.set("oa:anything", "of ours")
    env = {"OPENAGENTS_REDIS_URL": settings.redis_url}
    done = await asyncio.to_thread(CliRunner().invoke, commands, ["runs", "--json"], env=env)
    assert (done.exit_code, done.exception) == (0, None), done.output


DOORS: tuple[Door, ...] = (
    producer,
    async_producer,
    watcher,
    cancel_listener,
    heartbeat,
    scripts_in_batches,
    broker,
    backlog,
    result_backend,
    flower,
    command_line,
)


@pytest.mark.parametrize("name", ["limits", "a socket with a user", "TLS with limits"])
def test_time_limits_and_the_name_of_the_client_reach_every_connection(name: str, servers: Servers) -> None:
    """Timeouts of the URL can only shorten ours, so that an answer arrives within the lease."""
    url = VARIANTS[name].url(servers)
    settings = load_settings({"OPENAGENTS_REDIS_URL": url, "OPENAGENTS_RESULT_BACKEND": url})
    app = make_app(settings)
    with (
        closing(Store(cell_of(settings), answer_timeout_s=9)) as store,
        app.connection_for_read() as reading,
        publishing_connection(app) as publishing,
    ):
        clients: list[tuple[Any, float]] = [
            (store.redis, 5),
            (reading.default_channel.client, 5),
            (publishing.default_channel.client, 1.5),
            (app.backend.client, 5),
        ]
        for client, timeout_s in clients:
            options = client.connection_pool.connection_kwargs
            assert client.client_getname() in ("the-shop", b"the-shop")
            assert options["socket_timeout"] == timeout_s
            assert options["health_check_interval"] == 7
        assert store.redis.connection_pool.connection_kwargs["protocol"] == 3
        app.backend.client.connection_pool.disconnect()
    with closing(Store(cell_of(settings), answer_timeout_s=2)) as store:
        assert store.redis.connection_pool.connection_kwargs["socket_timeout"] == 2
    app.close()


@pytest.mark.share(of=6)
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
async def test_each_url_works_everywhere(variant: Variant, door: Door, servers: Servers) -> None:
    """One URL is enough: the broker and the result backend are the same Redis."""
    url = variant.url(servers)
    settings = load_settings({"OPENAGENTS_REDIS_URL": url, "OPENAGENTS_RESULT_BACKEND": url})
    settings.check_files()
    with servers.inside(servers.locked if variant.is_locked else servers.free, variant.db) as inside:
        if inspect.iscoroutinefunction(door):
            await door(settings, inside)
        else:
            await asyncio.to_thread(door, settings, inside)
