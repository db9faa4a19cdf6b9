"""The original SDK (`io-openagent-sdk`), in process: a pattern that calls a tool once per step.

Sessions are in SQLite, opened by its `sqlite` backend. The provider is `mock` and is not called. Without
durability, a run stores two messages at its end and no steps. With `durable=True` it stores a checkpoint
after each tool call. Each checkpoint contains all earlier ones, so the size doubles with every step. Such a
job is aborted after `GIVEN_UP_S`, and the row contains the number of its finished steps.

The SDK has neither a queue nor workers: the worker here is a process that executes the requested runs, 32 at
the same time. Recovery: the death is not detected. The adapter starts another process at once and requests
the same run: without durability from its start, with durability from the last checkpoint
(`resume_from_checkpoint`).
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

import peer
from openagents import Runtime
from openagents.interfaces.pattern import PatternPlugin
from openagents.interfaces.runtime import RunRequest
from openagents.interfaces.tool import ToolPlugin
from processes import bytes_of

FILE, DURABLE = "PEER_FILE", "PEER_DURABLE"
GIVEN_UP_S = 20.0
MAX_MEMORY = 8 << 30


class Text(ToolPlugin):
    """The tool."""

    name = "text"
    description = "Returns a text."

    async def invoke(self, params: dict[str, Any], context: Any) -> str:
        return await peer.step(*params["step"])


class Steps(PatternPlugin):
    """Calls the tool so often."""

    async def execute(self) -> str:
        assert self.context is not None
        run_id, steps, size, pause_ms = json.loads(self.context.input_text)
        for n in range(steps):
            await self.call_tool("text", {"step": [run_id, n, size, pause_ms]})
        return "done"


def _config() -> dict[str, Any]:
    return {
        "agents": [
            {
                "id": "steps",
                "name": "steps",
                "memory": {"type": "buffer"},
                "pattern": {"impl": "original_peer.Steps"},
                "llm": {"provider": "mock"},
                "tools": [{"id": "text", "impl": "original_peer.Text"}],
            }
        ],
        "session": {"type": "sqlite", "config": {"db_path": os.environ[FILE]}},
    }


async def work() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    runtime, durable = Runtime.from_dict(_config()), bool(os.environ[DURABLE])

    async def execute(run_id: str, job: peer.Job, again: bool) -> None:
        checkpoints = await runtime.session_manager.list_checkpoints(run_id) if again and durable else []
        request = RunRequest(
            agent_id="steps",
            session_id=run_id,
            run_id=run_id,
            input_text=json.dumps([run_id, *job.line()]),
            durable=durable,
            resume_from_checkpoint=checkpoints[-1] if checkpoints else None,
        )
        result = await runtime.run_detailed(request=request)
        assert result.stop_reason == "completed", result.error_details

    await peer.execute_requests(execute)


class Original(peer.Library):
    packages = ("io-openagent-sdk", "aiosqlite")
    recovery_setting = "none: the caller has to notice and to ask again"

    def start(self) -> None:
        if self.options["durable"]:
            self.recovery_job = peer.Job(8, peer.KILLED.size, peer.KILLED.pause_ms)
        self._start_afresh()
        self._run_one(peer.NOTHING)
        with sqlite3.connect(self.file) as connection:
            mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
        self.durability = f"SQLite journal={mode}, synchronous=NORMAL"

    def _start_afresh(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.workers.clear()
        self.file = self.folder / f"{time.monotonic_ns()}.sqlite"
        self.env |= {FILE: str(self.file), DURABLE: "yes" if self.options["durable"] else ""}
        self.start_worker("worker")

    def do_job(self, steps: int, size: int) -> dict[str, Any]:
        if not self.options["durable"]:
            return super().do_job(steps, size)
        before, run_id = self.stored(), peer.fresh()
        began = time.monotonic()
        self.submit(run_id, peer.Job(steps, size))
        while not (self.ended / run_id).exists() and time.monotonic() - began < GIVEN_UP_S:
            time.sleep(0.05)
        times = [entry["at"] for entry in self.steps.begun(run_id)]
        done = len(times) == steps
        after = self.stored()
        self._start_afresh()
        return {
            "ms_step": (times[-1] - times[0]) * 1000 / (len(times) - 1) if done else None,
            "reached": len(times) - (not done),
            "within_s": GIVEN_UP_S,
            "stored": {where: after[where] - before[where] for where in after},
            "content": steps * size,
        }

    def stored(self) -> dict[str, int]:
        with sqlite3.connect(self.file) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return {"SQLite file": bytes_of(*(Path(f"{self.file}{end}") for end in ("", "-wal")))}

    def more_facts(self) -> dict[str, str]:
        return {"SQLite": sqlite3.sqlite_version}


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        asyncio.run(work())
    else:
        peer.serve(Original)
