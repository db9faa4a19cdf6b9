"""The Redis client: cancellations, lost answers and refusals are never hidden."""

from __future__ import annotations

import asyncio
from contextlib import closing
from typing import Any

import pytest
from redis import exceptions

from openagents_worker.errors import RedisRefused, RedisUnreachable
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.store import batching, scripts
from openagents_worker.store.client import AnswerLost, AsyncStore, Cell, Plan, Store
from tests.support.clocks import LoopClock
from tests.support.lossy_proxy import Proxy
from tests.support.waiting import PATIENCE_S, await_for


async def test_a_cancellation_while_sending_is_never_lost(redis_url: str) -> None:
    """A task that is cancelled while its command is sent ends as cancelled, at whatever moment."""
    store = AsyncStore(Cell(redis_url))

    async def ask_for_ever() -> None:
        while True:
            await store.run(scripts.wake(limit=1))

    lost = 0
    for delay in range(300):
        task = asyncio.create_task(ask_for_ever())
        for _ in range(delay % 17):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=PATIENCE_S)
        if not task.done():
            lost += 1
            while not task.done():
                task.cancel()
                await asyncio.sleep(0)
    await store.close()

    assert lost == 0


@pytest.mark.defect("S07")
async def test_commands_of_many_runs_share_a_round_trip(redis_url: str) -> None:
    """Commands of one iteration of the event loop are one round trip; each caller gets its own answer."""
    store = AsyncStore(Cell(redis_url))
    batcher = store._batcher

    answers = await asyncio.gather(*(batcher.execute("ECHO", str(n)) for n in range(500)))

    assert answers == [str(n) for n in range(500)]
    info = await batcher.execute("CLIENT", "LIST")
    assert 1 <= info.count("name=openagents") <= 2
    await store.close()


async def test_a_script_that_redis_does_not_know_is_loaded_once(redis_url: str) -> None:
    """Redis forgets its scripts when it restarts; callers do not notice."""
    store = AsyncStore(Cell(redis_url))
    await store.run(scripts.wake(limit=1))
    await store.redis.script_flush()
    await store.redis.config_resetstat()

    answers = await asyncio.gather(*(store.run(scripts.wake(limit=1)) for _ in range(100)))

    assert answers == [((), 0, ())] * 100
    commands = await store.redis.info("commandstats")
    assert commands["cmdstat_script|load"]["calls"] == 1
    assert "cmdstat_eval" not in commands
    await store.close()


async def test_runs_that_start_together_check_the_rights_of_a_script_once(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check takes longer than most scripts. The others wait for the first run."""
    store = AsyncStore(Cell(redis_url))
    batcher, call = store._batcher, scripts.wake(limit=1)
    ask, sent = batcher.execute, []

    async def noting(*command: str | int) -> Any:
        sent.append(command[1])
        return await ask(*command)

    monkeypatch.setattr(batcher, "execute", noting)

    await asyncio.gather(*(store.run(call) for _ in range(100)))

    checking, _ = call.script.checking()
    assert sent[:3] in ([checking, "LOAD", checking], [checking, call.script.sha, call.script.sha])
    assert checking not in sent[3:]
    await store.close()


async def test_if_the_first_run_of_a_script_fails_the_others_do_not_wait_for_each_other(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tries by itself, so that a Redis that does not answer delays them only once."""
    store = AsyncStore(Cell(redis_url))
    batcher, call = store._batcher, scripts.wake(limit=1)
    ask, sent = batcher.execute, []

    async def failing_once(*command: str | int) -> Any:
        sent.append(command[1])
        if len(sent) == 1:
            await asyncio.sleep(0)
            raise exceptions.ConnectionError("the connection was closed")
        return await ask(*command)

    monkeypatch.setattr(batcher, "execute", failing_once)

    failed, *answers = await asyncio.gather(*(store.run(call) for _ in range(3)), return_exceptions=True)

    assert isinstance(failed, AnswerLost)
    assert answers == [((), 0, ())] * 2
    assert sent[:3] == [call.script.checking()[0]] * 3
    await store.close()


async def test_a_script_that_is_forgotten_again_immediately_is_sent_with_its_source(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example, when another server becomes the master between two commands."""
    store = AsyncStore(Cell(redis_url))
    batcher = store._batcher
    ask, sent = batcher.execute, []

    async def forgetful(*command: str | int) -> Any:
        sent.append(command[0])
        answer = await ask(*command)
        if command[:2] == ("SCRIPT", "LOAD"):
            await ask("SCRIPT", "FLUSH")
        return answer

    monkeypatch.setattr(batcher, "execute", forgetful)
    await ask("SCRIPT", "FLUSH")

    assert await store.run(scripts.wake(limit=1)) == ((), 0, ())
    assert sent == ["EVALSHA", "SCRIPT", "EVALSHA", "EVAL"]
    await store.close()


async def test_a_refused_command_does_not_affect_the_others(redis_url: str) -> None:
    """An error is the answer to one command only."""
    store = AsyncStore(Cell(redis_url))
    batcher = store._batcher

    good, bad, after = await asyncio.gather(
        batcher.execute("ECHO", "a"),
        batcher.execute("NO-SUCH-COMMAND"),
        batcher.execute("ECHO", "b"),
        return_exceptions=True,
    )

    assert (good, after) == ("a", "b")
    assert isinstance(bad, exceptions.ResponseError)
    await store.close()


async def test_a_command_that_cannot_be_encoded_does_not_affect_the_others(redis_url: str) -> None:
    """Invalid text in the command of one run fails this command; the other commands of the pipeline are
    sent."""
    store = AsyncStore(Cell(redis_url))
    batcher = store._batcher

    before, bad, after = await asyncio.gather(
        batcher.execute("ECHO", "a"),
        batcher.execute("ECHO", "\ud800"),
        batcher.execute("ECHO", "b"),
        return_exceptions=True,
    )

    assert (before, after) == ("a", "b")
    assert isinstance(bad, UnicodeEncodeError)
    await store.close()


async def test_the_answer_for_a_cancelled_caller_is_dropped(redis_url: str) -> None:
    """It is read, and it is not taken for the answer to the next command."""
    store = AsyncStore(Cell(redis_url))
    batcher = store._batcher
    tasks = [batcher.execute("ECHO", str(n)) for n in range(40)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()

    answers = await asyncio.gather(*tasks[1::2])

    assert answers == [str(n) for n in range(1, 40, 2)]
    assert await batcher.execute("ECHO", "next") == "next"
    await store.close()


async def test_a_lost_connection_fails_only_its_own_commands(redis_url: str) -> None:
    """Callers whose answers are lost get `AnswerLost`; the next command uses a new connection."""
    async with Proxy(redis_url) as proxy:
        store = AsyncStore(Cell(proxy.url))
        await store.run(scripts.wake(limit=1))
        proxy.lose_answer_to = lambda data: b"EVAL" in data and proxy.lost < 1

        found = await asyncio.gather(
            *(store.run(scripts.wake(limit=1)) for _ in range(20)), return_exceptions=True
        )

        assert proxy.lost == 1
        assert any(isinstance(answer, AnswerLost) for answer in found)
        assert await store.run(scripts.wake(limit=1)) == ((), 0, ())
        await store.close()


async def test_a_silent_redis_is_detected_within_the_time_limit(redis_url: str) -> None:
    """All commands on the connection fail together, not one after the other."""
    async with Proxy(redis_url) as proxy:
        store, clock = AsyncStore(Cell(proxy.url), answer_timeout_s=60), LoopClock()
        await store.run(scripts.wake(limit=1))
        silenced: list[bytes] = []
        proxy.swallow = lambda data: not silenced.append(data)  # no answer of Redis arrives
        asking = [asyncio.create_task(store.run(scripts.wake(limit=1))) for _ in range(20)]
        await await_for(lambda: silenced, "Redis has answered")

        clock.forward(61)
        found = await asyncio.gather(*asking, return_exceptions=True)

        assert all(isinstance(answer, AnswerLost) for answer in found)
        proxy.swallow = lambda _: False
        assert await store.run(scripts.wake(limit=1)) == ((), 0, ())
        await store.close()


async def test_every_caller_gets_an_answer_when_all_connections_break_at_once(redis_url: str) -> None:
    """More commands wait than one pipeline holds: each gets its answer, or `AnswerLost`."""
    async with Proxy(redis_url) as proxy:
        store = AsyncStore(Cell(proxy.url))
        nothing = await store.run(scripts.wake(limit=1))
        proxy.lose_answer_to = lambda data: b"EVAL" in data and proxy.lost < 4

        async with asyncio.timeout(10):
            found = await asyncio.gather(
                *(store.run(scripts.wake(limit=1)) for _ in range(1_000)), return_exceptions=True
            )

        assert proxy.lost >= 2
        assert found.count(nothing) + sum(isinstance(one, AnswerLost) for one in found) == 1_000
        assert found.count(nothing) > 0
        await store.close()


@pytest.mark.parametrize("lines", [{"min-replicas-to-write": "1"}, {"replicaof": "127.0.0.1 1"}])
async def test_a_temporary_refusal_of_writes_may_be_repeated(lines: dict[str, str]) -> None:
    """Redis has too few replicas, or is a replica itself: nothing was written."""
    write = scripts.register(incarnation="w@test:1", lease_ms=60_000, agents=[])
    async with EmbeddedRedis(extra=lines) as server:
        store, answering = Store(Cell(server.url)), AsyncStore(Cell(server.url))
        for ask in (lambda: asyncio.to_thread(store.run, write), lambda: answering.run(write)):
            with pytest.raises(RedisUnreachable, match="temporarily refuses commands") as caught:
                await ask()
            assert not isinstance(caught.value, AnswerLost)
        store.close()
        await answering.close()


async def test_a_permanent_refusal_has_its_own_error(redis_url: str) -> None:
    """A wrong command is not repeated as if Redis were unreachable, and the cause is kept."""
    store, answering, sent = Store(Cell(redis_url)), AsyncStore(Cell(redis_url)), []

    def ask(client: Any) -> Any:
        sent.append(client)
        return client.execute_command("NO-SUCH-COMMAND")

    for work in (lambda: asyncio.to_thread(store.ask, ask), lambda: answering.ask_until(ask, lambda: False)):
        with pytest.raises(RedisRefused, match="unknown command") as caught:
            await work()
        assert isinstance(caught.value.__cause__, exceptions.ResponseError)
        assert not caught.value.retryable
    assert len(sent) == 2
    store.close()
    await answering.close()


async def test_waiting_for_a_connection_does_not_count_as_waiting_for_an_answer(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two round trips, a pipeline may have to wait for its pool. No command is on its way then."""
    monkeypatch.setattr(batching, "MAX_HOLD_S", -1.0)  # a new connection for every round trip
    store, clock = AsyncStore(Cell(redis_url)), LoopClock()
    batcher = batching.PipelineBatcher(store._batcher._pool, answer_timeout_s=60, pipelines=1)
    get_connection = batcher._pool.get_connection

    async def slow(*of: str) -> Any:
        clock.forward(61)
        for _ in range(3):
            await asyncio.sleep(0)  # run everything that is due: the pipeline is checked
        return await get_connection(*of)

    monkeypatch.setattr(batcher._pool, "get_connection", slow)

    answers = await asyncio.gather(*(batcher.execute("ECHO", str(n)) for n in range(300)))

    assert answers == [str(n) for n in range(300)]
    await batcher.close()
    await store.close()


async def test_a_lost_answer_fails_its_caller_before_the_connection_is_released(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if releasing the broken connection takes long."""
    async with Proxy(redis_url) as proxy:
        store = AsyncStore(Cell(proxy.url))
        batcher = store._batcher
        await store.run(scripts.wake(limit=1))
        proxy.lose_answer_to = lambda data: b"ECHO" in data

        async def stuck(connection: Any) -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr(batcher._pool, "release", stuck)
        with pytest.raises(exceptions.ConnectionError):
            await asyncio.wait_for(batcher.execute("ECHO", "hello"), 60)
        monkeypatch.undo()
        await store.close()


async def test_bytes_that_are_not_utf8_do_not_prevent_reading_other_fields(redis_url: str) -> None:
    """They become U+FFFD: a field of another program is not an error for readers of other fields."""
    store, beside = Store(Cell(redis_url)), AsyncStore(Cell(redis_url))
    store.redis.hset("oa:run:x", mapping={"good": "ü", "bad": b"a\xff\xed\xa0\x80"})

    def read(client: Any) -> Any:
        return client.hmget("oa:run:x", "good", "bad", "none")

    assert store.ask(read) == await beside.ask(read) == ["ü", "a\ufffd\ufffd\ufffd\ufffd", None]
    store.redis.delete("oa:run:x")
    store.close()
    await beside.close()


def _plan_that_repeats_a_failed_step() -> Plan[list[str]]:
    """It catches the first error, and leaves the second one to the caller."""
    try:
        yield lambda r: r.incr("text")
    except RedisRefused:
        pause_s = 0.5
    found = [(yield pause_s), (yield lambda r: r.get("text"))]
    try:
        yield lambda r: r.incr("text")
    finally:
        found.append("left")
    return found


async def test_a_plan_gets_the_error_of_its_step(redis_url: str) -> None:
    """Both stores give it to the plan, which may go on. An error that it does not catch is raised."""
    cell, waits = Cell(redis_url), list[float]()
    with closing(Store(cell)) as store:
        store.redis.set("text", "not a number")
        with pytest.raises(RedisRefused, match="integer"):
            store.execute(_plan_that_repeats_a_failed_step(), waits.append)
    async_store = AsyncStore(cell)

    async def wait(seconds: float) -> None:
        waits.append(seconds)

    with pytest.raises(RedisRefused, match="integer"):
        await async_store.execute(_plan_that_repeats_a_failed_step(), wait)

    assert waits == [0.5, 0.5]
    await async_store.redis.delete("text")
    await async_store.close()
