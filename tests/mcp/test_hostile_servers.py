"""Servers that send too much, or what is not a message: one of them costs its own calls, and nothing else."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from openagents_worker.models import RunState
from openagents_worker.tools.mcp.http import Unfinished
from openagents_worker.tools.mcp.streams import mend
from openagents_worker.tools.mcp.toolset import McpToolset
from tests.mcp.conftest import FaultyServer
from tests.mcp.test_calls import output_of, results
from tests.mcp.test_connections import NOTE, POOLED, unknown
from tests.support.runner import process
from tests.support.waiting import await_for

pytestmark = pytest.mark.long

ADD = {"a": 1, "b": 1}


def add(form: str) -> tuple[str, dict[str, Any]]:
    """A call whose answer comes in this form."""
    return "add", {**ADD, "form": form}


# --- lists of tools --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "kept"),
    [
        ({"FURTHER": "10000", "PAGE": "5000"}, 1_000),
        ({"FURTHER": "8", "SIZE": "1000000", "PAGE": "30"}, 26),
    ],
    ids=["ten thousand tools", "descriptions of a megabyte"],
)
async def test_a_list_that_is_too_long_is_cut(
    redis_url: str, server: FaultyServer, caplog: pytest.LogCaptureFixture, env: dict[str, str], kept: int
) -> None:
    """The log says so, and the tools at its beginning can be used."""
    async with process(redis_url, server.agent(("add", ADD), server={"env": env}, tools=None)) as p:
        output = output_of(await p.run())

    assert output["results"] == [{"sum": 2}]
    assert len(output["tools"]) == kept - 1, "one has a schema that is not accepted"
    assert any(f"kept={kept}" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("as_one_tool", [False, True])
async def test_a_list_without_an_end_and_with_odd_tools_is_used_as_far_as_possible(
    redis_url: str, server: FaultyServer, as_one_tool: bool
) -> None:
    """A page that comes again ends it. Of a name that is listed twice, the first tool counts.

    Version 2 of the SDK refuses the whole list for one tool that is not valid in the protocol.
    """
    options: dict[str, Any] = {"server": {"env": {"ENDLESS": "1"}}, "as_one_tool": as_one_tool}
    call = ("srv", {"tool": "add", "arguments": ADD}) if as_one_tool else ("add", ADD)
    async with process(redis_url, server.agent(call, **options)) as p:
        output = output_of(await p.run())

    assert len(server.happened("list")) == 2
    if as_one_tool:
        assert output["results"] == [{"content": ["2"], "isError": False}]
        assert output["tools"]["srv"]["parameters"]["properties"]["tool"]["enum"] == [
            *("add", "nan", "deep", "a_text", "any", "no_type", "no_schema")
        ]
    else:
        assert output["results"] == [{"sum": 2}]
        assert list(output["tools"]) == ["add", "any", "no_schema", "no_type"]
        assert output["tools"]["any"]["parameters"]["properties"] == {"x": True}
        assert output["tools"]["no_type"]["parameters"]["type"] == "object"
        assert output["tools"]["add"]["parameters"]["title"] == "the first one"


async def test_a_name_of_the_agents_file_is_not_taken_by_another_tool(
    redis_url: str, server: FaultyServer
) -> None:
    """The server may add a tool with this name at any time."""
    agent = server.agent(("add", {"text": "x"}), overrides={"take.note": {"name": "add"}})
    async with process(redis_url, agent) as p:
        output = output_of(await p.run())
    assert output["results"] == ["take.note is done"]
    assert len([name for name in output["tools"] if name.startswith("add_")]) == 1


# --- lines that are not messages -------------------------------------------------------------------------


async def test_a_server_that_prints_to_stdout_fills_no_log_and_blocks_nothing(
    redis_url: str, server: FaultyServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The loop of the worker runs other code between the lines."""
    agent = server.agent(("flood", {"lines": 50_000}))
    assert await results(redis_url, agent) == ["done"]

    lines = [record.getMessage() for record in caplog.records if "mcp.invalid_message" in record.getMessage()]
    assert len(lines) == 201
    assert "mcp.invalid_messages_dropped" in lines[-1]


async def test_a_server_that_sends_only_other_lines_loses_its_connection(
    redis_url: str, server: FaultyServer
) -> None:
    [flood, then] = await results(redis_url, server.agent(("flood", {"lines": 150_000}), ("add", ADD)))
    assert flood["code"] == "tool.permanent"
    assert "lines that are not messages" in flood["message"]
    assert then == {"sum": 2}


# --- answers over HTTP -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "says"), [("gzip", "the compression 'gzip'"), ("empty lines", "more than 8,388,608 bytes")]
)
async def test_an_answer_over_http_is_bounded_whatever_its_form(
    redis_url: str, http_server: FaultyServer, form: str, says: str
) -> None:
    """Compression was not asked for. An empty line ends an event of a stream, but not another body."""
    [refused, then] = await results(redis_url, http_server.agent(add(form), ("add", ADD), **POOLED))
    assert refused["code"] == "tool.permanent"
    assert says in refused["message"]
    assert then == {"sum": 2}
    assert {post["headers"]["accept-encoding"] for post in http_server.happened("post")} == {"identity"}


async def test_a_stream_of_small_events_has_any_length(redis_url: str, http_server: FaultyServer) -> None:
    """Also if it arrives in pieces of which none contains a whole empty line."""
    agent = http_server.agent(add("event"), add("events in pieces"))
    assert await results(redis_url, agent) == [{"sum": 2}, {"sum": 2}]


def test_an_event_is_passed_on_as_soon_as_it_is_complete() -> None:
    """With every kind of line ends, in any two pieces. Nothing of it is held back or lost."""
    for line_end in (b"\n", b"\r\n", b"\r"):
        event, begun = b"data: 1" + line_end + line_end, b"data: 22" + line_end
        for at in range(1, len(event + begun)):
            stream = Unfinished(is_stream=True)
            passed = stream.add((event + begun)[:at]) + stream.add((event + begun)[at:])
            assert (passed, stream.rest()) == (event, begun), (line_end, at)
        for at in range(1, len(event)):
            stream = Unfinished(is_stream=True)
            assert stream.add(event[:at]) + stream.add(event[at:]) == event, (line_end, at)
    body = Unfinished(is_stream=False)
    assert (body.add(b"{\n\n"), body.add(b"}"), body.rest()) == (b"", b"", b"{\n\n}")


@pytest.mark.parametrize("kind", ["stdio", "json", "event"])
async def test_half_of_a_surrogate_pair_is_replaced(
    redis_url: str, server: FaultyServer, http_server: FaultyServer, kind: str
) -> None:
    """Servers that cut texts send it. The SDK drops the message, so the call would wait until its timeout."""
    used = server if kind == "stdio" else http_server
    arguments = {"form": "event"} if kind == "event" else {}
    assert await results(redis_url, used.agent(("half", arguments))) == ["cut in an emoji: \ufffd"]


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (rb'"\ud83d"', rb'"\ufffd"'),
        (rb'"\uDFFF\ud83d\ude00\UD83D"', rb'"\ufffd\ud83d\ude00\UD83D"'),
        (rb'"\\ud83d \" \\\ud83d"', rb'"\\ud83d \" \\\ufffd"'),
        (b'"\xff \xed\xa0\x80 \xe2\x82\xac"', '"\ufffd \ufffd\ufffd\ufffd \u20ac"'.encode()),
        (b"[" + rb'"\ud83d",' * 100_000 + b"1]", b"[" + rb'"\ufffd",' * 100_000 + b"1]"),
    ],
    ids=["escaped", "beside a pair", "behind backslashes", "bytes that are not UTF-8", "many"],
)
async def test_only_what_is_not_text_is_replaced(sent: bytes, expected: bytes) -> None:
    assert await mend(sent) == expected


async def test_numbers_that_are_not_json_are_replaced(redis_url: str, server: FaultyServer) -> None:
    """As in every result of a tool."""
    [numbers] = await results(redis_url, server.agent(("numbers", {})))
    assert numbers["nan"] is None
    assert numbers["infinite"] == [None]
    assert numbers["large"] == str(10**30)
    assert numbers["many"].startswith("1000")


async def test_an_answer_that_is_too_large_leaves_the_connection_to_others(
    redis_url: str, http_server: FaultyServer
) -> None:
    """Two runs share it: one gets an error, and the call of the other one is not lost."""
    agents = [
        {**http_server.agent(("slow", {}), pool_scope="worker", **POOLED), "id": "patient"},
        {**http_server.agent(add("gzip"), pool_scope="worker", **POOLED), "id": "greedy"},
    ]
    async with process(redis_url, *agents) as p:
        await p.submit("r1", agent_id="patient", session_id="s1")
        waiting = asyncio.create_task(p.execute("r1"))
        await await_for(lambda: http_server.called() == ["slow"], "the first call is at the server")
        output = output_of(await p.run("r2", agent_id="greedy", session_id="s2"))
        assert output["results"][0]["code"] == "tool.permanent"
        http_server.go()
        await waiting
        assert output_of(await p.record("r1"))["results"] == ["went"]
    assert http_server.called().count("slow") == 1


async def test_a_stream_that_ends_without_the_answer_leaves_the_outcome_unknown(
    redis_url: str, http_server: FaultyServer
) -> None:
    """The server has got the call. It was restarted, or a proxy gave up."""
    agent = http_server.agent((NOTE[0], {**NOTE[1], "form": "no event"}), timeout_ms=2_000, **POOLED)
    async with process(redis_url, agent) as p:
        await unknown(p)
        assert (await p.record()).state is RunState.PAUSED
    assert len(http_server.called()) == 1


class Context:
    """What a toolset uses of the context of a call."""

    session_id = "s1"
    run_request = None

    def __init__(self, key: str) -> None:
        self.idempotency_key = key

    async def emit(self, name: str, **payload: Any) -> None:
        """Nobody is interested."""


async def test_a_call_does_not_join_one_that_is_being_given_up(server: FaultyServer) -> None:
    """Identical calls are one call to the server. But a cancelled one has no result for another call."""
    toolset = McpToolset(server.tool()["config"])
    toolset.recorded(await toolset.list(Context("k0")))
    first = asyncio.create_task(toolset.call("slow", {}, Context("k1")))
    await await_for(lambda: server.called() == ["slow"], "the first call is at the server")

    first.cancel()
    await asyncio.sleep(0)
    second = asyncio.create_task(toolset.call("slow", {}, Context("k2")))
    server.go()

    assert await second == "went"
    assert (await asyncio.gather(first, return_exceptions=True))[0].__class__ is asyncio.CancelledError
    await toolset.close()
    await toolset._connections.close()
