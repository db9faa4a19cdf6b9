"""Executors of the agents file: time limits, retries, policies, and how many calls are made at once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from openagents_worker import Agent, RunContext, ToolContext, tool
from openagents_worker.agents.executors import EXECUTORS
from openagents_worker.errors import OpenAgentsError, RetryableToolError, ToolRateLimitError
from openagents_worker.models import RunState
from tests.support.runner import Process, agent, process, scripted
from tests.support.waiting import await_for

MADE: list[Any] = []
GATES: dict[str, asyncio.Event] = {}
ONE_TRY_LESS = {"initial_delay_ms": 1, "jitter": "none"}


@pytest.fixture(autouse=True)
def _from_zero() -> None:
    MADE.clear()
    GATES["open"] = asyncio.Event()


@tool
async def flaky(fails: int, context: ToolContext, retry_after_ms: int = 0) -> str:
    """Fail so many times, then succeed."""
    MADE.append(context.idempotency_key)
    context.state["tries"] = [*context.state.get("tries", []), len(MADE)]
    if len(MADE) <= fails:
        if retry_after_ms:
            raise ToolRateLimitError("slow down", "flaky", retry_after_ms=retry_after_ms)
        raise RetryableToolError("not yet", "flaky")
    return f"try {len(MADE)}"


@tool(durable_idempotent=False)
async def pay(context: ToolContext) -> str:
    """Pay, and lose the answer."""
    MADE.append(context.idempotency_key)
    raise RetryableToolError("the answer is lost", "pay")


@tool
async def broken(context: ToolContext) -> str:
    """Fail for good."""
    MADE.append("broken")
    raise ValueError("disk is on fire")


@tool(concurrency_safe=True)
async def wait(number: int, context: ToolContext) -> int:
    """Wait for the gate."""
    MADE.append(number)
    await GATES["open"].wait()
    return number


@tool(concurrency_safe=True)
async def outer(context: ToolContext) -> Any:
    """Call another tool."""
    return await context.call_tool("wait", {"number": 7})


@tool
async def start(command: str) -> str:
    """Start a program."""
    MADE.append(command)
    return "started"


@tool
async def touch(path: str) -> str:
    """Do something with a file."""
    MADE.append(path)
    return "touched"


def caller(executor: Any, *calls: tuple[str, Any], tools: Any = None) -> Agent:
    """An agent with this executor that makes the calls as a batch; errors are shown by class and code."""

    async def batch(context: RunContext) -> Any:
        results = await context.call_tool_batch(list(calls))
        return [str(each.code) if isinstance(each, OpenAgentsError) else each for each in results]

    tools = tools or [flaky, pay, broken, wait, outer, start, touch]
    return Agent("a", pattern=batch, tools=tools, tool_executor=executor, llm=scripted({"text": "hello"}))


def retrying(**config: Any) -> dict[str, Any]:
    return {"type": "retry", "config": {**ONE_TRY_LESS, **config}}


async def output(p: Process) -> Any:
    result = (await p.record()).result
    assert result is not None
    return result.final_output if result.error_details is None else result.error_details.code


@pytest.mark.parametrize("type_", sorted(EXECUTORS))
async def test_every_executor_makes_calls_and_keeps_the_cause_of_an_error(redis_url: str, type_: str) -> None:
    """P05: the message of the exception reaches the run, and its class and code are those of a tool error."""
    agent = caller({"type": type_}, ("flaky", {"fails": 0}), ("broken", {}))
    async with process(redis_url, agent) as p:
        await p.run()
        assert await output(p) == ["try 1", "tool.error"]
        (failed,) = [event["payload"] for event in await p.events() if event["name"] == "tool.failed"]
        assert "disk is on fire" in failed["error"]
        assert failed["type"] == "ValueError"


async def test_a_retryable_error_is_tried_again_in_the_same_call(redis_url: str) -> None:
    """One record and one key; the changes of failed tries are dropped; the event says what was done."""
    async with process(redis_url, caller(retrying(), ("flaky", {"fails": 2}))) as p:
        await p.run()
        assert await output(p) == ["try 3"]
        assert len(set(MADE)) == 1
        record = await p.record()
        assert (record.attempt, record.usage.tool_calls) == (1, 1)
        (ended,) = [event["payload"] for event in await p.events() if event["name"] == "tool.succeeded"]
        reasons = ["tool.retryable"] * 2
        metadata = {"retry_attempts": 3, "retry_delays_ms": [1, 2], "retry_reasons": reasons}
        assert ended["executor_metadata"] == metadata
        state = await p.store.redis.hgetall(p.store.keys("session_state", "s1"))
        assert state["tries"] == "[3]"


async def test_a_call_with_effects_is_not_tried_again(redis_url: str) -> None:
    async with process(redis_url, caller(retrying(), ("pay", {}), ("broken", {}))) as p:
        await p.run()
        assert await output(p) == ["tool.retryable", "tool.error"]
        assert len(MADE) == 2


async def test_a_long_pause_parks_the_run_in_place_of_a_retry(redis_url: str) -> None:
    """The error asks for a longer pause than the executor may make: it holds no slot meanwhile (A05)."""
    calls = ("flaky", {"fails": 1, "retry_after_ms": 60_000})
    async with process(redis_url, caller(retrying(max_delay_ms=100), calls)) as p:
        await p.run()
        assert (await p.record()).state is RunState.RETRYING
        assert len(MADE) == 1


async def test_a_pause_is_never_shorter_than_the_error_asks_for(redis_url: str) -> None:
    """P15: also with jitter."""
    calls = ("flaky", {"fails": 1, "retry_after_ms": 7})
    async with process(redis_url, caller(retrying(jitter="full"), calls)) as p:
        await p.run()
        (ended,) = [event["payload"] for event in await p.events() if event["name"] == "tool.succeeded"]
        assert ended["executor_metadata"]["retry_delays_ms"] == [7]


async def test_a_run_makes_at_most_so_many_calls_at_once(redis_url: str) -> None:
    """A call inside another one does not wait for it."""
    executor = {"type": "concurrent_batch", "config": {"max_concurrency": 2}}
    calls = [("outer", {}), *(("wait", {"number": number}) for number in range(3))]
    async with process(redis_url, caller(executor, *calls)) as p:
        await p.submit()
        executing = asyncio.create_task(p.execute())
        await await_for(lambda: len(MADE) == 2, "two calls are made")
        await p.event_names()  # time for more, if there was room
        assert sorted(MADE) == [0, 7]
        GATES["open"].set()
        await executing
        assert await output(p) == [7, 0, 1, 2]


async def test_only_allowed_programs_are_started(redis_url: str) -> None:
    """A06: by the parameter `command` of a tool, whatever its name is."""
    executor = {
        "type": "retry",
        "config": {"inner": {"type": "safe", "config": {"command_allowlist": ["ls"]}}},
    }
    calls = [("start", {"command": line}) for line in ("ls -l", "rm -rf /", "'ls", "")]
    async with process(redis_url, caller(executor, *calls)) as p:
        await p.run()
        assert await output(p) == ["started", *["tool.permanent"] * 3]
        assert MADE == ["ls -l"]


async def test_tools_use_files_below_the_roots_only(redis_url: str, tmp_path: Path) -> None:
    """By what a tool declares; a tool that declares nothing may neither read nor write elsewhere."""
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "file").write_text("text")
    (inside / "link").symlink_to(outside)
    config = {"read_roots": [str(inside)], "write_roots": [str(inside)], "deny_tools": ["flaky"]}
    files = {"root": str(tmp_path)}
    tools = [
        touch,
        flaky,
        {"id": "read", "type": "read_file", "config": files},
        {"id": "list", "type": "list_files", "config": files},
    ]
    calls = [
        ("touch", {"path": str(inside / "file")}),
        ("touch", {"path": str(inside / ".." / "out" / "file")}),
        ("touch", {"path": str(inside / "link" / "file")}),
        ("read", {"path": "in/file"}),
        ("read", {"path": "out/file"}),
        ("list", {}),  # the folder is that of the tool
        ("flaky", {"fails": 0}),
    ]
    executor = {"type": "filesystem_aware", "config": config}
    async with process(redis_url, caller(executor, *calls, tools=tools)) as p:
        await p.run()
        found = await output(p)
        denied = "tool.permanent"
        assert [found[at] == denied for at in range(7)] == [False, True, True, False, True, True, True]
        assert [str(inside / "file")] == MADE


async def test_the_default_of_the_file_is_for_agents_without_an_executor(redis_url: str) -> None:
    """C02: one registry for both levels."""
    definition = agent(tools=[{"id": "flaky", "impl": f"{__name__}.flaky"}])
    definition["llm"] = scripted(
        {"tool_calls": [{"name": "flaky", "arguments": {"fails": 1}}]}, {"text": "done"}
    )
    runtime = {"type": "default", "config": {"tool_executor": retrying()}}
    async with process(redis_url, definition, runtime=runtime) as p:
        await p.run()
        assert await output(p) == "done"
        assert len(MADE) == 2
