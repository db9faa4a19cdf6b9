"""Connections, loops and processes: what a client opens, finds closed, leaves behind and inherits."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Generator
from contextlib import aclosing, contextmanager
from typing import Any

import pytest

from openagents_worker.errors import RedisUnreachable
from openagents_worker.models import RunRequest, RunState
from openagents_worker.producer.client import AsyncClient, Client
from openagents_worker.producer.task import ProducerTask
from openagents_worker.settings import Settings, load_settings
from openagents_worker.store.watch import RunEvent
from openagents_worker.testing.model_server import ModelServer
from tests.producer import forking
from tests.support.lossy_proxy import Proxy
from tests.support.waiting import wait_for

LOOPS = 50
FIELDS = {"agent_id": "assistant", "session_id": "s1", "input_text": "hi"}


def request(n: int) -> RunRequest:
    return RunRequest(**FIELDS, run_id=f"r{n}")


def ours(client: Client) -> int:
    """How many connections of this library the server has, without the one that asks."""
    return sum(one["name"] == "openagents" for one in client.store.redis.client_list()) - 1


@contextmanager
def loop_closed_by_hand() -> Generator[asyncio.AbstractEventLoop]:
    """Nobody ends its generators or tasks: so do programs that are older than `asyncio.run`."""
    loop = asyncio.new_event_loop()
    try:
        yield loop
    finally:
        loop.close()


async def with_twin(client: Client, shared: AsyncClient, n: int) -> None:
    """`run_agent.adelay`."""
    task: Any = client.app.tasks.get(ProducerTask.name) or client.app.register_task(ProducerTask())
    handle = await task.adelay(request(n))
    assert (await handle.record()).state is not None
    await handle.cancel()


async def with_shared(client: Client, shared: AsyncClient, n: int) -> None:
    """One `AsyncClient` for all loops."""
    handle = await shared.submit(request(n))
    assert (await handle.record()).state is RunState.QUEUED
    await handle.cancel()


async def with_its_own(client: Client, shared: AsyncClient, n: int) -> None:
    """An `AsyncClient` that is never closed."""
    await with_shared(client, AsyncClient(settings=client.settings, app=client.app), n)


async def with_events(client: Client, shared: AsyncClient, n: int) -> None:
    """A run is watched to its end, on the pub/sub connection of the loop."""
    handle = await shared.submit(request(n))
    watching = asyncio.create_task(_names(handle), name="watch")
    await asyncio.sleep(0)
    await handle.cancel()
    assert "run.cancelled" in await watching


async def _names(handle: Any) -> list[str]:
    async with aclosing(handle.events()) as events:
        return [event.name async for event in events if isinstance(event, RunEvent)]


Use = Callable[[Client, AsyncClient, int], Awaitable[None]]


@pytest.mark.share(of=2)
@pytest.mark.parametrize("use", [with_twin, with_shared, with_its_own, with_events])
def test_loops_that_are_closed_by_hand_leave_no_connection(settings: Settings, use: Use) -> None:
    """Whoever opens a connection closes those of loops that are closed: so there are never many."""
    with Client(settings=settings) as client:
        shared = AsyncClient(settings=settings, app=client.app)
        most = 0
        for n in range(LOOPS):
            with loop_closed_by_hand() as loop:
                loop.run_until_complete(use(client, shared, n))
            most = max(most, ours(client))
        assert most <= 4  # those of one loop, and the client's own

        asyncio.run(with_shared(client, shared, LOOPS))
        wait_for(lambda: ours(client) <= 1, "only the client's own is left")


def test_a_loop_that_ends_closes_what_a_client_opened_on_it(settings: Settings) -> None:
    """`asyncio.run` leaves no connection, also if the client is not closed."""
    with Client(settings=settings) as client:
        shared = AsyncClient(settings=settings, app=client.app)
        for n in range(3):
            asyncio.run(with_shared(client, shared, n))

            wait_for(lambda: ours(client) <= 1, "only the client's own is left")


# --- a connection that was closed meanwhile --------------------------------------------------------------


def close_idle(client: Client) -> None:
    """What a server with a `timeout` does to idle connections, and a load balancer."""
    client.store.redis.client_kill_filter(skipme=True, _type="normal")


def test_a_client_does_not_notice_that_its_idle_connections_were_closed(settings: Settings) -> None:
    """It looks before it sends: nothing is lost, so nothing is unknown."""
    with Client(settings=settings) as client, Client(settings=settings) as killer:
        handle = client.submit(request(1))
        for _ in range(3):
            close_idle(killer)
            assert client.record("r1").state is RunState.QUEUED
        close_idle(killer)
        client.submit(request(1))
        close_idle(killer)
        assert len(client.runs().items) == 1
        close_idle(killer)
        handle.cancel()
        assert client.store.redis.xlen(client.store.keys("events", "r1")) == 3


def test_an_async_client_does_not_notice_that_its_idle_connections_were_closed(settings: Settings) -> None:
    """Also where the loop has not run since, and has not heard of it."""
    with Client(settings=settings) as killer, loop_closed_by_hand() as loop:
        client = AsyncClient(settings=settings)

        def do(work: Awaitable[Any]) -> Any:
            async def wait() -> Any:
                return await work

            return loop.run_until_complete(wait())

        handle = do(client.submit(request(1)))
        for _ in range(3):
            close_idle(killer)
            assert do(handle.record()).state is RunState.QUEUED
        close_idle(killer)
        do(client.submit(request(1)))
        close_idle(killer)
        assert len(do(client.runs()).items) == 1
        close_idle(killer)
        do(handle.cancel())
        assert killer.store.redis.xlen(killer.store.keys("events", "r1")) == 3
        do(client.close())


async def test_an_async_client_on_a_loop_that_goes_on_does_not_notice_it_either(settings: Settings) -> None:
    """Whenever it was closed: before the loop has heard of it, and after."""
    with Client(settings=settings) as killer:
        async with AsyncClient(settings=settings) as client:
            handle = await client.submit(request(1))
            for turns in range(20):
                await asyncio.to_thread(close_idle, killer)
                for _ in range(turns % 4):
                    await asyncio.sleep(0)
                assert (await handle.record()).state is RunState.QUEUED
                await client.submit(request(1))
            await handle.cancel()


@pytest.fixture
def losing(redis_url: str) -> Generator[tuple[Proxy, Settings]]:
    """A line that loses the answer to the next read."""
    with Proxy(redis_url) as proxy:
        proxy.lose_answer_to = lambda data: b"HMGET" in data and proxy.lost < 1
        yield (
            proxy,
            load_settings({"OPENAGENTS_REDIS_URL": proxy.url, "OPENAGENTS_BROKER_URL": redis_url}),
        )


def test_a_read_whose_answer_was_lost_is_asked_again(losing: tuple[Proxy, Settings]) -> None:
    """It changes nothing, so the caller gets no error."""
    proxy, settings = losing
    with Client(settings=settings) as client:
        handle = client.submit(request(1))
        assert handle.record().state is RunState.QUEUED
        handle.cancel()
    assert proxy.lost == 1


async def test_an_async_read_whose_answer_was_lost_is_asked_again(losing: tuple[Proxy, Settings]) -> None:
    """The same for asyncio."""
    proxy, settings = losing
    async with AsyncClient(settings=settings) as client:
        handle = await client.submit(request(1))
        assert (await handle.record()).state is RunState.QUEUED
        await handle.cancel()
    assert proxy.lost == 1


async def test_a_read_is_asked_twice_at_most(redis_url: str) -> None:
    """A line that stays bad is an error in the end."""
    async with Proxy(redis_url) as proxy:
        proxy.lose_answer_to = lambda data: b"HMGET" in data
        async with AsyncClient(proxy.url) as client:
            with pytest.raises(RedisUnreachable):
                await client.record("r1")
    assert proxy.lost == 2


# --- forks -----------------------------------------------------------------------------------------------


async def test_a_forked_child_shares_no_connection_with_its_parent(redis_url: str) -> None:
    """Sync, asyncio, pub/sub and HTTP: the child opens new connections, and those of the parent keep
    working."""
    async with ModelServer([{"text": "ok"}] * 20) as server:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            forking.__name__,
            redis_url,
            server.url,
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await process.communicate()

    assert process.returncode == 0
    found = json.loads(out)
    assert found["inherited_sockets"] == 0
    assert found["child_sends"] == 1
    for kind in ("model", "tool"):
        assert found["before"][kind] == found["after"][kind] != found["child"][kind]
    # Redis numbers its connections: the parent has none that is younger than its child's.
    kinds = ("sync", "async", "lane")
    assert max(found["after"][kind] for kind in kinds) < min(found["child"][kind] for kind in kinds)
