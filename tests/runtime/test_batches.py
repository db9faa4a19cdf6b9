"""Batches of tool calls (D05): each item passes the guards and has a record, one more record closes them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from openagents_worker import Agent, AsyncClient, RunContext
from openagents_worker.errors import OpenAgentsError, PermanentToolError, RequestInvalid
from openagents_worker.models import RunState, StopReason, WaitKind
from openagents_worker.runtime.latch import LatchReason
from openagents_worker.runtime.runner import AttemptOutcome
from openagents_worker.store import scripts
from tests.runtime import plugins
from tests.support.runner import Process, crash, process, scripted
from tests.support.waiting import await_for

PLUGINS = "tests.runtime.plugins"
ITEMS: list[Any] = []
"""What the agent calls as one batch."""


def caller(charge: str = "Charge", **options: Any) -> Agent:
    """An agent that makes the calls of `ITEMS` as one batch, then one more call."""

    async def batch(context: RunContext) -> Any:
        results = await context.call_tool_batch(ITEMS)
        await context.call_tool("charge", {"who": "after"})
        return [result.code if isinstance(result, OpenAgentsError) else result for result in results]

    tools: list[Any] = [
        {"id": "charge", "impl": f"{PLUGINS}.{charge}", **options},
        {"id": "look", "impl": f"{PLUGINS}.Look", "config": {"safe": True}},
    ]
    return Agent("a", pattern=batch, tools=tools, llm=scripted({"text": "hello"}))


def charges(*who: str, **more: Any) -> None:
    ITEMS[:] = [("charge", {"who": each, **more}) for each in who]


async def output(p: Process) -> Any:
    """The output of the run, or the code of its error."""
    result = (await p.record()).result
    assert result is not None
    return result.final_output if result.error_details is None else result.error_details.code


async def test_a_batch_has_a_record_for_each_item_and_one_that_closes_it(redis_url: str) -> None:
    """The results keep the order of the requests. Calls that are concurrency_safe run side by side."""
    ITEMS[:] = [
        ("look", {"who": "x", "gate": "look-x"}),
        ("look", {"who": "y"}),
        ("charge", {"who": "ann"}),
        ("charge", None),
    ]
    async with process(redis_url, caller()) as p:
        await p.submit()
        executing = asyncio.create_task(p.execute())
        await await_for(lambda: plugins.executed("look") == ["y"], "the second call ends before the first")
        assert plugins.executed("charge") == [], "a call that is not safe waits for those before it"
        plugins.GATES["look-x"].set()
        await executing
        assert await output(p) == [{"seen": "x"}, {"seen": "y"}, {"charged": "ann"}, {"charged": None}]
        records = [(record["kind"], record["name"]) for record in (await p.journal())[1:]]
        assert records == [
            *[("tool", "look")] * 2,
            *[("tool", "charge")] * 2,
            ("batch", "tools"),
            ("tool", "charge"),
        ]
        assert (await p.record()).usage.tool_calls == 5
        events = await p.events()
        (started,) = [event["payload"] for event in events if event["name"] == "tool.batch.started"]
        (closed,) = [event["payload"] for event in events if event["name"] == "tool.batch.completed"]
        assert started["tool_ids"] == ["look", "look", "charge", "charge"]
        assert (started["concurrent_count"], started["batch_id"]) == (4, closed["batch_id"])
        assert (closed["successes"], closed["failures"]) == (4, 0)


async def test_an_item_that_fails_leaves_its_error_in_its_place(redis_url: str) -> None:
    """Also one whose tool does not exist. The other items are made."""
    plugins.FAILURES["bob"] = [PermanentToolError("no money", "charge")]
    ITEMS[:] = [
        ("charge", {"who": "ann"}),
        ("charge", {"who": "bob"}),
        ("chrge", {}),
        ("charge", {"who": "eve"}),
    ]
    async with process(redis_url, caller()) as p:
        await p.run()
        assert await output(p) == [{"charged": "ann"}, "tool.permanent", "tool.not_found", {"charged": "eve"}]
        assert (await p.event_names()).count("tool.failed") == 2


@pytest.mark.defect("D05")
async def test_after_a_crash_only_the_missing_items_are_made(redis_url: str) -> None:
    ITEMS[:] = [
        ("charge", {"who": "ann"}),
        ("charge", {"who": "bob", "gate": "charge"}),
        ("charge", {"who": "eve"}),
    ]
    async with (
        process(redis_url, caller(), name="one") as one,
        process(redis_url, caller(), name="two") as two,
    ):
        await one.submit()
        dying = asyncio.create_task(one.execute())
        await await_for(
            lambda: plugins.LOG and plugins.LOG[-1][:3] == ("begin", "charge", "bob"), "bob's charge"
        )
        await crash(one, "r1", dying)
        plugins.GATES["charge"].set()
        await two.execute()
        assert await output(two) == [{"charged": "ann"}, {"charged": "bob"}, {"charged": "eve"}]
        assert plugins.executed("charge") == ["ann", "bob", "eve", "after"]
        names = await two.event_names()
        assert [names.count(f"tool.batch.{what}") for what in ("started", "completed")] == [1, 1]


async def test_a_finished_batch_is_answered_from_the_journal(redis_url: str) -> None:
    """Equal items keep their own results."""
    charges("ann", "ann", "bob")
    plugins.FAILURES["ann"] = [PermanentToolError("no money", "charge")]
    plugins.FAILURES["after"] = [asyncio.CancelledError(), PermanentToolError("ends the run", "charge")]
    async with process(redis_url, caller(), name="one") as one:
        await one.run()
        before = [entry for entry in plugins.LOG if entry[0] == "begin"]
        resumed = scripts.resume(run_id="r1", agent_id="a", session_id="s1", input_text="", checkpoint_id="")
        await one.store.run(resumed)
        plugins.FAILURES.clear()
        await one.execute()
        assert await output(one) == ["tool.permanent", {"charged": "ann"}, {"charged": "bob"}]
        again = [entry[2] for entry in plugins.LOG if entry[0] == "begin"][len(before) :]
        assert again == ["after"]


@pytest.mark.defect("D05")
async def test_the_budget_counts_each_item(redis_url: str) -> None:
    """The item over the limit ends the run (B05), although the program catches errors of items."""
    charges("ann", "bob", "eve")
    async with process(redis_url, caller()) as p:
        await p.submit(budget={"max_tool_calls": 2})
        await p.execute()
        record = await p.record()
        assert record.result is not None
        assert record.result.stop_reason is StopReason.MAX_STEPS
        assert plugins.executed("charge") == ["ann", "bob"]


@pytest.mark.defect("D05")
async def test_the_approvals_of_a_batch_are_asked_together(redis_url: str) -> None:
    charges("ann", "bob")
    async with process(redis_url, caller(approval="always")) as p, AsyncClient(redis_url) as client:
        await p.submit()
        assert (await p.execute()).kind is AttemptOutcome.SUSPENDED
        assert (await p.record()).state is RunState.AWAITING_APPROVAL
        ann, bob = sorted(await client.handle("r1").approvals(), key=lambda asked: str(asked.arguments))
        assert (ann.arguments, bob.arguments) == ({"who": "ann"}, {"who": "bob"})
        await client.approve("r1", bob.call_id, by="me")
        await client.deny("r1", ann.call_id, by="me")
        await p.execute()
        (after,) = await client.handle("r1").approvals()
        await client.approve("r1", after.call_id, by="me")
        await p.execute()
        assert await output(p) == ["tool.permanent", {"charged": "bob"}]
        assert plugins.executed("charge") == ["bob", "after"]


async def test_an_item_with_effects_is_not_repeated_unasked(redis_url: str) -> None:
    charges("ann", gate="charge")
    agent = caller("OnceOnly")
    async with (
        process(redis_url, agent, name="one") as one,
        process(redis_url, agent, name="two") as two,
        AsyncClient(redis_url) as client,
    ):
        await one.submit()
        dying = asyncio.create_task(one.execute())
        await await_for(lambda: len(plugins.LOG) == 1, "the charge begins")
        await crash(one, "r1", dying)
        plugins.GATES["charge"].set()
        await two.execute()
        assert [waiting.kind for waiting in (await two.record()).waiting] == [WaitKind.OUTCOME]
        await client.resolve("r1", "charge", "skip", by="me", result="paid by hand")
        await two.execute()
        assert await output(two) == ["paid by hand"]
        assert plugins.executed("charge") == ["after"]


async def test_a_cancelled_run_cancels_the_items_of_its_batch(redis_url: str) -> None:
    ITEMS[:] = [("look", {"who": "x", "gate": "never"}), ("look", {"who": "y", "gate": "never"})]
    async with process(redis_url, caller()) as p:
        await p.submit()
        executing = asyncio.create_task(p.execute())
        await await_for(lambda: _begun(p, 2), "both calls have begun")
        await p.store.run(scripts.cancel(run_id="r1", reason="enough", force=False))
        p.runner.latch("r1", LatchReason.CANCELLED)
        await executing
        assert (await p.record()).state is RunState.CANCELLED
        assert plugins.executed("look") == []


async def _begun(p: Process, calls: int) -> bool:
    return (await p.event_names()).count("tool.called") == calls


@pytest.mark.parametrize(
    ("requests", "problem"),
    [
        ("charge", "it takes a list, not a str"),
        ([("charge", {}), "charge"], "item 1 is not a pair"),
        ([("charge", [1])], "item 0 is not a pair"),
        ([("charge", {})] * 1_001, "it has 1,001 items, 1,000 are allowed"),
    ],
)
async def test_what_is_not_a_batch_is_refused(redis_url: str, requests: Any, problem: str) -> None:
    async def batch(context: RunContext) -> Any:
        with pytest.raises(RequestInvalid, match=problem):
            await context.call_tool_batch(requests)
        return await context.call_tool_batch([])

    async with process(redis_url, Agent("a", pattern=batch, llm=scripted({"text": "hello"}))) as p:
        await p.run()
        assert await output(p) == []
        assert [record["kind"] for record in await p.journal()] == ["prepare"]
