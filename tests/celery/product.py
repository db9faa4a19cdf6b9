"""A product's Celery app with its own tasks and ours. `celery -A tests.celery.product:app worker`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from celery import Celery, Task

from openagents_worker import register

__all__ = ["make_product"]


def make_product(redis_url: str, *, results: bool = True) -> Celery:
    """Create the app, with separate databases for broker and results; it is not Celery's current app."""
    broker, backend = f"{redis_url}/1", f"{redis_url}/2"
    app = Celery("product", broker=broker, backend=backend if results else None, set_as_current=False)
    app.conf.worker_pool = "openagents_worker.celery.pool:TaskPool"
    app.conf.worker_send_task_events = True

    def note(value: Any, what: str) -> Any:
        """Record the argument and return it."""
        with (Path(os.environ["NOTES_FOLDER"]) / "notes.jsonl").open("a") as notes:
            notes.write(json.dumps([what, value]) + "\n")
        return value

    def sleep_for_ever() -> None:
        """A task that is only revoked."""

    def ask(text: str) -> dict[str, str]:
        """Return the fields of a request."""
        return {"agent_id": "clerk", "session_id": f"asked for {text}".replace(" ", "-"), "input_text": text}

    def fail(text: str) -> None:
        """Fail with this text."""
        raise ValueError(text)

    def stamps_of_this(self: Task, _: Any, what: str) -> dict[str, Any]:
        """Return the stamps of its message."""
        return dict(self.request.stamps or {})

    app.task(stamps_of_this, name="product.stamps_of_this", bind=True, shared=False)
    for task in (note, ask, sleep_for_ever, fail):
        app.task(task, name=f"product.{task.__name__}", shared=False)
    run_agent = register(app)

    def become_a_run(self: Task, text: str) -> None:
        """Replace this task with a run, by `Task.replace`."""
        self.replace(run_agent.si({**ask(text), "session_id": str(self.request.id)}))

    app.task(become_a_run, name="product.become_a_run", bind=True, shared=False)
    return app


def __getattr__(name: str) -> Celery:
    if name != "app":
        raise AttributeError(name)
    app = globals()["app"] = make_product(os.environ["PRODUCT_REDIS"], results="NO_RESULTS" not in os.environ)
    return app
