"""An application with its own tasks, async and sync, beside ours. The tasks record what happens.

Run by a separate worker process: `celery -A tests.pool.shop worker`.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from contextvars import ContextVar
from typing import Any

import redis
from celery import Task, current_task, signals
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded

from openagents_worker.celery.app import make_worker_app
from openagents_worker.settings import load_settings

NOTES = "notes"

app = make_worker_app(load_settings())
app.conf.update(
    task_default_queue="shop",
    task_ignore_result=False,
    worker_soft_shutdown_timeout=float(os.environ.get("SOFT_SHUTDOWN_S", "0")),
)
app.conf.broker_transport_options.update(json.loads(os.environ.get("SHOP_BROKER_OPTIONS", "{}")))
tag_of_this: ContextVar[str] = ContextVar("tag_of_this", default="none")


def note(tag: str, what: str) -> None:
    """Store a line for the test, independent of the task's result."""
    with redis.Redis.from_url(app.conf.broker_url) as client:
        client.rpush(f"{NOTES}:{tag}", what)


@app.task(bind=True)
async def look_around(self: Task, tag: str, rounds: int) -> dict[str, Any]:
    """Yield to other tasks `rounds` times; returns the task identities seen each time."""
    tag_of_this.set(tag)
    seen = set()
    for _ in range(rounds):
        await asyncio.sleep(0)
        seen.add((self.request.id, current_task.request.id, self.request.args[0], tag_of_this.get()))
        await asyncio.gather(asyncio.sleep(0.001), _child(tag))
    return {"seen": [list(one) for one in seen], "thread": threading.current_thread().name}


async def _child(tag: str) -> None:
    assert tag_of_this.get() == tag


@app.task
async def hold(tag: str) -> str:
    """Wait until it is stopped, and record how."""
    note(tag, "begun")
    try:
        await asyncio.Event().wait()
    except SoftTimeLimitExceeded:
        note(tag, "soft")
        return "cleaned up"
    except asyncio.CancelledError:
        note(tag, "cancelled")
        raise
    return "never"


@app.task(acks_late=True)
async def hold_late(tag: str) -> str:
    return await hold.run(tag)


@app.task
async def stand(tag: str) -> str:
    """Wait until a note allows the end."""
    note(tag, "begun")
    with redis.Redis.from_url(app.conf.broker_url) as client:
        while not await asyncio.to_thread(client.exists, f"{NOTES}:{tag} may end"):
            await asyncio.sleep(0.01)
    note(tag, "ended")
    return tag


@app.task
async def greet(tag: str) -> str:
    note(tag, "begun")
    note(tag, "ended")
    return tag


@app.task
async def ignored() -> None:
    raise Ignore


@app.task
async def leave() -> None:
    raise SystemExit(3)


@app.task
async def fail(text: str) -> None:
    raise ValueError(text)


@app.task(acks_late=True)
async def rejected(tag: str) -> None:
    note(tag, "rejected")
    raise Reject("no", requeue=False)


@app.task(bind=True, autoretry_for=(ConnectionError,), retry_kwargs={"max_retries": 3, "countdown": 0})
async def third_time_lucky(self: Task) -> int:
    await asyncio.sleep(0)
    if self.request.retries < 2:
        raise ConnectionError("not yet")
    return self.request.retries


@app.task(bind=True)
async def asks_again(self: Task) -> int:
    if self.request.retries == 0:
        raise self.retry(countdown=0)
    return self.request.retries


@app.task
async def add(a: int, b: int) -> int:
    return a + b


@app.task(bind=True)
async def orders(self: Task, tag: str) -> str:
    """Send another task."""
    return greet.delay(tag).id


@app.task(bind=True)
def blocks(self: Task, until: str) -> dict[str, str]:
    """A sync task: it may block without delaying other tasks. It ends when a note exists under `until`."""
    with redis.Redis.from_url(app.conf.broker_url) as client:
        while not client.exists(f"{NOTES}:{until}"):
            time.sleep(0.01)
    return {"id": self.request.id, "thread": threading.current_thread().name}


@app.task
def blocks_and_notes(tag: str, seconds: float) -> str:
    note(tag, "begun")
    time.sleep(seconds)
    note(tag, "ended")
    return tag


@signals.task_prerun.connect(weak=False)
def _prerun(task_id: str, task: Task, **_: Any) -> None:
    if task.name.endswith(".add"):
        assert current_task.request.id == task_id
        note(f"signals-{task_id}", "prerun")


@signals.task_postrun.connect(weak=False)
def _postrun(task_id: str, task: Task, state: str, **_: Any) -> None:
    if task.name.endswith(".add"):
        note(f"signals-{task_id}", f"postrun {state}")
