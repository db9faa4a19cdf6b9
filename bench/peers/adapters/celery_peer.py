"""Celery with prefork: one task per run, which calls `asyncio.run`, as in many applications.

Celery records nothing within a task. So the application writes the whole transcript to Redis as JSON after
each step, and a task starts from the stored transcript. Broker and transcripts are in the same Redis (AOF,
everysec). There is no result backend. All other settings are the defaults: one child process per core, and
the message is acknowledged before the task is executed.

Recovery: the main process and its children are killed with SIGKILL; a second worker is running. With the
defaults the message is lost. A second test uses `task_acks_late` and `task_reject_on_worker_lost`: then the
message stays in `unacked` until the `visibility_timeout` (an hour) has passed. The test reads this time and
does not wait for it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import peer
import redis
import redis.asyncio
from celery import Celery
from celery.signals import worker_ready
from processes import Redis

URL, READY, LATE = "PEER_URL", "PEER_READY", "PEER_ACKS_LATE"
UNSEEN_S = 5.0  # if no step starts within this time, the queues of the broker show why

app = Celery("celery_peer", broker=os.environ.get(URL), set_as_current=False)
if os.environ.get(LATE):
    app.conf.update(task_acks_late=True, task_reject_on_worker_lost=True)


@app.task
def run(run_id: str, steps: int, size: int, pause_ms: int) -> None:
    asyncio.run(_run(run_id, steps, size, pause_ms))


async def _run(run_id: str, steps: int, size: int, pause_ms: int) -> None:
    async with redis.asyncio.Redis.from_url(os.environ[URL]) as store:
        transcript = json.loads(await store.get(f"transcript:{run_id}") or "[]")
        for n in range(len(transcript), steps):
            text = await peer.step(run_id, n, size, pause_ms)
            transcript.append({"role": "assistant", "content": text})
            await store.set(f"transcript:{run_id}", json.dumps(transcript))


@worker_ready.connect
def _ready(**_: Any) -> None:
    Path(os.environ[READY]).touch()


class PlainCelery(peer.Peer):
    packages = ("celery", "kombu", "redis")
    durability = "Redis AOF everysec"
    recovery_setting = "acks on receipt; with acks_late: visibility_timeout = 3,600 s"

    def start(self) -> None:
        self.server = Redis(self.folder, "everysec")
        self.held.callback(self.server.stop)
        self.servers.append(self.server)
        self.redis = self.held.enter_context(redis.Redis.from_url(self.server.url))
        self.env[URL] = self.server.url
        app.conf.broker_url = self.server.url
        self.held.callback(app.close)
        self._steps_of: dict[str, int] = {}
        self.start_worker("worker")

    def start_worker(self, name: str, late: str = "") -> None:
        ready = self.folder / f"ready.{name}"
        command = [sys.executable, "-m", "celery", "-A", "celery_peer", "worker", "-n", f"{name}@peer"]
        worker = self.launch_worker(name, command, **{READY: str(ready), LATE: late})
        worker.wait_until(ready.exists)

    def submit(self, run_id: str, job: peer.Job) -> None:
        self._steps_of[run_id] = job.steps
        run.delay(run_id, *job.line())

    def wait(self, run_id: str) -> None:
        """Wait until the last step has ended and the whole transcript is stored."""
        lines = 2 * self._steps_of[run_id]
        peer.wait_for(lambda: len(self.steps.of(run_id)) >= lines, "the last step has ended", 60)
        peer.wait_for(lambda: len(self._transcript(run_id)) == lines // 2, "it is stored", 10, 0.05)

    def _transcript(self, run_id: str) -> list[Any]:
        found: list[Any] = json.loads(self.redis.get(f"transcript:{run_id}") or "[]")
        return found

    def stored(self) -> dict[str, int]:
        return self.server.stored(self.redis)

    def more_facts(self) -> dict[str, str]:
        return self.server.about(self.redis)

    def do_recovery(self) -> dict[str, Any]:
        """Find the message after the kill, with the defaults and with late acknowledgement."""
        self.start_worker("spare")
        shipped = self._where_after_kill()
        for worker in self.workers:
            worker.kill()
        self.workers.clear()
        for name in ("late", "late-spare"):
            self.start_worker(name, late="yes")
        late = self._where_after_kill()
        return {"seconds": None, "says": f"{shipped}; acks_late: {late}"}

    def _where_after_kill(self) -> str:
        run_id = peer.fresh()
        self.submit(run_id, self.recovery_job)
        killed_at = self._kill(run_id, self.recovery_job)
        try:
            began = peer.wait_for(lambda: self._after(run_id, killed_at), "a step begins", UNSEEN_S, 0.01)
            return f"{began[0]['at'] - killed_at:.1f} s"
        except TimeoutError:
            queued, unacked = self.redis.llen("celery"), self.redis.hlen("unacked")
        if queued == unacked == 0:
            return "lost"
        with app.connection() as connection:
            after_s = connection.transport_options.get("visibility_timeout")
            after_s = after_s or connection.transport.Channel.visibility_timeout
        return f"{after_s:,} s"


if __name__ == "__main__":
    peer.serve(PlainCelery)
