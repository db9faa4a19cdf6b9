"""Registration: which queues are queues of runs, and which revocations cancel runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.worker import control
from celery.worker.state import revoked

from openagents_worker import register
from openagents_worker.celery.pool.task_pool import ON_LOOP
from openagents_worker.celery.revoke import take_over_revoke
from openagents_worker.errors import ConfigError
from openagents_worker.producer.client import client_of
from tests.support.deployment import agent
from tests.support.waiting import wait_for


@pytest.fixture
def app(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    agents = [agent("clerk"), agent("painter", queue="gpu")]
    (tmp_path / "agents.json").write_text(json.dumps({"version": "1.0", "agents": agents}))
    monkeypatch.setenv("OPENAGENTS_REDIS_URL", redis_url)
    monkeypatch.setenv("OPENAGENTS_CONFIG", str(tmp_path / "agents.json"))
    monkeypatch.setenv("MODEL_URL", "http://127.0.0.1:1/v1")
    app = Celery("product", broker=redis_url, set_as_current=False)
    register(app, queue="thoughts")
    yield app
    client_of(app).close()
    app.close()


def request(**fields: Any) -> dict[str, Any]:
    return {"agent_id": "clerk", "session_id": "s1", "input_text": "hi", **fields}


def test_runs_go_to_the_queue_that_was_registered(app: Celery) -> None:
    """Whatever the app's own default queue is."""
    handle = app.tasks["tasks.run_agent"].delay(request())

    assert handle.record().queue == "thoughts"
    handle.cancel()


def test_the_tasks_of_two_apps_are_their_own(app: Celery) -> None:
    """Nothing is shared with other apps of the process."""
    other = Celery("other", set_as_current=False)

    assert "tasks.run_agent" in app.tasks
    assert "tasks.run_agent" not in other.tasks


def test_our_tasks_wait_on_the_loop_of_our_pool(app: Celery) -> None:
    """By an attribute, as naming the pool would load it."""
    assert all(getattr(app.tasks[f"tasks.{name}"], ON_LOOP) for name in ("run_agent", "resume_run"))


def test_a_run_is_no_function_to_call(app: Celery) -> None:
    """It would start a worker in whatever process calls it."""
    with pytest.raises(ConfigError, match=r"cannot be called as a function"):
        app.tasks["tasks.run_agent"](request())


def test_revoking_cancels_runs_and_leaves_other_ids_to_celery(app: Celery, redis_url: str) -> None:
    """One command, both kinds of ids; an app without our tasks answers as before."""
    take_over_revoke()
    run = app.tasks["tasks.run_agent"].delay(request())
    state = SimpleNamespace(app=app, consumer=None)
    stranger = SimpleNamespace(app=Celery("other", set_as_current=False), consumer=None)

    control.Panel.data["revoke"](state, [run.id, "another"])
    control.Panel.data["revoke"](stranger, "a third")

    wait_for(lambda: run.state == "REVOKED", "the run is cancelled")
    assert run.id not in revoked
    assert {"another", "a third"} <= set(revoked)
    for task_id in ("another", "a third"):
        revoked.discard(task_id)
