"""The budget of a run and of its children is one: what one has reserved, nothing beside it may use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from openagents_worker import Agent, RunContext, ToolContext
from openagents_worker import tool as tool_function
from openagents_worker.models import RunRecord, RunState, StopReason, WaitKind
from openagents_worker.testing.model_server import ModelServer
from tests.runtime import delegating
from tests.runtime.delegating import agents, execute_all
from tests.runtime.talking import TOOLS
from tests.runtime.test_budgets import cheap, priced, result
from tests.runtime.test_replay import executed_until
from tests.support.runner import Process, crash, due, process


async def child_first(context: Any) -> Any:
    """Delegates to `worker`, and asks the model or calls a tool beside it."""
    child = asyncio.create_task(context.delegate("worker", "one"))
    own = context.call_tool("add", {"x": 1}) if context.input_text == "tool" else context.call_llm("hello")
    beside, ended = await asyncio.gather(own, child)
    return [getattr(beside, "output_text", beside), ended.output]


async def model_first(context: Any) -> Any:
    """Asks the model, and delegates to `worker` beside it."""
    reply, ended = await asyncio.gather(context.call_llm("hello"), context.delegate("worker", "one"))
    return [reply.output_text, ended.output]


async def in_background(context: Any) -> Any:
    """Starts a child in the background, and asks the model then."""
    await context.delegate("worker", "one", background=True)
    return (await context.call_llm("hello")).output_text


@asynccontextmanager
async def deployment(redis_url: str, reply: Any = cheap) -> AsyncIterator[Process]:
    """A model call costs up to 1 USD, and then 0.2 USD and 201 tokens."""
    delegating.CALLS.clear()
    async with ModelServer(reply) as server:
        llm = priced(server.url)["llm"]
        own = [
            Agent(pattern.__name__, pattern=pattern, llm=llm, tools=TOOLS)
            for pattern in (child_first, model_first, in_background)
        ]
        async with process(redis_url, *agents(), *own) as p:
            yield p


async def begin(p: Process, agent_id: str, text: str = "go", **budget: Any) -> RunRecord:
    await p.submit(agent_id=agent_id, input_text=text, budget=budget)
    await p.execute()
    return await p.record()


async def child_budget(p: Process) -> Any:
    [child_id] = await p.store.redis.zrange(p.store.keys("index", "parent=r1"), 0, -1)
    child = await p.record(child_id)
    assert child.request is not None
    return child.request.budget


@pytest.mark.parametrize(
    ("limits", "text"),
    [({"max_cost_usd": 1.5}, "go"), ({"max_total_tokens": 300}, "go"), ({"max_tool_calls": 1}, "tool")],
    ids=["cost", "tokens", "tool calls"],
)
@pytest.mark.defect("B06")
async def test_a_call_waits_for_what_is_reserved_for_a_child(
    redis_url: str, limits: dict[str, Any], text: str
) -> None:
    """The run parks meanwhile, so that the child gets a worker. The child has used nothing."""
    async with deployment(redis_url) as p:
        parked = await begin(p, "child_first", text, **limits)
        await execute_all(p)
        ended = await p.record()
        assert await p.store.redis.hgetall(p.store.keys("facts", "r1")) == {}

    assert parked.state is RunState.WAITING_CHILD
    assert (parked.usage.llm_calls, parked.usage.tool_calls) == (0, 0)
    assert sorted((wait.kind, wait.name == "budget") for wait in parked.waiting) == [
        (WaitKind.CHILD, False),
        (WaitKind.CHILD, True),
    ]
    assert result(ended).final_output == [1 if text == "tool" else "Done.", "done: one"]


async def test_a_child_gets_what_no_model_call_has_reserved(redis_url: str) -> None:
    async with deployment(redis_url) as p:
        await begin(p, "model_first", max_cost_usd=1.25)
        budget = await child_budget(p)
        await execute_all(p)
        ended = await p.record()

    assert budget.max_cost_usd == 0.25
    assert result(ended).final_output == ["Done.", "done: one"]


@pytest.mark.defect("B06")
async def test_a_child_waits_for_what_is_reserved_for_a_model_call(redis_url: str) -> None:
    """It gets what the call has not used."""
    async with deployment(redis_url) as p:
        await begin(p, "model_first", max_cost_usd=1.0)
        budget = await child_budget(p)
        await execute_all(p)
        ended = await p.record()

    assert budget.max_cost_usd == 0.8
    assert result(ended).final_output == ["Done.", "done: one"]


async def test_a_child_gets_the_tokens_that_no_model_call_has_reserved(redis_url: str) -> None:
    """A call reserves the 1,000 tokens of its reply, and those of its prompt."""
    async with deployment(redis_url) as p:
        await begin(p, "model_first", max_total_tokens=1_500)
        budget = await child_budget(p)
        await execute_all(p)
        ended = await p.record()

    assert 400 < budget.max_total_tokens < 500
    assert result(ended).final_output == ["Done.", "done: one"]


async def test_a_child_waits_for_the_tokens_that_a_model_call_has_reserved(redis_url: str) -> None:
    """It gets those that the call has not used."""
    async with deployment(redis_url) as p:
        await begin(p, "model_first", max_total_tokens=900)
        budget = await child_budget(p)
        await execute_all(p)
        ended = await p.record()

    assert budget.max_total_tokens == 900 - 201
    assert result(ended).final_output == ["Done.", "done: one"]


async def counts(context: RunContext) -> str:
    """A child that calls a tool."""
    await context.call_tool("add", {"x": 1})
    return "counted"


def asking(hold: asyncio.Event | None = None) -> list[Agent]:
    """An agent that delegates by a tool, which counts as a tool call, and calls other tools after it."""

    @tool_function
    async def ask(agent_id: str, context: ToolContext) -> str:
        """Ask another agent."""
        return str((await context.delegate(agent_id, "one")).output)  # type: ignore[attr-defined]

    async def asks(context: RunContext) -> Any:
        answer = await context.call_tool("ask", {"agent_id": context.input_text})
        if hold is not None:
            await hold.wait()
            await context.call_tool("add", {"x": 1})
        return answer

    llm = {"provider": "mock"}
    return [
        Agent("asks", pattern=asks, tools=[ask, *TOOLS], llm=llm),
        Agent("counts", pattern=counts, tools=TOOLS, llm=llm),
    ]


@pytest.mark.parametrize(("limit", "granted"), [(3, 2), (2, 1), (1, 0)])
async def test_the_tool_call_that_delegates_is_not_a_part_of_the_child(
    redis_url: str, limit: int, granted: int
) -> None:
    """It counts already, although it has not ended. A child may do without tools."""
    async with process(redis_url, *agents(), *asking()) as p:
        await begin(p, "asks", "worker", max_tool_calls=limit)
        budget = await child_budget(p)
        await execute_all(p)
        ended = result(await p.record())

    assert budget.max_tool_calls == granted
    assert ended.final_output == "done: one"


async def test_calls_of_a_child_inside_a_finished_call_count_after_a_death(redis_url: str) -> None:
    hold = asyncio.Event()
    definitions = (*agents(), *asking(hold))
    async with (
        process(redis_url, *definitions, name="one") as one,
        process(redis_url, *definitions, name="two") as two,
    ):
        await begin(one, "asks", "counts", max_tool_calls=2)
        [child] = await one.store.redis.zrange(one.store.keys("index", "parent=r1"), 0, -1)
        await one.execute(child)

        async def is_recorded() -> bool:
            return "ask" in [each.get("name") for each in await one.journal()]

        dying = await executed_until(one, is_recorded, "the call is recorded")
        await crash(one, "r1", dying)
        hold.set()
        await two.execute()
        ended = result(await two.record())

    assert ended.stop_reason is StopReason.MAX_STEPS
    assert ended.usage.tool_calls == 2


async def test_a_child_in_the_background_keeps_its_part_after_a_death(redis_url: str) -> None:
    """Also if a tool has started it whose call is not made again."""
    hold = asyncio.Event()

    @tool_function
    async def start(context: ToolContext) -> str:
        """Start another agent."""
        return str((await context.delegate("worker", "one", background=True)).task_id)  # type: ignore[attr-defined]

    async def starts(context: RunContext) -> Any:
        await context.call_tool("start")
        await hold.wait()
        return [await context.call_tool("add", {"x": number}) for number in range(2)]

    definitions = (
        *agents(),
        Agent("starts", pattern=starts, tools=[start, *TOOLS], llm={"provider": "mock"}),
    )
    async with (
        process(redis_url, *definitions, name="one") as one,
        process(redis_url, *definitions, name="two") as two,
    ):
        await one.submit(agent_id="starts", budget={"max_tool_calls": 3})

        async def is_recorded() -> bool:
            return "start" in [each.get("name") for each in await one.journal()]

        dying = await executed_until(one, is_recorded, "the call is recorded")
        assert (await child_budget(one)).max_tool_calls == 1
        await crash(one, "r1", dying)
        hold.set()
        await two.execute()
        ended = result(await two.record())

    assert ended.stop_reason is StopReason.MAX_STEPS
    assert ended.usage.tool_calls == 2


@pytest.mark.parametrize(("limit", "stop"), [(1.8, StopReason.BUDGET_EXHAUSTED), (2.0, StopReason.COMPLETED)])
async def test_a_child_in_the_background_keeps_half_of_what_is_left(
    redis_url: str, limit: float, stop: StopReason
) -> None:
    async with deployment(redis_url) as p:
        ended = result(await begin(p, "in_background", max_cost_usd=limit))
        budget = await child_budget(p)

    assert budget.max_cost_usd == limit / 2
    assert ended.stop_reason is stop
    if stop is StopReason.BUDGET_EXHAUSTED:
        assert "0.9000 are reserved for children in the background" in ended.error_details.message


async def test_a_run_that_is_suspended_does_not_wait_for_a_call_that_waits_for_its_budget(
    redis_url: str,
) -> None:
    """One call is retried later. The other one waits for what it has reserved, and cannot end by itself."""
    requests = 0

    def reply(*_: Any) -> Any:
        nonlocal requests
        requests += 1
        return {"error": "rate_limit", "retry_after_ms": 2_500} if requests == 1 else cheap()

    async with ModelServer(reply) as server:
        definition = priced(server.url, pattern={"impl": "tests.runtime.test_budgets.Parallel"})
        definition["llm"] = definition["llm"] | {"retry": {"max_attempts": 4}}
        async with process(redis_url, definition) as p:
            await p.submit(budget={"max_cost_usd": 1.5})
            await p.execute()
            suspended = await p.record()
            await due(p)
            await p.execute()
            ended = await p.record()

    assert suspended.state is RunState.RETRYING
    assert result(ended).final_output == ["Done.", "Done."]
