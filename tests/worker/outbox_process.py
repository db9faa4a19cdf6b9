"""A real worker process without Celery that has two recipients.

`python -m tests.worker.outbox_process LOG HANGS` with the Redis of the environment.
`ledger` appends each end to the file LOG. With HANGS = 1 it prints `delivering` and hangs before it does, so
that the process can be killed in the middle of a delivery. `broken` always fails.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from openagents_worker.agents import load_agents
from openagents_worker.runtime.assembly import Assembly
from openagents_worker.settings import load_settings
from openagents_worker.store.scripts import RunEnd
from openagents_worker.worker.outbox import OutboxLimits, Recipients
from openagents_worker.worker.process import WorkerProcess
from openagents_worker.worker.registration import WorkerIdentity

LIMITS = OutboxLimits(poll_s=0.05, deliver_s=20, retry_s=0.5, max_retry_s=0.5)


class Ledger:
    name = "ledger"

    def __init__(self, path: Path, *, hangs: bool) -> None:
        self._path = path
        self._hangs = hangs

    async def deliver(self, end: RunEnd) -> None:
        if self._hangs:
            print("delivering", flush=True)
            await asyncio.Event().wait()
        with self._path.open("a") as file:
            file.write(f"{end.run_id} {end.life}\n")


class Broken:
    name = "broken"

    async def deliver(self, end: RunEnd) -> None:
        raise ConnectionError("nobody answers")


def main(log: str, hangs: str) -> None:
    assembly = Assembly(load_agents(json.dumps({"agents": [agent()]}), env={}), env={})
    process = WorkerProcess(
        load_settings(),
        assembly,
        WorkerIdentity(node="outbox@test", queues=["agents"]),
        send_wakes=lambda wakes: None,
        recipients=Recipients(all=(Ledger(Path(log), hangs=hangs == "1"), Broken()), limits=LIMITS),
    )
    process.start()
    print("started", flush=True)
    sys.stdin.read()  # until the test closes it
    process.close()


def agent() -> dict[str, object]:
    return {
        "id": "assistant",
        "name": "assistant",
        "memory": {"type": "buffer"},
        "pattern": {"type": "react"},
        "llm": {"provider": "mock"},
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
