"""Calls with effects that fail without an outcome: an error of the tool says what is known."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from openagents_worker.models import RunState, WaitKind
from openagents_worker.runtime.runner import AttemptOutcome
from tests.runtime import plugins
from tests.support.runner import Process, agent, calls, crash, due, process, scripted
from tests.support.waiting import await_for

MODEL = scripted(calls(("uncertain", {})), {"text": "end"})


def uncertain(*, on_interrupted: str = "ask", **config: Any) -> dict[str, Any]:
    tool = {"id": "uncertain", "impl": "tests.runtime.plugins.Uncertain", "config": config}
    return agent(llm=MODEL, tools=[{**tool, "on_interrupted": on_interrupted}])


async def second_attempt(p: Process) -> RunState:
    """The state after the second attempt; the first one was suspended by the error."""
    await p.submit()
    assert (await p.execute()).kind is AttemptOutcome.SUSPENDED
    await due(p)
    await p.execute()
    return (await p.record()).state


def keys() -> list[str]:
    return [entry[2] for entry in plugins.LOG if entry[0] == "call"]


async def test_a_call_that_was_not_executed_is_made_again(redis_url: str) -> None:
    """Nobody is asked, and the key of the call stays."""
    async with process(redis_url, uncertain(was_executed=False)) as p:
        assert await second_attempt(p) is RunState.COMPLETED
        assert "run.outcome_unknown" not in await p.event_names()
    assert len(keys()) == 2
    assert len(set(keys())) == 1


@pytest.mark.parametrize(
    ("on_interrupted", "state", "made"),
    [("ask", RunState.PAUSED, 1), ("rerun", RunState.COMPLETED, 2), ("fail", RunState.FAILED, 1)],
)
async def test_a_call_of_which_nothing_is_known_counts_as_interrupted(
    redis_url: str, on_interrupted: str, state: RunState, made: int
) -> None:
    async with process(redis_url, uncertain(was_executed=None, on_interrupted=on_interrupted)) as p:
        assert await second_attempt(p) is state
    assert len(keys()) == made


async def test_an_error_that_says_nothing_is_the_outcome(redis_url: str) -> None:
    """A call with effects that has failed is not made again: the model gets the error."""
    async with process(redis_url, uncertain(was_executed=True)) as p:
        await p.run()
        assert (await p.record()).state is RunState.COMPLETED
    assert len(keys()) == 1


async def test_that_a_call_was_not_executed_holds_for_that_call_only(redis_url: str) -> None:
    """It is made again, and the worker dies meanwhile: that somebody has to decide about."""
    definition = uncertain(was_executed=False, gate="second")
    async with process(redis_url, definition) as one, process(redis_url, definition, name="v") as two:
        await one.submit()
        await one.execute()
        await due(one)
        executing = asyncio.create_task(one.execute())
        await await_for(lambda: len(keys()) == 2, "the call is made again")
        await crash(one, "r1", executing)
        await two.execute()
        record = await two.record()
    assert [waiting.kind for waiting in record.waiting] == [WaitKind.OUTCOME]
    assert len(keys()) == 2
