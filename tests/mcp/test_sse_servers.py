"""Servers that speak the older transport: a stream of Server-Sent Events, and messages that are posted."""

from __future__ import annotations

from typing import Any

import pytest

from openagents_worker.models import RunState
from tests.mcp.conftest import FaultyServer
from tests.mcp.test_calls import output_of
from tests.mcp.test_connections import ADD, POOLED, unknown
from tests.support.runner import due, process

SSE: dict[str, Any] = {"server": {"transport": "sse"}}


def streams(server: FaultyServer) -> int:
    return len(server.happened("stream"))


@pytest.mark.parametrize("transport", ["sse", "auto"])
async def test_a_server_that_speaks_only_the_older_protocol_is_used(
    redis_url: str, sse_server: FaultyServer, transport: str
) -> None:
    """It is found without being named. A pooled connection is one stream for the runs of a session."""
    agent = sse_server.agent(ADD, ADD, server={"transport": transport}, **POOLED)
    async with process(redis_url, agent) as p:
        results = [output_of(await p.run(run_id))["results"] for run_id in ("r1", "r2")]
    assert results == [[{"sum": 2}] * 2] * 2
    assert streams(sse_server) == 1


async def test_resources_and_prompts_come_over_the_stream(redis_url: str, sse_server: FaultyServer) -> None:
    agent = sse_server.agent(
        ("srv_read_resource", {"uri": "note://1"}),
        ("srv_get_prompt", {"name": "greet", "arguments": {"who": "Ada"}}),
        resources=True,
        prompts=True,
        **SSE,
    )
    async with process(redis_url, agent) as p:
        results = output_of(await p.run())["results"]
    assert results == ["content of note://1", [{"role": "user", "content": "Greet Ada."}]]


async def test_tools_that_change_do_not_change_the_run(redis_url: str, sse_server: FaultyServer) -> None:
    """The notice comes over the stream. The next run gets the new list."""
    agent = sse_server.agent(("change", {}), ("put", {}), **SSE, **POOLED)
    async with process(redis_url, agent) as p:
        output = output_of(await p.run("r1"))
        assert output["results"][1]["code"] == "tool.not_found"
        assert "brand_new" in output_of(await p.run("r2"))["tools"]


async def test_a_call_that_changes_nothing_is_made_again_after_the_stream_has_ended(
    redis_url: str, sse_server: FaultyServer
) -> None:
    """The server has made the call, and the answer is lost."""
    agent = sse_server.agent((ADD[0], {**ADD[1], "form": "end of stream"}), **SSE, **POOLED)
    async with process(redis_url, agent) as p:
        assert output_of(await p.run())["results"] == [{"sum": 2}]
    assert sse_server.called() == ["add", "add"]
    assert streams(sse_server) == 2


async def test_a_call_with_effects_waits_for_a_decision_after_the_stream_has_ended(
    redis_url: str, sse_server: FaultyServer
) -> None:
    agent = sse_server.agent(("take_note", {"text": "x", "form": "end of stream"}), **SSE, **POOLED)
    async with process(redis_url, agent) as p:
        await unknown(p)
        assert (await p.record()).state is RunState.PAUSED
    assert sse_server.called() == ["take.note"]


@pytest.mark.parametrize(("status", "attempts"), [(404, 1), (503, 2)])
async def test_a_message_that_the_server_refuses_is_sent_again(
    redis_url: str, sse_server: FaultyServer, status: int, attempts: int
) -> None:
    """The SDK itself would wait for the answer without an end."""
    agent = sse_server.agent((ADD[0], {**ADD[1], "status": status}), **SSE, **POOLED)
    async with process(redis_url, agent) as p:
        await p.submit()
        await p.execute()
        if attempts == 2:
            await due(p)
            await p.execute()
        record = await p.record()
    assert (output_of(record)["results"], record.attempt) == ([{"sum": 2}], attempts)
    assert sse_server.called() == ["add"]
