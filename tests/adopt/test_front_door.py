"""The front door's `run_agent` in a process that has a Celery app with runs: it is that app's task."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, group

from openagents_worker import AsyncClient, Client, RunHandle, register, run_agent
from openagents_worker.errors import ConfigError
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.models import RunState
from openagents_worker.producer.app_binding import AppKind, find_binding
from openagents_worker.producer.client import client_of, default_client
from openagents_worker.producer.connection import default_connection
from openagents_worker.producer.task import AgentTask
from openagents_worker.settings import load_settings
from tests.support.deployment import agent


@pytest.fixture
def environment(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[str]:
    """Runs live in a Redis of their own; the environment's broker is the same one, as by default."""
    llm = {"provider": "scripted", "script": [{"text": "done"}]}
    (tmp_path / "agents.json").write_text(json.dumps({"agents": [{**agent("clerk"), "llm": llm}]}))
    monkeypatch.setenv("OPENAGENTS_REDIS_URL", redis_url)
    monkeypatch.setenv("OPENAGENTS_CONFIG", str(tmp_path / "agents.json"))
    default_connection.cache_clear()
    yield redis_url
    default_client().close()
    default_connection.cache_clear()


@pytest.fixture(scope="module")
def broker() -> Generator[EmbeddedRedis]:
    """The app's broker is another server than the one that the environment names."""
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def app(environment: str, broker: EmbeddedRedis) -> Generator[Celery]:
    with Celery("shop", broker=broker.url, set_as_current=False) as app:
        register(app, queue="thoughts")
        yield app
        client_of(app).close()


def request(**fields: Any) -> dict[str, Any]:
    return {"agent_id": "clerk", "session_id": os.urandom(4).hex(), "input_text": "hi", **fields}


def messages(url: str, queue: str) -> list[str]:
    """The ids of the tasks whose messages wait in a queue of this Redis; they are taken out."""
    with Client(url) as client:
        found: list[str] = client.store.redis.lrange(queue, 0, -1)
        client.store.redis.delete(queue)
    return sorted(json.loads(item)["headers"]["id"] for item in found)


def test_it_publishes_to_the_broker_and_queue_of_the_registered_app(
    app: Celery, broker: EmbeddedRedis, environment: str
) -> None:
    """Also from signatures, chains and groups, and for asyncio; nothing goes to the environment's broker."""
    handles = [
        run_agent.delay(request()),
        run_agent.s(request()).delay(),
        *group(run_agent.s(request()), run_agent.si(request())).apply_async(),
        chain(run_agent.s(request()), run_agent.si(request())).apply_async().parent,
        asyncio.run(run_agent.adelay(request())),
        Client().submit(request()),
        asyncio.run(_submit(request())),
    ]

    assert run_agent.app is app
    assert messages(broker.url, "thoughts") == sorted(handle.id for handle in handles)
    assert messages(environment, "thoughts") == messages(environment, "agents") == []
    assert all(isinstance(run_agent.AsyncResult(handle.id), RunHandle) for handle in handles)


async def _submit(fields: dict[str, Any], app: Celery | None = None) -> Any:
    async with AsyncClient(app=app) as client:
        return await client.submit(fields)


def test_a_client_of_an_app_uses_the_queue_of_the_app(
    app: Celery, broker: EmbeddedRedis, environment: str
) -> None:
    """`Client(app=app)` is what an error recommends where two apps are registered."""
    with Celery("bakery", broker=f"{environment[:-1]}1", set_as_current=False) as other:
        register(other)
        with Client(app=app) as client:
            sent = [client.submit(request()), asyncio.run(_submit(request(), app))]
            set_by_caller = client.submit(request(), queue="slow")
        client_of(other).close()

    assert messages(broker.url, "thoughts") == sorted(handle.id for handle in sent)
    assert messages(broker.url, "slow") == [set_by_caller.id]
    assert messages(broker.url, "agents") == []


def test_a_client_of_an_app_without_runs_uses_the_queue_of_the_settings(
    environment: str, broker: EmbeddedRedis
) -> None:
    """A web process has an app that only publishes; the workers are processes of another app."""
    with Celery("web", broker=broker.url, set_as_current=False) as web:
        with Client(settings=load_settings().model_copy(update={"queue": "reports"}), app=web) as client:
            handle = client.submit(request())
        client_of(web).close()

    assert messages(broker.url, "reports") == [handle.id]


def test_what_was_made_before_the_app_was_registered_goes_out_by_it(
    environment: str, broker: EmbeddedRedis
) -> None:
    """A module imports `run_agent`, makes signatures and a client; another module registers the app."""
    signature, first, client = run_agent.s(request()), run_agent.s(request()), Client()
    with Celery("late", broker=broker.url, set_as_current=False) as late:
        register(late)

        one, two = signature.delay(), client.submit(request())
        three = chain(first, run_agent.si(request())).apply_async().parent

        ids = messages(broker.url, "agents")
        client_of(late).close()
    client.close()

    assert ids == sorted([one.id, two.id, three.id])
    assert messages(environment, "agents") == []


def test_runs_are_carried_in_this_process_where_the_registered_app_is_eager(app: Celery) -> None:
    """`task_always_eager` of the app counts, also for a client."""
    app.conf.task_always_eager = True

    by_task, by_signature = run_agent.delay(request()), run_agent.s(request()).delay()
    by_client = Client().submit(request())

    assert [h.state for h in (by_task, by_signature, by_client)] == ["SUCCESS"] * 3
    assert RunHandle(by_task.id).wait(0).final_output == "done"


def test_a_chain_that_was_made_before_an_eager_app_was_registered_is_carried_through(
    environment: str, broker: EmbeddedRedis
) -> None:
    """Its signatures belong to an app that is not eager, but each of their runs is executed."""
    second = request(run_id="second of the early chain".replace(" ", "-"))
    early = chain(run_agent.s(request()), run_agent.si(second))
    with Celery("late", broker=broker.url, set_as_current=False) as late:
        register(late)
        late.conf.task_always_eager = True

        early.apply_async()

        assert RunHandle(second["run_id"]).state == "SUCCESS"
        client_of(late).close()


def test_what_cancelling_wakes_goes_to_the_registered_app(app: Celery, broker: EmbeddedRedis) -> None:
    """A handle made by its id alone wakes the next run of the session where the app's workers listen."""
    first, second = run_agent.delay(request(session_id="one")), run_agent.delay(request(session_id="one"))
    messages(broker.url, "thoughts")

    RunHandle(first.id).cancel()

    assert second.id in messages(broker.url, "thoughts.wake")


def test_two_registered_apps_are_named(app: Celery, environment: str) -> None:
    """`openagents_worker.run_agent` cannot choose one of them; the result of each `register` still works."""
    with Celery("bakery", broker=f"{environment[:-1]}1", set_as_current=False) as other:
        bake = register(other)
        before = run_agent

        for submit in (
            lambda: run_agent.delay(request()),
            lambda: run_agent.s(request()),
            lambda: Client().submit(request()),
            lambda: Client().resume("r1"),
            lambda: list(Client().resume_all(dry_run=True)),
        ):
            with pytest.raises(ConfigError, match=r"'shop' .*'bakery' .*") as error:
                submit()
        handle = bake.delay(request())

        assert isinstance(run_agent, AgentTask)
        assert "tasks.run_agent" in repr(run_agent)
        assert not hasattr(run_agent, "__test__"), "whoever only looks at it is not stopped"
        assert "run_agent = register(app)" in str(error.value)
        assert "***" not in str(error.value)
        assert RunHandle(handle.id).record().state is RunState.QUEUED, "whoever only reads needs no broker"
        handle.cancel()
        client_of(other).close()

    assert before.app is app, "an app that is closed does not count"


def test_an_app_that_nobody_holds_does_not_count(environment: str) -> None:
    """A factory of apps, as test suites have one, does not fill the process with them."""

    def make() -> None:
        app = Celery("short", broker=environment, set_as_current=False)
        register(app)
        run_agent.delay(request()).cancel()
        client_of(app).close()

    gc.collect()
    for _ in range(3):
        make()
        assert run_agent.app.main in ("short", "openagents")


def test_registering_again_changes_nothing(app: Celery) -> None:
    """The same task and the same binding; the worker gets no second bootstep. Another queue is rejected."""
    task, parts = app.tasks["tasks.run_agent"], find_binding(app)

    again = register(app, queue="thoughts")
    with pytest.raises(ConfigError, match="the queue 'thoughts'; it cannot be registered with 'agents' too"):
        register(app)

    assert again is task
    assert find_binding(app) is parts
    assert parts is not None
    assert (parts.kind, parts.settings.queue) == (AppKind.REGISTERED, "thoughts")


def test_without_a_registered_app_it_is_the_producers_own(environment: str) -> None:
    """As before, it uses the settings of the environment."""
    gc.collect()
    handle = run_agent.delay(request())

    assert run_agent.app.main == "openagents"
    assert messages(environment, "agents") == [handle.id]


@pytest.mark.long
def test_a_django_web_process_submits_by_the_projects_app(
    tmp_path: Path, environment: str, broker: EmbeddedRedis
) -> None:
    """The README's import, in a view; the project's app is the current one and lives in another module."""
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").write_text("from shop.celery import app\n")
    (tmp_path / "shop" / "views.py").write_text(
        "from openagents_worker import run_agent\n"
        "REQUEST = {'agent_id': 'clerk', 'session_id': 's1', 'input_text': 'hi'}\n"
        "def view(): return run_agent.delay(REQUEST).id\n"
    )
    (tmp_path / "shop" / "celery.py").write_text(
        "import shop.views\n"
        "from celery import Celery\n"
        "from openagents_worker import register\n"
        f"app = Celery('shop', broker={broker.url!r})\n"
        "register(app)\n"
    )
    program = (
        "import celery, shop, shop.views; print(shop.views.view()); assert celery.current_app == shop.app"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=tmp_path,
        env={**os.environ, "DJANGO_SETTINGS_MODULE": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert messages(broker.url, "agents") == [done.stdout.strip()]
