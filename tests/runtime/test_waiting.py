"""A run that waits for a signal or a time: it parks, holds no slot, and continues where it was."""

from __future__ import annotations

import asyncio
import json
from datetime import date
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from openagents_worker import Agent, AsyncClient
from openagents_worker.errors import RequestInvalid
from openagents_worker.models import WaitKind
from openagents_worker.runtime import waits
from openagents_worker.runtime.calls import waiting as calls_of_waits
from openagents_worker.runtime.facts import RunFacts
from openagents_worker.runtime.latch import LatchReason
from openagents_worker.runtime.runner import AttemptOutcome
from openagents_worker.runtime.writer import RunWriter
from openagents_worker.settings import load_settings
from openagents_worker.store import scripts
from openagents_worker.store.facts import Fact
from openagents_worker.store.formats import PARKS
from openagents_worker.store.scripts import ClaimAnswer, Claimed
from openagents_worker.store.signals import MAX_SIGNALS, MAX_SIGNALS_BYTES, signal_fact
from tests.runtime import plugins
from tests.runtime.test_stop import worker
from tests.runtime.waiting import retrieved
from tests.support.runner import Process, agent, calls, crash, process, scripted
from tests.support.waiting import await_for

HERE = "tests.runtime.waiting"


def waiting(name: str, **config: Any) -> dict[str, Any]:
    """An agent with this pattern and the tools `charge` and `ask`."""
    return agent(
        pattern={"impl": f"{HERE}.{name}", "config": config},
        tools=[
            {"id": "charge", "impl": "tests.runtime.plugins.Charge"},
            {"id": "ask", "impl": f"{HERE}.AskTool"},
        ],
    )


async def send(p: Process, name: str, value: Any, message_id: str = "", run_id: str = "r1") -> Any:
    call = scripts.fact(
        run_id=run_id,
        name=signal_fact(name),
        value=json.dumps(value),
        message_id=message_id,
        max_facts=MAX_SIGNALS,
        max_bytes=MAX_SIGNALS_BYTES,
    )
    return await p.store.run(call)


async def time_out(p: Process, run_id: str = "r1") -> None:
    """Let the time of a parked run be over."""
    redis, keys = p.store.redis, p.store.keys
    facts = await redis.hgetall(keys("facts", run_id))
    for name, text in facts.items():
        if name.startswith("wait:") and "until_ms" in json.loads(text):
            await redis.hset(keys("facts", run_id), name, json.dumps({**json.loads(text), "until_ms": 1}))
    await redis.zadd(keys("timeouts"), {run_id: 1}, xx=True)
    assert [wake.run_id for wake in (await p.store.run(scripts.wake(limit=10))).wakes] == [run_id]


async def test_a_receive_parks_the_run_and_a_sent_value_wakes_it(redis_url: str) -> None:
    """A parked run has no owner. The value is stored before the run is woken, and taken with its record."""
    async with process(redis_url, waiting("Receives")) as p:
        await p.submit()
        result = await p.execute()
        assert (result.kind, result.reason) == (AttemptOutcome.SUSPENDED, "waiting for signal paid")
        record = await p.record()
        assert (record.state, record.worker, record.due_ms) == ("waiting", None, None)
        [wait] = record.waiting
        assert (wait.kind, wait.name, wait.until) == (WaitKind.SIGNAL, "paid", None)
        assert (await p.execute()).reason == "parked"

        sent = await send(p, "paid", {"amount": 3})
        assert [wake.run_id for wake in sent.wakes] == ["r1"]
        assert (await p.record()).waiting == ()
        await p.execute()
        record = await p.record()
        assert record.result is not None
        assert record.result.final_output == [{"amount": 3}]
        assert plugins.executed("charge") == ["before", "after"]
        assert await p.store.redis.hgetall(p.store.keys("facts", "r1")) == {}
        names = await p.event_names()
        assert [name for name in names if name in ("run.waiting", "run.woken", "signal.received")] == [
            "run.waiting",
            "run.woken",
            "signal.received",
        ]
        assert await p.store.redis.hget(p.store.keys("run", "r1"), "format") == str(PARKS)


async def test_values_are_kept_in_order_and_a_message_counts_once(redis_url: str) -> None:
    """Values that were sent before anybody waits are kept, in order, and each is received once."""
    async with process(redis_url, waiting("Receives", count=3)) as p:
        await p.submit()
        await send(p, "paid", 1, "m1")
        await send(p, "other", "x")
        await send(p, "paid", 2)
        assert (await send(p, "paid", 1, "m1")).answer == "SAME"
        await p.execute()
        assert (await p.record()).state == "waiting"
        assert (await send(p, "other", "y")).wakes == ()
        await send(p, "paid", 3, "m3")
        await p.execute()
        record = await p.record()
        assert record.result is not None
        assert record.result.final_output == [1, 2, 3]
        ended = await send(p, "paid", 4)
        assert (ended.answer, ended.state) == ("ENDED", "completed")
        assert (await send(p, "paid", 4, run_id="r2")).answer == "UNKNOWN"


@pytest.mark.parametrize("config", [{}, {"default": "late"}])
async def test_a_receive_times_out(redis_url: str, config: dict[str, Any]) -> None:
    async with process(redis_url, waiting("Receives", timeout=3600, **config)) as p:
        await p.submit()
        await p.execute()
        record = await p.record()
        assert record.due_ms is not None
        assert record.waiting[0].until is not None
        await time_out(p)
        await p.execute()
        record = await p.record()
        assert record.result is not None
        expected = ["late"] if config else ["signal.timeout", "paid"]
        assert record.result.final_output == expected
        assert plugins.executed("charge") == ["before", "after"]


async def test_a_value_that_was_not_announced_is_found_before_a_time_out(redis_url: str) -> None:
    """Here the time-out is 0, and the worker was not told of the value."""
    async with process(redis_url, waiting("Receives", timeout=0, gated=True)) as p:
        await p.submit()
        executing = asyncio.create_task(p.execute())
        await await_for(lambda: plugins.LOG, "the first charge begins")
        await send(p, "paid", 5)
        plugins.GATES["open"].set()
        await executing
        record = await p.record()
        assert record.result is not None
        assert record.result.final_output == [5]


async def test_a_sleep_of_a_year_is_one_entry_until_it_is_over(redis_url: str) -> None:
    """The time is counted from the first attempt that slept, whatever woke the run before it was over."""
    year = 365 * 86_400
    async with process(redis_url, waiting("Sleeps", delay=year)) as p:
        await p.submit()
        await p.execute()
        due_ms = (await p.record()).due_ms
        assert due_ms is not None
        assert await p.store.redis.zscore(p.store.keys("timeouts"), "r1") == due_ms
        assert (await p.store.run(scripts.wake(limit=10))).wakes == ()
        await p.store.redis.hset(p.store.keys("run", "r1"), "state", "queued")
        await p.execute()
        assert (await p.record()).due_ms == due_ms
        await time_out(p)
        await p.execute()
        record = await p.record()
        assert record.result is not None
        assert record.result.final_output == "slept"
        assert plugins.executed("charge") == ["before", "after"]
        assert await p.store.redis.zcard(p.store.keys("timeouts")) == 0


@pytest.mark.parametrize(
    "delay", [-1, 10**5000, float("nan"), float("inf"), "1", True, None], ids=lambda _: "delay"
)
async def test_a_delay_that_is_not_a_time_is_refused(delay: Any) -> None:
    with pytest.raises(RequestInvalid, match="the delay of sleep must be"):
        await calls_of_waits.sleep(None, delay)  # type: ignore[arg-type]  # it is refused before


async def test_a_short_sleep_does_not_park(redis_url: str) -> None:
    async with process(redis_url, waiting("Sleeps", delay=0.1)) as p:
        record = await p.run()
        assert (record.state, record.attempt) == ("completed", 1)


async def test_a_run_that_is_not_durable_waits_in_place(redis_url: str) -> None:
    """It cannot continue in another attempt. A value reaches it through its worker."""
    async with process(redis_url, waiting("Receives")) as p:
        await p.submit(durable=False)
        executing = asyncio.create_task(p.execute())
        await await_for(lambda: plugins.executed("charge") == ["before"], "the first charge")
        await send(p, "paid", 1)
        box = await p.store.redis.smembers(p.store.keys("worker_box", p.lease.incarnation))
        [notice] = [json.loads(text) for text in box]
        assert notice == {"kind": "fact", "number": 1, "run": "r1"}
        p.runner.announce_fact("r1", 1)
        await executing
        record = await p.record()
        assert record.result is not None
        assert record.result.final_output == [1]
        assert await p.store.redis.hgetall(p.store.keys("facts", "r1")) == {}


@pytest.mark.parametrize("way", ["gather", "group", "as_completed"])
async def test_branches_that_all_wait_park_together(redis_url: str, way: str) -> None:
    """The record lists all waits. The run wakes when the first can go on, and parks for the rest."""
    async with process(redis_url, waiting("Branches", names=["a", "b", "sleep3600"], way=way)) as p:
        await p.submit()
        await p.execute()
        record = await p.record()
        assert sorted((wait.kind, wait.name) for wait in record.waiting) == [
            ("signal", "a"),
            ("signal", "b"),
            ("timer", ""),
        ]
        due_ms = record.due_ms
        await send(p, "b", 2)
        await p.execute()
        record = await p.record()
        assert sorted(wait.kind for wait in record.waiting) == ["signal", "timer"]
        assert record.due_ms == due_ms
        await time_out(p)
        await p.execute()
        await send(p, "a", 1)
        await p.execute()
        record = await p.record()
        assert record.state == "completed", record.result
        assert sorted(plugins.executed("charge")) == ["a", "b"]


@pytest.mark.parametrize("pattern", ["Branches", "BranchesInAStep"])
async def test_branches_on_a_worker_park_at_once(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    """Whatever the program waits with. A worker steps the coroutines of all tasks of a run, and those of
    recorded functions once more."""
    monkeypatch.setattr(waits, "PARK_BUSY_AFTER_S", 3600.0)
    ways = ["gather", "group", "as_completed", "first", "wait_for", "delegate_many"]
    agents = [{**waiting(pattern, names=["x", "y"], way=way), "id": way} for way in ways]
    async with worker(redis_url, *agents, waiting("Branches", names=["x"])) as p:
        executing = {}
        for way in ways:
            await p.submit(way, agent_id=way, session_id=way)
            executing[way] = asyncio.create_task(p.execute(way))
        await await_for(
            lambda: {way for way in ways if executing[way].done()} == {*ways}, "every run is parked", 20
        )
        for way in ways:
            assert len((await p.record(way)).waiting) == 2


async def test_a_run_does_not_park_while_a_call_goes_on(redis_url: str) -> None:
    """What waits beside a call in progress waits in place. Its time-out is stored if the worker dies."""
    async with process(redis_url, waiting("Branches", names=["charge1", "sleep3600", "b"])) as p:
        await p.submit()
        executing = asyncio.create_task(p.execute())

        async def stored() -> list[str]:
            facts = await p.store.redis.hgetall(p.store.keys("facts", "r1"))
            return [name for name in facts if name.startswith("wait:")]

        await await_for(stored, "the time-out of the sleep")
        assert (await p.record()).state == "running"
        [name] = await stored()
        until = json.loads(await p.store.redis.hget(p.store.keys("facts", "r1"), name))["until_ms"]
        await crash(p, "r1", executing)
    plugins.GATES["charge1"].set()
    async with process(redis_url, waiting("Branches", names=["charge1", "sleep3600", "b"])) as q:
        await q.execute()
        record = await q.record()
        assert (record.state, record.due_ms) == ("waiting", until)
        assert plugins.executed("charge") == ["charge1"]


async def test_a_run_has_a_limited_number_of_waits(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "MAX_WAITS", 2)
    async with process(redis_url, waiting("Branches", names=["a", "b", "sleep3600"])) as p:
        record = await p.run()
        assert record.result is not None
        assert record.result.error_details is not None
        assert record.result.error_details.code == "pattern.error"
        assert "more than 2 signals and times at once" in record.result.error_details.message


async def test_a_wait_that_is_cancelled_by_the_pattern_leaves_nothing(redis_url: str) -> None:
    async with process(redis_url, waiting("Branches", names=["a", "sleep3600"], way="first")) as p:
        await p.submit()
        await p.execute()
        await send(p, "a", 1)
        await p.execute()
        record = await p.record()
        assert record.result is not None
        assert record.result.final_output == [["a", 1]]
        assert await p.store.redis.hgetall(p.store.keys("facts", "r1")) == {}


async def test_a_tool_that_parks_begins_again_and_keeps_its_inner_calls(redis_url: str) -> None:
    definition = waiting("Receives") | {
        "pattern": {"type": "react"},
        "llm": scripted(calls(("ask", {})), {"text": "thanks"}),
    }
    async with process(redis_url, definition) as p:
        await p.submit()
        await p.execute()
        [wait] = (await p.record()).waiting
        assert (wait.kind, wait.name) == ("signal", "answer")
        await send(p, "answer", 42)
        await p.execute()
        record = await p.record()
        assert record.result is not None
        assert record.result.final_output == "thanks"
        assert plugins.executed("charge") == ["inside", "inside again"]
        assert plugins.LOG.count(("begin", "ask")) == 2
        assert record.usage.llm_calls == 2


async def test_chance_and_time_are_the_same_in_every_attempt(redis_url: str) -> None:
    async with process(redis_url, waiting("Chance")) as p:
        await p.submit()
        await p.execute()
        await send(p, "go", None)
        await p.execute()
        record = await p.record()
        assert record.result is not None
        drawn = [list(entry[1:]) for entry in plugins.LOG if entry[0] == "drawn"]
        assert drawn[0] == drawn[1] == record.result.final_output[:3]
        assert len(set(map(str, record.result.final_output))) == 6


async def test_a_value_sent_while_the_run_parks_is_not_missed(redis_url: str) -> None:
    """The script that parks the run finds that there is a newer fact: the run continues at once."""
    async with process(redis_url, waiting("Receives")) as p:
        await p.submit()
        sent: list[Any] = []
        ask = type(p.store).run_until

        async def slow(store: Any, call: Any, *arguments: Any) -> Any:
            if call.script.name == "suspend":
                sent.append(await send(p, "paid", 7))
            return await ask(store, call, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(p.store), "run_until", slow)
            result = await p.execute()
        assert (result.reason, sent[0].wakes) == ("handover", ())
        assert [wake.run_id for wake in p.wakes] == ["r1"]
        await p.execute()
        record = await p.record()
        assert record.result is not None
        assert record.result.final_output == [7]


async def test_a_wait_that_ends_while_the_run_is_handed_over_leaves_nothing(redis_url: str) -> None:
    """Its value is recorded; the call beside it, which is in progress, is made again."""
    async with process(redis_url, waiting("Branches", names=["charge1", "a"])) as p:
        await p.submit()
        executing = asyncio.create_task(p.execute())

        def waits_beside_a_call() -> bool:
            attempt = p.runner._attempts.get("r1")
            is_waiting = attempt is not None and attempt._recorder and attempt._recorder.waits._open
            return bool(is_waiting) and any(e[:2] == ("begin", "charge") for e in plugins.LOG)

        await await_for(waits_beside_a_call, "one branch waits, and the other one charges")
        p.runner.latch("r1", LatchReason.HANDOVER)
        await send(p, "a", 1)
        p.runner.announce_fact("r1", 1)

        async def received() -> bool:
            return any(record["kind"] == "receive" for record in await p.journal())

        await await_for(received, "the value is recorded")
        plugins.GATES["charge1"].set()
        assert (await executing).reason == "handover"
        assert await p.store.redis.hgetall(p.store.keys("facts", "r1")) == {}


async def test_a_parked_run_can_be_cancelled(redis_url: str) -> None:
    async with process(redis_url, waiting("Receives", timeout=3600)) as p:
        await p.submit()
        await p.execute()
        cancelled = await p.store.run(scripts.cancel(run_id="r1", reason="enough", force=False))
        assert cancelled.answer == "CANCELLED"
        record = await p.record()
        assert (record.state, record.waiting, record.due_ms) == ("cancelled", (), None)
        assert await p.store.redis.zcard(p.store.keys("timeouts")) == 0


async def test_a_wait_is_stored_when_the_run_is_handed_over(redis_url: str) -> None:
    """The worker stops while the run waits in place beside a call: the time-out is that of before."""
    async with process(redis_url, waiting("Branches", names=["charge1", "sleep3600"])) as p:
        await p.submit()
        executing = asyncio.create_task(p.execute())
        await await_for(lambda: any(e[:2] == ("begin", "charge") for e in plugins.LOG), "the charge")
        p.runner.latch("r1", LatchReason.HANDOVER)
        plugins.GATES["charge1"].set()
        assert (await executing).reason == "handover"
        facts = await p.store.redis.hgetall(p.store.keys("facts", "r1"))
        [until] = [json.loads(text)["until_ms"] for name, text in facts.items() if "wait:" in name]
        await p.execute()
        assert (await p.record()).due_ms == until


async def test_a_value_that_comes_when_the_program_gives_up_is_for_the_next_call(redis_url: str) -> None:
    """The first call is cancelled in the moment in which its value is read."""
    first: list[asyncio.Task[Any]] = []

    async def gives_up(context: Any) -> Any:
        first.append(retrieved(context.receive("go")))
        await asyncio.wait(first)
        return [first[0].cancelled(), await context.receive("go")]

    own = Agent("gives_up", pattern=gives_up, llm={"provider": "mock"})
    async with process(redis_url, own) as p:
        await p.submit(agent_id="gives_up", durable=False)
        executing = asyncio.create_task(p.execute())
        await await_for(lambda: first, "the first call")
        facts = p.runner._attempts["r1"].facts
        await await_for(lambda: len(p.runner._attempts["r1"]._recorder.waits._open) == 1, "it waits")
        facts.when_changed.append(lambda: first[0].cancel())
        await send(p, "go", "now")
        p.runner.announce_fact("r1", 1)
        await executing
        record = await p.record()
        assert record.result is not None
        assert record.result.final_output == [True, "now"]


class Paid(BaseModel):
    model_config = ConfigDict(strict=True)

    day: date


async def test_a_value_that_was_sent_is_read_in_its_type(redis_url: str) -> None:
    """A strict one takes what JSON has for it: a text is a date."""

    async def cashier(context: Any) -> Any:
        paid = await context.receive("paid", type=Paid)
        return f"{paid.day:%d.%m.%Y}"

    async with process(redis_url, Agent("cashier", pattern=cashier, llm={"provider": "mock"})) as p:
        await p.submit(agent_id="cashier")
        await send(p, "paid", {"day": "2026-01-31"})
        await p.execute()
        record = await p.record()
    assert record.result is not None
    assert record.result.final_output == "31.01.2026"


async def test_a_value_that_comes_when_one_call_gives_up_is_for_another_one_that_waits(
    redis_url: str,
) -> None:
    """Otherwise a run would park, although the value that it waits for is stored."""
    first: list[asyncio.Task[Any]] = []

    async def gives_up(context: Any) -> Any:
        first.append(retrieved(context.receive("go")))
        second = retrieved(context.receive("go"))
        await asyncio.wait(first)
        return [first[0].cancelled(), await second]

    own = Agent("gives_up", pattern=gives_up, llm={"provider": "mock"})
    async with process(redis_url, own) as p:
        await p.submit(agent_id="gives_up", durable=False)
        executing = asyncio.create_task(p.execute())
        await await_for(lambda: first, "the first call")
        facts = p.runner._attempts["r1"].facts
        await await_for(lambda: len(p.runner._attempts["r1"]._recorder.waits._open) == 2, "both wait")
        facts.when_changed.append(lambda: first[0].cancel())
        await send(p, "go", "now")
        p.runner.announce_fact("r1", 1)
        await await_for(executing.done, "the other call has the value")
        record = await p.record()
        assert record.result is not None
        assert record.result.final_output == [True, "now"]


async def test_an_answer_that_is_overtaken_by_a_later_one_changes_nothing(redis_url: str) -> None:
    """Two connections may deliver their answers in another order than Redis has given them."""
    async with process(redis_url) as p:
        await p.submit()
        gate, asked = asyncio.Event(), asyncio.Event()

        class Slow:
            """Answers the first question last."""

            run_id, keys, codec = "r1", p.store.keys, p.store.codec

            async def ask(self, question: Any) -> Any:
                answer = await p.store.ask(question)
                if not asked.is_set():
                    asked.set()
                    await gate.wait()
                return answer

        store: Any = Slow()
        facts = RunFacts(Claimed(ClaimAnswer.CLAIMED, facts={}), store)
        first = asyncio.create_task(facts.refresh())
        await asked.wait()
        await send(p, "go", "now")
        await facts.refresh()
        gate.set()
        await first
        assert (facts.seen, facts.holds(signal_fact("go"))) == (1, True)


async def test_a_value_that_was_accepted_is_received_whatever_its_size(redis_url: str) -> None:
    """`send` has checked its size. With the rest of its record, it may be larger than an outcome may be."""
    env = {"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_MAX_PAYLOAD_BYTES": "4096"}
    value = "x" * 4_050
    async with (
        process(redis_url, waiting("Receives"), settings=load_settings(env)) as p,
        AsyncClient(settings=load_settings(env)) as client,
    ):
        await p.submit()
        await client.send("r1", "paid", value)
        await p.execute()
        record = await p.record()
        assert record.result is not None
        assert record.result.final_output == [value]


async def test_a_wait_that_ends_before_it_is_stored_leaves_nothing(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waits beside a call are stored one after the other. One ends while the first is being stored."""
    write, may_write = RunWriter.write_fact, asyncio.Event()

    async def write_later(writer: RunWriter, fact: Fact, format_: int = 0) -> None:
        await may_write.wait()
        await write(writer, fact, format_)

    monkeypatch.setattr(RunWriter, "write_fact", write_later)
    names = ["charge1", "sleep3600", "sleep0.5"]
    async with process(redis_url, waiting("Branches", names=names)) as p:
        await p.submit()
        executing = asyncio.create_task(p.execute())

        async def is_over() -> bool:
            return any(record["kind"] == "sleep" for record in await p.journal())

        async def stored() -> list[str]:
            return [name for name in await p.store.redis.hkeys(p.store.keys("facts", "r1")) if "wait" in name]

        await await_for(is_over, "the short sleep is recorded")
        may_write.set()
        await await_for(stored, "the long sleep is stored")
        p.runner.latch("r1", LatchReason.HANDOVER)
        plugins.GATES["charge1"].set()
        assert (await executing).reason == "handover"
        assert len(await stored()) == 1
