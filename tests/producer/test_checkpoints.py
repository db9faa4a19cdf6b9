"""Checkpoints as a producer reads them: what a run has recorded, whole."""

from __future__ import annotations

import pytest

from openagents_worker import Client
from openagents_worker.errors import RunNotFound
from openagents_worker.producer.client import AsyncClient
from tests.support.runner import agent, calls, process, scripted

LONG = "x" * 5_000


async def test_the_journal_tells_in_full_what_events_show_the_beginning_of(redis_url: str) -> None:
    """A call is found by its place, which its events name; its outcome is there to the last character."""
    asks = calls(("look", {"who": LONG}))
    looking = {"id": "look", "impl": "tests.runtime.plugins.Look"}
    definition = agent(llm=scripted(asks, {"text": "done"}), tools=[looking])
    async with process(redis_url, definition) as p:
        await p.run()
        events = await p.events()
    with Client(redis_url) as client:
        found = list(client.checkpoints("r1"))

    assert [(one.position, one.kind) for one in found] == [
        (0, "prepare"),
        (1, "model"),
        (2, "tool"),
        (3, "model"),
    ]
    assert [one.checkpoint_id for one in found] == [f"r1:step:{n}" for n in range(4)]
    [told] = [event["payload"] for event in events if event["name"] == "tool.succeeded"]
    assert told["call_id"] == found[2].call
    assert len(told["result"]["seen"]) < 400
    assert found[2].value == {"seen": LONG}
    assert found[2].usage.tool_calls == 1


async def test_asyncio_reads_the_same(redis_url: str) -> None:
    """One implementation serves both clients."""
    async with process(redis_url, agent()) as p:
        await p.run()
    async with AsyncClient(redis_url) as client:
        assert [one.kind async for one in client.checkpoints("r1")] == ["prepare", "model"]


def test_a_run_that_nobody_knows_has_none(redis_url: str) -> None:
    """It raises at once, and does not return an empty list."""
    with Client(redis_url) as client, pytest.raises(RunNotFound):
        list(client.checkpoints("nobody"))
