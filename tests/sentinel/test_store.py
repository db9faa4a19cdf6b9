"""The store through sentinels: it goes to the master, and to the next one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator
from dataclasses import replace

import pytest

from openagents_worker.errors import RedisUnreachable
from openagents_worker.store import scripts
from openagents_worker.store import sentinel as master_module
from openagents_worker.store.client import AsyncStore, Cell, Store
from openagents_worker.store.pubsub import subscribed_inbox
from tests.deployment.commands import free_port
from tests.sentinel.watched import PASSWORD, Watched
from tests.support.waiting import PATIENCE_S, await_for

pytestmark = pytest.mark.long

NOTHING = ((), 0, ())


@pytest.fixture
def cell(watched: Watched) -> Cell:
    return Cell(watched.url)


@pytest.fixture
def store(cell: Cell) -> Generator[Store]:
    with contextlib.closing(Store(cell)) as store:
        yield store


def port_of(store: Store) -> int:
    """Of the server that answers."""
    return int(store.ask(lambda r: r.info("server"))["tcp_port"])


def test_the_master_is_found_whichever_sentinel_is_away(watched: Watched) -> None:
    """One that answers is enough, wherever in the list it stands; and the master can be examined."""
    hosts = (("127.0.0.1", free_port()), *watched.address.hosts)
    with contextlib.closing(Store(Cell(replace(watched.address, hosts=hosts).url))) as store:
        assert port_of(store) == watched.master.port
        assert store.run(scripts.wake(limit=1)) == NOTHING
        assert store.persistence_info().maxmemory_policy == "noeviction"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"master": "other"}, "No master found for 'other'"),
        ({"password": "wrong"}, "refuses the login"),
        ({"sentinel_password": "wrong"}, "No master found"),
        ({"hosts": (("127.0.0.1", 1),)}, "No master found"),
    ],
)
async def test_what_is_wrong_is_said(watched: Watched, wrong: dict[str, object], says: str) -> None:
    """As `redis.unreachable`, with what redis-py knows of it, and no password."""
    cell = Cell(replace(watched.address, **wrong).url)  # type: ignore[arg-type]
    answering, store = AsyncStore(cell), Store(cell)

    for ask in (lambda: asyncio.to_thread(port_of, store), lambda: answering.run(scripts.wake(limit=1))):
        with pytest.raises(RedisUnreachable, match=says) as caught:
            await ask()
        assert PASSWORD not in str(caught.value)

    store.close()
    await answering.close()


async def test_a_sentinel_that_has_not_heard_of_it_yet_is_not_believed(watched: Watched) -> None:
    """It names a Redis that is a replica by now: nothing is read from it, nothing written to it."""
    replica = await asyncio.to_thread(lambda: watched.replica)
    sentinel = watched.sentinels[0].client
    sentinel.sentinel_monitor("stale", "127.0.0.1", replica.port, 3)
    sentinel.sentinel_set("stale", "auth-pass", PASSWORD)
    hosts = watched.address.hosts[:1]
    cell = Cell(replace(watched.address, hosts=hosts, master="stale").url)
    answering, store = AsyncStore(cell), Store(cell)
    try:
        for ask in (lambda: asyncio.to_thread(port_of, store), lambda: answering.ask(lambda r: r.get("x"))):
            with pytest.raises(RedisUnreachable, match="name as the master is not a master"):
                await ask()
    finally:
        sentinel.sentinel_remove("stale")
        store.close()
        await answering.close()


async def test_nobody_stays_with_a_master_that_was_replaced_while_it_lives(
    watched: Watched, cell: Cell
) -> None:
    """It takes writes, which are lost, for ten seconds more; we leave within one, however busy we are."""
    former = await asyncio.to_thread(lambda: watched.master)
    busy, store = AsyncStore(cell), Store(cell)
    ports: list[int] = []
    over = asyncio.Event()

    async def keep_asking() -> None:
        while not over.is_set():
            answer = await busy._batcher.execute("CONFIG", "GET", "port")
            ports.append(int(dict(answer)["port"] if isinstance(answer, dict) else answer[1]))

    asking = [asyncio.create_task(keep_asking()) for _ in range(400)]  # more than all lanes carry at once
    await await_for(lambda: ports, "it is asked")
    assert await asyncio.to_thread(port_of, store) == ports[-1] == former.port

    new = await asyncio.to_thread(watched.fail_over)

    await await_for(lambda: ports[-1] == new.port, "the busy one has left")
    assert await asyncio.to_thread(port_of, store) == new.port
    over.set()
    await asyncio.gather(*asking)
    await asyncio.to_thread(watched.make_replica, former)
    store.close()
    await busy.close()


async def test_a_write_that_a_former_master_refuses_goes_to_the_next(
    watched: Watched, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """READONLY is the end of a connection: it is an answer that may be asked for again."""
    monkeypatch.setattr(master_module, "ASK_EVERY_S", 1_000)
    await asyncio.to_thread(watched.settle)
    former = await asyncio.to_thread(lambda: watched.master)
    writing, store = AsyncStore(cell), Store(cell)
    write = scripts.register(incarnation="w@test:1", lease_ms=60_000, agents=[])
    await writing.run(write)
    await asyncio.to_thread(store.run, write)

    new = await asyncio.to_thread(watched.fail_over)
    await asyncio.to_thread(watched.make_replica, former)

    with pytest.raises(RedisUnreachable):
        await writing.run(write)
    with pytest.raises(RedisUnreachable):
        await asyncio.to_thread(store.run, write)
    async with asyncio.timeout(PATIENCE_S):
        await writing.run_until(write, lambda: False)
    await asyncio.to_thread(store.run, write)
    assert new.client.zscore("oa:workers", "w@test:1") is not None
    await writing.run(scripts.retire(incarnation="w@test:1"))
    store.close()
    await writing.close()


async def test_who_listens_hears_of_the_loss_and_listens_to_the_next(watched: Watched, cell: Cell) -> None:
    """A subscription dies with its Redis; the next one is to the new master."""
    async with subscribed_inbox(cell, "news") as inbox:
        killed = await asyncio.to_thread(watched.kill_master)
        with pytest.raises(RedisUnreachable):
            await inbox.next(timeout_s=10)
    await asyncio.to_thread(watched.bring_back, killed)

    async with subscribed_inbox(cell, "news") as inbox:
        assert await asyncio.to_thread(lambda: watched.master.client.publish("news", "hello")) == 1
        assert (message := await inbox.next(timeout_s=5)) is not None
        assert message.text == "hello"
