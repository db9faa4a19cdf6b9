"""Servers that stop answering, forget a session, or change their tools while nobody calls them."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.agents.sections import McpLimits
from openagents_worker.tools.mcp import connection
from openagents_worker.tools.mcp.connections import Connections, McpServers
from openagents_worker.tools.mcp.toolset import McpToolset
from tests.mcp.conftest import FaultyServer, is_alive
from tests.mcp.test_calls import output_of
from tests.mcp.test_connections import ADD, NOTE, POOLED, endpoint, starts
from tests.mcp.test_hostile_servers import Context
from tests.support.runner import process
from tests.support.waiting import await_for

SUM = [{"sum": 2}]


def begun(server: FaultyServer) -> int:
    """The sessions that a server over HTTP has begun."""
    return sum(post["method"] == "initialize" for post in server.happened("post"))


def toolset_of(faulty: FaultyServer, /, **config: Any) -> McpToolset:
    return McpToolset(faulty.tool(**config)["config"])


def known(toolset: McpToolset) -> Any:
    """The remembered list of the tools of its server; None if the next run asks for it."""
    return toolset._connections.known_tools(toolset.options.server.identity())


# --- servers that do not answer --------------------------------------------------------------------------


async def test_a_pooled_server_that_hangs_is_replaced(
    redis_url: str, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its call has timed out, and it does not answer a ping either. Nothing is left of it."""
    monkeypatch.setattr(connection, "PING_TIMEOUT_S", 0.1)
    hurried = {**server.agent(ADD, overrides={"add": {"timeout_ms": 200}}, **POOLED), "id": "hurried"}
    async with process(redis_url, server.agent(ADD, **POOLED), hurried) as p:
        await p.run("r1")
        [started] = server.happened("start")
        os.kill(started["pid"], signal.SIGSTOP)
        [found] = output_of(await p.run("r2", agent_id="hurried", durable=False))["results"]
        assert found["code"] == "tool.timeout"

        assert output_of(await p.run("r3"))["results"] == SUM
        assert starts(server) == 2
        await await_for(lambda: not is_alive(started["pid"]), "the server that hung is killed")


async def test_a_server_that_answers_keeps_its_connection_after_a_call_has_timed_out(
    redis_url: str, server: FaultyServer
) -> None:
    agent = server.agent(("hang", {}), ADD, overrides={"hang": {"timeout_ms": 200}}, **POOLED)
    async with process(redis_url, agent) as p:
        [hung, added] = output_of(await p.run(durable=False))["results"]
        assert (hung["code"], [added]) == ("tool.timeout", SUM)
        assert output_of(await p.run("r2", durable=False))["results"][1:] == SUM
    assert starts(server) == 1


async def test_a_server_is_not_replaced_while_it_makes_a_call(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may make one call after the other, so that a ping would wait, too."""
    monkeypatch.setattr(connection, "PING_TIMEOUT_S", 0.1)
    pool = Connections(McpLimits())
    try:
        lease, _ = await pool.acquire(endpoint(server), "one")
        slow = asyncio.create_task(lease.connection.call("slow", {}, "k1"))
        await await_for(lambda: server.called() == ["slow"], "the call is at the server")
        [started] = server.happened("start")
        os.kill(started["pid"], signal.SIGSTOP)
        given_up = asyncio.create_task(lease.connection.call("add", {}, "k2"))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.wait({given_up})

        again, is_new = await pool.acquire(endpoint(server), "one")
        assert (again.connection is lease.connection, is_new) == (True, False)
        os.kill(started["pid"], signal.SIGCONT)
        server.go()
        assert (await slow)["content"][0]["text"] == "went"
        assert await lease.connection.answers()
    finally:
        await pool.close()


async def test_a_connection_that_is_replaced_is_closed_by_its_last_user(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else gets it. It ends with the pool at the latest."""
    monkeypatch.setattr(connection, "PING_TIMEOUT_S", 0.1)
    pool = Connections(McpLimits())
    try:
        first, _ = await pool.acquire(endpoint(server), "one")
        [started] = server.happened("start")
        os.kill(started["pid"], signal.SIGSTOP)
        given_up = asyncio.create_task(first.connection.call("add", {}, "k"))
        await await_for(lambda: first.connection._waiting, "the call waits")
        given_up.cancel()
        await asyncio.wait({given_up})

        both = await asyncio.gather(*(pool.acquire(endpoint(server), "one") for _ in range(2)))
        assert {lease.connection for lease, _ in both} & {first.connection} == set()
        assert both[0][0].connection is both[1][0].connection
        assert starts(server) == 2
        assert first.connection.is_open
        pool.release(first)
        await await_for(lambda: not is_alive(started["pid"]), "the one that hung is closed")
    finally:
        await pool.close()


async def test_a_server_that_has_forgotten_the_session_gets_a_new_one(
    redis_url: str, http_server: FaultyServer
) -> None:
    """It was restarted, and rejects all requests of the session with 400. It has not executed the call."""
    async with process(redis_url, http_server.agent(NOTE, **POOLED)) as p:
        await p.run("r1")
        for method in ("tools_call", "ping"):
            Path(f"{http_server.log}.{method}").write_text("400")
        assert output_of(await p.run("r2"))["results"] == ["take.note is done"]
    assert begun(http_server) == 2
    assert len(http_server.called()) == 2


async def test_a_call_that_is_rejected_itself_is_not_made_again(
    redis_url: str, http_server: FaultyServer
) -> None:
    """The server knows the session: it answers a ping."""
    async with process(redis_url, http_server.agent(NOTE, ADD, **POOLED)) as p:
        await p.run("r1")
        Path(f"{http_server.log}.tools_call").write_text("400")
        rejected, added = output_of(await p.run("r2"))["results"]
    assert (rejected["code"], [added]) == ("tool.permanent", SUM)
    assert len(http_server.called()) == 3


# --- tools that change -----------------------------------------------------------------------------------


@pytest.mark.defect("M03")
async def test_tools_that_change_between_two_calls_are_asked_for_again(server: FaultyServer) -> None:
    """The server says so while nobody calls it. The next run, of any session, gets the new list."""
    toolset = toolset_of(server, **POOLED)
    toolset.recorded(await toolset.list(Context("k0")))
    await toolset.call("change", {"later": True}, Context("k1"))
    assert known(toolset) is not None

    server.go()
    await await_for(lambda: known(toolset) is None, "the server has said that its tools have changed")
    assert "brand_new" in [tool.name for tool in await toolset.list(Context("k2"))]
    await toolset.close()
    await toolset._connections.close()


@pytest.mark.defect("M03")
async def test_a_list_that_changes_while_it_is_read_is_not_remembered(server: FaultyServer) -> None:
    toolset = toolset_of(server, server={"env": {"CHANGES": "1"}}, **POOLED)
    await toolset.list(Context("k0"))
    await await_for(lambda: known(toolset) is None, "the list is not remembered")
    await toolset.close()
    await toolset._connections.close()


# --- connections that nobody uses ------------------------------------------------------------------------


class Stopping(Context):
    """The context of a call whose attempt stops while its connection is being opened."""

    async def emit(self, name: str, **payload: Any) -> None:
        if name == "tool.mcp.connect":
            raise asyncio.CancelledError


@pytest.mark.parametrize("mode", ["per_call", "pooled"])
async def test_a_connection_for_an_attempt_that_stops_is_closed(server: FaultyServer, mode: str) -> None:
    listing, toolset = (toolset_of(server, connection_mode=mode) for _ in range(2))
    toolset.attach("srv", McpServers(McpLimits(max_idle_seconds=0.01)), None)
    toolset.recorded(await listing.list(Context("k0")))
    await listing.close()
    await listing._connections.close()
    with pytest.raises(asyncio.CancelledError):
        await toolset.call("add", {"a": 1, "b": 1}, Stopping("k1"))

    await toolset.close()
    assert starts(server) == 2
    pids = [entry["pid"] for entry in server.happened("start")]
    await await_for(lambda: not any(map(is_alive, pids)), "no server is left")
    await toolset._connections.close()


async def test_an_eager_connection_without_a_place_in_the_pool_is_closed(server: FaultyServer) -> None:
    """All places are in use by others."""
    servers = McpServers(McpLimits(max_pooled_sessions=1))
    lease, _ = await servers.here().acquire(endpoint(server), "other")
    toolset = toolset_of(server, prelaunch="eager", **POOLED)
    toolset.attach("srv", servers, None)

    await toolset.warm_up(Context("k"))
    await toolset.close()

    used, unused = (entry["pid"] for entry in server.happened("start"))
    await await_for(lambda: not is_alive(unused), "the second one is closed")
    assert is_alive(used)
    servers.here().release(lease)
    await servers.close()
