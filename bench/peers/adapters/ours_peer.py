"""openagents-worker: a run of the ReAct pattern with a scripted model, executed by a worker process.

A step is a recorded call. Each turn has two steps: a call of the model, whose text has the content of a step,
and a call of a tool, which returns the content of a step. So n steps are n/2 turns, and one more call of the
model ends the run. Each call is committed with its usage and its events, which are stored for watchers and
published; the other systems store no events. The log of steps contains only the calls of the tool: one line
for two steps.

A run that does nothing calls the model once. Recovery: a second worker detects the death and takes over.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import peer
import redis
from processes import Redis

IN_FLIGHT = 20  # submissions at once


class Text:
    """The tool."""

    name = "text"

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = config or {}

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "description": "Returns a text.", "parameters": {"type": "object"}}

    async def invoke(self, params: dict[str, Any], context: Any) -> str:
        return await peer.step(context.run_id, params["n"], params["size"], params["pause_ms"])


class Ours(peer.Peer):
    packages = ("openagents-worker", "celery", "redis")
    recovery_setting = "another worker on the host sees the death; elsewhere LEASE_MS = 10,000 at most"
    steps_a_line = 2
    recovery_job = peer.Job(2 * peer.KILLED.steps, peer.KILLED.size, peer.KILLED.pause_ms)

    def start(self) -> None:
        from openagents_worker.producer.client import Client

        self.server = Redis(self.folder, self.options["fsync"])
        self.held.callback(self.server.stop)
        self.servers.append(self.server)
        self.durability = f"Redis AOF {self.options['fsync']}"
        self.redis = self.held.enter_context(redis.Redis.from_url(self.server.url))
        self.client = self.held.enter_context(Client(self.server.url))
        jobs = [peer.Job(5, 100), self.recovery_job, *(peer.Job(*job) for job in self.options["jobs"])]
        agents = self.folder / "agents.json"
        agents.write_text(json.dumps({"agents": [_nothing(), *map(_agent, jobs)]}))
        self.env |= {"OPENAGENTS_CONFIG": str(agents), "OPENAGENTS_REDIS_URL": self.server.url}
        self.env |= {"OPENAGENTS_LOG_LEVEL": "WARNING"}
        self.start_worker("worker")

    def start_worker(self, name: str) -> None:
        command = [sys.executable, "-m", "openagents_worker.cli", "worker", "--name", name]
        worker = self.launch_worker(name, command)
        worker.wait_until(lambda: any(one.startswith(f"{name}@".encode()) for one in self._registered()))

    def submit(self, run_id: str, job: peer.Job) -> None:
        self.client.submit(_request(run_id, job))

    def wait(self, run_id: str) -> None:
        result = self.client.handle(run_id).wait(timeout=60)
        if not result.ok:
            raise RuntimeError(f"the run failed: {result.error_details}")

    def submit_many(self, run_ids: Sequence[str]) -> None:
        from openagents_worker.producer.client import AsyncClient

        async def submit_all() -> None:
            places = asyncio.Semaphore(IN_FLIGHT)
            async with AsyncClient(self.server.url) as client, asyncio.TaskGroup() as tasks:

                async def submit(run_id: str) -> None:
                    async with places:
                        await client.submit(_request(run_id, peer.NOTHING))

                for run_id in run_ids:
                    tasks.create_task(submit(run_id))

        self._began_ms = time.time() * 1000
        self.run_async(submit_all())

    def all_done(self, run_ids: Sequence[str], began: float) -> float:
        """The model's calls are in no log: the end of the last run counts, which is later than its step's."""
        for run_id in run_ids:
            self.wait(run_id)
        ended_ms = [self.client.record(run_id).ended_ms or 0 for run_id in run_ids]
        return (max(ended_ms) - self._began_ms) / 1000

    def stored(self) -> dict[str, int]:
        return self.server.stored(self.redis)

    def more_facts(self) -> dict[str, str]:
        return self.server.about(self.redis)

    def _registered(self) -> list[bytes]:
        found: list[bytes] = self.redis.zrange("oa:workers", 0, -1)
        return found


def _request(run_id: str, job: peer.Job) -> dict[str, Any]:
    return {"agent_id": _name(job), "session_id": run_id, "run_id": run_id, "input_text": "Go."}


def _name(job: peer.Job) -> str:
    return "-".join(map(str, ["job", *job.line()]))


def _nothing() -> Mapping[str, Any]:
    return _with_script(peer.NOTHING, [{"text": "x" * peer.NOTHING.size}])


def _agent(job: peer.Job) -> Mapping[str, Any]:
    return _with_script(job, [*(_turn(n, job) for n in range((job.steps + 1) // 2)), {"text": "done"}])


def _turn(n: int, job: peer.Job) -> Mapping[str, Any]:
    arguments = {"n": n, "size": job.size, "pause_ms": job.pause_ms}
    return {
        "text": peer.content(-1 - n, job.size),
        "tool_calls": [{"name": "text", "arguments": arguments}],
        "usage": {"input_tokens": 1, "output_tokens": 1},  # said: a guess would read the whole conversation
    }


def _with_script(job: peer.Job, script: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return {
        "id": _name(job),
        "name": _name(job),
        "memory": {"type": "buffer"},
        "pattern": {"type": "react", "config": {"max_steps": len(script) + 1}},
        "llm": {"provider": "scripted", "script": script},
        "tools": [{"id": "text", "impl": "ours_peer.Text"}],
    }


if __name__ == "__main__":
    peer.serve(Ours)
