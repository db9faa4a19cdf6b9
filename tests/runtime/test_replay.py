"""What a run repeats after the death of its worker, and what it does not."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from openagents_worker.runtime.runner import AttemptOutcome
from tests.runtime import plugins
from tests.support.runner import Process, agent, crash, due, process
from tests.support.waiting import await_for


def tool(name: str, **config: Any) -> dict[str, Any]:
    return {"id": name.lower(), "impl": f"tests.runtime.plugins.{name}", "config": config}


def patterned(pattern: str, *tools: dict[str, Any], **config: Any) -> dict[str, Any]:
    ref = {"impl": f"tests.runtime.plugins.{pattern}", "config": config}
    return agent(pattern=ref, tools=list(tools) or [tool("Charge"), tool("Look")])


def open_gates(*names: str) -> None:
    for name in names:
        plugins.GATES[name].set()


async def executed_until(process: Process, condition: Any, what: str) -> asyncio.Task[Any]:
    """Execute r1 in the background until the condition holds."""
    executing = asyncio.create_task(process.execute("r1"))
    await await_for(condition, what)
    return executing


@pytest.mark.parametrize("died_at", range(5))
async def test_a_finished_call_is_not_made_again(redis_url: str, died_at: int) -> None:
    """In whatever step the worker dies: every finished tool call was made once, the call in flight twice."""
    definition = patterned("Steps", tool("Charge"), n=5)
    async with (
        process(redis_url, definition, name="one") as one,
        process(redis_url, definition, name="two") as two,
    ):
        await one.submit()
        open_gates(*(f"charge-{n}" for n in range(died_at)))
        begun = ("begin", "charge", died_at)
        dying = await executed_until(
            one, lambda: any(e[:3] == begun for e in plugins.LOG), f"call {died_at} begins"
        )
        await crash(one, "r1", dying)
        open_gates(*(f"charge-{n}" for n in range(5)))

        attempt_result = await two.execute("r1")

        assert attempt_result.kind is AttemptOutcome.FINISHED
        assert plugins.executed("charge") == [0, 1, 2, 3, 4]
        begins = [entry[2] for entry in plugins.LOG if entry[0] == "begin"]
        assert begins == sorted([0, 1, 2, 3, 4, died_at])
        keys = {entry[2]: set() for entry in plugins.LOG if entry[0] == "begin"}
        for entry in plugins.LOG:
            if entry[0] == "begin":
                keys[entry[2]].add(entry[3])
        assert all(len(sent) == 1 for sent in keys.values()), "a repeated call sends the same idempotency key"
        record = await two.record()
        assert record.result is not None
        assert record.result.final_output == 5
        assert record.usage.tool_calls == 5
        assert [event["seq"] for event in await two.events()] == list(range(1, len(await two.events()) + 1))
        assert sum(name == "run.completed" for name in await two.event_names()) == 1


async def test_events_of_a_replayed_part_are_not_emitted_again(redis_url: str) -> None:
    """Events before a recorded call were stored with that call. Replay does not emit them."""
    definition = patterned("Steps", tool("Charge"), n=3)
    async with (
        process(redis_url, definition, name="one") as one,
        process(redis_url, definition, name="two") as two,
    ):
        await one.submit()
        open_gates("charge-0", "charge-1")
        dying = await executed_until(one, lambda: ("end", "charge", 1) in plugins.LOG, "two calls end")
        await await_for(lambda: one.record(), "the record")
        await crash(one, "r1", dying)
        open_gates("charge-2")
        await two.execute("r1")

        numbers = [event["payload"]["number"] for event in await two.events() if event["name"] == "app.step"]
        assert numbers[:2] == [0, 1]
        assert set(numbers) == {0, 1, 2}
        assert numbers.count(0) == numbers.count(1) == 1
        called = [event for event in await two.event_names() if event == "tool.succeeded"]
        assert len(called) == 3


async def test_parallel_branches_keep_their_own_calls(redis_url: str) -> None:
    """Bob was faster when the worker died. Afterwards alice is charged once and bob is not charged again."""
    definition = patterned("Branches")
    async with (
        process(redis_url, definition, name="one") as one,
        process(redis_url, definition, name="two") as two,
    ):
        await one.submit()
        open_gates("look-bob", "charge-bob", "look-alice")
        dying = await executed_until(
            one,
            lambda: (
                ("end", "charge", "bob") in plugins.LOG
                and any(e[:3] == ("begin", "charge", "alice") for e in plugins.LOG)
            ),
            "bob is charged, alice is being charged",
        )

        async def stored() -> bool:
            return len(await one.journal()) == 4

        await await_for(stored, "bob's charge is committed")
        await crash(one, "r1", dying)
        open_gates("charge-alice")
        await two.execute("r1")

        assert sorted(plugins.executed("charge")) == ["alice", "bob"]
        assert sorted(plugins.executed("look")) == ["alice", "bob"]
        record = await two.record()
        assert record.result is not None
        assert record.result.final_output == [{"charged": "alice"}, {"charged": "bob"}]
        assert record.usage.tool_calls == 4


async def test_a_caught_error_is_replayed(redis_url: str) -> None:
    """The journal raises the error that the pattern caught. Plan B is not made twice."""
    definition = patterned("PlanB", tool("Charge"))
    plugins.FAILURES["a"] = [plugins.refused()]
    plugins.FAILURES["b"] = [plugins.rate_limited()]
    async with (
        process(redis_url, definition, name="one") as one,
        process(redis_url, definition, name="two") as two,
    ):
        await one.submit()
        first = await one.execute()
        assert first.kind is AttemptOutcome.SUSPENDED

        await due(two)
        await two.execute()

        caught = [entry for entry in plugins.LOG if entry[0] == "caught"]
        assert caught == [("caught", "PermanentToolError", "card refused")] * 2
        assert plugins.executed("charge") == ["b"]
        assert [entry[2] for entry in plugins.LOG if entry[0] == "begin"] == ["a", "b", "b"]


async def test_gather_with_return_exceptions_cannot_hide_a_suspension(redis_url: str) -> None:
    """A pattern that turns every exception into a value does not complete: the run is suspended."""
    definition = patterned("Stubborn", tool("Charge"))
    plugins.FAILURES["a"] = [plugins.rate_limited()]
    async with (
        process(redis_url, definition, name="one") as one,
        process(redis_url, definition, name="two") as two,
    ):
        await one.submit()
        executing = await executed_until(one, lambda: len(plugins.LOG) == 2, "both calls begin")
        open_gates("charge-a")
        await await_for(lambda: one.runner._attempts["r1"].latch.reason, "the first one has failed")
        open_gates("charge-b")
        assert (await executing).kind is AttemptOutcome.SUSPENDED
        assert plugins.executed("charge") == ["b"], "the call that ran beside it ended and was recorded"

        await due(two)
        await two.execute()

        assert sorted(plugins.executed("charge")) == ["a", "b"]
        record = await two.record()
        assert record.result is not None
        assert record.result.final_output == ["{'charged': 'a'}", "{'charged': 'b'}"]


async def test_a_call_that_the_pattern_cancelled_is_cancelled_again(redis_url: str) -> None:
    """A time limit of the pattern is replayed: after a crash the slow call is not made again."""
    definition = patterned("Impatient", tool("Charge"))
    async with (
        process(redis_url, definition, name="one") as one,
        process(redis_url, definition, name="two") as two,
    ):
        await one.submit()
        dying = await executed_until(
            one, lambda: any(e[:3] == ("begin", "charge", "then") for e in plugins.LOG), "the next call"
        )
        await crash(one, "r1", dying)
        open_gates("then")
        await two.execute("r1")

        begins = [entry[2] for entry in plugins.LOG if entry[0] == "begin"]
        assert begins == ["slow", "then", "then"]
        assert (await two.record()).state == "completed"


async def test_a_program_that_contradicts_its_journal_is_stopped(redis_url: str) -> None:
    """A call that differs from the journal fails the run with run.replay_mismatch. Nothing is executed."""
    plugins.Chancy.count = 0
    definition = patterned("Chancy", tool("Charge"))
    async with (
        process(redis_url, definition, name="one") as one,
        process(redis_url, definition, name="two") as two,
    ):
        await one.submit()
        open_gates("second")
        dying = await executed_until(one, lambda: ("begin", "third") in begun(), "the third call begins")
        await crash(one, "r1", dying)
        open_gates("third")
        await two.execute("r1")

        record = await two.record()
        assert record.result is not None
        assert record.result.error_details is not None
        assert record.result.error_details.code == "run.replay_mismatch"
        assert ("begin", "attempt 2") not in begun()
        assert record.usage.tool_calls == record.result.usage.tool_calls == 2, "also what was not replayed"


async def test_a_mismatch_after_a_changed_definition_is_named(redis_url: str) -> None:
    """The error says that the definition of the agent has changed."""
    old, new = patterned("Steps", tool("Charge"), n=3), patterned("PlanB", tool("Charge"))
    async with process(redis_url, old, name="one") as one, process(redis_url, new, name="two") as two:
        await one.submit()
        open_gates("charge-0")
        dying = await executed_until(one, lambda: ("begin", 1) in begun(), "the second call begins")
        await crash(one, "r1", dying)
        await two.execute("r1")

        record = await two.record()
        assert record.result is not None
        assert record.result.error_details is not None
        assert record.result.error_details.code == "run.definition_changed"


def begun() -> list[tuple[str, Any]]:
    return [("begin", entry[2]) for entry in plugins.LOG if entry[0] == "begin"]


@pytest.mark.defect("D03")
async def test_state_is_the_same_after_a_replay(redis_url: str) -> None:
    """The changes of the pattern and its tools are the same as without the crash."""
    definition = patterned("Steps", tool("Charge"), n=3)
    async with (
        process(redis_url, definition, name="one") as one,
        process(redis_url, definition, name="two") as two,
    ):
        await one.submit()
        open_gates("charge-0")
        dying = await executed_until(
            one, lambda: any(e[:3] == ("begin", "charge", 1) for e in plugins.LOG), "second call"
        )
        await crash(one, "r1", dying)
        open_gates("charge-1", "charge-2")
        await two.execute("r1")

        state = await two.store.redis.hgetall(two.store.keys("session_state", "s1"))
        assert state["counter"] == "3"
        assert state["charged"] == "[0,1,2]"
        assert state["last"] == "2"
