"""Django: runs in a project with its own Celery app and conventions."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.local.child_process import ChildProcess
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.producer.client import Client
from openagents_worker.settings import load_settings
from openagents_worker.testing.model_server import ModelServer, ModelServerRequest
from tests.adopt.project import run_in, write_project
from tests.support.waiting import PATIENCE_S, wait_for

pytestmark = pytest.mark.long


@dataclass
class Project:
    folder: Path
    env: Mapping[str, str]
    client: Client
    model: ModelServer

    def run(self, program: str) -> Any:
        return run_in(self.folder, program, self.env)

    def incarnations(self) -> list[str]:
        store = self.client.store
        return list(store.ask(lambda r: r.zrange(store.keys("workers"), 0, -1)))

    def start_worker(self, name: str, queues: str) -> ChildProcess:
        command = [sys.executable, "-m", "celery", "-A", "config", "--workdir", str(self.folder), "worker"]
        command += ["-n", f"{name}@project", "-Q", queues, "-c", "1", "-l", "INFO"]
        return ChildProcess(name, command, self.env, lambda *_: None)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Generator[Project]:
    folder = tmp_path_factory.mktemp("project")
    with EmbeddedRedis() as redis, ModelServer(_counts_twice).serve_in_thread() as model:
        write_project(folder, model.url)
        env = {
            "OPENAGENTS_REDIS_URL": redis.url,
            "OPENAGENTS_CONFIG": str(folder / "agents.json"),
            "OPENAGENTS_LEASE_MS": "3000",
            "PRODUCT_REDIS": redis.url.rpartition("/")[0],
            "DJANGO_SETTINGS_MODULE": "config.settings",
            "PYTHONPATH": str(folder),
        }
        with Client(settings=load_settings(env)) as client:
            project = Project(folder, {**os.environ, **env}, client, model)
            project.run(
                "from django.db import connection\n"
                "from tasks.models import Order\n"
                "with connection.schema_editor() as editor: editor.create_model(Order)\n"
                "print('null')"
            )
            yield project


@pytest.fixture(scope="module")
def workers(project: Project) -> Generator[tuple[ChildProcess, ChildProcess]]:
    """One that consumes the project's own queues, in prefork; one that consumes runs."""
    own, runs = project.start_worker("own", "low,default"), project.start_worker("runs", "agents")
    try:
        runs.wait_until(lambda: bool(project.incarnations()), "registered in Redis", PATIENCE_S)
        yield own, runs
    finally:
        for worker in (own, runs):
            worker.stop(20)


def _counts_twice(asked: ModelServerRequest) -> dict[str, Any]:
    if asked.n < 2:
        return {"tool_calls": [{"name": "count_orders", "arguments": {}}]}
    return {"text": "counted"}


def test_registering_changes_no_setting(project: Project) -> None:
    """The app's configuration is as it was, it is still the current one, and its tasks are its own."""
    said = project.run("""
import celery
from celery import Celery
from openagents_worker import register
from tasks.tasks import add
other = Celery("other", set_as_current=False)
other.conf.task_acks_late = True
before = repr(sorted(other.conf.table(with_defaults=True).items()))
task = register(other, queue="thoughts")
after = repr(sorted(other.conf.table(with_defaults=True).items()))
print(json.dumps({
    "same": before == after,
    "current": celery.current_app._get_current_object() is app,
    "acks_late": [task.acks_late, add.acks_late],
    "limits": [task.soft_time_limit, add.soft_time_limit],
}))
""")

    assert said == {"same": True, "current": True, "acks_late": [False, True], "limits": [0, 60]}


def test_whoever_submits_loads_no_model_client(project: Project) -> None:
    """A web process imports the app; only workers load the modules that execute runs."""
    loaded = project.run("""
import sys
handle = run_agent.apply_async(({"agent_id": "clerk", "session_id": "s", "input_text": "x"},), countdown=60)
handle.cancel()
print(json.dumps(sorted({"httpx", "greenlet", "openagents_worker.runtime.runner"} & sys.modules.keys())))
""")

    assert "httpx" not in loaded
    assert "openagents_worker.runtime.runner" not in loaded


def test_the_projects_own_tasks_behave_as_before(
    project: Project, workers: tuple[ChildProcess, ChildProcess]
) -> None:
    """Routed by the project's routes, acknowledged late, with a result."""
    said = project.run("""
from tasks.tasks import add
print(json.dumps(add.delay(2, 3).get(timeout=60)))
""")

    assert said == {"sum": 5, "queue": "low", "acks_late": True}


def test_a_run_works_beside_them(project: Project, workers: tuple[ChildProcess, ChildProcess]) -> None:
    """It goes to its own queue in spite of the route; each of its sync tools gets a fresh connection."""
    said = project.run("""
handle = run_agent.delay({"agent_id": "clerk", "session_id": "s1", "input_text": "How many?"})
result = handle.wait(timeout=60)
from celery.result import AsyncResult
print(json.dumps([handle.id, result.final_output, AsyncResult(handle.id).get(timeout=60)]))
""")

    run_id, output, value = said
    told = [line["messages"][-1] for line in project.model.log if str(line.get("key")).startswith(run_id)]
    counted = [json.loads(message["content"]) for message in told if message["role"] == "tool"]
    assert (output, value) == ("counted", {"run_id": run_id, "stop_reason": "completed"})
    assert [each["fresh"] for each in counted] == [True, True]
    assert len({each["thread"] for each in counted}) == 1


def test_a_worker_that_does_not_consume_runs_starts_nothing_of_ours(
    project: Project, workers: tuple[ChildProcess, ChildProcess]
) -> None:
    """No lease, no heartbeat: the only incarnations are those of the other worker."""
    wait_for(lambda: any("ready" in line for line in workers[0].lines), "it consumes", timeout=PATIENCE_S)

    assert {incarnation.partition(":")[0] for incarnation in project.incarnations()} == {"runs@project"}


def test_a_run_waits_for_the_commit(project: Project, workers: tuple[ChildProcess, ChildProcess]) -> None:
    """Before it nothing is known of the run; after a rollback nothing ever is."""
    said = project.run("""
from django.db import transaction
from openagents_worker import RunNotFound
def known(handle):
    try:
        return handle.state
    except RunNotFound:
        return None
request = {"agent_id": "clerk", "session_id": "s2", "input_text": "x"}
with transaction.atomic():
    kept = run_agent.delay_on_commit(request)
    before = known(kept)
try:
    with transaction.atomic():
        dropped = run_agent.delay_on_commit(request)
        raise ValueError
except ValueError:
    pass
print(json.dumps([before, kept.wait(timeout=60).final_output, known(dropped)]))
""")

    assert said == [None, "counted", None]
