"""Watchers see each call begin once in each life of its run, and again when its tool is executed again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from openagents_worker import AsyncClient
from openagents_worker.models import RunBudget, RunState
from openagents_worker.runtime import waits
from openagents_worker.runtime.runner import AttemptOutcome
from tests.runtime import plugins
from tests.runtime.test_approvals import charge, refunding
from tests.runtime.test_effects import call_in_question, interrupted, paying, resolve
from tests.runtime.test_waiting import send
from tests.support.runner import Process, agent, calls, crash, due, process, scripted
from tests.support.waiting import await_for

PLUGINS = "tests.runtime.plugins"


async def of_call(p: Process, tool_id: str, *, life: int = 1) -> Sequence[str]:
    """What watchers have seen of the calls of this tool in a life, in order."""
    return [
        event["name"].removeprefix("tool.")
        for event in await p.events()
        if event["life"] == life
        and event["payload"].get("tool_id") == tool_id
        and event["name"] in ("tool.called", "tool.succeeded", "tool.failed")
    ]


async def called_facts(p: Process) -> Sequence[str]:
    names = await p.store.redis.hkeys(p.store.keys("facts", "r1"))
    return [name for name in names if name.startswith("called:")]


async def approve_all(client: AsyncClient) -> None:
    for asked in await client.handle("r1").approvals():
        await client.approve("r1", asked.call_id, by="bob")


async def test_a_call_that_waits_for_its_approval_begins_once(redis_url: str) -> None:
    async with process(redis_url, refunding(charge("ann"))) as p, AsyncClient(redis_url) as client:
        await p.submit()
        await p.execute()
        assert len(await called_facts(p)) == 1, "the suspension has stored it"
        await approve_all(client)
        await p.execute()
        assert await of_call(p, "charge") == ["called", "succeeded"]
        assert await called_facts(p) == []


async def test_a_tool_that_waits_inside_begins_once(redis_url: str) -> None:
    """However often the run is parked in it: the tool goes on where it was."""
    definition = agent(
        llm=scripted(calls(("ask", {})), {"text": "done"}),
        tools=[
            {"id": "ask", "impl": "tests.runtime.waiting.AskTool"},
            {"id": "charge", "impl": f"{PLUGINS}.Charge"},
        ],
    )
    async with process(redis_url, definition) as p:
        await p.submit()
        assert (await p.execute()).kind is AttemptOutcome.SUSPENDED
        await send(p, "answer", 7)
        await p.execute()
        assert (await p.record()).state is RunState.COMPLETED
        assert await of_call(p, "ask") == ["called", "succeeded"]
        assert await of_call(p, "charge") == ["called", "succeeded"] * 2
        assert await called_facts(p) == []


async def test_each_try_after_a_failed_one_begins(redis_url: str) -> None:
    """Also that of a call that had an approval: each beginning has its end."""
    plugins.FAILURES["ann"] = [plugins.rate_limited(1)]
    async with process(redis_url, refunding(charge("ann"))) as p, AsyncClient(redis_url) as client:
        await p.submit()
        await p.execute()
        await approve_all(client)
        assert (await p.execute()).reason == "tool.rate_limit"
        await due(p)
        await p.execute()
        assert await of_call(p, "charge") == ["called", "failed", "called", "succeeded"]
        assert await called_facts(p) == []


async def test_a_call_whose_worker_dies_begins_again(redis_url: str) -> None:
    """Nobody knows how far it was: the tool is executed again."""
    definition = agent(
        llm=scripted(calls(("charge", {"who": "ann", "gate": "open"})), {"text": "done"}),
        tools=[{"id": "charge", "impl": f"{PLUGINS}.Charge"}],
    )
    async with (
        process(redis_url, definition, name="one") as one,
        process(redis_url, definition, name="two") as two,
    ):
        await one.submit()
        dying = asyncio.create_task(one.execute())

        async def is_called() -> bool:
            return "called" in await of_call(one, "charge")

        await await_for(is_called, "the beginning of the call is stored")
        await crash(one, "r1", dying)
        plugins.GATES["open"].set()
        await two.execute()
        assert await of_call(two, "charge") == ["called", "called", "succeeded"]


async def test_a_worker_that_dies_behind_the_question_asks_no_second_time(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question about the approval is stored, so the call is known, although its run was not parked."""
    definition = refunding(charge("ann"))
    async with (
        process(redis_url, definition, name="one") as one,
        process(redis_url, definition, name="two") as two,
        AsyncClient(redis_url) as client,
    ):
        await one.submit()
        monkeypatch.setattr(waits, "PARK_AFTER_S", 3_600)
        dying = asyncio.create_task(one.execute())
        await await_for(client.handle("r1").approvals, "the question is stored")
        await crash(one, "r1", dying)
        monkeypatch.undo()
        await two.execute()
        await approve_all(client)
        await two.execute()
        assert await of_call(two, "charge") == ["called", "succeeded"]


@pytest.mark.parametrize(
    ("action", "more", "seen"),
    [
        ("skip", {"result": {"charged": "by hand"}}, ["called", "succeeded"]),
        ("rerun", {}, ["called", "called", "succeeded"]),
    ],
)
async def test_an_interrupted_call_with_effects_begins_again_only_if_it_is_made_again(
    redis_url: str, action: str, more: dict[str, Any], seen: list[str]
) -> None:
    """While somebody decides, and if the decision is another one, nothing of it is executed."""
    async with interrupted(paying(), redis_url) as (_, two):
        assert (await two.execute()).kind is AttemptOutcome.SUSPENDED
        assert await of_call(two, "charge") == ["called"]
        await resolve(two, await call_in_question(two), action, **more)
        await two.execute()
        assert await of_call(two, "charge") == [*seen, "called", "succeeded"]


async def test_a_call_begins_in_each_life_of_its_run(redis_url: str) -> None:
    async with process(redis_url, refunding(charge("ann"))) as p, AsyncClient(redis_url) as client:
        await p.submit()
        await p.execute()
        await client.cancel("r1")
        await client.resume("r1")
        await p.execute()
        await approve_all(client)
        await p.execute()
        assert await of_call(p, "charge") == ["called"]
        assert await of_call(p, "charge", life=2) == ["called", "succeeded"]


async def test_a_call_that_waits_while_another_one_is_retried_begins_once(redis_url: str) -> None:
    """The suspension for the retry stores the waiting call, too."""
    plugins.FAILURES["ben"] = [plugins.rate_limited(1)]
    definition = agent(
        llm=scripted(calls(("refund", {"who": "ann"}), ("charge", {"who": "ben"})), {"text": "done"}),
        tools=[
            {"id": "refund", "impl": f"{PLUGINS}.Charge", "config": {"safe": True}, "approval": "always"},
            {"id": "charge", "impl": f"{PLUGINS}.Charge", "config": {"safe": True}},
        ],
    )
    async with process(redis_url, definition) as p, AsyncClient(redis_url) as client:
        await p.submit(budget=RunBudget(max_resume_attempts=2))
        assert (await p.execute()).reason == "tool.rate_limit"
        await due(p)
        await p.execute()
        await approve_all(client)
        await p.execute()
        assert await of_call(p, "refund") == ["called", "succeeded"]
        assert await of_call(p, "charge") == ["called", "failed", "called", "succeeded"]
