"""Our agents as an MCP server: `openagents-worker mcp` with the client of the official SDK.

Redis, the worker and the command are real processes.
"""

from __future__ import annotations

import asyncio
import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from openagents_worker import AsyncClient
from openagents_worker.cli.mcp.agents import KEY, AgentTools, ServedAgent
from openagents_worker.cli.mcp.protocol import StdioServer, ToolRequest
from openagents_worker.models import RunState
from tests.mcp.conftest import FaultyServer, is_alive, serving_http
from tests.support.deployment import PATIENCE_S, Installation, installed
from tests.support.runner import agent, calls, scripted
from tests.support.waiting import await_for, wait_for

if TYPE_CHECKING:
    from mcp import ClientSession

COMMAND = [sys.executable, "-m", "openagents_worker.cli", "mcp"]


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Generator[Installation]:
    importlib.import_module("mcp.client.stdio")  # it takes seconds, so not on the event loop of a test
    folder = tmp_path_factory.mktemp("serving")
    server = FaultyServer(folder)
    charge = {"id": "charge", "impl": "tests.runtime.plugins.Charge", "approval": "always"}
    delegating = [
        {"id": f"ask_{asked}", "type": "delegate", "config": {"agent": asked}} for asked in ("payer", "boss")
    ]
    slow = server.agent(("slow", {}), overrides={"slow": {"read_only": False}}, connection_mode="pooled")
    agents = [
        agent("greeter.v2", name="the greeter", llm=scripted(*[{"text": "hello"}] * 20)),
        agent("sleeper", pattern={"impl": "tests.mcp.patterns.Sleeps"}),
        agent("payer", tools=[charge], llm=scripted(calls(("charge", {"who": "Ada"})), {"text": "paid"})),
        {**slow, "id": "caller"},
        *(
            agent(
                id_,
                tools=delegating,
                llm=scripted(calls(*[(tool, {"input_text": text}) for text in texts]), {"text": "done"}),
            )
            for id_, tool, texts in (
                ("boss", "ask_payer", ["pay"]),
                ("director", "ask_boss", ["first", "second"]),
            )
        ),
    ]
    (folder / "http").mkdir()
    with serving_http(folder / "http") as shared:
        options = {"connection_mode": "pooled", "pool_scope": "worker"}
        agents.append({**shared.agent(("slow", {}), **options), "id": "sharer"})
        with installed(folder, *agents) as installation:
            yield installation
    left = [entry["pid"] for entry in server.happened("start") if is_alive(entry["pid"])]
    assert left == [], "a server has outlived its worker"


def environment(installation: Installation) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "OPENAGENTS_REDIS_URL": installation.stack.redis_url,
        "OPENAGENTS_CONFIG": str(installation.folder / "agents.json"),
    }


@asynccontextmanager
async def session(installation: Installation, *arguments: str) -> AsyncIterator[ClientSession]:
    from mcp import ClientSession, StdioServerParameters  # imported late: it takes seconds
    from mcp.client.stdio import stdio_client

    parameters = StdioServerParameters(
        command=COMMAND[0],
        args=[*COMMAND[1:], *arguments],
        env=environment(installation),
    )
    async with stdio_client(parameters) as (read, write), ClientSession(read, write) as session:
        await session.initialize()
        yield session


def found(result: Any) -> dict[str, Any]:
    """What a tool has returned, as JSON. Version 1 of the SDK has other names."""
    dumped = result.model_dump(by_alias=True)
    assert not dumped["isError"], dumped
    structured: dict[str, Any] = dumped["structuredContent"]
    return structured


async def test_each_agent_is_a_tool(installation: Installation) -> None:
    """Its call waits for the result of a run, and reports the events of the run. A session goes on."""
    told: list[str | None] = []

    async def report(progress: float, total: float | None, message: str | None) -> None:
        told.append(message)

    async with session(installation) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert {"greeter_v2", "sleeper", "payer", "run_result", "approve_call"} <= tools.keys()
        assert "the greeter" in (tools["greeter_v2"].description or "")
        result = await client.call_tool("greeter_v2", {"input": "hi"}, progress_callback=report)
        first = found(result)
        assert (first["output"], first["stop_reason"]) == ("hello", "completed")
        assert result.content[0].model_dump()["text"] == "hello"
        assert any(message and message.startswith("llm.called") for message in told)

        again = found(await client.call_tool("greeter_v2", {"input": "hi", "session": first["session"]}))
        assert again["session"] == first["session"]
        assert again["run_id"] != first["run_id"]
        events = found(await client.call_tool("run_events", {"run_id": first["run_id"], "after": 3}))[
            "events"
        ]
        assert events[0]["seq"] == 4


async def test_only_the_named_agents_are_served(installation: Installation) -> None:
    async with session(installation, "--agent", "sleeper") as client:
        names = {tool.name for tool in (await client.list_tools()).tools}
    assert "sleeper" in names
    assert "payer" not in names


async def test_a_call_that_needs_an_approval_is_approved_by_the_client(installation: Installation) -> None:
    async with session(installation) as client:
        waiting = found(await client.call_tool("payer", {"input": "pay"}))
        [approval] = waiting["approvals"]
        assert (approval["tool"], approval["arguments"]) == ("charge", {"who": "Ada"})
        ids = {"run_id": waiting["run_id"], "call_id": approval["call_id"]}
        assert found(await client.call_tool("approve_call", ids))["action"] == "approve"
        ended = found(await client.call_tool("run_result", {"run_id": waiting["run_id"], "wait": True}))
        assert ended["output"] == "paid"


async def test_a_call_of_a_child_is_approved_by_the_client(installation: Installation) -> None:
    """Two runs wait for children, which wait for children that ask. Their events do not say so. A decision
    names the run that asks; a run above it is enough if only one of its children has such a call."""
    async with session(installation) as client:
        waiting = found(await client.call_tool("director", {"input": "pay twice"}))
        ids = {"run_id": waiting["run_id"], "wait": True}

        async def both_ask() -> bool:
            nonlocal waiting
            waiting = found(await client.call_tool("run_result", {"run_id": ids["run_id"]}))
            parked = [each for each in waiting.get("waits_for", ()) if each["kind"] == "approval"]
            return len(waiting.get("approvals", ())) == len(parked) == 2

        await await_for(both_ask, "both children ask, and are parked")
        assert waiting["state"] == "waiting_child"
        assert {(each["tool"], each["arguments"]["who"]) for each in waiting["approvals"]} == {
            ("charge", "Ada")
        }
        first, second = waiting["approvals"]
        assert first["run_id"] != second["run_id"]
        waits = [each.get("run_id") for each in waiting["waits_for"] if each["kind"] == "approval"]
        assert sorted(waits) == sorted([first["run_id"], second["run_id"]])

        unclear = {"run_id": waiting["run_id"], "call_id": first["call_id"]}
        refused = (await client.call_tool("approve_call", unclear)).model_dump(by_alias=True)
        assert refused["structuredContent"] == {"code": "request.invalid"}
        decision = {"run_id": first["run_id"], "call_id": first["call_id"]}
        assert found(await client.call_tool("approve_call", decision))["action"] == "approve"
        left = found(await client.call_tool("run_result", ids))["approvals"]
        assert [each["run_id"] for each in left] == [second["run_id"]]
        decision = {"run_id": waiting["run_id"], "call_id": second["call_id"]}
        assert found(await client.call_tool("approve_call", decision))["action"] == "approve"
        assert found(await client.call_tool("run_result", ids))["output"] == "done"


@pytest.mark.long
async def test_a_cancelled_call_cancels_its_run(installation: Installation) -> None:
    """A call that is not waited for goes on until it is cancelled by its id."""
    async with session(installation) as client:
        begun = found(await client.call_tool("sleeper", {"input": "sleep", "wait": False}))
        cancelled = found(await client.call_tool("cancel_run", {"run_id": begun["run_id"]}))
        assert cancelled["answer"] in ("CANCELLED", "REQUESTED", "cancelled", "requested")

    process = await asyncio.create_subprocess_exec(
        *COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(installation)
    )
    assert process.stdin is not None

    def send(**message: Any) -> None:
        assert process.stdin is not None
        process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")

    arguments = {"input": "sleep", "session": "nap"}
    send(id=7, method="tools/call", params={"name": "sleeper", "arguments": arguments})

    def state() -> Any:
        runs = installation.client.runs(session_id="nap").items
        return runs[0].state if runs else None

    await await_for(lambda: asyncio.to_thread(lambda: state() is RunState.WAITING), "the run sleeps")
    send(method="notifications/cancelled", params={"requestId": 7})
    await await_for(lambda: asyncio.to_thread(lambda: state() is RunState.CANCELLED), "it is cancelled")
    process.stdin.close()
    assert await process.wait() == 0


async def test_a_call_that_a_worker_repeats_is_one_run(installation: Installation) -> None:
    """A worker sends the same idempotency key in each attempt of a call."""

    async def report(_: str) -> None: ...

    asked = ToolRequest("greeter_v2", {"input": "hi"}, {KEY: "run:uid:call"}, report)
    async with AsyncClient(installation.stack.redis_url) as client:
        tools = AgentTools(client, [ServedAgent("greeter.v2", "Greets.")], by="test")
        first, second = [(await tools.call(asked))["structuredContent"] for _ in range(2)]
    assert first["output"] == "hello"
    assert first == second


async def test_a_session_that_is_not_an_id_is_an_error_of_the_call(installation: Installation) -> None:
    """A model names it. The error says what is wrong, so that the model can try again."""

    async def report(_: str) -> None: ...

    asked = ToolRequest("greeter_v2", {"input": "hi", "session": "my session"}, {}, report)
    async with AsyncClient(installation.stack.redis_url) as client:
        refused = await AgentTools(client, [ServedAgent("greeter.v2", "Greets.")], by="test").call(asked)
    assert (refused["isError"], refused["structuredContent"]) == (True, {"code": "request.invalid"})
    assert "session_id" in refused["content"][0]["text"]
    assert "whitespace" in refused["content"][0]["text"]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"{not json", -32700),
        (b'{"jsonrpc":"2.0","id":1,"method":"no/such"}', -32601),
        (b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"nobody"}}', -32602),
        (b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":3}}', -32602),
        (b"[1]", -32600),
    ],
)
async def test_a_message_that_is_not_valid_is_answered_with_an_error(line: bytes, code: int) -> None:
    """And ends nothing."""
    out = io.BytesIO()
    ping = b'{"jsonrpc":"2.0","id":2,"method":"ping"}'
    service = AgentTools(None, [], by="test")  # type: ignore[arg-type]  # no run is submitted
    server = StdioServer(service, "1", reader=io.BytesIO(line + b"\n"), writer=out)
    await server._take(line)
    await server._take(ping)
    await asyncio.gather(*server._tasks)
    first, second = sorted(map(json.loads, out.getvalue().splitlines()), key=lambda reply: reply["id"] == 2)
    assert first["error"]["code"] == code
    assert second["result"] == {}


# --- a worker with a server ------------------------------------------------------------------------------


@pytest.mark.long
def test_a_cancelled_run_leaves_the_shared_connection_to_others(installation: Installation) -> None:
    """The tasks of the run are cancelled, but not those of the connection."""
    server = FaultyServer(installation.folder / "http")
    handles = [installation.submit("sharer") for _ in range(2)]
    wait_for(lambda: len(server.called()) == 2, "both calls are at the server")
    handles[0].cancel()
    wait_for(lambda: handles[0].record().state is RunState.CANCELLED, "the first run is cancelled")
    server.go()

    assert handles[1].wait(PATIENCE_S).final_output["results"] == ["went"]
    assert len(server.called()) == 2, "no call was repeated"
    begun = [post for post in server.happened("post") if post["method"] == "initialize"]
    assert len(begun) == 1


# --- a worker that is killed -----------------------------------------------------------------------------


@pytest.mark.long
def test_a_killed_worker_leaves_no_server_and_repeats_no_call(installation: Installation) -> None:
    """It is killed in the middle of a pooled call with effects. Another worker asks what to do."""
    server = FaultyServer(installation.folder)
    handle = installation.submit("caller")
    wait_for(lambda: server.called() == ["slow"], "the call is at the server")
    [started] = server.happened("start")
    installation.worker.kill()
    wait_for(lambda: not is_alive(started["pid"]), "the server has ended with its worker")
    installation.stack.start_worker("second")
    wait_for(lambda: handle.record().state is RunState.PAUSED, "the run waits for a decision")
    assert server.called() == ["slow"]

    server.go()
    [waiting] = handle.record().waiting
    handle.resolve(waiting.call_id, "rerun", by="test")
    result = handle.wait(PATIENCE_S)
    assert result.final_output["results"] == ["went"]
    assert len({entry["key"] for entry in server.happened("call")}) == 1
