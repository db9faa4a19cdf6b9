"""Streaming tools: watchers get each piece of the output while the tool works; the result is recorded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from openagents_worker import Agent, RunContext, ToolContext, tool
from openagents_worker.errors import OpenAgentsError, PermanentToolError
from openagents_worker.tools.base import ToolExecutionSpec
from tests.support.runner import Process, crash, process, scripted
from tests.support.waiting import await_for

CALLED: list[str] = []
GATES: dict[str, asyncio.Event] = {}


@pytest.fixture(autouse=True)
def _from_zero() -> None:
    CALLED.clear()
    GATES["go on"] = asyncio.Event()


@tool
async def count(to: int, context: ToolContext) -> AsyncIterator[str]:
    """Count, one number at a time."""
    CALLED.append("count")
    try:
        for number in range(1, to + 1):
            yield f"{number} "
    finally:
        CALLED.append("closed")


@tool
async def report() -> AsyncIterator[Any]:
    """Show the progress, then return a report."""
    yield {"type": "chunk", "data": "10 %"}
    yield {"done": 0.5}
    yield {"type": "result", "data": {"rows": 2}}


@tool
async def break_off() -> AsyncIterator[str]:
    """Fail in the middle."""
    yield "so far"
    raise PermanentToolError("no more", "break_off")


@tool(timeout_ms=50, durable_idempotent=False)  # so it is not repeated
async def hang() -> AsyncIterator[str]:
    """Never end."""
    try:
        yield "so far"
        await asyncio.Event().wait()
    finally:
        CALLED.append("closed")


@tool
async def flood(result: bool) -> AsyncIterator[Any]:
    """Yield more than a record can hold, without ever waiting."""
    for _ in range(400):
        yield "x" * 10_000
    if result:
        yield {"type": "result", "data": "much"}


class Duck:
    """A tool with the interface of the original SDK."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = config or {}

    def describe(self) -> dict[str, Any]:
        return {"name": "duck", "description": "Quacks.", "parameters": {"type": "object"}}

    def execution_spec(self) -> ToolExecutionSpec:
        return ToolExecutionSpec(supports_streaming=True)

    async def invoke(self, params: dict[str, Any], context: Any) -> Any:
        raise AssertionError("it is called by invoke_stream")

    async def invoke_stream(self, params: dict[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
        context.state["quacked"] = True
        yield {"type": "delta", "text": "quack"}
        yield {"type": "result", "data": [context.run_id, params]}


class Goose(Duck):
    def invoke_stream(self, params: dict[str, Any], context: Any) -> Any:
        return ["not", "async"]


def calling(tool_: Any, params: dict[str, Any] | None = None, *, waits: bool = False) -> Agent:
    """An agent that calls the tool and returns its result or the code of its error."""

    async def caller(context: RunContext) -> Any:
        (tool_id,) = context.tools
        try:
            result = await context.call_tool(tool_id, params)
        except OpenAgentsError as error:
            result = error.code
        if waits:
            await context.step("wait", GATES["go on"].wait)
        return result

    return Agent("a", pattern=caller, tools=[tool_], llm=scripted({"text": "hello"}))


async def live(p: Process) -> list[dict[str, Any]]:
    """The payloads of the `tool.delta` events of a run, as a watcher gets them."""
    async with p.store.redis.pubsub() as heard:
        await heard.psubscribe("*:events:*")
        await p.run()
        events = []
        while (message := await heard.get_message(timeout=0.5)) is not None:
            if message["type"] == "pmessage":
                events.append(json.loads(message["data"]))
    names = [event["name"] for event in events]
    ends = names.index("tool.succeeded" if "tool.succeeded" in names else "tool.failed")
    assert "tool.delta" not in names[ends:], "all pieces come before the event of the call"
    assert events[ends]["payload"]["streamed"] is True
    assert "tool.delta" not in await p.event_names(), "pieces are not stored"
    pieces = [event for event in events if event["name"] == "tool.delta"]
    assert all(event["seq"] is None for event in pieces)
    return [event["payload"] for event in pieces]


async def output(p: Process) -> Any:
    result = (await p.record()).result
    assert result is not None
    return result.final_output if result.error_details is None else result.error_details.code


async def test_watchers_get_the_pieces_and_the_run_gets_their_text(redis_url: str) -> None:
    async with process(redis_url, calling(count, {"to": 500})) as p:
        text = ""
        for piece in await live(p):
            assert (piece["offset"], piece["attempt"]) == (len(text), 1)
            assert piece["call_id"].startswith("count:")
            text += piece["text"]
        assert text == " ".join(map(str, range(1, 501))) + " "
        assert await output(p) == text
        assert CALLED == ["count", "closed"]


@pytest.mark.parametrize(
    ("called", "shown", "result"),
    [
        (report, '10 %{"done":0.5}\n', {"rows": 2}),
        (break_off, "so far", "tool.permanent"),
        (hang, "so far", "tool.timeout"),
        (Duck, "quack", ["r1", {}]),
    ],
)
async def test_what_a_tool_yields_and_what_it_returns(
    redis_url: str, called: Any, shown: str, result: Any
) -> None:
    """Objects of the original SDK, other values, errors and time limits. A generator is always closed."""
    async with process(redis_url, calling(called)) as p:
        pieces = await live(p)
        assert "".join(piece["text"] for piece in pieces) == shown
        assert await output(p) == result
        assert (["closed"] if called is hang else []) == CALLED


@pytest.mark.parametrize(("result", "returned"), [(True, "much"), (False, "step.too_large")])
async def test_an_output_may_be_larger_than_a_record(redis_url: str, result: bool, returned: str) -> None:
    """Not if it is the result."""
    async with process(redis_url, calling(flood, {"result": result})) as p:
        await p.run()
        assert await output(p) == returned


async def test_a_stream_that_is_not_async_is_an_error_of_the_tool(redis_url: str) -> None:
    async with process(redis_url, calling(Goose)) as p:
        await p.run()
        assert await output(p) == "tool.error"


async def test_a_later_attempt_gets_the_result_without_the_pieces(redis_url: str) -> None:
    agent = calling(count, {"to": 3}, waits=True)
    async with process(redis_url, agent, name="one") as one, process(redis_url, agent, name="two") as two:
        await one.submit()
        dying = asyncio.create_task(one.execute())
        await await_for(lambda: _has_step(one), "the tool has ended")
        await crash(one, "r1", dying)
        GATES["go on"].set()
        await two.execute()
        assert await output(two) == "1 2 3 "
        assert CALLED == ["count", "closed"]


async def _has_step(p: Process) -> bool:
    return "step.started" in await p.event_names()


async def test_a_streaming_function_outside_of_a_run_returns_its_text() -> None:
    assert await count.build().invoke({"to": 2}, None) == "1 2 "
    pieces = [piece async for piece in count.build().invoke_stream({"to": 2}, None)]
    assert pieces == ["1 ", "2 "]
