"""A worker process without Celery:

real Redis, real scripts, a lease that never ends. Tests execute runs one by one.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from openagents_worker.agents import read_agents_file
from openagents_worker.agents.code import Agent
from openagents_worker.jsontext import canonical_json
from openagents_worker.models import RunRecord, RunRequest, RunState
from openagents_worker.runtime.assembly import Assembly
from openagents_worker.runtime.journal import digest_of
from openagents_worker.runtime.kept_definitions import DefinitionKeeper
from openagents_worker.runtime.runner import AttemptResult, Runner
from openagents_worker.settings import Settings, load_settings
from openagents_worker.store import scripts
from openagents_worker.store.client import AsyncStore, Cell
from openagents_worker.store.codec import PLAIN, PayloadCodec
from openagents_worker.store.fleet import WorkerCard
from openagents_worker.store.listing import extra_indexes
from openagents_worker.store.records import aread_record
from openagents_worker.store.scripts import Submitted, Wake
from openagents_worker.submission.new_run import INTERRUPTING
from tests.support.stored_events import shown


@dataclass
class FixedLease:
    """A lease that lasts for the whole test."""

    incarnation: str
    left_s: float = 60.0

    def remaining_s(self) -> float:
        return self.left_s


def agent(agent_id: str = "a", **fields: Any) -> dict[str, Any]:
    """The definition of an agent for the agents file; by default a ReAct agent that says hello."""
    return {
        "id": agent_id,
        "name": agent_id,
        "memory": {"type": "buffer"},
        "pattern": {"type": "react"},
        "llm": {"provider": "scripted", "script": [{"text": "hello"}] * 50},
        **fields,
    }


def scripted(*entries: dict[str, Any]) -> dict[str, Any]:
    """A scripted model that returns these replies in order."""
    return {"provider": "scripted", "script": list(entries)}


def calls(*named: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """A scripted reply that calls tools."""
    return {"tool_calls": [{"name": name, "arguments": arguments} for name, arguments in named]}


class Process:
    """One incarnation with its runner.

    `wakes` collects its wake-up messages, `left` the exit codes of `leave`.
    """

    def __init__(
        self, store: AsyncStore, runner: Runner, lease: FixedLease, wakes: list[Wake], left: list[int]
    ) -> None:
        self.left = left
        self.store = store
        self.runner = runner
        self.lease = lease
        self.wakes = wakes

    async def submit(
        self, run_id: str = "r1", *, delay_ms: int = 0, tell: bool = False, **fields: Any
    ) -> Submitted:
        request = RunRequest(
            **{"agent_id": "a", "session_id": "s1", "input_text": "hi", "run_id": run_id, **fields}
        )
        text = request.model_dump_json()
        return await self.store.run(
            scripts.submit(
                run_id=request.run_id,
                agent_id=request.agent_id,
                session_id=request.session_id,
                queue="",
                default_queue="agents",
                digest=digest_of(canonical_json(json.loads(text))),
                uid="u1",
                request=text,
                canvas="",
                durable=request.durable is not False,
                delay_ms=delay_ms,
                reject_if_busy=False,
                parent_run_id="",
                lists=extra_indexes(request.tenant, request.labels),
                tell=tell,
                interrupts=request.on_busy if request.on_busy in INTERRUPTING else "",
            )
        )

    async def execute(self, run_id: str = "r1") -> AttemptResult:
        return await self.runner.execute(run_id)

    async def run(self, run_id: str = "r1", **fields: Any) -> RunRecord:
        """Submit and execute a run; returns its record."""
        await self.submit(run_id, **fields)
        await self.execute(run_id)
        return await self.record(run_id)

    async def record(self, run_id: str = "r1") -> RunRecord:
        return await aread_record(self.store, run_id)

    async def events(self, run_id: str = "r1") -> list[dict[str, Any]]:
        entries = await self.store.redis.xrange(self.store.keys("events", run_id))
        return shown(entries, run_id)

    async def event_names(self, run_id: str = "r1") -> list[str]:
        return [event["name"] for event in await self.events(run_id)]

    async def journal(self, run_id: str = "r1") -> list[dict[str, Any]]:
        return [
            json.loads(text)
            for text in await self.store.redis.lrange(self.store.keys("journal", run_id), 0, -1)
        ]

    async def transcript(self, session_id: str = "s1") -> list[dict[str, Any]]:
        key = self.store.keys("transcript", session_id)
        return [json.loads(text) for text in await self.store.redis.lrange(key, 0, -1)]


@cache
def _settings(redis_url: str) -> Settings:
    return load_settings({"OPENAGENTS_REDIS_URL": redis_url})


@asynccontextmanager
async def process(
    redis_url: str,
    *agents: dict[str, Any] | Agent,
    settings: Settings | None = None,
    name: str = "w",
    codec: PayloadCodec = PLAIN,
    env: Mapping[str, str] | None = None,
    keeps_definitions: bool = False,
    **file: Any,
) -> AsyncIterator[Process]:
    """A registered process with these agents. `file` holds further fields of its agents file.

    `env` has the values of its variables. With `keeps_definitions` it stores the definitions of its agents,
    as a worker does, and loads those that runs began with.
    """
    settings = settings or _settings(redis_url)
    in_file = [each for each in agents or [agent()] if isinstance(each, dict)]
    in_code = [each for each in agents if isinstance(each, Agent)]
    env = env or {}
    read = read_agents_file(json.dumps({**file, "agents": in_file}), env=env, in_code=in_code)
    assert not read.problems, read.problems
    config = read.config
    assert config is not None
    keeper = DefinitionKeeper.of(read, settings, env) if keeps_definitions else None
    assembly = Assembly(config, env=env, keeper=keeper)
    store = AsyncStore(Cell(redis_url, codec=codec))
    lease = FixedLease(f"{name}:{uuid.uuid4().hex[:8]}")
    wakes: list[Wake] = []

    async def send(these: Sequence[Wake]) -> None:
        wakes.extend(these)

    left: list[int] = []
    runner = Runner(
        store=store,
        lease=lambda: lease,
        assembly=assembly,
        settings=settings,
        send_wakes=send,
        leave=left.append,
    )
    await store.run(
        scripts.register(
            incarnation=lease.incarnation,
            lease_ms=600_000,  # nobody renews it
            agents=assembly.announcements(),
            info=WorkerCard("host", os.getpid(), ("agents",), assembly.hashes, None, "this").to_json(),
        )
    )
    try:
        yield Process(store, runner, lease, wakes, left)
    finally:
        await store.run(scripts.retire(incarnation=lease.incarnation))
        await assembly.aclose()
        await store.close()


async def due(p: Process, run_id: str = "r1") -> None:
    """Make a suspended run due now. Others may have become due meanwhile."""
    await p.store.redis.hset(p.store.keys("run", run_id), "due", 0)
    await p.store.redis.zadd(p.store.keys("due"), {run_id: 0})
    await p.store.run(scripts.wake(limit=10))
    assert (await p.record(run_id)).state is RunState.QUEUED


async def crash(dead: Process, run_id: str, executing: Any) -> None:
    """Let the process die while it executes the run: it writes nothing more, and its runs are reclaimed."""
    dead.lease.left_s = 0.0
    await dead.store.redis.zadd(dead.store.keys("workers"), {dead.lease.incarnation: 1})
    reclaimed = await dead.store.run(scripts.reclaim(limit=100, max_recoveries=50, blameless=False))
    assert run_id in [wake.run_id for wake in reclaimed.wakes]
    executing.cancel()
    with suppress(BaseException):  # errors of a dead process do not matter
        await executing
