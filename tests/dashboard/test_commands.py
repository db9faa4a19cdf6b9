"""How many commands a page sends to Redis. A proxy counts them; runs, workers and approvals are in Redis."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from openagents_worker.dashboard import approvals_page, sessions_page
from openagents_worker.dashboard.page import ActionHandler, PageHandler
from openagents_worker.dashboard.routes import PAGES
from openagents_worker.dashboard.run_stream import RunStream
from openagents_worker.store.client import AsyncStore, Cell
from openagents_worker.store.fleet import WorkerCard
from tests.dashboard.reading import words_of
from tests.dashboard.server import Server, serving
from tests.support.command_proxy import Proxy
from tests.support.script_calls import call

MOST_COMMANDS = 60
"""A page is read again every few seconds by everybody who has it open, so it must cost Redis little."""

WAITING, ASKING, FAILED, WORKERS, QUEUES, LIMITS, STEPS = 300, 60, 30, 40, 50, 70, 2_000
SCANNED = 10_000  # runs that a page examines at most; they match all filters but the one by state
BATCH = 100

PATHS = (
    "/overview",
    "/runs",
    "/runs?state=failed",
    "/runs?code=tool.*",
    "/runs?agent=a&tenant=acme&state=queued",
    "/runs?id=waits",
    "/runs?agent=b&tenant=t&label=x%3Dy&session=s&state=failed",
    "/approvals",
    "/approvals?agent=a&tenant=acme",
    "/approvals?tenant=nobody",
    "/sessions",
    "/session/waits-1",
    "/fleet",
    "/run/waits-1",
    "/run/asks-1",
    "/run/long",
)
"""Each page, and what its filters make of it."""


@dataclass
class World:
    """A busy fleet. `server` reaches its Redis through `proxy`."""

    server: Server
    proxy: Proxy
    store: AsyncStore

    async def commands_of(self, path: str) -> int:
        """How many commands the page sends when it is read again: its scripts are loaded by then."""
        for _ in range(2):
            self.proxy.count()
            await self.server.text(path)
        return len(self.proxy.seen) + sum(self.proxy.other_commands.values())


@pytest.fixture
async def world(redis_url: str) -> AsyncIterator[World]:
    store = AsyncStore(Cell(redis_url))
    await _fill(store)
    async with Proxy(redis_url) as proxy:
        url = await asyncio.to_thread(proxy.url_of, "flower")
        async with serving(url) as server:
            yield World(server, proxy, store)
    await store.redis.flushall()  # runs that have not ended have no time to live
    await store.close()


async def _fill(store: AsyncStore) -> None:
    """Workers, a queue with a backlog among many, runs in sessions of their own, and limits."""
    agents = ["a", _announced("agents")]
    for at in range(QUEUES):
        agents += [f"agent-{at}", _announced(f"queue-{at}")]
    for number in range(WORKERS):
        worker = f"w{number}@box:a1"
        card = WorkerCard("box", number + 1, ("agents",), {"a": "h"}, 10, "9.9").to_json()
        await store.run(call("register", incarnation=worker, info=card, agents=agents))
    for number in range(WAITING):
        await _submit(store, f"waits-{number}")
    for number in range(ASKING):
        fence = await _claimed(store, f"asks-{number}", lists=["tenant=acme"])
        await store.run(call("ask", run_id=f"asks-{number}", fence=fence, value=_asked(), stored=0))
    for number in range(FAILED):
        fence = await _claimed(store, f"fails-{number}")
        ending = {"end_state": "failed", "event": "run.failed", "stop_reason": "failed", "code": "tool.error"}
        result = _failure(f"fails-{number}")
        await store.run(call("finish", run_id=f"fails-{number}", fence=fence, result=result, **ending))
    await _execute_long_run(store)
    for index in ("agent=b", "tenant=t", "label=x=y", "session=s"):
        await store.redis.zadd(store.keys("index", index), {f"none-{at}": at for at in range(SCANNED)})
    await store.redis.zadd(store.keys("limits"), {f"limit-{at}": at for at in range(LIMITS)})


def _announced(queue: str) -> str:
    return json.dumps({"queue": queue, "def_hash": "h"})


def _asked() -> str:
    return json.dumps(
        {"tool_id": "charge", "arguments": {"who": "ann"}, "requested_ms": 1, "default_action": "deny"}
    )


def _failure(run_id: str) -> str:
    error = {"code": "tool.error", "message": "no such order"}
    return json.dumps({"run_id": run_id, "stop_reason": "failed", "error_details": error})


async def _submit(store: AsyncStore, run_id: str, **more: Any) -> None:
    request = {"agent_id": "a", "session_id": run_id, "run_id": run_id, "input_text": "hi", "tenant": "acme"}
    ids = {"run_id": run_id, "session_id": run_id, "default_queue": "agents"}
    await store.run(call("submit", **ids, request=json.dumps(request), **more))


async def _claimed(store: AsyncStore, run_id: str, **more: Any) -> str:
    await _submit(store, run_id, **more)
    claimed = await store.run(call("claim", run_id=run_id, incarnation="w0@box:a1"))
    fence: str = claimed.fence
    return fence


async def _execute_long_run(store: AsyncStore) -> None:
    fence = await _claimed(store, "long")
    for begin in range(0, STEPS, BATCH):
        calls = [f"look:ab:{number}" for number in range(begin, begin + BATCH)]
        records = [
            json.dumps({"call": each, "v": 1, "kind": "tool", "name": "look", "outcome": {"ok": {"n": 1}}})
            for each in calls
        ]
        events = [
            text
            for each in calls
            for name in ("tool.called", "tool.succeeded")
            for text in (name, json.dumps({"call_id": each, "tool_id": "look"}))
        ]
        committed = {"position": begin, "records": records, "events": events, "batch_no": begin + 1}
        await store.run(call("commit", run_id="long", fence=fence, **committed))


async def test_every_page_needs_few_commands(world: World) -> None:
    """Whatever there is to show: a pipeline counts as its commands, a script as one."""
    counts = {path: await world.commands_of(path) for path in PATHS}

    assert {path: count for path, count in counts.items() if count > MOST_COMMANDS} == {}


def test_every_page_is_counted() -> None:
    """Events of a run are a stream, not a page, and an action is not read again."""
    for page in PAGES:
        handler = page.handler_class
        if issubclass(handler, PageHandler) and not issubclass(handler, (ActionHandler, RunStream)):
            assert any(page.regex.match(path.partition("?")[0]) for path in PATHS), page.regex.pattern


async def test_pages_show_all_of_a_busy_fleet(world: World) -> None:
    overview, fleet, approvals, sessions = [
        words_of(await world.server.text(path)) for path in ("/overview", "/fleet", "/approvals", "/sessions")
    ]

    assert f"{ASKING} runs wait for approval" in overview
    assert f"{WORKERS} workers" in overview
    assert f"{WAITING} runs in queues" in overview
    assert f"tool.error {FAILED}" in overview
    assert f"agents {WAITING} " in fleet
    assert f"queue-{QUEUES - 1} 0 -" in fleet
    assert f"limit-{LIMITS - 1} 0 0" in fleet
    assert approvals.count("charge waits for approval") == approvals_page.ROWS
    assert sessions.count(" ago ") == sessions_page.ROWS


async def test_a_user_who_may_not_run_scripts_sees_the_same(world: World, redis_url: str) -> None:
    """The role `watcher`, for a Flower on which nobody can act. Each key is read with a command then."""
    redis = world.store.redis
    await redis.execute_command("ACL", "SETUSER", "looks", "on", "nopass", "~*", "&*", "+@all", "-@scripting")
    try:
        async with serving(redis_url.replace("//", "//looks:x@")) as limited:
            for path in ("/sessions", "/approvals", "/approvals?agent=a&tenant=acme", "/fleet"):
                shown, expected = await limited.text(path), await world.server.text(path)
                assert _without_times(words_of(shown)) == _without_times(words_of(expected)), path
            assert f"{WAITING} runs in queues" in words_of(await limited.text("/overview"))
            assert "no worker of queue agents has started it yet" in words_of(
                await limited.text("/run/waits-1")
            )
    finally:
        await redis.acl_deluser("looks")


def _without_times(text: str) -> str:
    return re.sub(r"\d[\d.]* ?(ms|s|min|m|h|d)\b", "T", text)
