"""A budget that is used up: the run waits, without a worker slot, until somebody extends the budget."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from openagents_worker import Agent, AsyncClient, RunContext
from openagents_worker.errors import RequestInvalid
from openagents_worker.jsontext import dumps
from openagents_worker.models import RunBudget, RunState, StopReason, WaitKind
from openagents_worker.runtime.waits import Waits
from openagents_worker.store import scripts
from openagents_worker.store.parking import Wait
from openagents_worker.testing.model_server import ModelServer
from tests.runtime.talking import Script, talker
from tests.support.runner import Process, calls, process, scripted

ANSWER = {"text": "Done."}
REPLIES = [
    calls(("add", {"x": 1}), ("add", {"x": 2})),
    calls(("add", {"x": 3})),
    calls(("shout", {"text": "a"})),
    ANSWER,
]
BREACHES: dict[str, tuple[dict[str, Any], dict[str, Any], Any]] = {
    "max_steps": ({"max_steps": 1}, {"max_steps": 10}, 1),
    "max_tool_calls": ({"max_tool_calls": 1}, {"max_tool_calls": 10}, 1),
    "max_total_tokens": ({"max_total_tokens": 1}, {"max_total_tokens": 10**6}, None),
    "max_cost_usd": ({"max_cost_usd": 1e-9}, {"max_cost_usd": 100.0}, None),
}


@asynccontextmanager
async def worker(redis_url: str, **fields: Any) -> AsyncIterator[tuple[Process, Script]]:
    script = Script()
    async with ModelServer(script) as server, process(redis_url, talker(server.url, **fields)) as p:
        script.by_run = {"r1": REPLIES}
        yield p, script


async def extend(p: Process, **limits: float) -> list[str]:
    """Returns the runs that must be woken."""
    value = dumps({"budget": limits, "by": "ada"})
    call = scripts.fact(
        run_id="r1", name="extend:", value=value, message_id="", max_facts=100, max_bytes=10_000
    )
    return [wake.run_id for wake in (await p.store.run(call)).wakes]


async def payloads(p: Process, name: str) -> list[dict[str, Any]]:
    return [event["payload"] for event in await p.events() if event["name"] == name]


@pytest.mark.parametrize("limit", BREACHES)
async def test_a_run_waits_for_a_larger_budget(redis_url: str, limit: str) -> None:
    """It is paused, says which limit, and continues when the budget is extended. Nothing is made twice."""
    budget, extension, current = BREACHES[limit]
    async with worker(redis_url) as (p, script):
        await p.submit(budget={**budget, "on_breach": "pause"})
        parked = await p.execute()
        paused = await p.record()
        asked = len(script.asked.get("r1", ()))
        assert await p.execute()  # a lost message comes late
        assert await extend(p, **extension) == ["r1"]
        await p.execute()
        record = await p.record()
        [exceeded] = await payloads(p, "run.budget_exceeded")
        [extended] = await payloads(p, "run.budget_extended")

    assert parked.reason
    assert paused.state is RunState.PAUSED
    [waiting] = paused.waiting
    assert (waiting.kind, waiting.name) == (WaitKind.BUDGET, limit)
    assert record.state is RunState.COMPLETED, record.result
    assert exceeded["kind"] == limit
    assert current is None or exceeded["current"] == current
    assert extended == {"budget": extension, "by": "ada"}
    assert len(script.asked["r1"]) == 4 > asked
    assert record.usage.tool_calls == 4


async def test_an_extension_that_is_too_small_asks_again(redis_url: str) -> None:
    """Each extension is used until its own end."""
    async with worker(redis_url) as (p, _):
        await p.submit(budget={"max_steps": 1, "on_breach": "pause"})
        await p.execute()
        for steps in (2, 2, 3, 4):
            assert (await p.record()).state is RunState.PAUSED
            await extend(p, max_steps=steps)
            await p.execute()

        assert (await p.record()).state is RunState.COMPLETED
        assert [each["current"] for each in await payloads(p, "run.budget_exceeded")] == [1, 2, 2, 3]


async def test_an_extension_can_come_before_the_budget_is_used_up(redis_url: str) -> None:
    """Then the run does not wait, also if its budget ends it otherwise."""
    async with worker(redis_url) as (p, _):
        await p.submit(budget={"max_tool_calls": 1})
        await extend(p, max_tool_calls=10)
        await p.execute()

        assert (await p.record()).state is RunState.COMPLETED
        assert len(await payloads(p, "run.budget_extended")) == 1


@pytest.mark.parametrize("fields", [{}, {"on_breach": "end"}, {"on_breach": "pause", "durable": False}])
async def test_without_a_pause_a_used_up_budget_ends_the_run(redis_url: str, fields: dict[str, Any]) -> None:
    """That is the default, and what a run does that cannot wait."""
    on_breach, durable = fields.get("on_breach"), fields.get("durable")
    async with worker(redis_url) as (p, _):
        await p.submit(budget=RunBudget(max_steps=2, on_breach=on_breach), durable=durable)
        await p.execute()
        record = await p.record()

    assert record.result is not None
    assert record.result.stop_reason is StopReason.MAX_STEPS


async def test_calls_side_by_side_need_one_extension(redis_url: str) -> None:
    """The extension that one of them takes also lets the others go on."""
    async with worker(redis_url) as (p, script):
        script.by_run["r1"] = [calls(*(("add", {"x": n}) for n in range(5))), ANSWER]
        await p.submit(budget={"max_tool_calls": 2, "on_breach": "pause"})
        await p.execute()
        assert (await p.record()).state is RunState.PAUSED
        await extend(p, max_tool_calls=9)
        await p.execute()

        record = await p.record()
        assert record.state is RunState.COMPLETED, record
        assert record.usage.tool_calls == 5


async def test_a_call_that_begins_to_wait_while_another_one_takes_the_extension_goes_on(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was still asking Redis for an extension of its own when the other call's was recorded."""
    look_again, check_again, is_taken = Waits._look_again, Waits.check_again, asyncio.Event()

    async def look_later(waits: Waits, wait: Wait) -> Any:
        await is_taken.wait()
        return await look_again(waits, wait)

    def check(waits: Waits, kind: WaitKind) -> None:
        check_again(waits, kind)
        is_taken.set()

    async with worker(redis_url) as (p, script):
        script.by_run["r1"] = [calls(*(("add", {"x": n}) for n in range(5))), ANSWER]
        await p.submit(budget={"max_tool_calls": 2, "on_breach": "pause"})
        await p.execute()
        await extend(p, max_tool_calls=9)
        monkeypatch.setattr(Waits, "_look_again", look_later)
        monkeypatch.setattr(Waits, "check_again", check)
        await p.execute()

        assert (await p.record()).state is RunState.COMPLETED


async def test_the_limit_of_the_agent_can_be_extended(redis_url: str) -> None:
    """And an agent can say that its runs wait."""
    async with worker(redis_url, limits={"max_steps": 1, "on_breach": "pause"}) as (p, _):
        await p.submit()
        await p.execute()
        assert (await p.record()).state is RunState.PAUSED
        await extend(p, max_steps=9)
        await p.execute()
        assert (await p.record()).state is RunState.COMPLETED


async def test_an_extension_is_compared_with_the_limit_that_is_used_up(redis_url: str) -> None:
    """It is the limit of the agent here, not the one of the request. Before, an extension to 30 was refused
    and one that raises nothing was accepted and announced."""
    async with (
        worker(redis_url, limits={"max_steps": 1, "on_breach": "pause"}) as (p, _),
        AsyncClient(redis_url) as client,
    ):
        await p.submit(budget={"max_steps": 40})
        await p.execute()
        [waiting] = (await p.record()).waiting
        with pytest.raises(RequestInvalid, match=r"is not larger than the limit 1, which is used up"):
            await client.extend("r1", {"max_steps": 1})
        await client.extend("r1", {"max_steps": 30})
        await p.execute()

        assert waiting.limit == 1
        assert (await p.record()).state is RunState.COMPLETED
        assert len(await payloads(p, "run.budget_extended")) == 1


async def test_an_extension_that_raises_nothing_is_not_announced(redis_url: str) -> None:
    """It may have been sent before the limit was used up."""
    async with worker(redis_url) as (p, _):
        await p.submit(budget={"max_steps": 2, "on_breach": "pause"})
        await extend(p, max_steps=2)
        await p.execute()

        assert (await p.record()).state is RunState.PAUSED
        assert await payloads(p, "run.budget_extended") == []


async def test_a_pattern_uses_the_steps_of_an_extension(redis_url: str) -> None:
    """Reflexion reviews no answer if fewer than two steps are left: here they are."""
    pattern = {"type": "reflexion"}
    async with worker(redis_url, pattern=pattern) as (p, script):
        script.by_run["r1"] = [*REPLIES, {"text": "ACCEPT"}]
        await p.submit(budget={"max_steps": 1, "on_breach": "pause"})
        await p.execute()
        await extend(p, max_steps=50)
        await p.execute()
        record = await p.record()

    assert record.state is RunState.COMPLETED, record.result
    assert len(script.asked["r1"]) == 5


@pytest.mark.parametrize(
    ("extensions", "stop"),
    [
        ([{"max_steps": 50}], StopReason.BUDGET_EXHAUSTED),
        ([{"max_total_tokens": 10_000}], StopReason.COMPLETED),
        ([{"max_steps": 50}, {"max_total_tokens": 10_000}], StopReason.COMPLETED),
    ],
    ids=["of another limit", "of this limit", "of both"],
)
async def test_calls_side_by_side_take_the_extensions_that_there_are(
    redis_url: str, extensions: list[dict[str, float]], stop: StopReason
) -> None:
    """The first call takes them. The second one neither waits for another one, nor ends the run too early."""

    async def program(context: RunContext) -> int:
        await context.call_llm("first")
        await asyncio.gather(context.call_llm("second"), context.call_llm("third"))
        return 3

    llm = scripted(*[{"text": "hi", "usage": {"input_tokens": 1, "output_tokens": 1}}] * 3)
    async with process(redis_url, Agent("a", pattern=program, llm=llm)) as p:
        await p.submit(budget={"max_total_tokens": 1, "on_breach": "end"})
        for extension in extensions:
            await extend(p, **extension)
        await p.execute()
        record = await p.record()

    assert record.result is not None, record.state
    assert record.result.stop_reason is stop
