"""pydocket: a chain of tasks, one per step.

pydocket records tasks, not steps within a task. So each step is a task that returns its content, which
pydocket stores as the result of the task, and that finally adds the next step. Redis has AOF with everysec.
The worker has its defaults: ten concurrent tasks, and new ones fetched every 250 ms, so at most 40 empty
tasks per second.

Recovery: a second worker is running. It gets the message of the interrupted step when the message has been
idle for `redelivery_timeout` (five minutes). Workers check for such messages four times in this period.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

import peer
import redis
from docket import CurrentDocket, Docket, Worker
from processes import Redis

URL = "PEER_URL"
DOCKET = "peer"
IN_FLIGHT = 20  # submissions at once


async def one_step(
    run_id: str,
    n: int,
    steps: int,
    size: int,
    pause_ms: int,
    docket: Docket = CurrentDocket(),  # noqa: B008 - how pydocket injects
) -> str:
    text = await peer.step(run_id, n, size, pause_ms)
    if n + 1 < steps:
        await docket.add(one_step, key=f"{run_id}:{n + 1}")(run_id, n + 1, steps, size, pause_ms)
    return text


async def work() -> None:
    async with Docket(name=DOCKET, url=os.environ[URL]) as docket:
        docket.register(one_step)
        async with Worker(docket) as worker:
            print("READY", flush=True)
            await worker.run_forever()


class Pydocket(peer.Peer):
    packages = ("pydocket", "redis")
    durability = "Redis AOF everysec"
    recovery_setting = "redelivery_timeout = 300 s"
    speed_setting = "concurrency = 10, minimum_check_interval = 250 ms: 40 tasks/s that do nothing"
    recovery_limit_s = 420.0

    def start(self) -> None:
        self.server = Redis(self.folder, "everysec")
        self.held.callback(self.server.stop)
        self.servers.append(self.server)
        self.redis = self.held.enter_context(redis.Redis.from_url(self.server.url))
        self.env[URL] = self.server.url
        self._last: dict[str, int] = {}
        self.docket = self.run_async(self._open())
        self.held.callback(lambda: self.run_async(self.docket.__aexit__(None, None, None)))
        self.start_worker("worker")

    async def _open(self) -> Docket:
        return await Docket(name=DOCKET, url=self.server.url).__aenter__()

    def start_worker(self, name: str) -> None:
        self.launch_worker(name, self.command("worker")).wait_until_said()

    def submit(self, run_id: str, job: peer.Job) -> None:
        self.run_async(self._submit(run_id, job))

    async def _submit(self, run_id: str, job: peer.Job) -> None:
        self._last[run_id] = job.steps - 1
        await self.docket.add(one_step, key=f"{run_id}:0")(run_id, 0, *job.line())

    def submit_many(self, run_ids: Sequence[str]) -> None:
        async def submit_all() -> None:
            places = asyncio.Semaphore(IN_FLIGHT)

            async def submit(run_id: str) -> None:
                async with places:
                    await self._submit(run_id, peer.NOTHING)

            await asyncio.gather(*map(submit, run_ids))

        self.run_async(submit_all())

    def wait(self, run_id: str) -> None:
        """Until the chain's last task has a result."""
        last = self._last[run_id]
        peer.wait_for(lambda: self._begun(run_id, last), "the last step begins", 60)

        async def result() -> None:
            execution = await self.docket.get_execution(f"{run_id}:{last}")
            if execution is not None:
                await execution.get_result()

        self.run_async(asyncio.wait_for(result(), 60))

    def _begun(self, run_id: str, n: int) -> bool:
        return any(entry["n"] == n for entry in self.steps.begun(run_id))

    def stored(self) -> dict[str, int]:
        return self.server.stored(self.redis)

    def more_facts(self) -> dict[str, str]:
        return self.server.about(self.redis)


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        asyncio.run(work())
    else:
        peer.serve(Pydocket)
