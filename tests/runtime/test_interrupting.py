"""Runs that do not wait for their session: they end the run that works there, and are the next one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from openagents_worker.llm.transcript import INTERRUPTED, usable_entries
from openagents_worker.models import RunState
from openagents_worker.patterns.tool_calls import INTERRUPTED_CALL, NOT_CALLED
from openagents_worker.runtime.finishing import finish_run
from openagents_worker.runtime.latch import LatchReason
from openagents_worker.store import scripts
from openagents_worker.testing.model_server import ModelServer
from openagents_worker.worker.interruptions import end_overdue
from tests.runtime import talking
from tests.runtime.talking import Script, talker
from tests.support.runner import Process, calls, process
from tests.support.waiting import await_for

ANSWER = {"text": "Here you are."}
THREE_CALLS = calls(("add", {"x": 1}), ("wait", {}), ("shout", {"text": "hey"}))


@pytest.fixture(autouse=True)
def _no_call_waits() -> None:
    talking.BEGUN.clear()
    talking.LET_GO.clear()


@asynccontextmanager
async def worker(redis_url: str, **fields: Any) -> AsyncIterator[tuple[Process, Script]]:
    script = Script()
    async with ModelServer(script) as server, process(redis_url, talker(server.url, **fields)) as p:
        script.by_run = {"r1": [THREE_CALLS, ANSWER], "r2": [ANSWER], "r3": [ANSWER]}
        yield p, script


async def in_a_tool(p: Process, **fields: Any) -> asyncio.Task[Any]:
    """The run r1, while its second call of three executes."""
    await p.submit("r1", input_text="First.", **fields)
    executing = asyncio.create_task(p.execute("r1"))
    await await_for(lambda: "r1" in talking.BEGUN, "the tool begins")
    return executing


async def answers_of(p: Process) -> list[Any]:
    return [entry["content"] for entry in await p.transcript() if entry["role"] == "assistant"]


async def test_an_interrupted_run_leaves_its_turn_so_far(redis_url: str) -> None:
    """The next run sees the question, the finished calls, and what happened to the others."""
    async with worker(redis_url) as (p, script):
        executing = await in_a_tool(p)
        await p.submit("r2", input_text="Second.", on_busy="interrupt")
        p.runner.latch("r1", LatchReason.CANCELLED)
        await executing
        interrupted = await p.record("r1")
        events = await p.events("r1")
        await p.execute("r2")
        shown = script.asked["r2"][0].body["messages"]

    assert interrupted.state is RunState.CANCELLED
    assert interrupted.result is not None
    assert interrupted.result.error_details is not None
    assert interrupted.result.error_details.message == "interrupted by the run r2"
    [requested] = [event["payload"] for event in events if event["name"] == "run.cancel_requested"]
    assert requested == {"reason": "interrupted by the run r2", "mode": "interrupt", "by_run_id": "r2"}
    roles = ["system", "user", "assistant", "tool", "tool", "tool", "assistant", "user"]
    assert [message["role"] for message in shown] == roles
    results = [message["content"] for message in shown if message["role"] == "tool"]
    assert results[0] == "1"
    assert INTERRUPTED_CALL in results[1]
    assert NOT_CALLED in results[2]
    assert [shown[at]["content"] for at in (1, 6, 7)] == ["First.", INTERRUPTED, "Second."]


@pytest.mark.defect("S04")
async def test_a_run_that_is_rolled_back_leaves_nothing(redis_url: str) -> None:
    """Neither messages nor state; the next run sees the session as it was before."""
    async with worker(redis_url) as (p, script):
        executing = await in_a_tool(p)
        await p.submit("r2", input_text="Second.", on_busy="rollback")
        p.runner.latch("r1", LatchReason.CANCELLED)
        await executing
        await p.execute("r2")
        shown = script.asked["r2"][0].body["messages"]

        assert (await p.record("r1")).state is RunState.CANCELLED
        assert [message["role"] for message in shown] == ["system", "user"]
        assert {entry["run_id"] for entry in await p.transcript()} == {"r2"}


async def test_a_run_that_is_rolled_back_never_completes(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the request comes after its last call: the end that its worker writes is refused."""
    async with worker(redis_url) as (p, script):
        script.by_run["r1"] = [ANSWER]

        async def finish_late(*given: Any, **named: Any) -> Any:
            if not await p.store.redis.exists(p.store.keys("run", "r2")):
                await p.submit("r2", on_busy="rollback")
            return await finish_run(*given, **named)

        monkeypatch.setattr("openagents_worker.runtime.attempt.finish_run", finish_late)
        record = await p.run("r1")

        assert record.state is RunState.CANCELLED
        assert await p.transcript() == []
        assert (await p.record("r2")).state is RunState.QUEUED


@pytest.mark.parametrize("on_busy", ["interrupt", "rollback"])
async def test_a_suspended_run_ends_at_once(redis_url: str, on_busy: str) -> None:
    """A worker replays an interrupted run to write its turn, and makes no call."""
    async with worker(redis_url) as (p, script):
        executing = await in_a_tool(p)
        p.runner.latch("r1", LatchReason.HANDOVER)
        await p.runner.hurry_all()
        await executing
        assert (await p.record("r1")).state is RunState.QUEUED
        talking.BEGUN.clear()
        asked = len(script.asked["r1"])
        submitted = await p.submit("r2", on_busy=on_busy)
        if on_busy == "interrupt":
            assert [wake.run_id for wake in submitted.also] == ["r1"]
            await p.execute("r1")
        assert (await p.record("r1")).state is RunState.CANCELLED
        assert (await p.record("r2")).state is RunState.QUEUED
        assert (len(script.asked["r1"]), talking.BEGUN) == (asked, [])
        transcript = await p.transcript()

    if on_busy == "rollback":
        assert transcript == []
        return
    question, answer = transcript
    assert (question["content"], answer["content"]) == ("First.", INTERRUPTED)
    assert [message["role"] for message in answer["tool_messages"]] == ["assistant", *["tool"] * 3]
    assert usable_entries(transcript) == transcript


async def test_a_run_without_a_journal_leaves_its_question(redis_url: str) -> None:
    """A run that is not durable and whose worker is gone is not executed again."""
    async with worker(redis_url) as (p, script):
        await p.submit("r1", input_text="First.", durable=False)
        await p.submit("r2", on_busy="interrupt")
        await p.execute("r1")

        assert "r1" not in script.asked
        assert await answers_of(p) == [INTERRUPTED]
        assert (await p.record("r2")).state is RunState.QUEUED


async def test_a_run_that_does_not_end_is_ended_by_force(redis_url: str) -> None:
    """After the grace its worker can write nothing any more. The question is kept, without its calls."""
    async with worker(redis_url) as (p, _):
        executing = await in_a_tool(p)
        await p.submit("r2", on_busy="interrupt")
        await p.store.redis.hset(p.store.keys("run", "r1"), "force_at", 1)
        await p.store.redis.zadd(p.store.keys("due"), {"r1": 1})
        woken = await p.store.run(scripts.wake(limit=10))
        assert woken.overdue == ("r1",)
        wakes = await end_overdue(p.store, "r1")
        p.runner.latch("r1", LatchReason.CANCELLED)
        await executing

        assert [wake.run_id for wake in wakes] == ["r2"]
        assert (await p.record("r1")).state is RunState.CANCELLED
        assert await answers_of(p) == [INTERRUPTED]


async def test_each_interrupting_run_ends_the_one_before_it(redis_url: str) -> None:
    """Three messages in a row: all questions are kept in their order, and only the last one is answered."""
    async with worker(redis_url) as (p, script):
        executing = await in_a_tool(p)
        for run_id, text in (("r2", "Second."), ("r3", "Third.")):
            await p.submit(run_id, input_text=text, on_busy="interrupt")
        p.runner.latch("r1", LatchReason.CANCELLED)
        await executing
        for run_id in ("r2", "r3"):
            await p.execute(run_id)
        transcript = await p.transcript()

    assert "r2" not in script.asked
    said = [(entry["run_id"], entry["content"]) for entry in transcript]
    assert said == [
        ("r1", "First."),
        ("r1", INTERRUPTED),
        ("r2", "Second."),
        ("r2", INTERRUPTED),
        ("r3", "Third."),
        ("r3", "Here you are."),
    ]


async def test_a_pattern_whose_turn_cannot_be_read_is_interrupted_without_calls(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in `turn_so_far` does not prevent the end."""

    def broken(_: Any) -> Any:
        raise ValueError("a bug in a pattern")

    monkeypatch.setattr("openagents_worker.patterns.react.ReActPattern.turn_so_far", broken)
    async with worker(redis_url) as (p, _):
        executing = await in_a_tool(p)
        await p.submit("r2", on_busy="interrupt")
        p.runner.latch("r1", LatchReason.CANCELLED)
        await executing
        _question, answer = await p.transcript()

    assert answer["content"] == INTERRUPTED
    assert "tool_messages" not in answer
