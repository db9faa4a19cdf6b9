"""What a consumer writes. Checked, not run: by mypy and pyright, both strict, without stubs for Celery."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import Any, assert_type

from pydantic import BaseModel

from openagents_worker import (
    Agent,
    AsyncClient,
    AsyncRunHandle,
    Client,
    Decision,
    RunBudget,
    RunContext,
    RunEvent,
    RunFailed,
    RunHandle,
    RunRecord,
    RunRequest,
    RunResult,
    RunState,
    StopReason,
    ToolContext,
    agent,
    register_agent,
    register_api_keys,
    register_deps,
    register_output,
    run_agent,
    sse,
    tool,
)

request = RunRequest(
    agent_id="assistant", session_id="s1", input_text="What is 17*23?", budget=RunBudget(max_steps=8)
)


def submit_and_wait() -> str:
    """What an agent's runs answer is said once, where the handle gets its name."""
    handle: RunHandle[str] = run_agent.delay(request)
    assert_type(handle.id, str)
    assert_type(handle.wait(timeout=60), RunResult[str])
    result = handle.wait(60)
    assert_type(result.final_output, str | None)
    assert_type(result.stop_reason, StopReason)
    assert_type(result.usage.total_tokens, int)
    assert_type(result.ok, bool)
    assert_type(handle.record(), RunRecord)
    assert_type(handle.record().state, RunState)
    assert_type(handle.ready(), bool)
    assert_type(handle.state, str)
    return result.final_output or ""


class Answer(BaseModel):
    total: int


def an_answer_of_a_class() -> int:
    """A class in the request is what `wait` gives; the handle says it to the type checker."""
    typed = RunRequest(agent_id="assistant", session_id="s1", input_text="17*23?", output_type=Answer)
    handle: RunHandle[Answer] = run_agent.delay(typed)
    answer = handle.wait(60).final_output
    assert_type(answer, Answer | None)
    return answer.total if answer else 0


async def key_of(provider: str, tenant: str | None) -> str:
    """The key of a model, from a secret store."""
    return f"{provider} {tenant or ''}"


def what_a_plugin_registers() -> None:
    register_api_keys(key_of)
    register_api_keys(lambda provider, tenant: f"{provider} {tenant or ''}")
    register_deps("shop", dict[str, str])
    register_output("answer", Answer)


def price_of(order_id: str, *, cents: bool = True) -> int:
    return 5 if cents else len(order_id)


async def prices(order_ids: list[str]) -> list[int]:
    return [price_of(order_id) for order_id in order_ids]


@agent("clerk", llm="mock", tools=[price_of], limits=RunBudget(max_tool_calls=3))
async def clerk(context: RunContext) -> str:
    """A step has the types of its function, whether it is async or not."""
    assert_type(await context.step("price", price_of, "A17", cents=False), int)
    assert_type(await context.step("prices", prices, ["A17"]), list[int])
    again = context.recorded(price_of, timeout=5)
    assert_type(await again("A17"), int)
    reply = await context.call_llm("Hello", output_type=Answer, temperature=0.5)
    return reply.output_text


async def what_an_agent_in_python_is(context: RunContext) -> None:
    """The decorated function stays as it is."""
    assert_type(await clerk(context), str)
    assert_type(register_agent(Agent("support", llm="mock", tools=["calc", price_of])), Agent)


def unsaid_is_any() -> None:
    """Without a word about it the answer may be anything; the rest is as typed as before."""
    handle = run_agent.delay(request)
    assert_type(handle, RunHandle[Any])
    assert_type(handle.wait(), RunResult[Any])
    assert_type(run_agent.delay({"agent_id": "a", "session_id": "s", "input_text": "hi"}), RunHandle[Any])
    assert_type(run_agent.apply_async((request,), countdown=5, queue="agents"), RunHandle[Any])
    assert_type(RunHandle("run-1"), RunHandle[Any])
    stored: RunHandle[str] = RunHandle("run-1")
    assert_type(stored.wait(), RunResult[str])
    assert_type(run_agent.AsyncResult("run-1"), RunHandle[Any])


def follow(handle: RunHandle[str]) -> list[str]:
    assert_type(handle.events(), Generator[RunEvent, None, None])
    lines: list[str] = []
    for event in handle.events(after=3):
        assert_type(event, RunEvent)
        assert_type(event.name, str)
        assert_type(event.seq, int | None)
        lines.append(f"{event.seq} {event.name} {event.payload.get('text', '')}")
    handle.cancel("enough")
    return lines


def a_failure_is_typed(handle: RunHandle[str]) -> str:
    try:
        handle.get(timeout=5)
    except RunFailed as error:
        assert_type(error.code, str)
        assert_type(error.run_id, str | None)
        return error.message
    return "fine"


def a_client() -> None:
    with Client("redis://127.0.0.1:6390/0") as client:
        assert_type(client, Client)
        assert_type(client.submit(request), RunHandle[Any])
        assert_type(client.handle("run-1"), RunHandle[Any])
        assert_type(client.record("run-1"), RunRecord)
        session = client.session("s1")
        assert_type(session.session_id, str)
        assert_type(str(client.cancel("run-1", reason="enough")), str)
        assert_type(client.runs(limit=5, state="failed", agent_id="clerk").next_cursor, str | None)
        assert_type(client.approve("run-1", "refund:1", by="ann"), Decision)
        assert_type(client.handle("run-1").deny("refund:1", by="ann", note="too much"), Decision)


async def an_async_product() -> str:
    handle: AsyncRunHandle[str] = await run_agent.adelay(request)
    assert_type(await handle.wait(timeout=60), RunResult[str])
    async for event in handle.events():
        assert_type(event, RunEvent)
    async with AsyncClient() as client:
        assert_type(client, AsyncClient)
        assert_type(await client.submit(request), AsyncRunHandle[Any])
        assert_type(client.handle("run-1"), AsyncRunHandle[Any])
        assert_type(await client.record("run-1"), RunRecord)
        assert_type((await client.runs(limit=5, state="failed")).next_cursor, str | None)
        assert_type(await client.approve("run-1", "refund:1", by="ann", arguments={"cents": 5}), Decision)
        assert_type(await client.handle("run-1").deny("refund:1", by="ann"), Decision)
        await handle.cancel()
    result = await handle.wait()
    return result.final_output or ""


async def a_page(handle: RunHandle[str], last_event_id: str | None) -> None:
    assert_type(sse(handle, last_event_id), AsyncGenerator[str, None])
    async for frame in sse(handle):
        assert_type(frame, str)
    async for event in handle.aevents(after=1):
        assert_type(event, RunEvent)


@tool
async def refund(order_id: str, cents: int, context: ToolContext) -> dict[str, int]:
    """Pays an order back."""
    assert_type(context.idempotency_key, str)
    assert_type(context.run_id, str)
    await context.emit("order.refunded", order_id=order_id)
    return {order_id: cents}


@tool(name="look_up", timeout_ms=1000)
def look_up(order_id: str) -> str:
    """Looks an order up."""
    return order_id


async def tools_are_still_functions(context: ToolContext) -> None:
    assert_type(await refund("A17", 500, context), dict[str, int])
    assert_type(look_up("A17"), str)
