"""A further guard of tool calls: what it refuses is not executed, what it parks is executed later."""

from __future__ import annotations

from typing import Any

import pytest

from openagents_worker.errors import PermanentToolError, RetryableToolError
from openagents_worker.models import RunState, StopReason
from openagents_worker.runtime.calls import guards
from openagents_worker.runtime.calls.tool_call import Guard, Proceed, ToolCall
from openagents_worker.runtime.runner import AttemptOutcome
from tests.runtime import plugins
from tests.support.runner import agent, calls, due, process, scripted

ONE = calls(("charge", {"who": "a"}))
TOGETHER = calls(("charge", {"who": "a"}), ("charge", {"who": "b"}))
ANSWER = {"text": "done"}


def charging(*replies: dict[str, Any], impl: str = "OnceOnly") -> dict[str, Any]:
    """An agent that charges. Its tool must not be repeated, and its calls in one turn run concurrently."""
    charge = {"id": "charge", "impl": f"tests.runtime.plugins.{impl}", "config": {"safe": True}}
    return agent(llm=scripted(*replies), tools=[charge])


def add_guard(monkeypatch: pytest.MonkeyPatch, guard: Guard) -> None:
    """Add a guard before the approval, where those that ask somebody belong."""
    at = guards.GUARDS.index(guards.approval)
    monkeypatch.setattr(guards, "GUARDS", (*guards.GUARDS[:at], guard, *guards.GUARDS[at:]))


@pytest.mark.parametrize("reply", [ONE, TOGETHER], ids=["one call", "calls in one turn"])
async def test_a_call_that_a_guard_refuses_is_not_executed(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, reply: dict[str, Any]
) -> None:
    """The model gets the error, and watchers see it."""

    async def refuses(call: ToolCall, proceed: Proceed) -> Any:
        raise PermanentToolError("not on Sundays", call.tool_id)

    add_guard(monkeypatch, refuses)
    async with process(redis_url, charging(reply, ANSWER)) as p:
        assert (await p.run()).state is RunState.COMPLETED

        failed = [event["payload"] for event in await p.events() if event["name"] == "tool.failed"]
        assert [event["message"] for event in failed] == ["not on Sundays"] * len(reply["tool_calls"])
        assert plugins.LOG == []


@pytest.mark.parametrize("reply", [ONE, TOGETHER], ids=["one call", "calls in one turn"])
async def test_a_call_that_a_guard_parks_is_executed_later_and_once(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, reply: dict[str, Any]
) -> None:
    """The run waits without a slot, also with a tool that must not be repeated: it has not begun."""
    is_open = []

    async def parks(call: ToolCall, proceed: Proceed) -> Any:
        if not is_open:
            raise RetryableToolError("the shop is closed", call.tool_id)
        return await proceed(call)

    add_guard(monkeypatch, parks)
    async with process(redis_url, charging(reply, ANSWER)) as p:
        await p.submit()
        assert (await p.execute()).kind is AttemptOutcome.SUSPENDED
        assert plugins.LOG == []
        is_open.append(True)
        await due(p)

        assert (await p.execute()).stop_reason is StopReason.COMPLETED
        assert sorted(plugins.executed("charge")) == ["a", "b"][: len(reply["tool_calls"])]
