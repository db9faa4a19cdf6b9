"""Connections to MCP servers: who shares them, when they end, and what happens when one is lost."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.agents.sections import McpLimits
from openagents_worker.errors import ToolRateLimitError
from openagents_worker.models import RunState, StopReason
from openagents_worker.tools.mcp.connection import ConnectionFailed, McpEndpoint
from openagents_worker.tools.mcp.connections import Connections
from openagents_worker.tools.mcp.options import ServerOptions
from tests.mcp.conftest import FaultyServer, is_alive
from tests.mcp.test_calls import output_of
from tests.runtime import plugins
from tests.support.runner import Process, crash, due, process
from tests.support.waiting import await_for

ADD = ("add", {"a": 1, "b": 1})
NOTE = ("take_note", {"text": "x"})
POOLED: dict[str, Any] = {"connection_mode": "pooled"}


def starts(server: FaultyServer) -> int:
    return len(server.happened("start"))


def endpoint(server: FaultyServer, **more: Any) -> McpEndpoint:
    options = ServerOptions.model_validate({**server.over_stdio, **more})
    assert options.command is not None
    return McpEndpoint(options, (options.command, *options.args))


# --- sharing ---------------------------------------------------------------------------------------------


async def test_each_call_has_a_connection_of_its_own_by_default(redis_url: str, server: FaultyServer) -> None:
    async with process(redis_url, server.agent(ADD, ADD)) as p:
        await p.run()
    assert starts(server) == 3, "one to list the tools, and one for each call"


async def test_the_runs_of_a_session_share_a_pooled_connection(redis_url: str, server: FaultyServer) -> None:
    async with process(redis_url, server.agent(ADD, ADD, **POOLED)) as p:
        await p.run("r1", session_id="s1")
        await p.run("r2", session_id="s1")
        assert starts(server) == 1
        await p.run("r3", session_id="s2")
        assert starts(server) == 2


async def test_all_sessions_may_share_a_connection(redis_url: str, server: FaultyServer) -> None:
    async with process(redis_url, server.agent(ADD, pool_scope="worker", **POOLED)) as p:
        await p.run("r1", session_id="s1")
        await p.run("r2", session_id="s2")
    assert starts(server) == 1


@pytest.mark.defect("M01")
async def test_servers_with_one_command_and_different_options_share_nothing(
    redis_url: str, server: FaultyServer
) -> None:
    """The key of a connection is the whole definition of the server."""
    tools = [
        server.tool(prefix="a_", server={"env": {"TENANT": "a"}}, **POOLED),
        {**server.tool(prefix="b_", server={"env": {"TENANT": "b"}}, **POOLED), "id": "other"},
    ]
    async with process(redis_url, server.agent(("a_env", {}), ("b_env", {}), tools=tools)) as p:
        first, second = output_of(await p.run())["results"]
    assert '"TENANT": "a"' in first
    assert '"TENANT": "b"' in second


async def test_tenants_with_different_tokens_share_nothing(
    redis_url: str, http_server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registered function is asked for the token of the tenant of the run."""
    from openagents_worker.llm import api_keys

    monkeypatch.setattr(api_keys, "_resolver", lambda service, tenant: f"token-{service}-{tenant}")
    options: dict[str, Any] = {
        "server": {"bearer_token_service": "tickets"},
        "pool_scope": "worker",
        **POOLED,
    }
    async with process(redis_url, http_server.agent(ADD, **options)) as p:
        for number, tenant in enumerate(("acme", "emca", "acme")):
            await p.run(f"r{number}", tenant=tenant)
    begun = [post["token"] for post in http_server.happened("post") if post["method"] == "initialize"]
    assert begun == ["Bearer token-tickets-acme", "Bearer token-tickets-emca"]


async def test_the_list_of_tools_is_asked_for_once(redis_url: str, server: FaultyServer) -> None:
    """Further runs use it for the time of the cache; `probe_on_preflight` asks in each run."""
    async with process(redis_url, server.agent(ADD)) as p:
        await p.run("r1")
        await p.run("r2")
        lists = {entry["pid"] for entry in server.happened("list")}
        assert len(lists) == 1
        results = [e["payload"]["result"] for e in await p.events("r2") if e["name"] == "tool.preflight"]
        assert results == ["cached-ok"]
    async with process(redis_url, server.agent(ADD, probe_on_preflight=True), name="x") as p:
        await p.run("r3")
        await p.run("r4")
    assert len({entry["pid"] for entry in server.happened("list")}) == 3


async def test_an_eager_connection_is_opened_before_the_pattern_begins(
    redis_url: str, server: FaultyServer
) -> None:
    async with process(redis_url, server.agent(prelaunch="eager", **POOLED)) as p:
        await p.run("r1", session_id="s1")
        await p.run("r2", session_id="s2")
        assert starts(server) == 2, "the list of r2 is known, its connection is opened all the same"
        names = [
            name for name in await p.event_names("r2") if name in ("tool.mcp.connect", "context.created")
        ]
    assert names == ["tool.mcp.connect", "context.created"]


async def test_identical_calls_at_once_are_one_call(redis_url: str, server: FaultyServer) -> None:
    """Of a tool that may be repeated. Each of them is recorded."""
    same = [["slow", {}], ["slow", {}], ["slow", {"other": 1}]]
    agent = server.agent(same, overrides={"slow": {}}, **POOLED)  # type: ignore[arg-type]
    async with process(redis_url, agent) as p:
        await p.submit()
        running = asyncio.create_task(p.execute())
        await await_for(lambda: len(server.called()) == 2, "both calls are at the server")
        server.go()
        await running
        assert output_of(await p.record())["results"] == [["went", "went", "went"]]
        assert [entry["name"] for entry in await p.journal()].count("slow") == 3
    assert server.called() == ["slow", "slow"]


# --- the pool --------------------------------------------------------------------------------------------


@pytest.mark.defect("M02")
async def test_a_connection_in_use_is_never_evicted(server: FaultyServer) -> None:
    """If all have users, the next one is for one use only. A connection without users makes room."""
    pool = Connections(McpLimits(max_pooled_sessions=1))
    try:
        one, _ = await pool.acquire(endpoint(server), "one")
        two, _ = await pool.acquire(endpoint(server), "two")
        assert two.entry is None
        assert one.connection.is_open
        pool.release(two)
        pool.release(one)
        three, is_new = await pool.acquire(endpoint(server), "three")
        assert (three.entry is not None, is_new) == (True, True)
        await await_for(lambda: not one.connection.is_open, "the idle one is closed")
        assert await three.connection.request("ping") == {}
    finally:
        await pool.close()


async def test_an_idle_connection_is_closed_after_its_time(server: FaultyServer) -> None:
    pool = Connections(McpLimits(max_idle_seconds=0.05))
    try:
        lease, _ = await pool.acquire(endpoint(server), "one")
        assert lease.connection.is_open
        pool.release(lease)
        await await_for(lambda: not lease.connection.is_open, "it is closed")
        again, is_new = await pool.acquire(endpoint(server), "one")
        assert is_new
        pool.release(again)
    finally:
        await pool.close()


async def test_a_connection_is_opened_once_for_all_who_wait(server: FaultyServer) -> None:
    """One of them gives up meanwhile: the others get it."""
    pool = Connections(McpLimits())
    try:
        waiting = [asyncio.create_task(pool.acquire(endpoint(server), "one")) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        leases = [lease for lease, _ in await asyncio.gather(*waiting[1:])]
        assert leases[0].connection is leases[1].connection
        assert starts(server) == 1
    finally:
        await pool.close()


async def test_all_that_a_server_has_started_ends_with_its_connection(server: FaultyServer) -> None:
    """Also a process in a session of its own."""
    pool = Connections(McpLimits())
    lease, _ = await pool.acquire(endpoint(server), "one")
    result = await lease.connection.call("spawn", {}, "key")
    child = int(result["content"][0]["text"])
    assert is_alive(child)
    await pool.close()
    assert not is_alive(child)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["-c", "import sys; sys.exit('no database')"],
            r"has ended \(stderr: no database\); its environment has no PATH",
        ),
        (["-c", "import time; time.sleep(600)"], "was not ready within 0.5 s"),
        (["-c", "print('hello')"], "has ended"),
    ],
)
async def test_a_server_that_does_not_start_is_an_error_that_says_why(
    server: FaultyServer, arguments: list[str], says: str
) -> None:
    pool = Connections(McpLimits())
    try:
        with pytest.raises(ConnectionFailed, match=says):
            await pool.acquire(
                endpoint(server, args=arguments, init_timeout_ms=500 if "600" in arguments[1] else None),
                "one",
            )
    finally:
        await pool.close()


# --- lost connections ------------------------------------------------------------------------------------


async def test_a_run_opens_a_lost_connection_again(redis_url: str, server: FaultyServer) -> None:
    """The server has ended between two runs of a session. The next call was not sent: it may have effects."""
    async with process(redis_url, server.agent(("quit", {}), **POOLED)) as p:
        await p.run("r1")
        [started] = server.happened("start")
        await await_for(lambda: not is_alive(started["pid"]), "the server has ended")
        assert output_of(await p.run("r2"))["results"] == ["bye"]
    assert starts(server) == 2


async def test_a_call_that_changes_nothing_is_made_again_at_once(
    redis_url: str, server: FaultyServer
) -> None:
    """The server died in the middle of it."""
    async with process(redis_url, server.agent(("look_and_die", {}), **POOLED)) as p:
        assert output_of(await p.run())["results"] == ["survived"]
    assert server.called() == ["look_and_die"] * 2


@pytest.mark.defect("M03")
async def test_the_tools_are_asked_for_again_after_a_connection_was_lost(
    redis_url: str, server: FaultyServer
) -> None:
    """The server may have been replaced by one with other tools."""
    async with process(redis_url, server.agent(("look_and_die", {}), **POOLED)) as p:
        await p.run("r1")
        await p.run("r2")
        results = [e["payload"]["result"] for e in await p.events("r2") if e["name"] == "tool.preflight"]
    assert results == ["ok"]


async def unknown(p: Process) -> None:
    """Execute the run until its call has an unknown outcome and the next attempt has begun."""
    await p.submit()
    await p.execute()
    await due(p)
    await p.execute()


async def test_a_lost_call_with_effects_waits_for_a_decision(redis_url: str, server: FaultyServer) -> None:
    """The server died in the middle of it. It is not made again before somebody decides."""
    async with process(redis_url, server.agent(("die", {}), **POOLED)) as p:
        await unknown(p)
        record = await p.record()
        assert record.state is RunState.PAUSED
        assert "run.outcome_unknown" in await p.event_names()
    assert server.called() == ["die"]


async def test_a_lost_call_that_may_be_rerun_is_made_again_with_its_key(
    redis_url: str, server: FaultyServer
) -> None:
    async with process(redis_url, server.agent(("die", {}), on_interrupted="rerun", **POOLED)) as p:
        await unknown(p)
        assert output_of(await p.record())["results"] == ["survived"]
    keys = [entry["key"] for entry in server.happened("call")]
    assert len(keys) == 2
    assert keys[0] == keys[1]


async def test_a_worker_that_dies_in_a_call_does_not_repeat_it(redis_url: str, server: FaultyServer) -> None:
    """Another worker takes the run, and waits for a decision about the call."""
    agent = server.agent(("slow", {}), overrides={"slow": {"read_only": False}}, **POOLED)
    async with process(redis_url, agent) as one, process(redis_url, agent, name="v") as two:
        await one.submit()
        executing = asyncio.create_task(one.execute())
        await await_for(lambda: server.called() == ["slow"], "the call is at the server")
        await crash(one, "r1", executing)
        await two.execute()
        assert (await two.record()).state is RunState.PAUSED
    assert server.called() == ["slow"]


@pytest.mark.parametrize(
    ("status", "name", "code", "calls"),
    [
        (401, "take_note", "tool.auth", 0),
        (404, "take_note", None, 1),
        (422, "take_note", "tool.permanent", 0),
        (500, "add", None, 1),
    ],
)
async def test_the_status_of_a_server_decides(
    redis_url: str, http_server: FaultyServer, status: int, name: str, code: str | None, calls: int
) -> None:
    """A call that the server has refused is made again over a new session; for a 500, in the next attempt."""
    arguments = {"a": 1, "b": 1, "status": status}
    async with process(redis_url, http_server.agent((name, arguments), **POOLED)) as p:
        await p.submit()
        await p.execute()
        if status == 500:
            await due(p)
            await p.execute()
        [found] = output_of(await p.record())["results"]
    assert (found["code"] if code else None) == code
    assert len(http_server.called()) == calls


@pytest.mark.parametrize("method", ["initialize", "tools_list"])
async def test_a_server_that_is_not_there_yet_suspends_the_run(
    redis_url: str, http_server: FaultyServer, method: str
) -> None:
    """Also if it is its list of tools that cannot be had."""
    Path(f"{http_server.log}.{method}").write_text("503")
    async with process(redis_url, http_server.agent(ADD)) as p:
        await p.submit()
        assert (await p.execute()).reason == "tool.unavailable"
        await due(p)
        await p.execute()
        assert output_of(await p.record())["results"] == [{"sum": 2}]


async def test_a_limited_call_is_made_when_the_server_allows_it(
    redis_url: str, http_server: FaultyServer
) -> None:
    """It was not executed, so that also a call with effects is made later."""
    async with process(redis_url, http_server.agent(("take_note", {"status": 429}), **POOLED)) as p:
        await p.submit()
        assert (await p.execute()).stop_reason is None
        [retry] = [e for e in await p.events() if e["name"] == "run.retry_scheduled"]
        assert retry["payload"]["delay_ms"] >= 3000
        await due(p)
        await p.execute()
        assert output_of(await p.record())["results"] == ["take.note is done"]


async def test_an_error_of_the_server_in_a_call_with_effects_leaves_its_outcome_unknown(
    redis_url: str, http_server: FaultyServer
) -> None:
    agent = http_server.agent(("take_note", {"status": 500, "executes": True}), **POOLED)
    async with process(redis_url, agent) as p:
        await unknown(p)
        assert (await p.record()).state is RunState.PAUSED
    assert len(http_server.called()) == 1


# --- tools that change -----------------------------------------------------------------------------------


async def test_a_server_that_changes_its_tools_does_not_change_the_run(
    redis_url: str, server: FaultyServer
) -> None:
    """A tool that is gone is an error for the model. The next run gets the new list."""
    async with process(redis_url, server.agent(("change", {}), ("put", {}), **POOLED)) as p:
        output = output_of(await p.run("r1"))
        assert "put" in output["tools"]
        assert output["results"][1]["code"] == "tool.not_found"
        assert "no longer has the tool 'put'" in output["results"][1]["message"]

        tools = output_of(await p.run("r2"))["tools"]
        assert "put" not in tools
        assert "brand_new" in tools


async def test_what_a_server_says_about_a_tool_decides_how_it_is_called(
    redis_url: str, server: FaultyServer
) -> None:
    """A destructive one needs an approval, one that says nothing must not be repeated."""
    async with process(redis_url, server.agent(("wipe", {}))) as p:
        await p.submit()
        await p.execute()
        assert "tool.approval_needed" in await p.event_names()
        [listed] = [entry for entry in await p.journal() if entry["kind"] == "tools"]
    tools = {tool["name"]: tool for tool in listed["outcome"]["ok"]}
    assert [tools[name]["once"] for name in ("add", "put", "take_note")] == [False, False, True]
    assert tools["add"]["spec"]["concurrency_safe"] is True
    assert "concurrency_safe" not in tools["put"]["spec"]
    assert server.called() == []


async def test_hints_can_be_overridden_or_ignored(redis_url: str, server: FaultyServer) -> None:
    allowed = server.agent(("wipe", {}), overrides={"wipe": {"approval": "never"}})
    async with process(redis_url, allowed) as p:
        assert output_of(await p.run())["results"] == ["wipe is done"]
    async with process(redis_url, server.agent(trust_annotations=False), name="x") as p:
        await p.run("r2")
        [listed] = [entry for entry in await p.journal("r2") if entry["kind"] == "tools"]
    assert all(tool["once"] for tool in listed["outcome"]["ok"])


async def test_a_replayed_run_starts_no_server(redis_url: str, server: FaultyServer) -> None:
    """Until it makes a call that is not in its journal."""
    charge = {"id": "charge", "impl": "tests.runtime.plugins.Charge"}
    agent = server.agent(ADD, ("charge", {"who": "a"}), tools=[server.tool(), charge])
    async with process(redis_url, agent) as p:
        await p.submit()
        plugins.FAILURES["a"] = [ToolRateLimitError("busy", "charge", retry_after_ms=1)]
        await p.execute()
        begun = starts(server)
        await due(p)
        assert (await p.execute()).stop_reason is StopReason.COMPLETED
        assert starts(server) == begun
